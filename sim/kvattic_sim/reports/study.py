"""The points of a study: a grid of configurations and workloads, and rows of what was found at each."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from kvattic import Config, Mode, RequestError
from kvattic.spec.nand import NandPart, part
from kvattic_sim.simulators.build import Simulator
from kvattic_sim.workloads import ModeSettings

__all__ = ["AXES", "CHECKED", "DATA", "FIGURES", "Figures", "Point", "Row", "grid", "parse_axis", "sample"]

FIGURES = {
    "write_cycles": "cycles of writing K and V",
    "cycles": "cycles of one attention of all heads",
    "milliseconds": "the same at the configuration's clock",
    "p50_us": "median time of a command, from its fetch to its completion, in microseconds",
    "p99_us": "the same, 99th percentile",
    "p999_us": "the same, 99.9th percentile",
    "bus_use": "share of the flash buses' time in which data moved, during attention",
    "lane_use": "share of the lanes' beats that carried data, from the first beat to the last",
    "die_use": "share of the dies' time in which their arrays were busy",
    "starved": "share of lane cycles without a beat although codewords were requested",
    "barrier": "share of lane cycles in which V waited for the maximum",
    "idle": "share of lane cycles without work",
    "flash_bytes": "bytes on the flash buses during attention, parity included",
    "kv_bytes": "bytes of K and V",
    "page_reads": "pages read from the arrays",
    "corrected": "codewords read with errors, all of them corrected",
    "bit_errors": "bits corrected",
    "retries": "codewords read again with a read-retry setting",
    "rel_rms": "relative RMS against float64 attention of all tokens",
    "equal_bits": "whether the results are the golden device's, bit for bit",
    "seconds": "time that simulating attention took",
}
"""What is found at a point; the timing model finds some of them."""
CHECKED = ("cycles", "p50_us", "p99_us", "p999_us")
"""What a modelled row says of the RTL too, where it ran."""

Figures: TypeAlias = dict[str, float | bool]

DATA = ("topical", "random", "clustered", "minilm")
"""`kvattic_sim.workloads.topical`; normal noise; keys in runs of 8 alike; MiniLM's attention on real text."""
AXES: dict[str, str] = {
    "features": "features of the first pass, r; modes sparf and fetched",
    "top_units": "tokens, or units, that are selected, k; sparse modes",
    "layers": "layers, which attend one after the other",
    "batch": "sequences, which attend side by side",
    "drives": "drives that the heads are dealt over",
    "data": f"what K, V and queries are: {', '.join(DATA)}",
    "seed": "of the data",
}
"""Axes of a study besides configurations, workloads and modes."""
_USED_BY = {"features": ("sparf", "fetched"), "top_units": ("sparf", "fetched", "centroid", "codes")}
"""Modes in which an axis makes a difference; the others have one point for all its values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One place of the grid.

    Attributes:
        base: the configuration but for the settings.
        settings: fields of it that the point sets, by name: of `Config`, or part.FIELD of its part.
        heads: KV heads of a layer; as many query rows as the configuration has attend to each.
        tokens: of each head; of the longest, if there is a mix.
        mode: which tokens are attended, a name of `kvattic.Mode` in small letters.
        mix: tokens of the sequences of a batch, in turn; empty: all have `tokens`.  The batch must have them all.
        features: see `AXES`; None: an eighth of head_dim.
        top_units: see `AXES`; None: as many as hold a sixteenth of the tokens (an eighth for centroids).
        layers, batch: see `AXES`.
        drives: see `AXES`; figures but `kv_bytes` are those of one that has the most heads.
        data: one of `DATA`.
        seed: of the data.
        repeat: seeds that are run, from `seed` on; figures are means.
        shown: names of `AXES` that tell this point from others.
        modelled: by the timing model instead of the RTL.
        simulator: what runs it.
        bit_error_rate: raw bit errors of each read, over bits read; the timing model has none.
        check: compare the results with the golden device and with float64.
    """

    base: Config
    settings: dict[str, Any]
    heads: int
    tokens: int
    mode: str = "dense"
    mix: tuple[int, ...] = ()
    features: int | None = None
    top_units: int | None = None
    layers: int = 1
    batch: int = 1
    drives: int = 1
    data: str = "topical"
    seed: int = 0
    repeat: int = 1
    shown: tuple[str, ...] = ()
    modelled: bool = False
    simulator: Simulator = Simulator.VERILATOR
    bit_error_rate: float = 1e-5
    check: bool = True

    @property
    def config(self) -> Config:
        """Its configuration.

        Raises:
            ConfigError: the settings do not fit together.
        """
        ours = {name: value for name, value in self.settings.items() if "." not in name}
        theirs = {name.removeprefix("part."): value for name, value in self.settings.items() if "." in name}
        if isinstance(ours.get("part"), str):
            ours["part"] = part(ours["part"])
        if theirs:
            ours["part"] = replace(ours.get("part", self.base.part), **theirs)
        return replace(self.base, **ours)

    @property
    def options(self) -> ModeSettings:
        """Which tokens are attended."""
        return ModeSettings(mode=self.mode, features=self.features, top_units=self.top_units)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of the batch."""
        mix = self.mix or (self.tokens,)
        return [mix[number % len(mix)] for number in range(self.batch)]

    @property
    def axes(self) -> dict[str, Any]:
        """What tells it from the other points: settings, heads, tokens, mode, and those of `AXES` that are studied."""
        tokens = "+".join(map(str, self.mix)) if self.mix else self.tokens
        return {**self.settings, "heads": self.heads, "tokens": tokens, "mode": self.mode,
                **{name: getattr(self, name) for name in self.shown}}

    @property
    def how(self) -> str:
        """Where its figures come from."""
        return "modelled" if self.modelled else "measured"

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.axes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A point and its result.

    Attributes:
        number: of the point in its grid.
        point: the point.
        figures: see `FIGURES`; empty if there was an error. With repeats also ``NAME_ci``, half the width of the 95 %
            confidence interval of a mean.
        error: the error's message; empty if there was none.
        measured: of a modelled point that ran on the RTL, too: its figures there.
    """

    number: int
    point: Point
    figures: Figures = field(default_factory=dict)
    error: str = ""
    measured: Figures = field(default_factory=dict)

    @property
    def deviation(self) -> float | None:
        """Of the model's cycles, as a share of the RTL's; None where the RTL did not run."""
        return float(self.figures["cycles"] / self.measured["cycles"] - 1) if self.measured else None

    def flat(self) -> dict[str, Any]:
        """Axes, whether modelled or measured, figures and error side by side; a figure that is not known is None."""
        known = {name: self.figures.get(name) for name in FIGURES}
        more: dict[str, Any] = {name: value for name, value in self.figures.items() if name not in known}
        if self.point.modelled:
            more |= {f"measured_{name}": self.measured.get(name) for name in CHECKED} | {"deviation": self.deviation}
        return {**self.point.axes, "how": self.point.how, **known, **more, "error": self.error}


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`channels=1,2,4` as a name and its values.

    Args:
        text: a field of `Config` (of `part` by the part's name) or part.FIELD, and values of its type.

    Raises:
        RequestError: the field does not exist, or a value is not of its type.
    """
    name, separator, values = text.partition("=")
    owner, key = (NandPart, name.removeprefix("part.")) if name.startswith("part.") else (Config, name)
    types = {one.name: one.type for one in fields(owner)}
    if not separator or not values or key not in types:
        raise RequestError(f"a setting must be FIELD=VALUE,VALUE,... with FIELD one of "
                           f"{', '.join(one.name for one in fields(Config))}, or part.FIELD, not {text!r}")
    return name, [_value(name, types[key], value.strip()) for value in values.split(",")]


def _value(name: str, kind: Any, text: str) -> Any:
    booleans = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if kind is bool:
        if text.lower() not in booleans:
            raise RequestError(f"{name} must be one of {', '.join(booleans)}, not {text!r}")
        return booleans[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise RequestError(f"{name} must be {'an int' if kind is int else 'a number'}, not {text!r}") from None
    return text


def _check_study(study: Mapping[str, Sequence[Any]]) -> None:
    """Refuse an axis or a value that does not exist."""
    for name, values in study.items():
        if name not in AXES:
            raise RequestError(f"an axis must be one of {', '.join(AXES)}, not {name!r}")
        for value in values:
            if name == "data":
                if value not in DATA:
                    raise RequestError(f"data must be one of {', '.join(DATA)}, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "seed" else 1):
                least = "an int from 0 on" if name == "seed" else "a positive int"
                raise RequestError(f"{name} must be {least}, not {value!r}")


def grid(base: Config, axes: Mapping[str, Sequence[Any]], workloads: Sequence[tuple[int, int | Sequence[int]]],
         modes: Sequence[str] = ("dense",), *, study: Mapping[str, Sequence[Any]] | None = None,
         **common: Any) -> list[Point]:
    """All combinations, the last axis fastest.

    Args:
        base: the configuration but for the axes.
        axes: values of each setting (`parse_axis`).
        workloads: (heads, tokens), or (heads, tokens of each sequence of a batch in turn).
        modes: see `Point`.
        study: values of `AXES`. A mode that does not use an axis has one point for all its values, with None.
        common: further attributes of every point.

    Raises:
        RequestError: the mode, axis or data do not exist, or a number is not positive.
    """
    study = study or {}
    _check_study(study)
    known = [mode.name.lower() for mode in Mode]
    for mode in modes:
        if mode not in known:
            raise RequestError(f"mode must be one of {', '.join(known)}, not {mode!r}")
    mixes = [(heads, (tokens,) if isinstance(tokens, int) else tuple(tokens)) for heads, tokens in workloads]
    for heads, mix in mixes:
        if heads < 1 or not mix or min(mix) < 1:
            raise RequestError(f"a workload must have at least one head and one token, not {heads},"
                               f"{'+'.join(map(str, mix))}")
    longest = max((len(mix) for _, mix in mixes), default=1)
    for batch in study.get("batch", [longest]):
        if batch < longest:
            raise RequestError(f"batch must be at least {longest}, of which a workload has the lengths, not {batch}")
    if common.get("repeat", 1) < 1:
        raise RequestError(f"repeat must be positive, not {common['repeat']}")
    combinations = itertools.product(itertools.product(*axes.values()), mixes, modes, _combinations(study))
    points = []
    for values, (heads, mix), mode, chosen in combinations:
        unused = [name for name, used in _USED_BY.items() if name in chosen and mode not in used]
        if any(chosen[name] != study[name][0] for name in unused):
            continue
        points.append(Point(
            base=base, settings=dict(zip(axes, values, strict=True)), heads=heads, tokens=max(mix),
            mix=mix if len(mix) > 1 else (), mode=mode, shown=tuple(chosen),
            **{"batch": len(mix), **common, **chosen, **dict.fromkeys(unused)}))
    return points


def _combinations(study: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(study, values, strict=True)) for values in itertools.product(*study.values())]


def sample(points: int, count: int) -> list[int]:
    """Numbers of so many of some points, drawn at random but always the same; all if there are not so many.

    Points at even distances would all have the same value of the fastest axis.

    Raises:
        RequestError: the count is not positive.
    """
    if count < 1:
        raise RequestError(f"points to check must be at least 1, not {count}")
    return sorted(random.Random(0).sample(range(points), min(count, points)))
