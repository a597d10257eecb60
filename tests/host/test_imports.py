"""The import rule: arrows go one way, host needs numpy alone, hdl and sim keep to each other's public names."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


LAYERS = (
    ("errors",),
    ("support", "spec"),
    ("merge", "placement", "transport"),
    ("golden", "driver"),
    ("targets",),
    ("array", "selftest"),
    ("integrations", "cli"),
    ("__main__",),
)
"""Rooms of `kvattic`, from the bottom up: each imports from itself and from lower rows only."""
HEAVY = {"amaranth", "cocotb", "torch", "transformers", "kvattic_hdl", "kvattic_sim"}
"""What `kvattic` never loads by itself."""


def imports(source: str) -> list[tuple[str, str | None]]:
    """(module, name or None) of every import statement, at any depth of the source; relative ones begin with a dot."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


TUPLE_METHODS = {"_asdict", "_fields", "_field_defaults", "_make", "_replace"}
"""What a NamedTuple makes public under names that begin with an underscore."""


def private_uses(source: str) -> list[str]:
    """`x._name` where x is neither self nor cls: what another object keeps to itself."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            and node.attr not in TUPLE_METHODS
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))]


def row(room: str) -> int:
    """The layer of a room of `kvattic`; that of the package itself, whose names are for those above, is the highest."""
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), len(LAYERS))


def breaks_inside(room: str, module: str, name: str | None) -> bool:
    """Whether a room of `kvattic` may not import a module of `kvattic`."""
    if room == "__init__":
        return False
    parts = [*module.split(".")[1:], *([name] if module == "kvattic" and row(name or "") < len(LAYERS) else [])]
    if not parts:  # from kvattic import ...: the package's public names are not for its insides, but for those on top
        return room not in ("cli", "__main__")
    return parts[0] != room and row(parts[0]) >= row(room)


def breaks(source: str, package: str, room: str = "") -> list[str]:
    """Imports of a package's source that the rule forbids; `room`: which one of `kvattic` the source is in."""
    bad = []
    for module, name in imports(source):
        top = module.partition(".")[0]
        ours = top in ("kvattic", "kvattic_hdl", "kvattic_sim")
        forbidden = module.startswith(".") or (ours and (name or "").startswith("_"))
        if package == "kvattic":
            optional = {"torch", "transformers"} if room == "integrations" else set()
            forbidden |= top in HEAVY - optional
            forbidden |= top == "kvattic" and breaks_inside(room, module, name)
        elif package == "kvattic_hdl":
            lower = module.split(".")[1:2] in (["spec"], ["support"])
            forbidden |= top == "kvattic_sim" or (top == "kvattic" and not lower)
        else:
            forbidden |= top == "kvattic_hdl" and module != "kvattic_hdl"
        if forbidden:
            bad.append(module if name is None else f"{module}.{name}")
    return bad


FILES = [
    pytest.param(path, package, id=str(path.relative_to(ROOT)))
    for folder, package in (("host", "kvattic"), ("hdl", "kvattic_hdl"), ("sim", "kvattic_sim"))
    for path in sorted((ROOT / folder / package).rglob("*.py"))
]


def dependencies(package: str, folder: str) -> dict[str, set[str]]:
    """For each module of a package, those of the same package that it imports at its top."""
    root = ROOT / folder / package
    names = {".".join((package, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    found = {}
    for module, path in names.items():
        top = ast.Module([node for node in ast.parse(path.read_text()).body
                          if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        wanted = {(m if name is None else f"{m}.{name}") for m, name in imports(ast.unparse(top))}
        wanted |= {m for m, _ in imports(ast.unparse(top))}
        found[module] = {name for name in wanted if name in names and name != module}
    return found


@pytest.mark.parametrize(("path", "package"), FILES)
def test_sources_keep_the_import_rule(path, package):
    room = path.relative_to(ROOT / path.relative_to(ROOT).parts[0] / package).parts[0].removesuffix(".py")
    assert breaks(path.read_text(), package, room) == []


@pytest.mark.parametrize("path", [file.values[0] for file in FILES if file.values[1] == "kvattic"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_objects_keep_their_private_names(path):
    assert private_uses(path.read_text()) == []


def test_private_uses_are_found():
    source = "self._a + cls._b + x._replace(y=1) + x.__dict__"
    assert private_uses(source) == []
    assert private_uses(source + " + device._dispatcher._arena\nfuture._finish(None)") == [
        "device._dispatcher._arena", "future._finish", "device._dispatcher"]


@pytest.mark.parametrize(("package", "folder"), [("kvattic", "host"), ("kvattic_hdl", "hdl"), ("kvattic_sim", "sim")])
def test_no_circle_of_imports(package, folder):
    graphlib.TopologicalSorter(dependencies(package, folder)).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("package", "room", "source", "bad"),
    [
        ("kvattic", "driver", "def f():\n    import amaranth.hdl", ["amaranth.hdl"]),
        ("kvattic", "cli", "from kvattic_hdl import Engine", ["kvattic_hdl.Engine"]),
        ("kvattic", "driver", "import numpy\nfrom kvattic.spec.config import Config", []),
        ("kvattic", "driver", "from kvattic.driver.rings import Ring", []),
        ("kvattic", "driver", "from .rings import Ring", [".rings.Ring"]),
        ("kvattic", "driver", "from kvattic import Config", ["kvattic.Config"]),
        ("kvattic", "driver", "from kvattic.golden.dense import attend", ["kvattic.golden.dense.attend"]),
        ("kvattic", "spec", "from kvattic.driver.jobs import Job", ["kvattic.driver.jobs.Job"]),
        ("kvattic", "array", "from kvattic.driver.device import _hidden", ["kvattic.driver.device._hidden"]),
        ("kvattic", "driver", "import torch", ["torch"]),
        ("kvattic", "integrations", "import torch", []),
        ("kvattic_hdl", "", "from kvattic_sim.oracle import attend", ["kvattic_sim.oracle.attend"]),
        ("kvattic_hdl", "", "from kvattic.driver.jobs import Job", ["kvattic.driver.jobs.Job"]),
        ("kvattic_hdl", "", "from kvattic.spec.config import Config\nfrom kvattic_hdl.lane.lane import Lane", []),
        ("kvattic_sim", "", "from kvattic_hdl.lane.lane import Lane", ["kvattic_hdl.lane.lane.Lane"]),
        ("kvattic_sim", "", "from kvattic_hdl import _hidden", ["kvattic_hdl._hidden"]),
        ("kvattic_sim", "", "import kvattic_hdl\nfrom kvattic_hdl import Engine", []),
    ],
)
def test_the_rule_itself(package, room, source, bad):
    assert breaks(source, package, room) == bad


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
