"""The delivered Verilog: the text that is simulated, readable, clean to Verilator's lint, alive under Icarus."""

import errno
import re
import subprocess
from pathlib import Path

import pytest
from amaranth.back import rtlil
from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import TINY
from kvattic_hdl import PhyShapes
from kvattic_hdl.verilog import netlist
from kvattic_hdl.verilog.shared import Netlist, ports
from kvattic_hdl.verilog.text import clocked_resets, looped_contents, named, verilog_of, waking
from kvattic_sim.nand.files import nand_parameters
from kvattic_sim.rtl.testbench import rtl_verilog
from kvattic_sim.simulators.build import icarus_available, verilator_environment

ROOT = Path(__file__).parents[2]
NAND = ROOT / "sim" / "kvattic_sim" / "verilog" / "nand_channel.sv"
NAME = "kvattic_tiny.v"


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    return netlist.generate(TINY, tmp_path_factory.mktemp("build") / NAME)


@pytest.fixture(scope="module")
def text(delivered):
    return delivered.read_text()


def test_it_is_the_text_that_is_simulated(text, tmp_path):
    assert rtl_verilog(TINY, netlist.TOP, build_root=tmp_path).read_text() == text


def test_no_wire_is_empty_and_none_has_a_number_for_a_name(text):
    assert "[-1:0]" not in text
    assert not re.findall(r"\\\$\S*", text)
    assert not re.findall(r"\\port\$\S*", text)


def test_registers_and_their_next_values_say_where_they_come_from(text):
    assert re.search(r'\(\* src = "kvattic_hdl/sparse/ranker\.py:\d+" \*\)\n +reg \[', text)
    assert re.search(r'\(\* src = "kvattic_hdl/flash/\w+\.py:\d+" \*\)\n +reg ', text)
    assert re.search(r"^ +reg (\[\S+ )?level_next;$", text, re.MULTILINE)
    assert re.search(r"^ +wire (\[\S+ )?ranker_\d+_add(_\d+)?;$", text, re.MULTILINE)


def test_it_does_not_depend_on_where_it_was_written(text):
    sources = {source for found in re.findall(r'src = "([^"]+)"', text) for source in found.split("|")}
    assert {source.partition("/")[0] for source in sources if "/" in source} == {"kvattic_hdl", "amaranth"}
    assert str(ROOT) not in text


# ---------------------------------------------------------------- lint


