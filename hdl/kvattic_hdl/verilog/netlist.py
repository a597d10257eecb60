"""Verilog of the drive, and of the engine alone: the text that is delivered is the text that is simulated."""

import contextlib
import gc
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from kvattic.spec.config import Config
from kvattic.support.files import write_whole
from kvattic_hdl.drive import Drive
from kvattic_hdl.engine import Engine
from kvattic_hdl.verilog.shared import Netlist, ports

TOPS = {"kvattic_drive": Drive, "kvattic_engine": Engine}
"""Top modules: the whole drive; the engine, with the streams of each flash channel as ports."""
TOP = "kvattic_drive"

_SHARED = re.compile(r"(module kvattic_(?:lane|flash_channel|corrector)\(.*?\);)", re.DOTALL)


def _port_name(head: str, *rest: Any) -> str:
    """Port names that FPGA tools infer buses from."""
    match head:
        case "host":
            return f"s_axil_{rest[0]}"
        case "read" | "write":
            return f"m_axi_{rest[0]}"
        case "dram":
            return f"m_axi_dram_{rest[0]}"
        case "requests" | "codewords" | "operations" | "page_words" | "outcomes":
            channel, signal = rest
            return f"flash{channel}_{head[:-1]}_{signal}"
        case "phys":
            channel, *signal = rest
            return "_".join([f"phy{channel}", *map(str, signal)])
        case "value_open" | "epoch":
            return f"flash_{head}"
    return head


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: it would look at millions of objects that live to the end, a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def verilog_text(config: Config, top: str = TOP) -> str:
    """One of `TOPS` as one Verilog text; lanes, cells, flash channels and correctors are one module each.

    Ports of both: clk, rst; s_axil_* (AXI4-Lite registers); m_axi_* (AXI4 to host memory); m_axi_dram_* (AXI4 to
    device DRAM, read only); irq.  Of the drive: phy<channel>_* (`flash.phy`).  Of the engine:
    flash<channel>_{request,codeword,operation,page_word,outcome}_{valid,ready,payload} (payloads packed as the
    layouts of these names in `interfaces.Shapes`; a codeword's is `beat`), flash_value_open, flash_epoch,
    flash_events, media_errors.
    """
    with _uncollected():
        component = TOPS[top](config)
        netlist = Netlist()
        text = netlist.convert(component, top, ports(component, _port_name))
    # Verilator compiles a lane, a channel or a corrector once, however many there are; to others it is a comment.
    return _SHARED.sub(r"\1 /*verilator no_inline_module*/", "\n".join([*netlist.modules.values(), text]))


def waivers(name: str) -> str:
    """What ``verilator --lint-only -Wall`` may find in a file of this name, and why: a configuration file for it."""
    return (resources.files(__package__) / "waivers.vlt").read_text().replace("kvattic_*.v", name)


def generate(config: Config, path: Path, top: str = TOP) -> Path:
    """Write `verilog_text` to path; beside it its configuration as JSON and `waivers` for Verilator; returns path.

    Raises:
        OSError: it cannot be written; what was there before is still there, whole.
    """
    text = verilog_text(config, top)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".json"), config.to_json() + "\n")
    write_whole(path.with_suffix(".vlt"), waivers(path.name))
    write_whole(path, text)
    return path
