"""What `make clean` removes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_removes_what_was_built_wherever_it_is(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    cache, other = tmp_path / "a cache", tmp_path / "no cache"
    for folder in ("build/sim/model", ".venv", "a cache/sim/model", "no cache/sim/model"):
        (tmp_path / folder).mkdir(parents=True)
    (cache / "sim" / "CACHEDIR.TAG").write_text("")
    (cache / "something else").write_text("")
    for variable in (str(cache), str(other), ""):
        subprocess.run(["make", "clean"], cwd=tmp_path, env={**os.environ, "KVATTIC_CACHE": variable}, check=True,
                       stdout=subprocess.DEVNULL)
    assert not (tmp_path / "build").exists()
    assert os.listdir(cache) == ["something else"]
    assert (other / "sim" / "model").is_dir()   # no tag: nobody knows what that is
    assert (tmp_path / ".venv").is_dir()
