"""Trials: what is done with a sequence of a drive and measured on the RTL, and the same in the timing model.

A drive's trials run one after the other, on the golden device first: it says what queries choose and which bits are
right, and shows a mistake in a trial before the RTL has run for minutes. Then on the RTL, in one simulation; what each
act took lies in the run's folder as soon as it is known.
"""

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic import timing
from kvattic.driver.device import Device
from kvattic.driver.jobs import FlashOperation, Job
from kvattic.driver.results import JobResult
from kvattic.errors import RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import Opcode
from kvattic.spec.config import Config
from kvattic.support.files import write_whole
from kvattic_sim.reports.in_flight import HOST_US, in_flight
from kvattic_sim.reports.noted import Choice, JobNote, NotedOperations, burst_of, note_job, run_noted, timing_job
from kvattic_sim.rtl.jobs import report
from kvattic_sim.rtl.transport import RtlTransport
from kvattic_sim.workloads import DENSE, Attention, Meter, ModeSettings, clustered, decode, measured

__all__ = ["Act", "Append", "Attend", "Done", "Erase", "Prefill", "Trial", "acts_of", "golden", "kept", "model_cycles",
           "on_drive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """The sequence's first tokens are written."""

    @property
    def name(self) -> str:
        """For people."""
        return "prefill"


@dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """Tokens are appended in one call, and the stripes that they fill are programmed.

    Attributes:
        tokens: how many.
        counted: it takes long enough to be measured: it fills stripes.
    """

    tokens: int
    counted: bool = True

    @property
    def name(self) -> str:
        """For people."""
        return f"append of {self.tokens:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attend:
    """All heads attend.

    Attributes:
        settings: mode, and what is chosen.
        rows: query heads of a KV head.
        batch: queries of each; each is an ATTEND for each KV head.
        in_flight: ATTENDs that the host keeps with the drive; 0: all of them.
    """

    settings: ModeSettings = DENSE
    rows: int = 1
    batch: int = 1
    in_flight: int = 0

    @property
    def name(self) -> str:
        """For people."""
        rows = f", {self.rows} rows" if self.rows > 1 else ""
        batch = f", {self.batch} queries" if self.batch > 1 else ""
        flight = f", {self.in_flight} in flight" if self.in_flight else ""
        return f"{self.settings.mode}{rows}{batch}{flight}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Erase:
    """Blocks of an unused zone, the last one, are erased.

    Attributes:
        dies: on each channel.
    """

    dies: int = 1

    @property
    def name(self) -> str:
        """For people."""
        return f"erase of {self.dies} dies' blocks on each channel"


Act = Prefill | Append | Attend | Erase


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A sequence, and what is done with it after its prefill.

    Attributes:
        heads: KV heads.
        tokens: of the prefill, of each.
        acts: what follows.
        run: important tokens come in runs of so many; 1: K is normal noise.
        features: K is written in the feature layout, too.
        centroids: tokens of a unit whose mean keys are written; 0: none are.
        codes: codes of K are written.
    """

    heads: int
    tokens: int
    acts: tuple[Act, ...]
    run: int = 1
    features: bool = False
    centroids: int = 0
    codes: bool = False

    @property
    def name(self) -> str:
        """For people."""
        sketches = ", features" * self.features + ", centroids" * bool(self.centroids) + ", codes" * self.codes
        runs = f", runs of {self.run}" if self.run > 1 else ""
        return f"{self.heads} x {self.tokens:,}{sketches}{runs}"

    @property
    def appended(self) -> int:
        """Tokens that are appended."""
        return sum(act.tokens for act in self.acts if isinstance(act, Append))


def acts_of(trial: Trial) -> tuple[Act, ...]:
    """All acts of a trial, its prefill included."""
    return (Prefill(), *trial.acts)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Done:
    """What an act was.

    Attributes:
        cycles: that it took; 0 on the golden device.
        jobs: its ATTENDs.
        bursts: its flash commands; each burst begins when all before it has ended.
        bits: uint32, outputs of all jobs' rows; None if nothing was attended.
        choices: of each job; of the golden device alone.
    """

    cycles: int
    jobs: list[JobNote] = field(default_factory=list)
    bursts: list[list[FlashOperation]] = field(default_factory=list)
    bits: NDArray[np.uint32] | None = None
    choices: list[Choice] = field(default_factory=list)


class _Golden:
    """Runs work on the golden device, where it takes no time."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def measure(self, work: Callable[[], Any]) -> int:
        work()
        return 0

    def run(self, jobs: list[Job], in_flight: int) -> tuple[list[JobResult], int, list[Choice]]:
        results, choices = run_noted(self.device, jobs)
        return results, 0, choices


class _Rtl:
    """Runs work on the RTL, and counts cycles in which the drive had work; inside of the simulator."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def measure(self, work: Callable[[], Any]) -> int:
        return measured(self.device, work)[1].cycles

    def run(self, jobs: list[Job], in_flight: int) -> tuple[list[JobResult], int, list[Choice]]:
        if in_flight:
            return (*self._keep(jobs, in_flight), [])
        results, usage = measured(self.device, lambda: self.device.run(jobs))
        return results, usage.cycles, []

    def _keep(self, jobs: Iterable[Job], in_flight: int) -> tuple[list[JobResult], int]:
        """Keep so many jobs with the drive."""
        device, jobs = self.device, iter(jobs)
        transport = device.transport
        assert isinstance(transport, RtlTransport)
        latency = round(HOST_US * device.config.clock_mhz)
        meter = Meter(device)
        waiting = deque(device.submit(list(islice(jobs, in_flight))))
        results = []
        while waiting:
            transport.wait(1e9)
            transport.run_cycles(latency)
            device.poll()
            while waiting and waiting[0].done():
                results.append(waiting.popleft().result())
            waiting.extend(device.submit(list(islice(jobs, in_flight - len(waiting)))))
        return results, meter.read().cycles


def _attention(config: Config, trial: Trial, number: int) -> Attention:
    """K and V of all tokens; the queries are `_queries`."""
    shape: dict[str, int] = {"kv_heads": trial.heads, "tokens": trial.tokens + trial.appended, "seed": number}
    return decode(config, **shape) if trial.run == 1 else clustered(config, run=trial.run, **shape)


def _perform(drive: _Golden | _Rtl, trial: Trial, number: int, tell: Callable[[int, Done], None]) -> None:
    """Do a trial, and tell of each act as it is done.

    Args:
        drive: where.
        trial: what.
        number: of the trial, from which its data are drawn.
        tell: called with the number of the act and what it was.
    """
    device, config = drive.device, drive.device.config
    data = _attention(config, trial, number)
    sequence = device.create_sequence(trial.heads, capacity_tokens=trial.tokens + trial.appended,
                                      sparse=trial.features, centroids=trial.centroids or None, codes=trial.codes)
    operations = NotedOperations()
    operations.watch(device)
    length = 0
    for place, act in enumerate(acts_of(trial)):
        match act:
            case Prefill() | Append():
                stop = length + (trial.tokens if isinstance(act, Prefill) else act.tokens)
                key, value = data.key[:, length:stop], data.value[:, length:stop]
                cycles = drive.measure(lambda key=key, value=value: sequence.append(key, value))  # type: ignore[misc]
                length = stop
                done = Done(cycles=cycles, bursts=operations.take())
            case Attend():
                jobs = []
                for query in range(act.batch):
                    asked = decode(config, kv_heads=trial.heads, tokens=1, group=act.rows, seed=100 * place + query)
                    jobs += sequence.plan(asked.query, **act.settings.attend_arguments(config, length)).jobs
                notes = [note_job(config, job) for job in jobs]
                results, cycles, choices = drive.run(jobs, act.in_flight)
                done = Done(cycles=cycles, jobs=notes, choices=choices, bursts=operations.take(),
                            bits=np.concatenate([result.bits for result in results]))
            case Erase():
                wanted = _erases(config, act.dies)
                cycles = drive.measure(lambda wanted=wanted: device.operate(wanted))  # type: ignore[misc]
                done = Done(cycles=cycles, bursts=operations.take())
        tell(place, done)


def _erases(config: Config, dies: int) -> list[FlashOperation]:
    """ERASEs of blocks of the last zone, in the driver's order.

    Raises:
        RequestError: there are not so many dies.
    """
    if not 1 <= dies <= config.dies:
        raise RequestError(f"dies must be 1 to {config.dies}, not {dies}")
    first = config.pages_per_channel - config.zone_pages
    pages = [range(first, first + dies * config.part.planes)] * config.channels
    return [FlashOperation(Opcode.ERASE, one.channel, one.page, domain=0)
            for one in timing.in_turn(config, pages, program=False)]


def golden(config: Config, trials: Sequence[Trial], progress: Callable[[str], None] = lambda line: None) \
        -> list[list[Done]]:
    """What each act of each trial is, from the golden device.

    Raises:
        KvatticError: a trial is not possible.
    """
    found: list[list[Done]] = []
    with Device(GoldenDevice(config, dram_bytes=1 << 27)) as device:
        drive = _Golden(device)
        for number, trial in enumerate(trials):
            progress(trial.name)
            found.append([])
            _perform(drive, trial, number, lambda place, done: found[-1].append(done))
    return found


def _file(trial: int, act: int) -> str:
    return f"act-{trial}-{act}.pickle"


def on_drive(device: Device, trials: Sequence[Trial]) -> None:
    """Do the trials, and leave what each act was in the working directory; runs inside of the simulator.

    It reports ``act|trial|act`` for each, and ``cycles|number`` now and then.
    """
    transport = device.transport
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    drive = _Rtl(device)
    for number, trial in enumerate(trials):

        def tell(place: int, done: Done, number: int = number) -> None:
            write_whole(Path(_file(number, place)).absolute(), pickle.dumps(done))
            report(f"act|{number}|{place}")

        _perform(drive, trial, number, tell)


def kept(folder: Path, trial: int, act: int) -> Done | None:
    """What `on_drive` left of an act in a folder, or None."""
    path = folder / _file(trial, act)
    if not path.is_file():
        return None
    done: Done = pickle.loads(path.read_bytes())
    return done


# The same in the timing model.


def model_cycles(config: Config, act: Act, done: Done, choices: Sequence[Choice]) -> int:
    """Cycles of an act in the timing model.

    Args:
        config: of the drive.
        act: which.
        done: where it read and what it programmed or erased.
        choices: of its jobs.

    Raises:
        RequestError: the choices are not those of the jobs.
    """
    if not isinstance(act, Attend):
        return sum(timing.estimate(config, (), burst_of(burst)).cycles for burst in done.bursts)
    if len(choices) != len(done.jobs):
        raise RequestError(f"choices must be those of the {len(done.jobs)} jobs, not of {len(choices)}")
    jobs = [timing_job(config, note, choice) for note, choice in zip(done.jobs, choices, strict=True)]
    return in_flight(config, jobs, act.in_flight)[0].cycles
