"""Icarus Verilog: event by event, slow, and there to check the fast one."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvattic_sim.simulators.base import TIMESCALE
from kvattic_sim.simulators.steps import Steps

__all__ = ["build_icarus", "icarus_available"]


def icarus_available() -> bool:
    """Whether Icarus Verilog is installed."""
    return shutil.which("iverilog") is not None and shutil.which("vvp") is not None


def build_icarus(
    steps: Steps,
    sources: Sequence[Path],
    toplevel: str,
    parameters: Mapping[str, int],
    *,
    waves: bool,
) -> None:
    """Compile Verilog for Icarus."""
    (steps.directory / "commands.f").write_text(f"+timescale+{'/'.join(TIMESCALE)}\n")
    tops = [toplevel]
    extra = []
    if waves:
        dump = steps.directory / "kvattic_dump.v"
        dump.write_text(
            "module kvattic_dump();\n"
            f'initial begin $dumpfile("waves.fst"); $dumpvars(0, {toplevel}); end\n'
            "endmodule\n"
        )
        tops.append("kvattic_dump")
        extra.append(str(dump))
    steps.run(
        [
            *("iverilog", "-g2012", "-o", "simulation.vvp", "-f", "commands.f"),
            *(option for top in tops for option in ("-s", top)),
            *(f"-P{toplevel}.{name}={value}" for name, value in parameters.items()),
            *(str(source) for source in sources),
            *extra,
        ]
    )
