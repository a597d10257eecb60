"""Blocks that stand in the engine many times, written to Verilog once.

Amaranth writes a module for each instance.  Where the platform is a `Netlist`, `shared` puts an instance of a module
that the netlist keeps once; everywhere else (Amaranth's simulator, formal) it is the block itself.
"""

from collections.abc import Callable

from amaranth.back import rtlil
from amaranth.hdl import ClockSignal, Elaboratable, Instance, Module, ResetInserter, ResetSignal, Signal, ValueCastable
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring

from kvattic_hdl.verilog.text import verilog_of


def ports(component: wiring.Component, name: Callable[..., str] = lambda *path: "__".join(map(str, path))) -> dict:
    """The component's members as Verilog ports: name -> (signal, direction); those without bits are none."""
    result = {}
    for path, member, value in component.signature.flatten(component):
        if isinstance(value, ValueCastable):
            value = value.as_value()
        direction = PortDirection.Input if member.flow == wiring.In else PortDirection.Output
        if len(value):
            result[name(*path)] = (value, direction)
    return result


class Netlist:
    """A platform that collects shared modules.

    Attributes
    ----------
    modules : dict of str to str
        Verilog text by module name, inner modules before those that use them.
    """

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self._signatures: dict[str, wiring.Signature] = {}

    def add(self, name: str, make: Callable[[], wiring.Component]) -> wiring.Signature:
        """Write the component as module `name`, once; returns its signature."""
        if name not in self._signatures:
            component = make()
            self._signatures[name] = component.signature
            text = self.convert(component, name, ports(component))
            self.modules[name] = text
        return self._signatures[name]

    def convert(self, elaboratable: Elaboratable, name: str, module_ports: dict) -> str:
        """Verilog of one module (and those below it that are not shared)."""
        return verilog_of(rtlil.convert(elaboratable, name=name, platform=self, ports=module_ports))


class _Shared(wiring.Component):
    """Stands where the component would: the same members, an instance inside."""

    def __init__(self, name: str, signature: wiring.Signature, reset: Signal | None) -> None:
        self._name = name
        self._reset = reset
        super().__init__(signature)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        reset = ResetSignal() if self._reset is None else ResetSignal() | self._reset
        connections = {"i_clk": ClockSignal(), "i_rst": reset}
        for port, (value, direction) in ports(self).items():
            connections[("i_" if direction is PortDirection.Input else "o_") + port] = value
        m.submodules.instance = Instance(self._name, **connections)
        return m


def shared(platform: object, name: str, make: Callable[[], wiring.Component], reset: Signal | None = None):
    """(what to talk to, what to make a submodule of) for one of several equal components.

    Parameters
    ----------
    platform : object
        What `elaborate` was given.
    name : str
        Module name in a netlist.
    make : callable
        Makes one instance; all that are given the same name must be equal.
    reset : Signal
        Resets it beside its domain's reset.
    """
    if isinstance(platform, Netlist):
        stand_in = _Shared(name, platform.add(name, make), reset)
        return stand_in, stand_in
    component = make()
    return component, component if reset is None else ResetInserter(reset)(component)
