"""What a workload is asked for, and what it says: `Request`, `Run`, `Outcome`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["BOUND", "COLUMNS", "How", "Outcome", "Request", "Run"]

BOUND = 1e-5
"""Error against the reference that no workload may exceed."""
COLUMNS = ("what", "time is", "cycles", "KB", "milliseconds")
"""Heads of the table of an outcome's runs."""


class How(StrEnum):
    """Where the time of a run comes from."""

    MEASURED = "measured on the RTL"
    MODELLED = "modelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a workload is asked for.

    Attributes:
        target: where the slice runs: `model` or `sim:verilator`.
        drives: that the KV heads are dealt over.
        output: file that what was computed is written to; None: none.
        kv: the format of K and V in the drive; None: the workload's own.
        progress: told what is being done.
    """

    target: str = "model"
    drives: int = 1
    output: Path | None = None
    kv: str | None = None
    progress: Callable[[str], None] = field(default=lambda line: None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What something took.

    Attributes:
        what: it was, for people.
        how: where cycles and seconds come from.
        cycles: of the drive, of several drives the slowest one's.
        bytes: data bytes that were read, of flash and device DRAM together; of several drives all.
        seconds: of what is said.
        limit: what it waits for.
    """

    what: str
    how: How
    cycles: int
    bytes: int
    seconds: float
    limit: str

    def __str__(self) -> str:
        return f"{self.what}: {self.limit}"

    def cells(self) -> list[str]:
        """A row of the table (`COLUMNS`)."""
        return [self.what, str(self.how), f"{self.cycles:,}", f"{self.bytes / 1e3:,.0f}", f"{1e3 * self.seconds:.4g}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a workload.

    Attributes:
        name: of the workload.
        target: where the slice ran.
        drives: that took part.
        geometry: sizes of the whole.
        source: where these are from.
        slice: what was computed bit by bit.
        reference: what the error is against.
        error: of the slice, at most `BOUND`.
        bit_exact: whether a target that is not one golden device gave its bits; None: there is nothing to compare.
        runs: what the slice and the whole take.
        figures: what else was found, by name, which says whether it is modelled or counted.
        notes: what a reader must know to judge it.
    """

    name: str
    target: str
    drives: int = 1
    geometry: Mapping[str, Any]
    source: str
    slice: str
    reference: str
    error: float
    bit_exact: bool | None
    runs: tuple[Run, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether the error is within the bound and all bits are right; a NaN is not."""
        return self.error <= BOUND and self.bit_exact is not False

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "geometry": dict(self.geometry), "figures": dict(self.figures), "bound": BOUND,
                "good": self.good}

    def facts(self) -> dict[str, Any]:
        """What stands above the table of the runs."""
        exact = {None: "not compared: the target is the golden device", True: "yes", False: "NO"}[self.bit_exact]
        return {**self.geometry, "source": self.source, "slice": self.slice, "reference": self.reference,
                "error": f"{self.error:.1e} (at most {BOUND:.0e})", "equal to the golden device, bit for bit": exact,
                **{name.replace("_", " "): value for name, value in self.figures.items()}}
