"""The house itself: what its two commands cost on a fresh machine, and how long its longest function is.

`make sim` and `make test` are run in fresh clones, without .venv and without any cache, of this version and of
`BEFORE`, one right after the other. That takes an hour, so it is done only when their keys are asked for.
"""

import ast
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError, WrongResultError
from kvattic_sim.simulators.build import CACHE, Group

__all__ = ["BEFORE", "BENCHES", "KEYS", "cpu_seconds", "largest_body"]

ROOT = Path(__file__).resolve().parents[4]
BEFORE = "dfa8963"
"""The version that the commands are compared with."""
LOGS = Path("build") / "house"
PACKAGES = ("host/kvattic", "hdl/kvattic_hdl", "sim/kvattic_sim")
POLL_S = 1.0
OURS = (CACHE, "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""Variables of the environment that a fresh machine does not have."""


def functions(root: Path) -> Iterator[tuple[int, str]]:
    """(lines, file:name) of every function of a source tree's packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                    yield node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.name}"


def largest_body(lab: Lab) -> Figures:
    """Lines of the longest function of host, hdl and sim, and its name in words.

    Raises:
        UnavailableError: this is no source tree.
    """
    found = sorted(functions(_checkout()), reverse=True)
    for lines, name in found[:3]:
        lab.say(f"{name}: {lines} lines")
    return {"house.largest_body": float(found[0][0])}


def _checkout() -> Path:
    if not (ROOT / ".git").exists():
        raise UnavailableError(f"{ROOT} is no clone of the repository")
    return ROOT


def cpu_seconds(target: str, version: str, progress: Callable[[str], None] = lambda line: None, *,
                must_pass: bool = True) -> float:
    """CPU seconds, user and system, that make and all it starts take in a fresh clone; the output goes to `LOGS`.

    Args:
        target: of the Makefile.
        version: a commit.
        progress: told the last line of the output, again and again.
        must_pass: whether a failure is an error, not only said.

    Raises:
        UnavailableError: this is no clone, or one without that commit.
        WrongResultError: make failed, but was to pass.
    """
    log = (LOGS / f"{target}-{version}.log").absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    with tempfile.TemporaryDirectory(prefix="kvattic-house-") as folder, log.open("w") as output, Group() as group:
        clone = Path(folder) / "kvattic"
        progress("cloning")
        for command in (["clone", "-q", str(_checkout()), str(clone)], ["-C", str(clone), "checkout", "-q", version]):
            done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnavailableError(f"cannot check {version} out: {done.stderr.strip()}")
        process = subprocess.Popen(["make", target], cwd=clone, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, process_group=group.number)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            lines = log.read_text(errors="replace").split("\n")
            progress(next((line.strip() for line in reversed(lines) if line.strip()), "starting"))
            time.sleep(POLL_S)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        failure = f"make {target} at {version} ended with status {process.returncode}; the log is {log}"
        if must_pass:
            raise WrongResultError(failure)
        progress(failure)
    return usage.ru_utime + usage.ru_stime


def _ratio(target: str) -> Bench:
    """CPU seconds of a target over those of `BEFORE`, and both."""
    key = f"house.{target}"

    def measure(lab: Lab) -> Figures:
        here = subprocess.run(["git", "-C", str(_checkout()), "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True, check=True).stdout.strip()

        def seconds(version: str) -> float:
            def progress(line: str) -> None:
                lab.progress(f"make {target} at {version}: {line}", 0, None)

            # Some of the older version's tests fail on a slow machine, behind which the others run all the same.
            found = cpu_seconds(target, version, progress, must_pass=version != BEFORE)
            lab.say(f"make {target} at {version}: {found:.0f} CPU seconds")
            return found

        now, before = seconds(here), seconds(BEFORE)
        return {f"{key}.cpu_ratio": now / before, f"{key}.cpu_seconds": now, f"{key}.cpu_seconds.before": before}

    return Bench(keys=(f"{key}.cpu_ratio", f"{key}.cpu_seconds", f"{key}.cpu_seconds.before"), measure=measure,
                 by_name=True)


BENCHES = (Bench(keys=("house.largest_body",), measure=largest_body), _ratio("sim"), _ratio("test"))
"""What the bench runner calls."""
KEYS = tuple(key for bench in BENCHES for key in bench.keys)
