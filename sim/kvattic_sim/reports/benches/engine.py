"""ModeSettings busy the engine keeps its lanes, how many cycles it takes, and how fast the simulators run it.

The engine runs alone here, behind ideal flash that has every codeword at hand at the lanes' full rate; what real flash
makes of it is measured in benches/flash.py.

Each function runs decode steps on the simulated engine, compares all results with the golden device's bit for bit and
checks that the counters add up; if either fails, it raises `WrongResultError` and gives no figure.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvattic import GQA, PAPER, AttendResult, Config, Device
from kvattic_sim.compare import equal_bits
from kvattic_sim.rtl.jobs import report, run_on_model
from kvattic_sim.rtl.testbench import Flash, build_testbench
from kvattic_sim.rtl.transport import FlashSettings, RtlTransport
from kvattic_sim.simulators.build import Simulator, icarus_available
from kvattic_sim.workloads import STALLS, Usage, attend, decode

__all__ = [
    "BENCHES",
    "CASES",
    "Bench",
    "Case",
    "Lab",
    "UnavailableError",
    "WrongResultError",
    "check",
]

IDEAL = FlashSettings(latency=64, jitter=16, shuffle=True)
"""Codewords come at full lane rate, out of order."""

Figures = dict[str, float]
Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many cycles of it are simulated, and how many it takes at least, if known."""


class WrongResultError(Exception):
    """The engine's results or counters are wrong, so that no figure of the run means anything."""


class UnavailableError(Exception):
    """A figure cannot be measured on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One decode step, a job for each KV head, all submitted at once.

    Attributes:
        config: what runs it.
        kv_heads: jobs.
        tokens: of each head; as many query rows as the configuration has attend to them.
    """

    config: Config
    kv_heads: int
    tokens: int

    @property
    def beats(self) -> int:
        """Lane beats that carry its K and V."""
        return 2 * self.kv_heads * self.tokens * self.config.beats_per_token


CASES = {
    "paper": Case(config=PAPER, kv_heads=40, tokens=2048),
    "gqa": Case(config=GQA, kv_heads=40, tokens=2048),
    "long": Case(config=PAPER, kv_heads=1, tokens=32768),
}
"""What engine.dense.utilization is measured on: OPT-13B's heads; the same with groups of 8; a long context."""

SCALING = Case(config=PAPER, kv_heads=16, tokens=2048)
"""Eight channels' side of engine.dense.scaling; the other side differs in the number of channels alone."""

SINGLE = Case(config=Config(channels=1, beat_bytes=8, rows=1, head_dim=64), kv_heads=1, tokens=512)
"""The geometry of the open FP32 engine that engine.single_channel.cycles is compared with."""

SPEED = Case(config=replace(PAPER, part=replace(PAPER.part, blocks=2, pages=16)), kv_heads=1, tokens=512)
"""Small enough for Icarus (flash too: it erases slowly), and a page of K and of V for every lane."""


def measure(device: Device, case: Case) -> tuple[AttendResult, Usage]:
    """Run a case; this is the part that runs inside of the simulator."""
    if isinstance(device.transport, RtlTransport):
        device.transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    attention = decode(case.config, kv_heads=case.kv_heads, tokens=case.tokens, group=case.config.rows)
    result, _, (usage,) = attend(device, attention, case.kv_heads, "jobs")
    return result, usage


def check(case: Case, result: AttendResult, usage: Usage) -> None:
    """Compare with the golden device, and the counters with each other and with the geometry.

    Raises:
        WrongResultError: they differ.
    """
    attention = decode(case.config, kv_heads=case.kv_heads, tokens=case.tokens, group=case.config.rows)
    equal = equal_bits(attention, result, case.config)
    if not equal.all():
        raise WrongResultError(f"{(~equal).sum()} of {case.kv_heads} KV heads differ from the golden device")
    if usage.beats != case.beats:
        raise WrongResultError(f"BEATS is {usage.beats:,}, but K and V are {case.beats:,} beats")
    slots, counted = case.config.lanes * usage.cycles, usage.beats + sum(usage.stalls.values())
    if counted != slots:
        raise WrongResultError(f"BEATS and the stalls add up to {counted:,}, not to lanes * CYCLES = {slots:,}")


