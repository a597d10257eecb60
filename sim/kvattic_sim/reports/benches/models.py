"""How large the compiled model of the whole drive is, and how fast it runs beside that of an earlier version."""

import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvattic import PAPER
from kvattic_sim.compare import equal_bits
from kvattic_sim.reports.benches import speed_probe
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError, WrongResultError
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.simulators.build import Model, Simulator, SimulatorError, default_build_root, generated_files
from kvattic_sim.workloads import decode

__all__ = ["BENCHES", "EARLIER"]

EARLIER = "dfa8963"
"""The commit whose model is the measure: each lane, channel and die was written out as often as it is there."""
ROUNDS = 3
"""Runs of each of the two, taking turns, so that what else the machine does meets both."""


def _text_bytes(model: Model) -> int:
    """Bytes of machine code of a model.

    Raises:
        UnavailableError: binutils are not installed.
    """
    if shutil.which("size") is None:
        raise UnavailableError("binutils are not installed (apt-get install binutils)")
    found = subprocess.run(["size", model.directory / "simulation"], capture_output=True, text=True, check=True).stdout
    return int(found.splitlines()[1].split()[0])


def size(lab: Lab) -> Figures:
    """Megabytes of C++ and of machine code of `paper`, the whole drive."""
    lab.progress("paper, the whole drive: building", 0, None)
    model = build_testbench(PAPER, Simulator.VERILATOR)
    return {
        "house.model.cpp_mb": sum(path.stat().st_size for path in generated_files(model)) / 1e6,
        "house.model.text_mb": _text_bytes(model) / 1e6,
    }


def _checkout(commit: str, folder: Path) -> None:
    """Put the files of a commit of this source tree into a folder.

    Raises:
        UnavailableError: this is no source tree with its history.
    """
    tree = Path(__file__).resolve().parents[4]
    archive = folder / "files.tar"
    done = subprocess.run(["git", "-C", tree, "archive", "-o", archive, commit], capture_output=True, check=False)
    if done.returncode:
        raise UnavailableError(f"commit {commit} is not in the history of {tree}")
    subprocess.run(["tar", "-xf", archive], cwd=folder, check=True)
    archive.unlink()


def _probe(packages: list[Path], folder: Path) -> dict[str, Any]:
    """Run the probe with these packages; its result stays pickled: it may be another version's class."""
    outcome = folder / "outcome.pickle"
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "KVATTIC_CACHE": str(default_build_root().parent),
    }
    done = subprocess.run([sys.executable, speed_probe.__file__, outcome], env=environment, cwd=folder,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise SimulatorError(f"the probe failed with {packages[0]}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = pickle.loads(outcome.read_bytes())
    return found


def speed(lab: Lab) -> Figures:
    """Cycles a second of processor time of the simulator's process, over those of `EARLIER` in the same run.

    Raises:
        UnavailableError: the earlier commit is not here.
        WrongResultError: a bit of this version's results is wrong.
    """
    here = [Path(entry) for entry in sys.path if entry]
    with tempfile.TemporaryDirectory(prefix="kvattic-") as name:
        folder = Path(name)
        _checkout(EARLIER, folder)
        there = [folder / part for part in ("host", "hdl", "sim")]
        rates: dict[str, list[float]] = {"earlier": [], "now": []}
        for number in range(ROUNDS):
            for which, packages in (("earlier", there), ("now", here)):
                lab.progress(f"paper, the whole drive, {which}: run {number + 1} of {ROUNDS}", 0, None)
                found = _probe(packages, folder)
                rates[which].append(found["cycles"] / found["cpu_s"])
        attention = decode(PAPER, kv_heads=speed_probe.KV_HEADS, tokens=speed_probe.TOKENS, group=PAPER.rows)
        if not equal_bits(attention, pickle.loads(found["result"]), PAPER).all():
            raise WrongResultError("results differ from the golden device's")
    now, earlier = statistics.median(rates["now"]), statistics.median(rates["earlier"])
    return {"sim.cycles_per_second.ratio": now / earlier, "sim.cycles_per_second.drive": now,
            "sim.cycles_per_second.drive.earlier": earlier}


BENCHES = (
    Bench(keys=("house.model.cpp_mb", "house.model.text_mb"), measure=size),
    Bench(keys=("sim.cycles_per_second.ratio", "sim.cycles_per_second.drive", "sim.cycles_per_second.drive.earlier"),
          measure=speed),
)
