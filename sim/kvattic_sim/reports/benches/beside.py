"""What programs and erases under way cost attention, modelled; and what suspending them would give back.

A part of a decode step of one layer of OPT-13B attends alone, beside the programs of a sequence whose stripes are full
(those of all heads are, in the same step), beside a prefill that never ends, and beside the erase of a zone. What
appends cost decoding is the first one's price, times how often it is paid.

The controller has no suspend: what it would give back is a bound. The same operations come at the same times, but keep
their dies busy only until they have given way. Beside a prefill that never ends, attends take longer the more is
written meanwhile; there the figure to compare is that of both in turn over both side by side. (That bound holds where
programs are limited by the bus, as with this part, and not by their own time in the arrays.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvattic import PAPER
from kvattic.errors import RequestError
from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.timing import Estimate, Job, Layer, Operation, estimate, in_turn
from kvattic_sim.reports.benches.decode_step import HEADS, step_jobs, step_layer
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.reports.in_flight import latencies, quantiles

__all__ = ["BENCHES", "IDEAL", "LIKE_MQSIM", "LOADS", "WAYS", "Found", "Suspend", "Way", "attention", "in_turn_ratio",
           "measure", "operations"]

TOKENS, BATCH = 2048, 4
"""The paper's prompt; 160 commands of its 2,560."""
LOADS = ("stripes", "prefill", "erase")
PREFILL_HEADS = 240
"""So many heads of TOKENS are written beside the step: more than end while it goes on."""
WRITE_ZONE = 16
"""The first zone that is written; the step reads lower ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspend:
    """How fast operations give way, in nanoseconds.

    Attributes:
        program, erase: from the wish to read until the array is free, at most the operation itself.
    """

    program: float
    erase: float

    def part_of(self, config: Config) -> Config:
        """The configuration whose operations keep a die busy for so long only."""
        part = config.part
        return replace(config, part=replace(part, t_prog=min(part.t_prog, self.program),
                                            t_bers=min(part.t_bers, self.erase)))


IDEAL = Suspend(program=1.0, erase=1.0)
"""A die gives way at once: no suspend can give back more."""
LIKE_MQSIM = Suspend(program=100_000.0, erase=700_000.0)
"""MQSim's default set (Suspend_Program_Time 100 us, Suspend_Erase_Time 700 us).  A Samsung OneNAND's datasheet promises
an erase suspend within 500 us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How the step is attended.

    Attributes:
        suffix: of the keys.
        mode: of the commands.
        seeds: of what is selected; figures are means over them, for a single one is a draw.
    """

    suffix: str
    mode: Mode
    seeds: tuple[int, ...] = (0,)

    def layer(self, config: Config, heads: int) -> Layer:
        """Where its K and V, and for sparse modes its features, lie."""
        return step_layer(config, heads, TOKENS, self.mode)

    def jobs(self, config: Config, seed: int = 0) -> list[Job]:
        """The commands of the part of the step."""
        return step_jobs(config, BATCH * HEADS, TOKENS, self.mode, seed=seed)


WAYS = (Way(suffix="", mode=Mode.DENSE), Way(suffix=".sparf", mode=Mode.SPARF, seeds=(0, 1, 2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What attention takes beside some load; modelled.

    Attributes:
        cycles: until the last job's completion.
        p99_us: of the jobs' latencies, from the fetch.
    """

    cycles: int
    p99_us: float


def attention(found: Estimate) -> Found:
    """What the jobs of an estimate took, whatever its operations did."""
    return Found(cycles=max(job.completed for job in found.jobs), p99_us=quantiles(latencies(found))["p99"])


def operations(load: str, way: Way, config: Config) -> list[Operation]:
    """The PROGRAM or ERASE commands of a load.

    Args:
        load: one of `LOADS`.
        way: how the step is attended, which says what is written.
        config: of the drive.

    Raises:
        RequestError: there is no such load.
    """
    base = WRITE_ZONE << config.zone_page_bits
    if load == "erase":
        blocks = [base | place for place in range(config.dies * config.part.planes)]
        return in_turn(config, [blocks] * config.channels, program=False)
    layer = way.layer(config, PREFILL_HEADS)
    writes = [replace(operation, page=base + operation.page) for operation in layer.prefill()]
    if load == "prefill":
        return writes
    if load not in LOADS:
        raise RequestError(f"load must be one of {', '.join(LOADS)}, not {load!r}")
    return writes[:HEADS * (3 if layer.features else 2) * layer.pages]      # K and V; for the sparse modes K again


def in_turn_ratio(config: Config, writes: Sequence[Operation], found: Estimate, alone: int) -> float:
    """Time of the attends, and then of the programs that ended beside them, over the time of both side by side.

    Args:
        config: of the drive, as it is.
        writes: the programs.
        found: both side by side.
        alone: cycles of the attends alone.
    """
    together = attention(found).cycles
    done = [write for write, ended in zip(writes, found.operations, strict=True) if ended <= together]
    return (alone + estimate(config, operations=done).cycles) / together


def measure(way: Way, config: Config = PAPER, say: Lab | None = None) -> Figures:
    """Slow-downs and latencies of one way to attend, means over its seeds; modelled.

    Args:
        way: how the step is attended.
        config: of the drive.
        say: for progress.
    """
    each = [_measure(way, config, seed, say) for seed in way.seeds]
    return {key: sum(figures[key] for figures in each) / len(each) for key in each[0]}


def _measure(way: Way, config: Config, seed: int, say: Lab | None) -> Figures:
    jobs = way.jobs(config, seed)
    alone = attention(estimate(config, jobs))
    figures: Figures = {f"beside.p99_us.alone{way.suffix}": alone.p99_us}
    for load in LOADS:
        if say is not None:
            say.progress(f"attention beside {load}, {way.mode.name.lower()}: timing model", 0, None)
        writes = operations(load, way, config)
        for name, where in (("", config), ("suspend.", LIKE_MQSIM.part_of(config)),
                            ("suspend.ideal.", IDEAL.part_of(config))):
            found = estimate(where, jobs, writes)
            if load == "prefill":
                ratio = in_turn_ratio(config, writes, found, alone.cycles)
                figures[f"beside.{name}in_turn.prefill{way.suffix}"] = ratio
            if load != "prefill" or not name:
                here = attention(found)
                figures[f"beside.{name}slowdown.{load}{way.suffix}"] = here.cycles / alone.cycles
                figures[f"beside.{name}p99_us.{load}{way.suffix}"] = here.p99_us
            if load == "stripes":       # of each sequence of the batch once in as many steps as a stripe has tokens
                share = (here.cycles / alone.cycles - 1) * BATCH / way.layer(config, 1).size
                figures[f"beside.{name}slowdown.append{way.suffix}"] = 1 + share
    return figures


def _keys(way: Way) -> tuple[str, ...]:
    names = ["p99_us.alone"]
    for load in LOADS:
        for how in ("", "suspend.", "suspend.ideal."):
            names += [f"{how}in_turn.prefill"] if load == "prefill" else []
            names += [f"{how}slowdown.append"] if load == "stripes" else []
            names += [f"{how}{kind}.{load}" for kind in ("slowdown", "p99_us")] if load != "prefill" or not how else []
    return tuple(f"beside.{name}{way.suffix}" for name in names)


def _bench(way: Way) -> Bench:
    return Bench(keys=_keys(way), measure=lambda lab: measure(way, say=lab))


BENCHES = tuple(_bench(way) for way in WAYS)
"""What the bench runner calls."""
