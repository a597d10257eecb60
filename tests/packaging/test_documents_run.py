"""What README and the pages show can be done: their Python runs, and what they name exists.

All ```python blocks of a page run one after the other in one namespace, as a reader would type them, with `numpy` as
`np` and `kvattic` imported.  Two comments in a page help, which no reader sees:

    <!-- run:
    key, value = rng.standard_normal((2, 2, 100, 32))
    -->

runs like a block, for what the page takes for granted; and `<!-- not run: why -->` right before a block leaves it out.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvattic
import kvattic_hdl
import kvattic_sim
from kvattic import cli
from kvattic_sim.reports.bench import BARS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"(?P<skip><!-- not run: [^>]+-->\n+)?^```python\n(?P<code>.*?)^```$"
                    r"|^<!-- run:\n(?P<hidden>.*?)^-->$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(line, code) of what runs on a page."""
    text = page.read_text()
    for found in PYTHON.finditer(text):
        if not found["skip"]:
            group = "code" if found["code"] is not None else "hidden"
            yield text.count("\n", 0, found.start(group)), found[group]


def shown(page: Path) -> list[str]:
    """What a page shows as code and that is no Python: lines of blocks, and what stands between backticks."""
    text = page.read_text()
    lines = [line for language, code in FENCE.findall(text) if language in ("", "sh", "console")
             for line in code.replace("\\\n", " ").splitlines()]
    return [*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


def words(line: str) -> list[str]:
    """The words of a shell command, without its prompt and comment."""
    try:
        found = shlex.split(line.strip().removeprefix("$ "), comments=True)
    except ValueError:
        return []
    while found and re.fullmatch(r"[A-Z_]+=\S*", found[0]):
        found = found[1:]
    return found


RUN = [page for page in PAGES if any(blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if "kvattic.integrations.transformers" in page.read_text():
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace = {"np": np, "kvattic": kvattic, "rng": np.random.default_rng(0), "__name__": "page"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_these_pages_have_python_that_runs():
    assert {"README.md", "docs/getting_started.md", "docs/host.md", "docs/sparse.md", "docs/transformers.md",
            "docs/extending.md", "docs/troubleshooting.md"} <= {name(page) for page in RUN}


def test_every_python_block_is_found_or_marked():
    for page in PAGES:
        text = page.read_text()
        assert len(re.findall(r"^ *```(?:py|python)$", text, re.MULTILINE)) == sum(
            found["code"] is not None for found in PYTHON.finditer(text)), f"{name(page)}: a block that is not run"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shown(page):
        if (command := words(line))[:1] == ["make"]:
            for word in command[1:]:
                if "=" not in word:
                    assert word in targets, line
                elif (prefix := word.partition("BENCH=")[2]) != "prefix":
                    assert any(key.startswith(prefix) for key in BARS), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_are_run_exist(page):
    for line in shown(page):
        for module in re.findall(r"python3? -m (\w[\w.]*)", line):
            assert importlib.util.find_spec(module) is not None, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_the_command_line_exist(page, capsys):
    for line in shown(page):
        command = words(line)
        if command[:1] == ["kvattic"] and len(command) > 1 and re.fullmatch(r"[a-z]+", command[1]):
            assert cli.main([command[1], "--help"]) == 0, line
            options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
            assert {word for word in command[2:] if word.startswith("--")} <= options, line


TOPS = ("docs", "examples", "hdl", "host", "include", "sim", "tests")
PATH = re.compile(rf"((?:{'|'.join(TOPS)})/[\w./-]+|\w+\.(?:py|sv|npz|log))")
MODULE = re.compile(r"((?:kvattic|kvattic_hdl|kvattic_sim)(?:\.\w+)+)(?:\(.*)?")
FILES = {path.name for top in TOPS for path in (ROOT / top).rglob("*.*") if "__pycache__" not in path.parts}
MADE = {"source.py", "rows.csv"}
"""Files of examples."""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
        if found := PATH.fullmatch(code.partition("::")[0]):
            path = found[1]
            found_there = (ROOT / path).exists() if "/" in path else path in FILES | MADE
            assert found_there, f"{name(page)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_and_names_that_are_named_exist(page):
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        if found := MODULE.fullmatch(code):
            assert resolves(found[1]), f"{name(page)}: {found[1]}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(thing, part):
                # A field of a dataclass with slots has no default, and an attribute may only be annotated.
                return part in getattr(thing, "__annotations__", {})
            thing = getattr(thing, part)
        return True
    return False


def test_what_does_not_exist_is_found():
    assert resolves("kvattic.Config") and resolves("kvattic.spec.nand.PARTS") and not resolves("kvattic.nothing")
    assert words("$ PRESET=tiny make sim  # a comment") == ["make", "sim"]


def test_every_exception_has_its_section():
    from kvattic import errors

    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for class_name in (name for name, thing in vars(errors).items() if isinstance(thing, type)):
        assert class_name == "KvatticError" or f"\n## {class_name}\n" in text, class_name


def test_the_trial_has_twenty_kinds_of_change():
    _, _, trial = (ROOT / "docs" / "contributing.md").read_text().partition("## A reader's trial")
    rows = [line for line in trial.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    assert len(set(rows)) == len(rows)


NEED_DIFFUSERS = {f"kvattic_sim.runs.{name}" for name in ("diffusion", "koala", "unet", "z_image")}
"""Modules whose extra the tests can do without."""


def classes() -> dict[str, list[type]]:
    """All classes of the packages by their names."""
    found: dict[str, list[type]] = {}
    for package in (kvattic, kvattic_hdl, kvattic_sim):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith((".__main__", ".train", ".cocotb_channels", ".cocotb_jobs", ".cocotb_server")):
                continue
            if info.name in NEED_DIFFUSERS and importlib.util.find_spec("diffusers") is None:
                continue
            for class_name, thing in vars(importlib.import_module(info.name)).items():
                if isinstance(thing, type) and thing not in found.setdefault(class_name, []):
                    found[class_name].append(thing)
    return found


def has(thing: type, member: str) -> bool:
    """Whether a class has a member; of a component's ports, whether its docstring names one."""
    named = re.findall(r"\w+", inspect.getdoc(thing) or "")
    return hasattr(thing, member) or member in getattr(thing, "__annotations__", {}) or member in named or (
        f"self.{member} " in inspect.getsource(thing))


OTHERS = {"AnnAttention", "Config(ecc_t=...)"}
"""Classes of other projects."""


def test_classes_and_members_that_are_named_exist():
    known = classes()
    missing = set()
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
            if found := re.fullmatch(r"([A-Z][a-z]+(?:[A-Z][a-z]+)*)(?:\.([a-z]\w*))?(?:\(.*|\[.*)?", code):
                class_name, member = found[1], found[2]
                if hasattr(builtins, class_name) or class_name in OTHERS:
                    continue
                things = known.get(class_name, [])
                if not (any(has(thing, member) for thing in things) if member else things):
                    missing.add(f"{name(page)}: {code}")
    assert missing == set()


LONG = 9
"""Characters of a piece of a message that can be recognised."""


def message_pieces() -> set[str]:
    """What strings of the host library say between their values, where that is long enough to be recognised."""
    found = set()
    for path in (ROOT / "host").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {piece for piece in found if len(piece) >= LONG}


def test_messages_of_the_troubleshooting_page_are_said():
    pieces = message_pieces()
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    messages = [cell for row in rows for cell in re.findall(r"`([^`]+)`", row) if " " in cell]
    assert len(messages) >= 40
    for message in messages:
        fragments = [part for part in re.split(r"\s*\.\.\.\s*", message) if len(part) >= LONG]
        assert any(piece in message or any(part in piece for part in fragments) for piece in pieces), message
