"""The import rule: host needs numpy alone, hdl and sim keep to each other's public names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(source: str) -> list[tuple[str, str | None]]:
    """(module, name or None) of every import statement, at any depth of the source."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def breaks(source: str, package: str) -> list[str]:
    """Imports of a package's source that the rule forbids."""
    bad = []
    for module, name in imports(source):
        top = module.partition(".")[0]
        if package == "kvattic":
            forbidden = top in {"kvattic_hdl", "kvattic_sim", "amaranth", "cocotb", "torch", "transformers"}
        elif package == "kvattic_hdl":
            forbidden = top == "kvattic_sim"
        else:
            inside = module != "kvattic_hdl" or (name or "").startswith("_")
            forbidden = top == "kvattic_hdl" and inside
        if forbidden:
            bad.append(module if name is None else f"{module}.{name}")
    return bad


FILES = [
    pytest.param(path, package, id=str(path.relative_to(ROOT)))
    for folder, package in (("host", "kvattic"), ("hdl", "kvattic_hdl"), ("sim", "kvattic_sim"))
    for path in sorted((ROOT / folder / package).rglob("*.py"))
]


@pytest.mark.parametrize(("path", "package"), FILES)
def test_sources_keep_the_import_rule(path, package):
    found = breaks(path.read_text(), package)
    if path.name == "huggingface.py" and package == "kvattic":
        # The one module that is there for them; nothing else may import it at its top.
        found = [name for name in found if name.partition(".")[0] not in ("torch", "transformers")]
    assert found == []


@pytest.mark.parametrize(
    ("package", "source", "bad"),
    [
        ("kvattic", "def f():\n    import amaranth.hdl", ["amaranth.hdl"]),
        ("kvattic", "from kvattic_hdl import Engine", ["kvattic_hdl.Engine"]),
        ("kvattic", "import numpy\nfrom kvattic.config import Config", []),
        ("kvattic_hdl", "from kvattic_sim.oracle import attend", ["kvattic_sim.oracle.attend"]),
        ("kvattic_hdl", "from kvattic.config import Config\nfrom .lane import Lane", []),
        ("kvattic_sim", "from kvattic_hdl.lane import Lane", ["kvattic_hdl.lane.Lane"]),
        ("kvattic_sim", "from kvattic_hdl import _hidden", ["kvattic_hdl._hidden"]),
        ("kvattic_sim", "import kvattic_hdl\nfrom kvattic_hdl import Engine", []),
    ],
)
def test_the_rule_itself(package, source, bad):
    assert breaks(source, package) == bad


def test_importing_kvattic_loads_numpy_alone():
    program = (
        "import sys, kvattic\n"
        "kvattic.open('model', 'tiny').close()\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(tops & {'amaranth', 'cocotb', 'torch', 'kvattic_hdl', 'kvattic_sim'}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "host")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import kvattic

    assert sorted(set(kvattic.__all__)) == sorted(kvattic.__all__)
    assert all(hasattr(kvattic, name) for name in kvattic.__all__)
