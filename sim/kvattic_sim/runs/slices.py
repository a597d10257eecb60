"""What workloads have in common: slices that are computed bit by bit, and what attention took, measured or modelled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvattic import AttendResult, Config, Device
from kvattic import Sequence as KvSequence
from kvattic.array import open_array
from kvattic.timing import Estimate
from kvattic.timing.cost import Cost
from kvattic_sim.compare import equal_bits, oracle_errors
from kvattic_sim.runs.outcome import How, Run
from kvattic_sim.workloads import Attention, Meter, Usage

__all__ = ["Attending", "Slice", "bus_share", "limit_of", "modelled_run", "options_of", "run_of", "run_slice",
           "stall_shares"]

BUSY = 0.8
"""Share of the time from which on something that is busy counts as the limit."""
WAITS = {"starved": "data from flash", "barrier": "the other lanes' maxima", "weights": "weights of the softmax",
         "scores": "room for scores", "idle": "commands"}
"""What a lane without a beat waits for, by the counter of the stall."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """What came of a slice.

    Attributes:
        error: relative RMS against float64 attention of the worst KV head.
        bit_exact: whether it has the bits of one golden device; None: it is one.
        run: what the attention took.
        result: of the attention.
    """

    error: float
    bit_exact: bool | None
    run: Run
    result: AttendResult


def bus_share(config: Config, data_bytes: float, cycles: float, drives: int = 1) -> float:
    """Share of the cycles in which flash buses move data, parity included.

    Args:
        config: of the drive.
        data_bytes: that were read from flash, without parity.
        cycles: of the slowest drive.
        drives: that share the bytes.
    """
    raw = data_bytes / config.codeword_bytes * config.raw_codeword_bytes
    return raw * config.clock_mhz / (config.channels * drives * cycles * config.part.bus_mts)


def limit_of(bus: float, stalls: dict[str, float] | None = None, dies: float | None = None) -> str:
    """What a run waits for, in words.

    Args:
        bus: share of the time in which flash buses move data.
        stalls: shares of all lanes' cycles without a beat, by reason; None: not known.
        dies: share of the time in which arrays work; None: not known.
    """
    if bus >= BUSY:
        return f"flash buses, busy {bus:.0%} of the time"
    if stalls:
        worst = max(stalls, key=lambda name: stalls[name])
        return f"lanes wait for {WAITS[worst]} {stalls[worst]:.0%} of the time, buses are busy {bus:.0%}"
    arrays = "" if dies is None else f", arrays {dies:.0%}"
    return f"latency: buses are busy {bus:.0%} of the time{arrays}"


def stall_shares(config: Config, used: Sequence[Usage]) -> dict[str, float]:
    """Shares of all lanes' cycles without a beat, by reason.

    Args:
        config: of the drive.
        used: what was counted, on several drives or one after the other.
    """
    total = Usage.sum(used)
    slots = config.lanes * total.cycles
    return {name: count / slots for name, count in total.stalls.items()} if slots else {}


def options_of(target: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Options of `kvattic.open` by which a simulated drive tells what it does; the golden device has none."""
    return {"on_progress": progress} if target.startswith("sim:") else {}


def run_of(what: str, how: How, config: Config, cost: Cost, *, drives: int = 1,
           stalls: dict[str, float] | None = None) -> Run:
    """What attention took.

    Args:
        what: it was, for people.
        how: where its time is from.
        config: of the drive.
        cost: of it.
        drives: that shared it.
        stalls: of the lanes, by reason; None: not known.
    """
    flash, cycles = sum(cost.flash_bytes.values()), cost.cycles or 0
    return Run(what=what, how=how, cycles=cycles, bytes=flash + sum(cost.dram_bytes.values()),
               seconds=cost.seconds or 0.0, limit=limit_of(bus_share(config, flash, cycles, drives), stalls))


def modelled_run(what: str, found: Estimate) -> Run:
    """What attention takes by the timing model."""
    return Run(what=what, how=How.MODELLED, cycles=found.cycles, bytes=sum(found.bytes_by_kind.values()),
               seconds=found.seconds, limit=limit_of(found.bus_use, dies=found.die_use))


class Attending:
    """Attends on a drive, and counts what each job did to the lanes where the drive is the RTL.

    Args:
        device: the drive.
        target: of `kvattic.open`.

    Attributes:
        used: of each attend on the RTL; empty on the golden device.
    """

    def __init__(self, device: Device, target: str) -> None:
        self.used: list[Usage] = []
        self._meter = Meter(device) if target.startswith("sim:") else None

    def __call__(self, sequence: KvSequence, *rows: Any, **masks: Any) -> AttendResult:
        """`Sequence.attend`, counted."""
        found = sequence.attend(*rows, **masks)
        if self._meter is not None:
            self.used.append(self._meter.read())
        return found


def run_slice(config: Config, attention: Attention, what: str, *, target: str = "model", drives: int = 1,
              progress: Callable[[str], None] = lambda line: None, **options: Any) -> Slice:
    """A decode step: all tokens but the last are written as a prompt, the last is appended, then all is attended.

    Args:
        config: of each drive.
        attention: inputs.
        what: the slice is, for people.
        target: of `kvattic.open`.
        drives: that the KV heads are dealt over.
        progress: told what is being done.
        options: of the target.
    """
    heads, tokens, _ = attention.key.shape
    options |= options_of(target, progress)
    progress(f"opening {target}")
    # One drive is an array, too, so that all go the same way.
    with open_array([target] * drives, config, **options) as array:
        sequence = array.create_sequence(heads, capacity_tokens=tokens)
        progress(f"{what}: writing")
        sequence.prefill(attention.key[:, :-1], attention.value[:, :-1])
        sequence.append(attention.key[:, -1:], attention.value[:, -1:])
        measured = target != "model"
        meters = [Meter(device) for device in array.devices] if measured else []
        progress(f"{what}: attending")
        result = sequence.attend(attention.query)
        stalls = stall_shares(config, [meter.read() for meter in meters]) if meters else None
    progress(f"{what}: checking")
    run = run_of(what, How.MEASURED if measured else How.MODELLED, config, result.cost, drives=drives, stalls=stalls)
    exact = bool(equal_bits(attention, result, config).all()) if measured or drives > 1 else None
    error = float(oracle_errors(attention, result, config)[:, 0].max())
    return Slice(error=error, bit_exact=exact, run=run, result=result)
