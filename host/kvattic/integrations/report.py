"""What generating text with K and V in the drive has cost: `Report`, which prints as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvattic.array import ArrayPlan
from kvattic.driver.accounts import DenseTally, Tally
from kvattic.driver.results import AttendPlan, AttendResult
from kvattic.spec.config import Config
from kvattic.timing.cost import Cost
from kvattic.timing.energy import Range

__all__ = ["Meter", "Report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a `DriveCache` has cost so far.

    It is the drive's part alone: neither the model's own work nor the host's.

    Attributes:
        mode: what decode steps attend.
        rows: of the batch.
        layers: of the model.
        prompt_tokens: of all rows.
        steps: decode steps.
        tokens: that these brought, of all rows.
        prefill: writing the prompt.
        append: writing the tokens of the decode steps.
        attend: their attention; the rows of a batch at the same time, layer after layer.
        dense: what `attend` would have cost in dense mode over the same tokens, modelled; None: it is dense.
    """

    mode: str
    rows: int
    layers: int
    prompt_tokens: int
    steps: int
    tokens: int
    prefill: Cost
    append: Cost
    attend: Cost
    dense: Cost | None

    @property
    def milliseconds_per_token(self) -> float | None:
        """Of the drive, attention and writing, for a token of all rows; None if the time or tokens are not known."""
        seconds = (self.attend + self.append).seconds
        return None if seconds is None or not self.tokens else 1e3 * seconds / self.tokens

    @property
    def joules_per_token(self) -> Range | None:
        """Likewise; None if they are not known."""
        joules = (self.attend + self.append).joules
        return None if joules is None or not self.tokens else joules * (1 / self.tokens)

    def __str__(self) -> str:
        columns: list[tuple[str, Cost, int]] = [("prefill", self.prefill, 1)]
        if self.tokens:
            columns += [("attend/token", self.attend, self.tokens), ("write/token", self.append, self.tokens)]
            if self.dense is not None:
                columns.append(("attend dense/token", self.dense, self.tokens))
        lines = [["", *(name for name, _, _ in columns)]]
        for name, cell in _ROWS:
            lines.append([name, *(cell(cost, share) for _, cost, share in columns)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        plural = "" if self.rows == 1 else "s"
        head = (f"{self.mode}, {self.rows} row{plural}, {self.layers} layers: {self.prompt_tokens:,} tokens of prompt, "
                f"then {self.tokens:,} in {self.steps:,} steps; the drive alone")
        body = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                        zip(line[1:], widths[1:], strict=True))]) for line in lines]
        return "\n".join([head, *body])


class Meter:
    """Sums what the decode steps of a `DriveCache` cost.

    Args:
        config: of the drives.
        dense: they attend densely, so that there is nothing to compare them with.

    Attributes:
        prompt_tokens: of all rows.
        steps: decode steps.
        tokens: that they brought, of all rows.
    """

    def __init__(self, config: Config, *, dense: bool) -> None:
        self.prompt_tokens = self.steps = self.tokens = 0
        self._attend = Tally(config)
        self._dense = None if dense else DenseTally(config)

    def count(self, plans: Sequence[AttendPlan | ArrayPlan], results: Sequence[AttendResult], tokens: int, *,
              new_step: bool) -> None:
        """Add what a layer attends in a decode step.

        Args:
            plans: of all rows, which ran together.
            results: theirs.
            tokens: that the step brings, of all rows.
            new_step: it is the step's first layer.
        """
        if new_step:
            self.steps += 1
            self.tokens += tokens
        self._attend.add_attend([account for result in results for account in result.accounts])
        if self._dense is not None:
            self._dense.add([job if isinstance(job, tuple) else (0, job) for plan in plans for job in plan.jobs])

    def report(self, parts: Sequence[Mapping[str, Cost]], *, rows: int, mode: str, layers: int) -> Report:
        """The sums so far.

        Args:
            parts: statistics of the sequences, also of those that are freed, by `accounts.PARTS`.
            rows: of the batch.
            mode: what the steps attend.
            layers: of the model.
        """
        prefill, append = (sum((row[part] for row in parts[1:]), parts[0][part]) for part in ("prefill", "append"))
        return Report(mode=mode, rows=rows, layers=layers, prompt_tokens=self.prompt_tokens, steps=self.steps,
                      tokens=self.tokens, prefill=prefill, append=append, attend=self._attend.total(),
                      dense=None if self._dense is None else self._dense.total())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _amount(of: Callable[[Cost], float | None]) -> Callable[[Cost, int], str]:
    """A cell with an amount."""
    def cell(cost: Cost, share: int) -> str:
        value = of(cost)
        return "?" if value is None else _number(value / share)

    return cell


def _energy(which: Callable[[Range], float]) -> Callable[[Cost, int], str]:
    """A cell with millijoules."""
    return _amount(lambda cost: None if cost.joules is None else 1e3 * which(cost.joules))


_ROWS: tuple[tuple[str, Callable[[Cost, int], str]], ...] = (
    ("milliseconds", _amount(lambda cost: None if cost.seconds is None else 1e3 * cost.seconds)),
    ("these are", lambda cost, _: "modelled" if cost.modelled else "measured"),
    ("millijoules, modelled", _energy(lambda joules: joules.typical)),
    ("  at least", _energy(lambda joules: joules.low)),
    ("  at most", _energy(lambda joules: joules.high)),
    ("KB from flash", _amount(lambda cost: sum(cost.flash_bytes.values()) / 1e3)),
    ("KB from DRAM", _amount(lambda cost: sum(cost.dram_bytes.values()) / 1e3)),
    ("KB over the link", _amount(lambda cost: cost.link_bytes / 1e3)),
    ("page reads", _amount(lambda cost: cost.page_reads)),
    ("page programs", _amount(lambda cost: cost.page_programs)),
)
