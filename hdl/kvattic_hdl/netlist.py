"""Verilog of the engine."""

from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import ValueCastable
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring

from kvattic.config import Config
from kvattic_hdl.engine import Engine

TOP = "kvattic_engine"


def _port_name(path: tuple[str | int, ...]) -> str:
    """Port names that FPGA tools infer buses from."""
    head, *rest = path
    match head:
        case "host":
            return f"s_axil_{rest[0]}"
        case "read" | "write":
            return f"m_axi_{rest[0]}"
        case "requests" | "codewords":
            channel, signal = rest
            return f"flash{channel}_{str(head)[:-1]}_{signal}"
        case "value_open" | "epoch":
            return f"flash_{head}"
    return "_".join(map(str, path))


def verilog_text(config: Config) -> str:
    """The engine as one Verilog text, top module `TOP`.

    Ports: clk, rst; s_axil_* (AXI4-Lite registers); m_axi_* (AXI4 to host memory);
    flash<channel>_request_{valid,ready,payload} and flash<channel>_codeword_{valid,ready,payload} (payloads packed as
    `interfaces.Shapes.request` and `.beat`); flash_value_open, flash_epoch; irq.
    """
    engine = Engine(config)
    ports = {}
    for path, member, value in engine.signature.flatten(engine):
        if isinstance(value, ValueCastable):
            value = value.as_value()
        direction = PortDirection.Input if member.flow == wiring.In else PortDirection.Output
        ports[_port_name(path)] = (value, direction)
    return verilog.convert(engine, name=TOP, ports=ports, emit_src=False, strip_internal_attrs=True)


def generate(config: Config, path: Path) -> Path:
    """Write `verilog_text` to path, and its configuration as JSON beside it; returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(verilog_text(config))
    path.with_suffix(".json").write_text(config.to_json() + "\n")
    return path
