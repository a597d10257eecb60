"""Verilog of the engine."""

from pathlib import Path

from kvattic.config import Config
from kvattic_hdl.engine import Engine
from kvattic_hdl.shared import Netlist, ports

TOP = "kvattic_engine"


def _port_name(head: str, *rest: str | int) -> str:
    """Port names that FPGA tools infer buses from."""
    match head:
        case "host":
            return f"s_axil_{rest[0]}"
        case "read" | "write":
            return f"m_axi_{rest[0]}"
        case "requests" | "codewords":
            channel, signal = rest
            return f"flash{channel}_{head[:-1]}_{signal}"
        case "value_open" | "epoch":
            return f"flash_{head}"
    return head


def verilog_text(config: Config) -> str:
    """The engine as one Verilog text, top module `TOP`; lanes and cells are one module each.

    Ports: clk, rst; s_axil_* (AXI4-Lite registers); m_axi_* (AXI4 to host memory);
    flash<channel>_request_{valid,ready,payload} and flash<channel>_codeword_{valid,ready,payload} (payloads packed as
    `interfaces.Shapes.request` and `.beat`); flash_value_open, flash_epoch; irq.
    """
    engine = Engine(config)
    netlist = Netlist()
    top = netlist.convert(engine, TOP, ports(engine, _port_name))
    return "\n".join([*netlist.modules.values(), top])


def generate(config: Config, path: Path) -> Path:
    """Write `verilog_text` to path, and its configuration as JSON beside it; returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(verilog_text(config))
    path.with_suffix(".json").write_text(config.to_json() + "\n")
    return path
