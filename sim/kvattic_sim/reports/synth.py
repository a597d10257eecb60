"""Area and clock of the drive: `make synth`.

Yosys maps every module by itself for Xilinx 7-series and UltraScale+ (build/synth keeps the results by content, so
that only what has changed is done again; no run needs more than 2 GB). Counted are LUTs, flip-flops, DSPs and block
RAMs of the engine, a flash channel and its corrector, block by block, beside the paper's. A static timing estimate
over all mapped netlists gives each block's longest paths (kvattic_sim.synth.delays states its model). Then Yosys and
nextpnr place and route a flash channel, a corrector, and the engine with one channel, for the largest ECP5, which the
estimate is held to.
"""

import argparse
import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce

from rich.console import Console
from rich.table import Table

from kvattic.spec.config import LANE_CHANNELS, PRESETS, Config, preset
from kvattic.spec.formats import KvFormat
from kvattic.spec.scheduling import channels_of_corrector
from kvattic.support.terminal import run_command
from kvattic_hdl import verilog_text
from kvattic_sim.reports.console import make_console, phase
from kvattic_sim.reports.figures import record
from kvattic_sim.synth.area import Area
from kvattic_sim.synth.blocks import Design
from kvattic_sim.synth.mapping import peak_gigabytes
from kvattic_sim.synth.route import Routed, route
from kvattic_sim.synth.timing import Path
from kvattic_sim.synth.verilog import split

NAMES = ("paper", "board", "gqa")
ENGINE, CHANNEL, CORRECTOR = "engine", "channel_0", "corrector_0"
FAMILIES = ("xc7", "xcup")
PAPER = {
    "attention engine": Area(lut=99_200, lut_packed=99_200, lutram=0, ff=207_300, dsp=768, bram36=96),
    "argtopk": Area(lut=5_830, lut_packed=5_830, lutram=0, ff=3_870, dsp=0, bram36=24),
    "NFC with filters": Area(lut=58_300, lut_packed=58_300, lutram=0, ff=0, dsp=0, bram36=96),
}
"""InstInfer's table II: Vivado on a Zynq-7045; FF of the NFC are not taken from it."""
BYTES_A_CYCLE = 64
"""What the lanes of `paper` take in a cycle."""


def _correctors(design: Design) -> int:
    return design.channels // channels_of_corrector(design.config)


def _channels(design: Design) -> Area:
    """All flash channels and their correctors."""
    parts = [CHANNEL] * design.channels + [CORRECTOR] * _correctors(design)
    return reduce(operator.add, map(design.area, parts))


