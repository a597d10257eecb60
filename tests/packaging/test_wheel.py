"""The wheel: what is in it, and that the host library works from it with numpy alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"kvattic": "host", "kvattic_hdl": "hdl", "kvattic_sim": "sim"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build backend itself: no isolated environment, so nothing to download.
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_and_data_file_is_in_it(names, package):
    folder = ROOT / PACKAGES[package]
    files = {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*")
             if path.suffix in {".py", ".c", ".npz", ".sv", ".typed", ".vlt"} and "__pycache__" not in path.parts}
    assert f"{package}/py.typed" in files
    assert files - names == set()


def test_data_files_are_in_it(names):
    assert "kvattic_sim/data/minilm.npz" in names
    assert any(name.startswith("kvattic_sim/verilog/") and name.endswith(".sv") for name in names)


def test_nothing_else_is_in_it(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert not [name for name in names if name.endswith(".pyc")]


def test_its_metadata(wheel, names):
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(metadata).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    header, _, description = text.partition("\n\n")
    assert "Requires-Dist: numpy" in header
    assert [line for line in header.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line] == [
        line for line in header.splitlines() if line.startswith("Requires-Dist: numpy")]
    assert description.lstrip().startswith("# kvattic")


def test_the_host_library_works_from_it_with_numpy_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    only = tmp_path / "only_numpy"
    only.mkdir()
    home = Path(numpy.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):  # the second holds the shared libraries of the wheel on Linux
        if (home / name).exists():
            (only / name).symlink_to(home / name)
    program = f"""
import importlib.util, sys
sys.path[:0] = {[str(tmp_path / "wheel"), str(only)]!r}
for absent in ("amaranth", "cocotb", "rich"):
    assert importlib.util.find_spec(absent) is None, absent
import numpy, kvattic
assert kvattic.__file__.startswith({str(tmp_path)!r}), kvattic.__file__
assert numpy.__file__.startswith({str(only)!r}), numpy.__file__
key, value = numpy.ones((2, 1, 70, 32), numpy.float16)
with kvattic.open("model", "tiny") as device, device.create_sequence(1, capacity_tokens=100) as sequence:
    sequence.prefill(key, value)
    assert (sequence.attend(numpy.ones((2, 1, 32))).output == 1).all()
with kvattic.open("model") as device:
    print(device.config.channels)
"""
    # -I: no PYTHONPATH, no user site; -S: no site-packages.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"
