"""Every public thing has a docstring; that of a component names each of its ports, and nothing that is none."""

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
from amaranth.lib import wiring

import kvattic
import kvattic_hdl
from kvattic.spec.commands import Kind
from kvattic.spec.config import TINY

ARGUMENTS: dict[str, Any] = {
    "config": TINY,
    "kind": Kind.KEY,
    "interval": 3,
    "build_cycles": 18,
    "depth": 16,
    "bits": 48,
    "numerator_bits": TINY.accumulator_bits,
    "denominator_bits": TINY.denominator_bits,
    "shape": 8,
    "width": 8,
    "tag": 4,
    "blocks": 4,
    "fraction_bits": 10,
    "exponent_bits": 5,
    "elements": 4,
    "rows": 2,
    "sources": 2,
    "queues": 4,
    "buffers": 8,
    "positions": 8,
    "channels": 4,
    "patience": 32,
}
"""What constructors are given, by the name of the parameter."""


def modules(package: Any) -> list[Any]:
    """All modules of a package."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(info.name) for info in found]


def defined(module: Any) -> list[tuple[str, Any]]:
    """Public functions and classes that a module defines itself."""
    return [(name, thing) for name, thing in vars(module).items()
            if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing))
            and thing.__module__ == module.__name__]


COMPONENTS = [pytest.param(thing, id=name) for module in modules(kvattic_hdl) for name, thing in defined(module)
              if inspect.isclass(thing) and issubclass(thing, wiring.Component)]
HOST = [pytest.param(name, thing, id=f"{module.__name__}.{name}")
        for module in modules(kvattic) for name, thing in defined(module)]


def build(component: type[wiring.Component]) -> wiring.Component:
    """An instance with `ARGUMENTS`; parameters with a default keep it."""
    required = [name for name, p in inspect.signature(component).parameters.items() if p.default is p.empty]
    unknown = [name for name in required if name not in ARGUMENTS]
    assert not unknown, f"add {unknown} of {component.__name__} to ARGUMENTS"
    return component(**{name: ARGUMENTS[name] for name in required})


def section(doc: str, title: str) -> str:
    """Text under an underlined heading."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[\w ]*\n-+$|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def entries(text: str) -> str:
    """The lines of a section that name things, which are those that are not indented."""
    return "\n".join(line for line in text.splitlines() if line and not line.startswith(" "))


def named(text: str) -> set[str]:
    """Names before a colon: `a, b : In, c : Out` names a, b and c."""
    found = re.findall(r"(\w+(?:, \w+)*) :", entries(text))
    return {name for names in found for name in names.split(", ")} - {"In", "Out"}


def test_there_are_components():
    names = {p.id for p in COMPONENTS}
    assert {"Engine", "Lane", "Cell", "Walker", "Scaler", "Divider"} <= names


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_has_a_docstring(component):
    assert component.__doc__, "no docstring (one behind a nested class is none)"
    first = component.__doc__.partition("\n")[0]
    assert first.endswith((".", ":")), f"first line must be one sentence, not {first!r}"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_names_its_ports(component):
    members = set(build(component).signature.members)
    words = named(section(inspect.getdoc(component) or "", "Members"))
    assert members - words == set(), "ports that the Members section does not name"
    assert words - members == set(), "names in the Members section that are no ports"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_names_its_parameters(component):
    parameters = set(inspect.signature(component).parameters)
    assert named(section(inspect.getdoc(component) or "", "Parameters")) >= parameters - {"config"}
    assert not parameters or "config" not in parameters or "config" in entries(
        section(inspect.getdoc(component) or "", "Parameters"))


@pytest.mark.parametrize("module", [*modules(kvattic), *modules(kvattic_hdl), kvattic, kvattic_hdl],
                         ids=lambda m: m.__name__)
def test_a_module_has_a_docstring(module):
    assert module.__doc__


@pytest.mark.parametrize("name, thing", HOST)
def test_public_things_of_the_host_library_have_docstrings(name, thing):
    assert own_doc(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(function) or isinstance(
                    function, property | classmethod | staticmethod)):
                assert function.__doc__, f"{name}.{method} has no docstring"


def own_doc(thing: Any) -> str:
    """The docstring that stands in the source; dataclasses and named tuples make one up where there is none."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return "" if not doc or doc.startswith(f"{thing.__name__}(") else doc


def test_made_up_docstrings_do_not_count():
    from dataclasses import make_dataclass

    assert own_doc(make_dataclass("Point", ["x"])) == ""
    assert own_doc(own_doc)


def test_entries_are_read_as_they_are_written():
    doc = ("A thing.\n\nMembers\n-------\na, b : In, c : Out(8) two cycles later\n    d : not a port\ne : In\n\n"
           "Raises\n------\nf : g")
    assert named(section(doc, "Members")) == {"a", "b", "c", "e"}
