"""The benches of the house, on a repository that is not this one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvattic_sim.reports.benches import house
from kvattic_sim.reports.benches.engine import Lab, UnavailableError, WrongResultError

BURN = "sim:\n\t@echo working; echo KVATTIC_CACHE=$$KVATTIC_CACHE; test ! -e left; touch left; %s\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True,
                          text=True).stdout.strip()


def commit(folder: Path, recipe: str) -> str:
    (folder / "Makefile").write_text(BURN % recipe)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "a version")
    return git(folder, "rev-parse", "--short", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty one, which the benches take for this one, and from which they are called."""
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "POLL_S", 0.05)
    monkeypatch.setenv("KVATTIC_CACHE", "somewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(target: str) -> Any:
    return next(one for one in house.BENCHES if one.keys[0] == f"house.{target}.cpu_ratio")


def test_cpu_of_all_children_is_compared_in_fresh_clones(repository: Path, monkeypatch: Any) -> None:
    (repository / "burn.py").write_text("import time\nwhile time.process_time() < 1.2: pass\n")
    before = commit(repository, "sh -c 'python3 burn.py'")
    (repository / "burn.py").write_text("import time\nwhile time.process_time() < 0.6: pass\n")
    now = commit(repository, "sh -c 'python3 burn.py'")
    monkeypatch.setattr(house, "BEFORE", before)
    said: list[str] = []
    seen: list[str] = []
    lab = Lab(progress=lambda what, done, total: seen.append(what), say=said.append)
    found = bench("sim").measure(lab)
    assert found["house.sim.cpu_seconds"] >= 0.6
    assert found["house.sim.cpu_seconds.before"] >= 1.2
    assert 0.3 < found["house.sim.cpu_ratio"] < 0.9
    assert [line.partition(":")[0] for line in said] == [f"make sim at {now}", f"make sim at {before}"]
    assert f"make sim at {now}: KVATTIC_CACHE=" in seen
    assert "working" in (house.LOGS / f"sim-{now}.log").read_text()
    assert not (repository / "left").exists()


def test_a_command_that_fails_gives_no_figure(repository: Path) -> None:
    version = commit(repository, "exit 3")
    with pytest.raises(WrongResultError, match=r"make sim at .* status 2; the log is .*\.log"):
        house.cpu_seconds("sim", version)


def test_a_version_that_is_not_there_is_said(repository: Path, tmp_path: Path) -> None:
    commit(repository, "true")
    with pytest.raises(UnavailableError, match="cannot check 0123456 out"):
        house.cpu_seconds("sim", "0123456")


def test_without_a_clone_nothing_is_measured(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    with pytest.raises(UnavailableError, match="no clone"):
        house.largest_body(Lab())


def test_the_longest_function_is_found(repository: Path) -> None:
    for package in house.PACKAGES:
        (repository / package / "inside").mkdir(parents=True)
    (repository / "host/kvattic/a.py").write_text("def short():\n    pass\n")
    (repository / "hdl/kvattic_hdl/inside/b.py").write_text(
        "class C:\n    def elaborate(self):\n        a = 1\n        b = 2\n        return a + b\n")
    said: list[str] = []
    assert house.largest_body(Lab(say=said.append)) == {"house.largest_body": 4.0}
    assert said[0] == "hdl/kvattic_hdl/inside/b.py:elaborate: 4 lines"
