"""Command line: `python -m kvattic_hdl --preset paper --output build/kvattic_paper.v`."""

import argparse
import sys
from pathlib import Path

from kvattic.spec.config import PRESETS, Config, preset
from kvattic.support.terminal import Telling, run_command
from kvattic_hdl.verilog.netlist import TOP, generate


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="paper", choices=list(PRESETS))
    parser.add_argument("--config", type=Path, help="a configuration in JSON instead of a preset")
    parser.add_argument("--output", type=Path, help="default: build/kvattic_<preset>.v")
    options = parser.parse_args(arguments)
    config = Config.from_json(options.config.read_text()) if options.config else preset(options.preset)
    name = options.config.stem if options.config else options.preset
    with Telling(quiet=sys.stderr.isatty()).phase(f"Generating Verilog of {name}"):
        path = generate(config, options.output or Path("build") / f"kvattic_{name}.v")
    print(f"{path}: {TOP}, {config.to_json()}")


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_hdl"))
