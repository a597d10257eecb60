"""Modules that Verilator compiles by themselves: once, however many instances, models and channel counts use them.

In the model, an instance of such a module is a shell that calls the compiled code once a cycle, at the rising edge of
`clk`, with the inputs as they were before the edge; the outputs change with it.  Therefore

- all state of the module changes at the rising edge of its input `clk`, and
- no output depends on an input within a cycle.

Tests hold both (tests/hdl/test_borders.py).  An input that changed is taken before the edge, which evaluates what is
behind it once more; where inputs rarely change, or lead to registers without much logic, that costs little.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Port", "glue", "modules_of", "needed", "ports_of", "shell", "wrapper", "wrapper_name"]

_MODULE = re.compile(r"^(?:\(\*[^\n]*\*\)\n)*module\s+(\\\S+|\w+).*?^endmodule[^\n]*\n?", re.MULTILINE | re.DOTALL)
_TOKEN = re.compile(r"\\\S+|\w+")
_PORT = re.compile(r"\b(input|output)\s+(?:reg\s+|wire\s+)?(?:\[(\d+):0\]\s*)?(\w+)\s*(?=[,;)])")


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a module, but for its clock.

    Attributes:
        name: in Verilog.
        width: in bits.
        output: its direction.
        alias: its name where a word of C++ may not stand.
        sample: of an input: the signal whose rise makes the compiled module take it. A stream's inputs have one.
    """

    name: str
    width: int
    output: bool
    alias: str
    sample: str = ""

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
            return f"{'' if self.output else 'const '}svBitVecVal* {self.alias}"
        kind = "svBit" if self.width == 1 else "unsigned int" if self.width <= 32 else "unsigned long long"
        return f"{kind}{'*' if self.output else ''} {self.alias}"

    @property
    def assignment(self) -> str:
        """Statements that copy it from or to the parameter; of an input only if it is not what it was."""
        size = 4 * -(-self.width // 32)
        if self.output:
            return (f"std::memcpy({self.alias}, its->{self.alias}.data(), {size});" if self.width > 64
                    else f"*{self.alias} = its->{self.alias};")
        if self.width > 64:
            return (f"if (std::memcmp(its->{self.alias}.data(), {self.alias}, {size})) {{ its->{self.sample} = 1; "
                    f"std::memcpy(its->{self.alias}.data(), {self.alias}, {size}); }}")
        return (f"if (its->{self.alias} != {self.alias}) {{ its->{self.sample} = 1; "
                f"its->{self.alias} = {self.alias}; }}")


def modules_of(texts: Iterable[str]) -> dict[str, str]:
    """The Verilog modules in some texts, by name."""
    return {found[1].lstrip("\\"): found[0] for text in texts for found in _MODULE.finditer(text)}


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


def ports_of(module: str) -> list[Port]:
    """The ports of a module but for `clk`, by its text; all ranges must be numbers.

    Raises:
        ValueError: it has no `clk`.
    """
    found = [(direction == "output", int(top or 0) + 1, name) for direction, top, name in _PORT.findall(module)]
    if (False, 1, "clk") not in found:
        raise ValueError("a module that is compiled by itself needs an input clk")
    found.remove((False, 1, "clk"))
    groups = list(dict.fromkeys(name.rpartition("__")[0] or name for output, _, name in found if not output))
    return [Port(name, width, output, f"{'o' if output else 'i'}{number}",
                 "" if output else f"s{groups.index(name.rpartition('__')[0] or name)}")
            for number, (output, width, name) in enumerate(found)]


def _samples(ports: Sequence[Port]) -> list[str]:
    return list(dict.fromkeys(port.sample for port in ports if port.sample))


def wrapper(module: str, ports: Sequence[Port]) -> str:
    """The module that is compiled, around the one that is meant; its name is `wrapper_name`.

    It takes an input when its sample signal rises: so what is behind inputs that did not change is not evaluated.
    """
    heads = ["input clk", *(f"input {sample}" for sample in _samples(ports)),
             *(f"{'output' if port.output else 'input'} [{port.width - 1}:0] {port.alias}" for port in ports)]
    signals = [".clk(clk)", *(f".{port.name}({port.alias}{'' if port.output else '_q'})" for port in ports)]
    taken = [line for port in ports if not port.output for line in (
        f"  reg [{port.width - 1}:0] {port.alias}_q = 0;",
        f"  always @(posedge {port.sample}) {port.alias}_q <= {port.alias};")]
    return "\n".join([f"module {wrapper_name(module)} (\n  {(',' + chr(10) + '  ').join(heads)}\n);", *taken,
                      f"  {module} meant ({', '.join(signals)});", "endmodule", ""])


def wrapper_name(module: str) -> str:
    """Name of the module around a module."""
    return f"{module}_separate"


def shell(module: str, ports: Sequence[Port]) -> str:
    """The module that stands for a compiled one in the model."""
    inputs = [port for port in ports if not port.output]
    outputs = [port for port in ports if port.output]

    def arguments(direction: str, of: Sequence[Port]) -> str:
        return "".join(f",\n    {direction} {port.verilog_type} {port.alias}" for port in of)

    heads = ["input clk", *(
        f"{'output reg' if port.output else 'input'} [{port.width - 1}:0] {port.name}" for port in ports)]
    given = "".join(f", {port.name}" for port in inputs)
    taken = "".join(f", {port.alias}" for port in outputs)
    return "\n".join([
        f"module {module} (\n  {(',' + chr(10) + '  ').join(heads)}\n);",
        f'  import "DPI-C" function chandle {module}_create();',
        f'  import "DPI-C" function void {module}_show(input chandle its_state{arguments("output", outputs)});',
        f'  import "DPI-C" function void {module}_step(input chandle its_state{arguments("input", inputs)}'
        f'{arguments("output", outputs)});',
        f'  import "DPI-C" function void {module}_end(input chandle its_state);',
        "  chandle its_state;",
        *(f"  {port.verilog_type} {port.alias};" for port in outputs),
        "  initial begin",
        f"    its_state = {module}_create();",
        f"    {module}_show(its_state{taken});",
        *(f"    {port.name} = {port.alias}{_bits(port)};" for port in outputs),
        "  end",
        "  always @(posedge clk) begin",
        f"    {module}_step(its_state{given}{taken});",
        *(f"    {port.name} <= {port.alias}{_bits(port)};" for port in outputs),
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
        prefix: of the class of `wrapper`.
        ports: its ports.
        root_header: text of the header of its state.
    """
    outputs = [port for port in ports if port.output]
    inputs = [port for port in ports if not port.output]
    samples = _samples(ports)
    edges = {found[2]: found[1] for found in re.finditer(r"\b(__Vtrigprevexpr___TOP__(\w+?)__\d+)\b", root_header)}

    def parameters(of: Sequence[Port]) -> str:
        return "".join(f", {port.declaration}" for port in of)

    def fall(signal: str) -> str:
        # With the edge's memory cleared, nothing has to be evaluated for the fall.
        return f"its->{signal} = 0; its->rootp->{edges[signal]} = 0;" if signal in edges else f"its->{signal} = 0;"

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
        f"  show(static_cast<{prefix}*>(handle){''.join(f', {port.alias}' for port in outputs)});",
        "}",
        f"void {module}_step(void* handle{parameters([*inputs, *outputs])}) {{",
        f"  auto* const its = static_cast<{prefix}*>(handle);",
        *(f"  {port.assignment}" for port in inputs),
        *([f"  if ({' | '.join(f'its->{sample}' for sample in samples)}) {{",
           "    its->eval();",
           *(f"    {fall(sample)}" for sample in samples),
           "  }"] if samples else []),
        "  its->clk = 1;",
        "  its->eval();",
        f"  {fall('clk')}",
        *([] if "clk" in edges else ["  its->eval();"]),
        f"  show(its{''.join(f', {port.alias}' for port in outputs)});",
        "}",
        f"void {module}_end(void* handle) {{",
        f"  auto* const its = static_cast<{prefix}*>(handle);",
        "  its->final();",
        "  delete its;",
        "}",
        "}",
        "",
    ])
