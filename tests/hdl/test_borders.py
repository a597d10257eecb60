"""What is compiled by itself (`kvattic_sim.simulators.separate`): no output depends on an input within a cycle."""

import re
from collections import defaultdict
from collections.abc import Iterable
from importlib import resources

import pytest
from amaranth.hdl import Fragment, Module, Signal, _nir
from amaranth.hdl._ir import build_netlist
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import BOARD, GQA, TINY, Config
from kvattic.spec.scheduling import channels_of_corrector
from kvattic_hdl.flash.channel import FlashChannel
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.lane.lane import Lane
from kvattic_hdl.verilog.shared import ports

STATE = (_nir.FlipFlop, _nir.Memory, _nir.SyncReadPort)


def source(net: _nir.Net) -> object:
    """The number of the cell that drives a net, or the bit of the input that it is."""
    return ("input", net.bit) if net.cell == 0 else net.cell


def paths(component: wiring.Component) -> dict[str, set[str]]:
    """For each input the outputs that depend on it within a cycle; those of none are left out."""
    netlist = build_netlist(Fragment.get(component, None), ports(component))
    readers = defaultdict(list)
    for number, cell in enumerate(netlist.cells):
        if not isinstance(cell, _nir.Top):
            for net in cell.input_nets():
                if not net.is_const:
                    readers[source(net)].append(number)
    shown = defaultdict(set)
    for name, value in netlist.top.ports_o.items():
        for net in value:
            if not net.is_const:
                shown[source(net)].add(name)

    def reached(begin: Iterable[object]) -> set[str]:
        waiting, seen, found = list(begin), set(), set()
        while waiting:
            place = waiting.pop()
            if place not in seen:
                seen.add(place)
                found |= shown[place]
                waiting += [n for n in readers[place] if not isinstance(netlist.cells[n], STATE)]
        return found

    result = {}
    for name, (first, width) in netlist.top.ports_i.items():
        if name != "clk" and (found := reached(("input", bit) for bit in range(first, first + width))):
            result[name] = found
    return result


def corrector(config: Config) -> Corrector:
    return Corrector(config, channels_of_corrector(config))


@pytest.mark.parametrize("config", [TINY, BOARD, GQA], ids=["tiny", "board", "gqa"])
@pytest.mark.parametrize("block", [Lane, FlashChannel, corrector])
def test_no_output_depends_on_an_input(block, config):
    assert paths(block(config)) == {}


class Through(wiring.Component):
    """Has one path from an input to an output, through two operators, and one through a register."""

    def __init__(self) -> None:
        super().__init__({"a": In(4), "b": In(4), "now": Out(4), "later": Out(4)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sum_ = Signal(4)
        m.d.comb += [sum_.eq(self.a + 1), self.now.eq(sum_ ^ 3)]
        m.d.sync += self.later.eq(self.b)
        return m


def test_a_path_is_found():
    assert paths(Through()) == {"a": {"now"}}


@pytest.mark.parametrize("twin", ["nand_channel", "flash_channel"])
def test_twins_are_clocked_processes(twin):
    text = (resources.files("kvattic_sim") / "verilog" / f"{twin}.sv").read_text()
    text = re.sub(r"//.*", "", text)
    assert re.findall(r"\balways\b[^\n]*", text) == ["always @(posedge clk) begin"]
    assert not re.search(r"\bassign\b|\balways_\w+|\bwire\b", text)
    assert all("output reg" in line for line in text.splitlines() if re.match(r"\s*output\b", line))
