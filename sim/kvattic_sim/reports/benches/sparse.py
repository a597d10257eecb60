"""What sparse attention gains on the drive: cycles of dense attention over cycles of each mode, behind NAND timing.

OPT-13B's 40 heads of 4,096 tokens on the `paper` preset, the same sequence attended densely and sparsely in the same
simulation; every result is compared with the golden device, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from kvattic import GQA, PAPER, AttendResult, Config, Device
from kvattic_sim import oracle
from kvattic_sim.compare import equal_bits
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, WrongResultError
from kvattic_sim.rtl.jobs import report, run_in_simulation
from kvattic_sim.rtl.transport import RtlTransport
from kvattic_sim.workloads import DENSE, Attention, ModeSettings, Usage, clustered, decode, measured

__all__ = ["BENCHES"]

HEADS, TOKENS = 40, 4096
RUN = 8
"""Tokens of a run in the clustered load."""
PAGE = 64
"""Tokens of a unit of the centroid load: whole pages."""
DRAM_BYTES = 1 << 27
SEPARATE_BUS = replace(PAPER, part=replace(PAPER.part, name="pslc, separate command bus", separate_command_bus=True))
"""The paper's drive with JESD230G's separate command and address bus, nothing else changed."""
SPARF = ModeSettings(mode="sparf", features=PAPER.head_dim // 8, top_units=TOKENS // 16)
FETCHED = ModeSettings(mode="fetched", features=PAPER.head_dim // 8, top_units=TOKENS // 32)
CODES = ModeSettings(mode="codes", top_units=TOKENS // 32)
"""As far off dense attention as SPARF with twice as many tokens, or less (docs/quality.md)."""
CENTROID = ModeSettings(mode="centroid", unit_tokens=PAGE, top_units=TOKENS // 8 // PAGE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A sequence and the ways in which it is attended.

    Attributes:
        config: the drive's.
        heads: KV heads.
        run: tokens of a run of like keys; 1: selections are scattered at random.
        ways: by name; `dense` comes on top.
    """

    config: Config
    heads: int = HEADS
    run: int
    ways: Mapping[str, ModeSettings]

    @property
    def attention(self) -> Attention:
        """The inputs."""
        shape = {"kv_heads": self.heads, "tokens": TOKENS, "group": self.config.rows}
        return decode(self.config, **shape) if self.run == 1 else clustered(self.config, run=self.run, **shape)


def on_drive(device: Device, load: Load) -> dict[str, tuple[AttendResult, Usage]]:
    """Write once, attend in each way; this is the part that runs inside of the simulator."""
    transport = device.transport
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    config, attention = load.config, load.attention
    ways = {"dense": DENSE, **load.ways}
    wanted: dict[str, object] = {}
    for how in ways.values():
        wanted |= how.sequence_arguments(config)
    sequence = device.create_sequence(load.heads, capacity_tokens=TOKENS, **wanted)  # type: ignore[arg-type]
    sequence.prefill(attention.key, attention.value)
    found = {}
    for name, how in ways.items():
        plan = sequence.plan(attention.query, **how.attend_arguments(config, TOKENS))
        (result,), usage = measured(device, lambda plan=plan: device.attend_many([plan]))  # type: ignore[misc]
        found[name] = (result, usage)
    return found


