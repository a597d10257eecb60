"""From Amaranth's RTLIL to the one Verilog text that is simulated, synthesised and delivered.

Amaranth hands RTLIL to Yosys, and Yosys writes Verilog.  Between and behind the two:

- Wires without bits, which a layout's empty fields leave, are dropped: Verilog would give them two, ``[-1:0]``.
- A wire that Amaranth only numbers (``$12``) is named after the register it is the next value of (``level_next``), or
  after the line and the operator that it comes from (``ranker_88_add``).
- ``src`` attributes stay, with paths from the package on, so that the text does not depend on where it was written.
- All combinational blocks wake at time zero under Icarus, too (`waking`).
- A synchronous reset stands in the clocked block, not in the next value (`clocked_resets`).
- Equal initial contents of a memory are one loop (`looped_contents`).
"""

import functools
import re
from pathlib import Path

from amaranth.back import verilog

_MODULE = re.compile(r"^module \\(\S+)\n(.*?)^end$", re.MULTILINE | re.DOTALL)
_INTERNAL = re.compile(r"^ *attribute \\(?:generator|top|amaranth\.\S+) .*\n", re.MULTILINE)
_OPERATOR = re.compile(r"^  attribute \\src .*\n(?=  cell \$(?!dff|mem|print|check))", re.MULTILINE)
_EMPTY = re.compile(r"(?:^  attribute .*\n)*^  wire width 0 (\S+)\n\n?", re.MULTILINE)
_NOTHING = re.compile(r"^connect \S+ \{ +\}\n", re.MULTILINE)
_SOURCE = re.compile(r'(?<=attribute \\src ")([^"]+)(?=:\d+"$)', re.MULTILINE)
_AT = r'(?:^  attribute \\src "(?P<file>[^"]+):(?P<line>\d+)"\n)?(?:^  attribute [^\n]*\n)*'
_WIRE = re.compile(_AT + r"^  wire width (?P<width>\d+) .*?(?P<name>\S+)$", re.MULTILINE)
_ITEM = re.compile(_AT + r"^  (?:cell (?P<kind>\S+)|process) \S+\n(?P<body>.*?)^  end$", re.MULTILINE | re.DOTALL)
_UNNAMED = re.compile(r"\\\$[a-z]+(?:\$\d+)?(?P<rest>.*?)(?:\$\d+)?$")
_NUMBERED_PORT = re.compile(r"^    connect (\\port\$\d+\$\d+) (?:\{ )?(\S+)", re.MULTILINE)
_TOKEN = re.compile(r"(?<!\S)\\?\S*\$\S+")
_DRIVEN = re.compile(r"^ +(?:connect \\(?:Y|DATA)|assign) (\$\d+)(?!\S)", re.MULTILINE)
_NEXT = re.compile(r"^    connect \\D (\$\d+)(?: \[(\d+)(?::0)?\])?$", re.MULTILINE)
_STATE = re.compile(r"^    connect \\Q (\S+)", re.MULTILINE)

_WAKE = re.compile(r"reg (\\\$auto\$verilog_backend\S+dump_module\$\d+) += 0;")
"""A register that each combinational block of a module reads, so that its first value wakes them all.

Icarus 11 gives it that value before the blocks listen, and they keep X until an input changes (amaranth issues 594
and 1629); a non-blocking assignment comes late enough.  always_comb would wake them too, but Icarus 11 then listens to
all bits of a vector where one is selected, and went round in circles in one block of this engine."""
_WOKEN = r"""reg {0};
  // verilator lint_off INITIALDLY
  initial {0} <= 0;  // so late that all blocks listen
  // verilator lint_on INITIALDLY"""
_LONE = re.compile(r"always @\*\n( +[^\n;]+;)\n")
"""A block of one assignment, which Yosys writes without reading that register."""
_RESET = re.compile(r"^    if \(rst\) begin\n      (?P<next>\S+) +=\s(?P<value>\S+);\n    end\n  end\n", re.MULTILINE)
"""The end of a block that gives a register's next value."""
_CLOCKED = re.compile(r"^  always @\(posedge clk\)\n    (?P<state>.+) <= (?P<next>\S+) ?;\n", re.MULTILINE)
_CONTENTS = re.compile(
    r"^  initial begin\n    (?P<memory>\S+ ?)\[0\] = (?P<value>\S+);\n"
    r"(?:    (?P=memory)\[\d+\] = (?P=value);\n)+  end\n", re.MULTILINE)
_YOSYS = re.compile(r"\\\$auto\$[^:\s]+:\d+:([^$\s]+)\$(\d+) ")
"""A wire that Yosys adds."""


@functools.cache
def _from_package(path: str) -> str:
    """A source's path from its package on: kvattic_hdl/flash/ecc.py."""
    source = Path(path)
    folder = source.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return source.relative_to(folder).as_posix()


def _without_empty_wires(name: str, body: str) -> str:
    empty = set(_EMPTY.findall(body))
    body = _NOTHING.sub("", _EMPTY.sub("", body))
    if used := empty & set(body.split()):
        wires = ", ".join(sorted(used))
        raise ValueError(f"module {name} uses {wires}, which has no bits: give it some, or leave it out")
    return body


def _where(file: str, line: str) -> str:
    path = Path(file)
    return f"{path.parent.name if path.stem == '__init__' else path.stem}_{line}"


