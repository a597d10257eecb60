"""The modules of a Verilog text as `kvattic_hdl` writes it: what each instantiates, and what names its content."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_MODULE = re.compile(r"^module .*?^endmodule", re.MULTILINE | re.DOTALL)
_ATTRIBUTE = re.compile(r"^\s*\(\* (?:src|init) = .*?\*\)\n", re.MULTILINE)
_HEADER = re.compile(r"^module (\S+?)\s*\((.*?)\);", re.DOTALL)
_PORT = re.compile(r"^  (?:input|output|inout)\b[^;]*;", re.MULTILINE)
_INSTANCE = re.compile(r"^  (\\?\S+)\s+(\\?\S+)\s*\(\n", re.MULTILINE)
_ESCAPED = re.compile(r"\\\S*\[\S*")


def _unlike_a_bit(text: str) -> str:
    """Escaped names such as a[0], which Yosys would take for bit 0 of a when it gives bits names, as a<0>."""
    return _ESCAPED.sub(lambda found: found.group().replace("[", "<").replace("]", ">"), text)


def _plain(name: str) -> str:
    return name.removeprefix("\\")


def _spelled(name: str) -> re.Pattern[str]:
    """The module's name where it is written as a word of its own, escaped or not."""
    return re.compile(rf"(?<=\s)\\?{re.escape(name)}(?=[\s(])")


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        name: without the backslash of an escaped identifier.
        text: from `module` to `endmodule`, without source attributes.
        instances: name of the module of each instance, by the instance's name; those of primitives are not there.
    """

    name: str
    text: str
    instances: Mapping[str, str]

    @cached_property
    def stub(self) -> str:
        """Its ports alone, as the body of a black box: text from the bracket of the header on."""
        header = _HEADER.match(self.text)
        if header is None:
            raise ValueError(f"module {self.name} has no list of ports")
        return f"({header.group(2)});\n" + "\n".join(_PORT.findall(self.text)) + "\nendmodule\n"

    @cached_property
    def interface(self) -> str:
        """Name of its black box: equal for modules with equal ports."""
        return "port_" + hashlib.sha256(self.stub.encode()).hexdigest()[:16]

    def named(self, name: str, modules: Mapping[str, "Module"]) -> str:
        """Its text under another name, with black boxes for what it instantiates."""
        text = _spelled(self.name).sub(name, self.text, count=1)
        for child in set(self.instances.values()):
            text = _spelled(child).sub(modules[child].interface, text)
        return text

    def key(self, modules: Mapping[str, "Module"], salt: str) -> str:
        """Names its content: its text and its children's ports, and what else the result depends on."""
        return hashlib.sha256(f"{salt}\n{self.named('self', modules)}".encode()).hexdigest()[:24]


def split(text: str) -> dict[str, Module]:
    """The modules of a text, by name.

    Args:
        text: Verilog as `kvattic_hdl.verilog_text` writes it.

    Raises:
        ValueError: it has no module.
    """
    bodies: dict[str, str] = {}
    for body in _MODULE.findall(_unlike_a_bit(_ATTRIBUTE.sub("", text))):
        header = _HEADER.match(body)
        if header is not None:
            bodies[_plain(header.group(1))] = body
    if not bodies:
        raise ValueError("the text has no Verilog module: it must be what kvattic_hdl.verilog_text returns")
    return {name: Module(name, body, {_plain(instance): _plain(child) for child, instance in _INSTANCE.findall(body)
                                      if _plain(child) in bodies})
            for name, body in bodies.items()}