def lint(verilog: Path, top: str) -> tuple[int, str]:
    """What Verilator finds, and its status."""
    done = subprocess.run(
        ["verilator_bin", "--lint-only", "-Wall", "--top-module", top, str(verilog.with_suffix(".vlt")), str(verilog)],
        env=verilator_environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_verilator_finds_nothing_in_the_drive(delivered):
    assert lint(delivered, "kvattic_drive") == (0, "")


def test_verilator_finds_nothing_in_the_engine_alone(tmp_path):
    assert lint(netlist.generate(TINY, tmp_path / "engine.v", "kvattic_engine"), "kvattic_engine") == (0, "")


FAULTS = {
    "LATCH": "reg latch; always @* if (clk) latch = rst;",
    "UNDRIVEN": "wire undriven; wire reader = undriven;",
    "WIDTHTRUNC": "wire [1:0] narrow = s_axil_wdata;",
    "PINMISSING": "kvattic_cell lonely (.clk(clk));",
}


def test_waivers_hide_no_fault(delivered, text, tmp_path):
    path = tmp_path / NAME
    path.write_text(re.sub(r"(module kvattic_drive\(.*?\);)", lambda head: "\n".join([head[1], *FAULTS.values()]), text,
                           flags=re.DOTALL))
    path.with_suffix(".vlt").write_text(delivered.with_suffix(".vlt").read_text())
    assert set(re.findall(r"^%Warning-(\w+):", lint(path, "kvattic_drive")[1], re.MULTILINE)) == set(FAULTS)


def test_each_waiver_has_a_reason_and_hides_something(delivered, tmp_path):
    lines = delivered.with_suffix(".vlt").read_text().splitlines()
    waivers = [number for number, line in enumerate(lines) if line.startswith("lint_off")]
    for number in waivers:
        before = lines[:number]
        while before[-1].startswith("lint_off"):
            before.pop()
        assert before[-1].startswith("//"), f"no reason for {lines[number]}"
        assert f'-file "*{NAME}" -match "' in lines[number]
    path = tmp_path / NAME
    path.write_bytes(delivered.read_bytes())
    path.with_suffix(".vlt").write_text("`verilator_config\n")
    found = set(re.findall(r"^%Warning-(\w+):", lint(path, "kvattic_drive")[1], re.MULTILINE))
    assert found == {re.findall(r"-rule (\w+)", lines[number])[0] for number in waivers}


# ---------------------------------------------------------------- Icarus


def bench(text: str, reset: str) -> str:
    """The drive with dies on its PHYs and a host that does nothing; says which command cycles the dies see."""
    head = text[text.index("module kvattic_drive("):]
    members = re.findall(r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", head[:head.index("endmodule")], re.MULTILINE)
    body = ["reg clk = 0;", "always #1 clk = ~clk;", reset, "initial #1000 $finish;"]
    for direction, top, name in members:
        if name not in ("clk", "rst"):
            idle = " = 0" if direction == "input" and not name.startswith("phy") else ""
            body.append(f"wire [{top or 0}:0] {name}{idle};")
    body.append(f"kvattic_drive drive ({', '.join(f'.{name}({name})' for _, _, name in members)});")
    for channel in range(TINY.channels):
        phy = [name for _, _, name in members if name.startswith(f"phy{channel}_")]
        signals = [".clk(clk)", ".rst(rst)", f".channel({channel})", ".configure(1'b0)", ".load(1'b0)", ".dump(1'b0)",
                   *(f".{name.partition('_')[2]}({name})" for name in phy)]
        parameters = nand_parameters(TINY, frames=4)
        body += [
            f"nand_channel #({', '.join(f'.{k}({v})' for k, v in parameters.items())}) "
            f"nand{channel} ({', '.join(signals)});",
            f"always @(posedge clk) if (!rst && phy{channel}_cycles_valid !== 0 && phy{channel}_cycles_ready)",
            f'  $display("cycle {channel} %b %b", phy{channel}_cycles_valid, phy{channel}_cycles_payload);']
    return "module bench;\n" + "\n".join(body) + "\nendmodule\n"


def first_cycles(text: str, reset: str, folder: Path) -> set[tuple[int, str, str]]:
    """Channel, valid and payload of each command cycle in the first 500 clocks, under Icarus."""
    (folder / NAME).write_text(text)
    (folder / "bench.v").write_text(bench(text, reset))
    subprocess.run(["iverilog", "-g2012", "-s", "bench", "-o", "bench.vvp", "bench.v", NAME, str(NAND)], cwd=folder,
                   check=True, capture_output=True)
    done = subprocess.run(["vvp", "bench.vvp"], cwd=folder, check=True, capture_output=True, text=True)
    return {(int(channel), valid, payload)
            for channel, valid, payload in re.findall(r"^cycle (\d+) (\S+) (\S+)$", done.stdout, re.MULTILINE)}


RESETS = {
    "from the start": "reg rst = 1; initial #9 rst = 0;",
    "late": "reg rst = 0; initial begin #9 rst = 1; #9 rst = 0; end",
    "never": "wire rst = 0;",
}


@pytest.mark.icarus
@pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")
class TestIcarus:
    """Blocks that never woke gave the dies X for a command."""

    @pytest.mark.parametrize("reset", RESETS)
    def test_each_die_is_reset_first(self, text, reset, tmp_path):
        cycle = PhyShapes(TINY).cycle
        resets = {cycle.const({"target": die, "address": 0, "byte": 0xFF}).as_bits() for die in range(TINY.dies)}
        assert first_cycles(text, RESETS[reset], tmp_path) == {
            (channel, "1", f"{bits:0{cycle.size}b}") for channel in range(TINY.channels) for bits in resets}

    def test_without_waking_the_dies_see_x(self, text, tmp_path):
        asleep = re.sub(r"reg (wake_*);\n.*\n +initial \1 <= 0;", r"reg \1 = 0;", text)
        assert asleep != text
        assert any("x" in valid + payload for _, valid, payload in first_cycles(asleep, RESETS["never"], tmp_path))


# ---------------------------------------------------------------- what becomes of RTLIL


class Small(wiring.Component):
    """A memory of one row, a field without bits, signals without names, a module below."""

    class Below(wiring.Component):
        """Takes part of something that has no name."""

        i: In(4)
        o: Out(5)

        def elaborate(self, platform):
            m = Module()
            m.d.sync += self.o.eq(self.i + 1)
            return m

    i: In(data.StructLayout({"row": unsigned(0), "data": 4}))
    o: Out(5)

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=4, depth=1, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        m.submodules.below = below = self.Below()
        m.d.comb += [write.addr.eq(self.i.row), write.data.eq(self.i.data), write.en.eq(1), read.addr.eq(self.i.row),
                     below.i.eq((read.data ^ 3) - [Signal(4)][0]), self.o.eq(below.o)]
        return m


class Hollow(wiring.Component):
    """Has a port without bits."""

    i: In(unsigned(0))
    o: Out(1)

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.o.eq(self.i == 0)
        return m


def small_rtlil(**options: object) -> str:
    component = Small()
    return rtlil.convert(component, name="small", ports=ports(component), **options)


def test_names_come_from_registers_and_lines():
    found = named(small_rtlil())
    assert "width 0" not in found
    assert not re.search(r"(?<!\S)\$\d+ *$", "\n".join(re.findall(r"^  wire .*", found, re.MULTILINE)), re.MULTILINE)
    assert re.search(r"wire width \d+ \\test_verilog_\d+_xor$", found, re.MULTILINE)
    assert not re.search(r"wire .*\\\$signal", found)
    assert re.search(r'attribute \\src "(\w+/)*test_verilog\.py:\d+"', found)
    assert str(ROOT) not in found


def test_verilog_of_a_small_module():
    found = verilog_of(small_rtlil())
    assert "[-1:0]" not in found
    assert not re.findall(r"\\\$\S*", found)


def test_names_need_no_sources():
    found = named(small_rtlil(emit_src=False))
    assert re.search(r"^  wire width \d+ \\value(_\d+)?$", found, re.MULTILINE)


def test_ports_of_shared_modules_have_bits():
    component = Hollow()
    assert set(ports(component)) == {"o"}
    assert re.search(r"module hollow\(o\);", Netlist().convert(component, "hollow", ports(component)))


def test_a_wire_without_bits_that_is_used_is_an_error():
    broken = "module \\top\n  wire width 0 \\gone\n\n  wire width 1 \\here\n\nconnect \\here \\gone\nend\n"
    with pytest.raises(ValueError, match=r"module top uses \\gone, which has no bits"):
        named(broken)


RESET = """module a(clk, rst, x);
  always @(posedge clk)
    x <= x_next;
  always @(posedge clk)
    \\y$1  <= \\y$1_next ;
  always @(posedge clk)
    z <= w;
  always @* begin
    x_next = x;
    if (go) begin
      x_next = 4'h3;
    end
    if (rst) begin
      x_next = 4'h1;
    end
  end
  always @* begin
    \\y$1_next  = 1'h1;
    if (rst) begin
      \\y$1_next  = 1'h0;
    end
  end
  always @* begin
    w = u;
    if (rst) begin
      v = 2'h0;
    end
  end
endmodule
"""


def test_resets_stand_in_the_clocked_blocks():
    found = clocked_resets(RESET)
    assert "    if (rst) x <= 4'h1;\n    else x <= x_next;\n" in found
    assert "    if (rst) \\y$1  <= 1'h0;\n    else \\y$1  <= \\y$1_next ;\n" in found
    assert "    z <= w;\n" in found, "it has no reset"
    assert found.count("if (rst) begin") == 1, "that of v, which is no register's next value"
    assert "    if (go) begin\n      x_next = 4'h3;\n    end\n  end\n" in found


def test_no_next_value_depends_on_the_reset(text):
    assert "if (rst) begin" not in text
    assert text.count("    if (rst) ") > 1000


def test_equal_contents_of_a_memory_are_a_loop():
    lines = [f"    memory[{n}] = 8'h07;\n" for n in range(5)]
    found = looped_contents("  initial begin\n" + "".join(lines) + "  end\n")
    assert found == ("  initial begin : fill_memory\n    integer fill_memory_at;\n"
                     "    for (fill_memory_at = 0; fill_memory_at < 5; fill_memory_at = fill_memory_at + 1)\n"
                     "      memory[fill_memory_at] = 8'h07;\n  end\n")
    lines[3] = "    memory[3] = 8'h08;\n"
    other = "  initial begin\n" + "".join(lines) + "  end\n"
    assert looped_contents(other) == other


def test_a_signal_may_be_called_wake():
    text = ("module a(x);\n  reg \\$auto$verilog_backend.cc:1:dump_module$1  = 0;\n  wire wake;\n  always @* begin\n"
            "    if (\\$auto$verilog_backend.cc:1:dump_module$1 ) begin end\n    y = wake;\n  end\nendmodule\n")
    woken = waking(text)
    assert "reg wake_;" in woken
    assert "initial wake_ <= 0;" in woken
    assert "if (wake_) begin end" in woken


# ---------------------------------------------------------------- files


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / NAME
    monkeypatch.setattr(netlist, "verilog_text", lambda config, top: "old")
    netlist.generate(TINY, path)
    monkeypatch.setattr(netlist, "verilog_text", lambda config, top: "new and longer")
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.suffix == path.suffix:
            write(self, content[:3])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        netlist.generate(TINY, path)
    assert path.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {NAME, "kvattic_tiny.json", "kvattic_tiny.vlt"}


def test_modules_that_are_shared_wake_too():
    text = Netlist().convert(component := Small.Below(), "below", ports(component))
    assert "dump_module" not in text