def _measure(lab: Lab, load: Load, name: str) -> dict[str, Usage]:
    """Run a load, check it; the usage of each way."""
    def follow(line: str) -> None:
        kind, _, rest = line.partition("|")
        if kind == "cycles":
            lab.progress(f"drive, {name}", int(rest), None)

    config = load.config
    lab.progress(f"drive, {name}: building", 0, None)
    pages = 4 * load.heads * TOKENS * config.token_bytes // config.page_bytes
    found: dict[str, tuple[AttendResult, Usage]] = run_in_simulation(
        config, on_drive, {"load": load}, simulator=lab.simulator,
        frames=pages // config.channels + config.zone_pages // 8, dram_bytes=DRAM_BYTES, progress=follow).result
    for way, how in {"dense": DENSE, **load.ways}.items():
        lab.progress(f"drive, {name}: checking {way}", 0, None)
        equal = equal_bits(load.attention, found[way][0], config, how)
        if not equal.all():
            raise WrongResultError(
                f"{name}, {way}: {(~equal).sum()} of {load.heads} KV heads differ from the golden device")
    return {way: usage for way, (_, usage) in found.items()}


FIGURES = ("speedup", "bus_utilization", "bytes_ratio", "cycles")


def _figures(dense: Usage, sparse: Usage, config: Config) -> tuple[float, ...]:
    """`FIGURES` of one way."""
    return (dense.cycles / sparse.cycles, sparse.bus_use_in_window(config),
            sparse.flash["flash_words"] / dense.flash["flash_words"], float(sparse.cycles))


def _bench(load: Load, name: str, keys: Mapping[str, str], also: Mapping[str, str] = MappingProxyType({})) -> Bench:
    """The figures of a load's ways.

    Args:
        load: what to run.
        name: of it, for people.
        keys: way to its keys, with {} for the figure.
        also: further names of figures.
    """
    def run(lab: Lab) -> Figures:
        usage = _measure(lab, load, name)
        found = {key.format(figure): value for way, key in keys.items()
                 for figure, value in zip(FIGURES, _figures(usage["dense"], usage[way], load.config), strict=True)}
        return found | {name: found[other] for name, other in also.items()}

    return Bench(keys=(*(key.format(figure) for key in keys.values() for figure in FIGURES), *also), measure=run)


def sparq_equal(lab: Lab) -> Figures:
    """Largest difference between the oracle's SparF and an independent SparQ, relative to the largest output."""
    rng, worst = np.random.default_rng(0), 0.0
    for rows in (1, 4):
        for tokens, r, k, local in ((256, 16, 16, 0), (512, 32, 64, 16), (1024, 16, 64, 0)):
            q, key, value = (rng.standard_normal(shape) for shape in ((rows, 128), (tokens, 128), (tokens, 128)))
            mean = value.mean(axis=0)
            ours = oracle.sparf(q, key, value, 128**-0.5, features=r, top_units=k, local_tokens=local, mean=mean).output
            theirs = oracle.sparq(q, key, value, mean, r=r, k=k, local_tokens=local)
            worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return {"sparse.sparq_equal": worst}


BENCHES = (
    Bench(keys=("sparse.sparq_equal",), measure=sparq_equal),
    _bench(Load(config=PAPER, run=1, ways={"codes": CODES}), "random selection by codes",
           {"codes": "sparse.sketch.{}.random"}),
    _bench(Load(config=PAPER, run=RUN, ways={"codes": CODES}), "clustered selection by codes",
           {"codes": "sparse.sketch.{}.clustered"}),
    _bench(Load(config=GQA, heads=16, run=1, ways={"codes": CODES}), "eight rows, by codes",
           {"codes": "sparse.gqa.{}"}),
    _bench(Load(config=PAPER, run=1, ways={"sparf": SPARF, "fetched": FETCHED}), "random selection",
           {"sparf": "sparse.{}.random", "fetched": "sparse.fetched.{}.random"},
           also={"sparse.bus_utilization": "sparse.bus_utilization.random"}),
    _bench(Load(config=PAPER, run=RUN, ways={"sparf": SPARF, "fetched": FETCHED}), "clustered selection",
           {"sparf": "sparse.{}.clustered", "fetched": "sparse.fetched.{}.clustered"}),
    _bench(Load(config=PAPER, run=PAGE, ways={"centroid": CENTROID}), "centroids", {"centroid": "sparse.centroid.{}"}),
    _bench(Load(config=SEPARATE_BUS, run=1, ways={"sparf": SPARF}), "random selection, separate command bus",
           {"sparf": "sparse.{}.random.separate_command_bus"}),
    _bench(Load(config=SEPARATE_BUS, run=RUN, ways={"sparf": SPARF}), "clustered selection, separate command bus",
           {"sparf": "sparse.{}.clustered.separate_command_bus"}),
)
"""What the bench runner calls, short ones first."""
