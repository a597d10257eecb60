"""Modules that Verilator compiles by themselves: once, however many instances, models and channel counts use them.

In the model, an instance of such a module is a shell that calls its compiled code once a cycle, at the rising edge of
`clk`, with the inputs as they were before the edge; the outputs change with it.  Therefore

- all state of the module changes at the rising edge of its input `clk`, and
- no output depends on an input within a cycle.

Tests hold both for the RTL (tests/unit/test_hdl_shared.py).  Where the inputs lead to registers without much logic,
nothing is evaluated twice.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Port", "glue", "modules_of", "needed", "ports_of", "shell", "without"]

_MODULE = re.compile(r"^(?:\(\*[^\n]*\*\)\n)*module\s+(\\\S+|\w+).*?^endmodule[^\n]*\n?", re.MULTILINE | re.DOTALL)
_TOKEN = re.compile(r"\\\S+|\w+")
_PORT = re.compile(r"^ +VL_(IN|OUT)(8|16|64|W|)\(&(\w+),(\d+),0(?:,\d+)?\);", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a compiled module.

    Attributes:
        name: in Verilog.
        member: in the C++ class.
        width: in bits.
        output: its direction.
    """

    name: str
    member: str
    width: int
    output: bool

    @property
    def verilog_type(self) -> str:
        """The type that carries it between the languages."""
        if self.width == 1:
            return "bit"
        if self.width <= 32:
            return "int unsigned"
        return "longint unsigned" if self.width <= 64 else f"bit [{self.width - 1}:0]"

    @property
    def declaration(self) -> str:
        """Its parameter in C."""
        if self.width > 64:
            return f"{'' if self.output else 'const '}svBitVecVal* {self.member}"
        kind = "svBit" if self.width == 1 else "unsigned int" if self.width <= 32 else "unsigned long long"
        return f"{kind}{'*' if self.output else ''} {self.member}"

    @property
    def assignment(self) -> str:
        """What copies it from or to the parameter."""
        words = -(-self.width // 32)
        if self.width > 64:
            ours, its = self.member, f"its->{self.member}.data()"
            to, source = (ours, its) if self.output else (its, ours)
            return f"std::memcpy({to}, {source}, {4 * words});"
        return f"*{self.member} = its->{self.member};" if self.output else f"its->{self.member} = {self.member};"


def modules_of(texts: Iterable[str]) -> dict[str, str]:
    """The Verilog modules in some texts, by name."""
    return {found[1].lstrip("\\"): found[0] for text in texts for found in _MODULE.finditer(text)}


def without(text: str, names: Iterable[str]) -> str:
    """A text without the modules of these names."""
    names = set(names)
    return _MODULE.sub(lambda found: "" if found[1].lstrip("\\") in names else found[0], text)


def needed(modules: Mapping[str, str], roots: Iterable[str], borders: Iterable[str] = ()) -> list[str]:
    """Names of the modules that these need, themselves included, in the order of `modules`.

    Args:
        modules: all of them, name to text.
        roots: where to begin.
        borders: modules that are not looked into, unless they are roots.
    """
    found: set[str] = set()
    closed = set(borders) - set(roots)
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in closed:
            found.add(name)
            waiting += {token.lstrip("\\") for token in _TOKEN.findall(modules[name])} & modules.keys()
    return [name for name in modules if name in found]


def ports_of(header: str) -> list[Port]:
    """The ports of a compiled module, by the header of its class."""
    return [Port(name=re.sub(r"__0([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), member.removeprefix("__SYM__")),
                 member=member, width=int(top) + 1, output=direction == "OUT")
            for direction, _, member, top in _PORT.findall(header)]


def shell(module: str, ports: Sequence[Port]) -> str:
    """The module that stands for a compiled one in the model."""
    inputs = [port for port in ports if not port.output and port.name != "clk"]
    outputs = [port for port in ports if port.output]

    def arguments(direction: str, of: Sequence[Port]) -> str:
        # Names with an end, for a word of C++ may not stand here.
        return "".join(f",\n    {direction} {port.verilog_type} {port.name}_now" for port in of)

    heads = [f"{'output reg' if port.output else 'input'} [{port.width - 1}:0] {port.name}" for port in ports]
    given = "".join(f", {port.name}" for port in inputs)
    taken = "".join(f", {port.name}_now" for port in outputs)
    return "\n".join([
        f"module {module} (\n  {(',' + chr(10) + '  ').join(heads)}\n);",
        f'  import "DPI-C" function chandle {module}_create();',
        f'  import "DPI-C" function void {module}_show(input chandle its_state{arguments("output", outputs)});',
        f'  import "DPI-C" function void {module}_step(input chandle its_state{arguments("input", inputs)}'
        f'{arguments("output", outputs)});',
        f'  import "DPI-C" function void {module}_end(input chandle its_state);',
        "  chandle its_state;",
        *(f"  {port.verilog_type} {port.name}_now;" for port in outputs),
        "  initial begin",
        f"    its_state = {module}_create();",
        f"    {module}_show(its_state{taken});",
        *(f"    {port.name} = {port.name}_now{_bits(port)};" for port in outputs),
        "  end",
        "  always @(posedge clk) begin",
        f"    {module}_step(its_state{given}{taken});",
        *(f"    {port.name} <= {port.name}_now{_bits(port)};" for port in outputs),
        "  end",
        f"  final {module}_end(its_state);",
        "endmodule",
        "",
    ])


def _bits(port: Port) -> str:
    whole = port.width == 1 or port.width in (32, 64) or port.width > 64
    return "" if whole else f"[{port.width - 1}:0]"


def glue(module: str, prefix: str, ports: Sequence[Port], root_header: str) -> str:
    """The C++ that the shell calls.

    Args:
        module: its name.
        prefix: of its class.
        ports: its ports.
        root_header: text of the header of its state.
    """
    outputs = [port for port in ports if port.output]
    inputs = [port for port in ports if not port.output and port.name != "clk"]

    def parameters(of: Sequence[Port]) -> str:
        return "".join(f", {port.declaration}" for port in of)

    # With the edge's memory cleared, the clock need not fall, which would cost an evaluation.
    edge = re.search(r"\b(__Vtrigprevexpr___TOP__clk__\d+)\b", root_header)
    fall = f"its->rootp->{edge[1]} = 0;" if edge else "its->clk = 0; its->eval();"
    return "\n".join([
        "#include <cstring>",
        "#include <string>",
        f'#include "{prefix}.h"',
        f'#include "{prefix}___024root.h"',
        '#include "svdpi.h"',
        "static int created;",
        f"static inline void show({prefix}* its{parameters(outputs)}) {{",
        *(f"  {port.assignment}" for port in outputs),
        "}",
        'extern "C" {',
        f"void* {module}_create() {{",
        f'  const std::string name = "{module}_" + std::to_string(created++);',
        f"  auto* its = new {prefix}{{Verilated::threadContextp(), name.c_str()}};",
        "  its->eval();",
        "  return its;",
        "}",
        f"void {module}_show(void* handle{parameters(outputs)}) {{",
        f"  show(static_cast<{prefix}*>(handle){''.join(f', {port.member}' for port in outputs)});",
        "}",
        f"void {module}_step(void* handle{parameters([*inputs, *outputs])}) {{",
        f"  auto* const its = static_cast<{prefix}*>(handle);",
        *(f"  {port.assignment}" for port in inputs),
        "  its->clk = 1;",
        "  its->eval();",
        f"  {fall}",
        f"  show(its{''.join(f', {port.member}' for port in outputs)});",
        "}",
        f"void {module}_end(void* handle) {{",
        f"  auto* const its = static_cast<{prefix}*>(handle);",
        "  its->final();",
        "  delete its;",
        "}",
        "}",
        "",
    ])