@dataclass(kw_only=True)
class Lab:
    """Where benches run; a case that two of them need is run once.

    Attributes:
        simulator: for figures in cycles, which do not depend on it.
        progress: told how far a run is.
        say: told what is worth a line of its own.
    """

    simulator: Simulator = Simulator.VERILATOR
    progress: Progress = lambda what, done, total: None
    say: Callable[[str], None] = print
    _usage: dict[tuple[Case, Simulator], Usage] = field(default_factory=dict)

    def run(self, case: Case, simulator: Simulator | None = None) -> Usage:
        """Build, run and check a case.

        Args:
            case: what to run.
            simulator: where; the lab's by default.

        Raises:
            WrongResultError: a bit or a counter is wrong.
        """
        simulator = simulator or self.simulator
        if (case, simulator) not in self._usage:
            config = case.config
            label = f"{simulator}: {config.channels} channels, {case.kv_heads} x {case.tokens:,} tokens"
            self.progress(f"{label}: building", 0, None)
            model = build_testbench(config, simulator, Flash.IDEAL)

            def follow(line: str) -> None:
                kind, _, rest = line.partition("|")
                if kind == "cycles":
                    self.progress(label, int(rest), case.beats // config.channels)

            self.progress(label, 0, case.beats // config.channels)
            result, usage = run_on_model(model, config, measure, {"case": case}, flash=IDEAL, progress=follow).result
            self.progress(f"{label}: checking", 0, None)
            check(case, result, usage)
            self._usage[case, simulator] = usage
        return self._usage[case, simulator]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """One function that measures.

    Attributes:
        keys: of the figures that it returns.
        measure: the function.
        by_name: it takes so long that it is measured only when a prefix of its keys is asked for.
    """

    keys: tuple[str, ...]
    measure: Callable[[Lab], Figures]
    by_name: bool = False


def _utilization(name: str) -> Bench:
    """Lanes' use between the first and the last beat; beside it the stalls' shares of all cycles of all lanes."""
    case = CASES[name]
    key, stalls = f"engine.dense.utilization.{name}", {s: f"engine.dense.stalls.{name}.{s}" for s in STALLS}

    def utilization(lab: Lab) -> Figures:
        usage, lanes = lab.run(case), case.config.lanes
        shares = {stalls[s]: usage.stalls[s] / (lanes * usage.cycles) for s in STALLS}
        return {key: usage.lane_use(lanes)} | shares

    return Bench(keys=(key, *stalls.values()), measure=utilization)


def scaling(lab: Lab) -> Figures:
    """Cycles of one channel over eight times the cycles of eight."""
    config = SCALING.config
    one = replace(SCALING, config=replace(config, channels=config.lane_channels))
    return {"engine.dense.scaling": lab.run(one).cycles / (config.lanes * lab.run(SCALING).cycles)}


def single_channel(lab: Lab) -> Figures:
    """Cycles of one small job on one channel, from doorbell to completion."""
    return {"engine.single_channel.cycles": lab.run(SINGLE).cycles}


def speed_ratio(lab: Lab) -> Figures:
    """Verilator's cycles per second over Icarus's, and both: the same small job, one right after the other.

    Raises:
        UnavailableError: Icarus is not installed.
        WrongResultError: the simulators count different cycles or stalls.
    """
    if not icarus_available():
        raise UnavailableError("Icarus Verilog is not installed (apt-get install iverilog)")
    verilator, icarus = (lab.run(SPEED, simulator) for simulator in (Simulator.VERILATOR, Simulator.ICARUS))
    if (counted := [replace(usage, seconds=0) for usage in (verilator, icarus)])[0] != counted[1]:
        raise WrongResultError(f"Verilator and Icarus count differently: {counted[0]} and {counted[1]}")
    fast, slow = (usage.cycles / usage.seconds for usage in (verilator, icarus))
    return {"sim.speed_ratio": fast / slow, "sim.speed_ratio.verilator": fast, "sim.speed_ratio.icarus": slow}


def cycles_per_second(lab: Lab) -> Figures:
    """Cycles that Verilator simulates in a second: the whole batch of `CASES`["paper"], driver included."""
    usage = lab.run(CASES["paper"], Simulator.VERILATOR)
    return {"sim.cycles_per_second.paper": usage.cycles / usage.seconds}


BENCHES = (
    Bench(keys=("engine.single_channel.cycles",), measure=single_channel),
    _utilization("paper"),
    _utilization("gqa"),
    _utilization("long"),
    Bench(keys=("engine.dense.scaling",), measure=scaling),
    Bench(keys=("sim.cycles_per_second.paper",), measure=cycles_per_second),
    Bench(keys=("sim.speed_ratio", "sim.speed_ratio.verilator", "sim.speed_ratio.icarus"), measure=speed_ratio),
)
"""What the bench runner calls, short ones first."""
