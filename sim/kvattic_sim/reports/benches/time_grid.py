"""How far the timing model is from the RTL: a grid of modes, parts, heads, contexts, rows, writes, commands in flight.

What each act of the trials took the RTL is kept under build/time_grid until the RTL, its test bench or the trials
change, so that a run that was cut short goes on with the next drive, and the model can be compared anew in seconds.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvattic import GQA, PAPER, Config, KvatticError
from kvattic.spec.nand import part
from kvattic.support.files import write_whole
from kvattic.timing import estimate
from kvattic_sim.reports import trials
from kvattic_sim.reports.benches.decode_step import WAYS, step_jobs
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, WrongResultError
from kvattic_sim.reports.trials import Act, Append, Attend, Done, Erase, Trial, acts_of, model_cycles
from kvattic_sim.rtl.jobs import JobError, run_on_model
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.simulators.build import Model, SimulationFailed, SimulatorError
from kvattic_sim.workloads import ModeSettings

__all__ = ["BENCHES", "GRID", "KEPT", "Drive", "Row", "compare", "rows_of"]

KEPT = Path("build") / "time_grid"
FRAMES = 1 << 11
"""Pages that a channel keeps: more than all trials of a drive write."""
DRAM_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True, slots=True)
class Drive:
    """A configuration, and what is done on it in one simulation.

    Attributes:
        name: for people.
        config: of the drive.
        trials: in their order.
        frames, dram_bytes: of the simulation (`build_testbench`).
    """

    name: str
    config: Config
    trials: tuple[Trial, ...]
    frames: int | None = FRAMES
    dram_bytes: int | None = DRAM_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A point of the grid.

    Attributes:
        point: what was done.
        measured: cycles of the RTL.
        modelled: cycles of the timing model.
    """

    point: str
    measured: int
    modelled: int

    @property
    def deviation(self) -> float:
        """Of the model, as a share of what the RTL took."""
        return self.modelled / self.measured - 1

    def __str__(self) -> str:
        return f"| {self.point} | {self.measured:,} | {self.modelled:,} | {self.deviation:+.1%} |"