class _Names:
    """Names for what Amaranth only numbers in a module."""

    def __init__(self, body: str) -> None:
        self._new: dict[str, str] = {}
        self._taken = {token for token in body.split() if token.startswith("\\")}
        widths: dict[str, int] = {}
        for wire in _WIRE.finditer(body):
            name = wire["name"]
            widths[name] = int(wire["width"])
            if wire["file"] is not None and (unnamed := _UNNAMED.match(name)):
                self.add(name, _where(wire["file"], wire["line"]) + unnamed["rest"])
        wanted: dict[str, str] = {}
        for item in _ITEM.finditer(body):
            if item["kind"] == "$dff":
                following, state = _NEXT.search(item["body"]), _STATE.search(item["body"])
                if following and state and widths[following[1]] == int(following[2] or 0) + 1:
                    wanted[following[1]] = f"{self[state[1]][1:]}_next"
            elif item["file"] is not None:
                kind = item["kind"].removeprefix("$").partition("_")[0] if item["kind"] else "case"
                for driven in _DRIVEN.findall(item["body"]):
                    wanted.setdefault(driven, f"{_where(item['file'], item['line'])}_{kind}")
        for name in widths:
            if name.startswith("$"):
                self.add(name, wanted.get(name, "value"))

    def __getitem__(self, name: str) -> str:
        return self._new.get(name, name)

    def add(self, name: str, wanted: str) -> None:
        """Call a wire so, or so with a number behind it; the first call counts."""
        if name not in self._new:
            unique, number = f"\\{wanted}", 1
            while unique in self._taken:
                number += 1
                unique = f"\\{wanted}_{number}"
            self._taken.add(unique)
            self._new[name] = unique

    def rename(self, text: str) -> str:
        """The text with the new names."""
        return _TOKEN.sub(lambda token: self[token[0]], text)


def named(rtlil: str) -> str:
    """RTLIL with names instead of numbers, with paths that start at a package, and without wires that have no bits.

    Raises:
        ValueError: a wire without bits is used.
    """
    rtlil = _SOURCE.sub(lambda path: _from_package(path[1]), _INTERNAL.sub("", rtlil))
    names = {name: _Names(body) for name, body in _MODULE.findall(rtlil)}
    for name, body in _MODULE.findall(rtlil):  # those that have instances of a module come before it
        for item in _ITEM.finditer(body):
            if (inner := names.get((item["kind"] or "")[1:])) is not None:
                for port, outside in _NUMBERED_PORT.findall(item["body"]):
                    inner.add(port, names[name][outside].lstrip("\\"))

    def module(found: re.Match[str]) -> str:
        name, body = found.groups()
        lines = []
        inner = None
        for line in _OPERATOR.sub("", _without_empty_wires(name, body)).splitlines():
            if line.startswith("  cell "):
                inner = names.get(line.split()[1][1:])
            if "$" in line:
                if inner is not None and line.startswith("    connect "):
                    port, outside = line.split(maxsplit=2)[1:]
                    line = f"    connect {inner[port]} {names[name].rename(outside)}"
                else:
                    line = names[name].rename(line)
            lines.append(line)
        return "\n".join([f"module \\{name}", *lines, "end"])

    return _MODULE.sub(module, rtlil)


def _unused(name: str, text: str) -> str:
    while re.search(rf"\b{name}\b", text):
        name += "_"
    return name


def waking(text: str) -> str:
    """Verilog with all blocks woken at time zero under Icarus, too."""
    modules = re.split(r"(?m)^(?=module )", text)
    for number, module in enumerate(modules):
        if found := _WAKE.search(module):
            name = _unused("wake", module)
            module = _LONE.sub(rf"always @* begin if ({name}) begin end\n\1 end\n", module)
            module = _WAKE.sub(_WOKEN.format(name), module)
            modules[number] = module.replace(f"{found[1]} ", name)
    return "".join(modules)


def _with_clocked_resets(module: str) -> str:
    values = {found["next"]: found["value"] for found in _RESET.finditer(module)}
    clocked = {found["next"] for found in _CLOCKED.finditer(module)} & set(values)

    def block(found: re.Match[str]) -> str:
        return "  end\n" if found["next"] in clocked else found[0]

    def register(found: re.Match[str]) -> str:
        if found["next"] not in clocked:
            return found[0]
        state, following = found["state"], found["next"]
        end = " " if following.startswith("\\") else ""  # an escaped name ends with a space
        return (f"  always @(posedge clk)\n    if (rst) {state} <= {values[following]};\n"
                f"    else {state} <= {following}{end};\n")

    return _CLOCKED.sub(register, _RESET.sub(block, module))


def clocked_resets(text: str) -> str:
    """Verilog whose registers take their reset's value in the clocked block.

    Where a module's `rst` is an input, what gives a next value would else depend on it, and so would all logic between
    registers: a simulator would evaluate all of it anew for each change of the input.
    """
    return "".join(map(_with_clocked_resets, re.split(r"(?m)^(?=module )", text)))


def looped_contents(text: str) -> str:
    """Verilog with one loop where a memory's initial contents are all equal."""
    def loop(found: re.Match[str]) -> str:
        memory, words = found["memory"], found[0].count("\n") - 2
        label = f"fill_{re.sub(r'[^A-Za-z0-9_]', '_', memory.strip())}"
        return (f"  initial begin : {label}\n    integer {label}_at;\n"
                f"    for ({label}_at = 0; {label}_at < {words}; {label}_at = {label}_at + 1)\n"
                f"      {memory}[{label}_at] = {found['value']};\n  end\n")

    return _CONTENTS.sub(loop, text)


def _yosys_named(text: str) -> str:
    names = {wire: _unused(f"yosys_{kind.lower()}_{number}", text)
             for wire, kind, number in {(found[0], found[1], found[2]) for found in _YOSYS.finditer(text)}}
    return _YOSYS.sub(lambda wire: names[wire[0]], text)


def verilog_of(rtlil: str) -> str:
    """The Verilog of Amaranth's RTLIL; what it changes is said above."""
    text = looped_contents(clocked_resets(verilog._convert_rtlil_text(named(rtlil))))
    return _yosys_named(waking(text))