def _channel(design: Design) -> Area:
    """One flash channel and its share of a corrector, rounded up but for block RAM."""
    return Area(**{key: value / design.channels if key == "bram36" else -(-value // design.channels)
                   for key, value in asdict(_channels(design)).items()})


def _shown(path: str) -> str:
    return path.replace(".instance", "").replace(".", "/")


def _row(table: Table, title: str, area: Area, clocks: Sequence[str], *, bold: bool = False) -> None:
    table.add_row(title, f"{area.lut:,}", f"{area.lut_packed:,}", f"{area.lutram:,}", f"{area.ff:,}", str(area.dsp),
                  f"{area.bram36:g}", *clocks, style="bold" if bold else None)


def _blocks(design: Design, name: str) -> Table:
    """The engine, a flash channel and a corrector, block by block."""
    table = Table(title=f"{name} on Xilinx {design.families[0]}, by block; MHz by levels, estimated")
    table.add_column("block")
    for title in ("LUT", "packed", "LUTRAM", "FF", "DSP", "BRAM36"):
        table.add_column(title, justify="right")
    for family in design.families:
        table.add_column(f"{family} levels", justify="right")
        table.add_column(f"{family} MHz", justify="right")
    counts = {CHANNEL: design.channels, CORRECTOR: _correctors(design)}
    for top in (ENGINE, CHANNEL, CORRECTOR):
        for block in design.blocks(top):
            clocks: list[str] = []
            for family in design.families:
                worst = design.worst(family, block.path)
                clocks += [str(worst[0].levels), f"{worst[0].mhz:.0f}"] if worst else ["", ""]
            count = counts.get(block.path, block.count)
            times = f" x {count}" if count > 1 else ""
            _row(table, _shown(block.path) + times, block.area, clocks, bold=block.path == top)
    return table


def _paths(design: Design, family: str, path: str, count: int) -> Table:
    """The longest paths of a block."""
    table = Table(title=f"{_shown(path)}: longest paths, {family}")
    for title in ("ns", "LUTs"):
        table.add_column(title, justify="right")
    table.add_column("from")
    table.add_column("to")
    for found in design.worst(family, path)[:count]:
        table.add_row(f"{found.ns:.2f}", str(found.levels), _shown(found.start), _shown(found.end))
    return table


def _paper(engine: Area, channels: Area) -> Table:
    """Ours beside the paper's."""
    table = Table(title="paper (preset) beside the paper's table II")
    table.add_column("")
    for title in ("LUT", "packed", "LUTRAM", "FF", "DSP", "BRAM36"):
        table.add_column(title, justify="right")
    _row(table, "engine", engine, [])
    _row(table, "its attention engine + argtopk", PAPER["attention engine"] + PAPER["argtopk"], [])
    _row(table, "8 flash channels, their correctors", channels, [])
    _row(table, "its NFC with filters", PAPER["NFC with filters"], [])
    return table


def _slowest(design: Design, family: str, tops: Sequence[str]) -> Path:
    return max((design.worst(family, top)[0] for top in tops), key=lambda path: path.ns)


def _record(design: Design, name: str) -> None:
    """What the keys stand for: engine and channel of `paper`, this with its share of a corrector; engine of `board`."""
    engine = design.area(ENGINE)
    figures: dict[str, float] = {}
    if name == "board":
        figures["synth.board.lut_packed"] = engine.lut_packed
    if name == "paper":
        channel = _channel(design)
        figures |= {f"synth.engine.{key}": value for key, value in asdict(engine).items()}
        figures |= {f"synth.channel.{key}": value for key, value in asdict(channel).items()}
        figures["synth.lut_per_byte_cycle"] = engine.lut_packed / BYTES_A_CYCLE
        for family in design.families:
            each = {name: _slowest(design, family, tops).mhz
                    for name, tops in (("engine", [ENGINE]), ("channel", [CHANNEL, CORRECTOR]))}
            figures |= {f"synth.{top}.fmax.{family}_mhz": mhz for top, mhz in each.items()}
            figures[f"synth.fmax.{family}_mhz"] = min(each.values())
    if figures:
        record(figures)


def _estimate(console: Console, name: str, lane_channels: int | None, kv: str, families: Sequence[str],
              blocks: Sequence[str], paths: int) -> None:
    """Area and timing of a preset."""
    config, title = preset(name), name
    if kv != config.kv:
        config, title = replace(config, kv=KvFormat(kv)), f"{name}, {kv}"
    if lane_channels not in (None, config.lane_channels):
        config = config.with_lane_channels(lane_channels)
        title = f"{title}, {lane_channels} channels a lane"
    with phase(console, f"Yosys: {title} (minutes for each family, seconds if little has changed)") as note:
        design = Design(config, families, note)
    console.print(_blocks(design, title))
    if name == "paper":
        console.print(_paper(design.area(ENGINE), _channels(design)))
        share = _channel(design)
        console.print(f"A flash channel and its share of a corrector: {share.lut:,} LUT, {share.lut_packed:,} packed, "
                      f"{share.ff:,} FF, {share.bram36:g} BRAM36", markup=False)
    wanted = [b.path for top in (ENGINE, CHANNEL, CORRECTOR) for b in design.blocks(top)] if "all" in blocks else blocks
    for family in design.families:
        for path in wanted:
            console.print(_paths(design, family, path.replace("/", "."), paths))
    if config == preset(name):
        _record(design, name)


def _routed(console: Console, what: str, result: Routed) -> None:
    table = Table(title=f"{what} on ECP5 LFE5U-85F-8: {result.mhz:.1f} MHz routed; the estimate says "
                        f"{result.estimated:.1f} ({result.estimated / result.mhz:.2f} of it). Critical path")
    table.add_column("step")
    table.add_column("ns", justify="right")
    for step, delay in result.path:
        table.add_row(step, f"{delay:.2f}")
    console.print(table)


def _of_channels(config: Config, channels: int) -> Config:
    """The same with so many channels, in lanes of so many of them as it can have."""
    lane_channels = next(number for number in reversed(LANE_CHANNELS) if channels % number == 0)
    return replace(config.with_lane_channels(lane_channels), channels=channels)


def _route(console: Console, what: Sequence[str], channels: int) -> None:
    """Place and route a flash channel, and the engine."""
    found = {}
    if "channel" in what:
        with phase(console, "Yosys and nextpnr: a flash channel and a corrector of paper for ECP5 (five minutes)"):
            modules = split(verilog_text(preset("paper")))
            parts = {name: route(modules, f"kvattic_{name}", f"ecp5_{name}") for name in ("flash_channel", "corrector")}
        for name, result in parts.items():
            _routed(console, f"a {name.replace('_', ' ')}", result)
        found["channel"] = min(parts.values(), key=lambda result: result.mhz)
    if "engine" in what:
        with phase(console, f"Yosys and nextpnr: engine of board with {channels} channels for ECP5 (several minutes)"):
            text = verilog_text(_of_channels(preset("board"), channels), "kvattic_engine")
            found["engine"] = route(split(text), "kvattic_engine", f"ecp5_{channels}")
        _routed(console, f"engine of board with {channels} channels", found["engine"])
    figures = {}
    for key, result in found.items():
        figures[f"synth.{key}.fmax.ecp5_mhz"] = result.mhz
        figures[f"synth.{key}.fmax.ecp5_estimate_ratio"] = result.estimated / result.mhz
    if len(found) == 2:
        figures["synth.fmax.ecp5_mhz"] = min(result.mhz for result in found.values())
    record(figures)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), action="append",
                        help=f"hardware configuration, may be given again; {', '.join(NAMES)} by default")
    parser.add_argument("--lane-channels", type=int, choices=LANE_CHANNELS,
                        help="channels that share a lane, with as many times the beat and score buffer; as the preset "
                             "has by default; of others no figure is kept")
    parser.add_argument("--kv", choices=[form.value for form in KvFormat], default=KvFormat.ELEMENT.value,
                        help="how K and V are stored; of others than %(default)s no figure is kept")
    parser.add_argument("--family", choices=list(FAMILIES), action="append",
                        help="devices, may be given again; the area is the first one's; both by default")
    parser.add_argument("--paths", metavar="BLOCK", action="append", default=[],
                        help="also the longest paths of this block, as the table names it (engine, engine/finisher, "
                             "channel_0/controller), or of all; may be given again")
    parser.add_argument("--count", type=int, default=10, help="paths of a block; 10 by default")
    parser.add_argument("--route", choices=["channel", "engine", "none"], action="append",
                        help="what to place and route for ECP5, may be given again; both by default")
    parser.add_argument("--ecp5-channels", type=int, default=1,
                        help="channels of the board preset's engine for the ECP5; placing and routing more than one "
                             "takes the better part of an hour")
    options = parser.parse_args(arguments)
    console = make_console(190)
    for name in options.preset or NAMES:
        _estimate(console, name, options.lane_channels, options.kv, options.family or FAMILIES, options.paths,
                  options.count)
    console.print(f"Largest run of Yosys: {peak_gigabytes():.1f} GB", markup=False)
    _route(console, options.route or ("channel", "engine"), options.ecp5_channels)


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.synth"))