def _attends(tokens: int, *modes: str, rows: int = 1, unit: int = 64) -> tuple[Attend, ...]:
    """Attends that choose a sixteenth of the tokens, an eighth in centroid mode, whose units have `unit` tokens."""
    ways = {
        "dense": ModeSettings(),
        "sparf": ModeSettings(mode="sparf", features=16, top_units=tokens // 16),
        "fetched": ModeSettings(mode="fetched", features=16, top_units=tokens // 32),
        "centroid": ModeSettings(mode="centroid", unit_tokens=unit, top_units=tokens // 8 // unit),
    }
    return tuple(Attend(settings=ways[mode], rows=rows) for mode in modes)


_ALL = ("dense", "sparf", "fetched", "centroid")


TLC, LOW_LATENCY = (replace(PAPER, part=part(name)) for name in ("tlc", "lowlatency"))
_TWICE = Attend(batch=2, in_flight=64)
"""80 jobs for 40 heads."""

GRID = (
    Drive(name="pSLC", config=PAPER, trials=(
        Trial(heads=8, tokens=2048, features=True, centroids=64, acts=(
            *_attends(2048, *_ALL), Append(tokens=100, counted=False), *_attends(2148, "sparf"), Append(tokens=156))),
        Trial(heads=1, tokens=8192, features=True, centroids=64, acts=_attends(8192, *_ALL)),
        Trial(heads=40, tokens=256, features=True, acts=(
            *_attends(256, "dense", "sparf", "fetched"), _TWICE,
            replace(_TWICE, settings=_attends(256, "sparf")[0].settings))),
        Trial(heads=4, tokens=4096, run=8, features=True, acts=_attends(4096, "sparf", "fetched")),
        Trial(heads=16, tokens=512, acts=(Attend(), Append(tokens=64))))),
    Drive(name="TLC", config=TLC, trials=(
        Trial(heads=4, tokens=2048, features=True, centroids=64, acts=_attends(2048, *_ALL)),
        Trial(heads=40, tokens=256, acts=(Attend(), _TWICE)))),
    Drive(name="low latency", config=LOW_LATENCY, trials=(
        Trial(heads=4, tokens=2048, features=True, centroids=16, acts=_attends(2048, *_ALL, unit=16)),
        Trial(heads=1, tokens=4096, features=True, acts=_attends(4096, "dense", "sparf", "fetched")),
        Trial(heads=40, tokens=256, features=True, acts=(*_attends(256, "dense", "sparf"), Erase(dies=1))))),
    Drive(name="pSLC, `gqa`", config=GQA, trials=(
        Trial(heads=4, tokens=2048, features=True, centroids=64, acts=(
            *_attends(2048, *_ALL, rows=8), *_attends(2048, "dense", "sparf"))),
        Trial(heads=1, tokens=8192, features=True, acts=_attends(8192, "dense", "sparf", "fetched", rows=8)))),
)
"""About eleven million cycles of the RTL in all."""


def _counted(act: Act) -> bool:
    return not isinstance(act, Append) or act.counted


def rows_of(drive: Drive, expected: Sequence[Sequence[Done]], trial: int, act: int, done: Done) -> Row | None:
    """The point that an act is; None if it is none.

    Args:
        drive: whose.
        expected: of the golden device.
        trial: number of the trial.
        act: number of the act.
        done: of the RTL.

    Raises:
        WrongResultError: the bits differ from the golden device's.
    """
    what, right = acts_of(drive.trials[trial])[act], expected[trial][act]
    name = f"{drive.name}, {drive.trials[trial].name}: {what.name}"
    if done.bits is not None and (right.bits is None or not np.array_equal(done.bits, right.bits)):
        raise WrongResultError(f"{name}: differs from the golden device")
    if not _counted(what):
        return None
    if done.cycles <= 0:
        raise WrongResultError(f"{name}: the drive counted no cycles")
    return Row(point=name, measured=done.cycles, modelled=model_cycles(drive.config, what, done, right.choices))


def _current(folder: Path, drive: Drive, expected: Sequence[Sequence[Done]]) -> bool:
    """Whether a folder has all acts, each with the places that the driver chooses today."""
    for number, trial in enumerate(drive.trials):
        for place in range(len(acts_of(trial))):
            done = trials.kept(folder, number, place)
            right = expected[number][place]
            if done is None or done.jobs != right.jobs or _places(done) != _places(right):
                return False
    return True


def _places(done: Done) -> list[tuple[int, ...]]:
    return sorted((one.opcode, one.channel, one.page) for burst in done.bursts for one in burst)


def _folder(drive: Drive, model: Model) -> Path:
    digest = hashlib.sha256(repr((drive.config, drive.trials)).encode()).hexdigest()[:16]
    return KEPT / f"{model.directory.name}-{digest}"


def compare(drive: Drive, lab: Lab, expected: Sequence[Sequence[Done]]) -> Iterator[Row]:
    """Run the trials of a drive on the RTL, unless that was done, and compare.

    Args:
        drive: what to do.
        lab: where.
        expected: of the golden device (`trials.golden`).

    Yields:
        The points, each as soon as it is known where the trials were kept, else when all of the drive's are done; each
        is said when it is known.

    Raises:
        WrongResultError: a bit is wrong.
        SimulatorError, SimulationFailed, JobError: see `kvattic_sim.rtl.jobs`.
    """
    lab.progress(f"{drive.name}: building", 0, None)
    model = build_testbench(drive.config, lab.simulator, frames=drive.frames, dram_bytes=drive.dram_bytes)
    folder = _folder(drive, model)
    found: list[Row] = []

    def add(trial: int, act: int) -> None:
        done = trials.kept(folder, trial, act)
        assert done is not None
        row = rows_of(drive, expected, trial, act, done)
        if row is not None:
            found.append(row)
            lab.say(str(row))

    def follow(line: str) -> None:
        kind, *rest = line.split("|")
        if kind == "act":
            add(*map(int, rest))
        elif kind == "cycles":
            lab.progress(drive.name, int(rest[0]), None)

    if _current(folder, drive, expected):
        lab.say(f"{drive.name}: the RTL's cycles are those of an earlier run of the same RTL; delete {folder} to run "
                "it again")
        for number, trial in enumerate(drive.trials):
            for act in range(len(acts_of(trial))):
                add(number, act)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin = time.perf_counter()
        run = run_on_model(model, drive.config, trials.on_drive, {"trials": drive.trials}, run_dir=folder.resolve(),
                           progress=follow)
        lab.say(f"{drive.name}: {run.cycles:,} cycles of the RTL in {time.perf_counter() - begin:.0f} s")
    yield from found


def error(lab: Lab) -> Figures:
    """Largest and mean deviation of the model; a drive that fails does not keep the others from being measured.

    Raises:
        WrongResultError: the RTL's results are wrong.
        KvatticError, SimulatorError, SimulationFailed, JobError: a drive's trials failed.
    """
    # All trials on the golden device and in the model first: what is wrong with one shows within minutes.
    expected = []
    for drive in GRID:
        expected.append(trials.golden(drive.config, drive.trials,
                                      lambda line, drive=drive: lab.progress(  # type: ignore[misc]
                                          f"{drive.name}, golden device: {line}", 0, None)))
        for trial, acts in zip(drive.trials, expected[-1], strict=True):
            for act, done in zip(acts_of(trial), acts, strict=True):
                lab.progress(f"{drive.name}, timing model: {trial.name}, {act.name}", 0, None)
                model_cycles(drive.config, act, done, done.choices)
    rows: list[Row] = []
    failed: Exception | None = None
    for drive, right in zip(GRID, expected, strict=True):
        try:
            rows += compare(drive, lab, right)
        except (KvatticError, WrongResultError, SimulatorError, SimulationFailed, JobError) as problem:
            lab.say(f"{drive.name}: {problem}")
            failed = failed or problem
    table = ["| point | RTL | model | deviation |", "| --- | --- | --- | --- |", *map(str, rows)]
    write_whole(KEPT.with_suffix(".md"), "\n".join(table) + "\n")
    if failed is not None:
        raise failed
    deviations = [abs(row.deviation) for row in rows]
    worst = max(rows, key=lambda row: abs(row.deviation))
    lab.say(f"{len(rows)} points, worst: {worst.point} ({worst.deviation:+.1%}); all in {KEPT.with_suffix('.md')}")
    return {"time.error.max": max(deviations), "time.error.mean": float(np.mean(deviations)),
            "time.error.points": float(len(rows))}


# How long the model takes.

STEP_JOBS, STEP_MODELLED, STEP_TOKENS = 2560, 80, 2048
"""A decode step of one layer, batch 64, OPT-13B; jobs of it that are modelled, the others go on at their rate."""


def step(lab: Lab) -> Figures:
    """Seconds in which a decode step is modelled."""
    found = {}
    for suffix, mode in WAYS.items():
        begin = time.perf_counter()
        estimate(PAPER, step_jobs(PAPER, STEP_MODELLED, STEP_TOKENS, mode), in_all=STEP_JOBS)
        found[f"time.step_seconds{suffix}"] = time.perf_counter() - begin
    return found


BENCHES = (
    Bench(keys=tuple(f"time.step_seconds{suffix}" for suffix in WAYS), measure=step),
    Bench(keys=("time.error.max", "time.error.mean", "time.error.points"), measure=error),
)
"""What the bench runner calls, short ones first."""
