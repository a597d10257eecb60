"""Mapped netlists: what Yosys writes as JSON, of one module, small enough to keep."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Bit = int | str
"""A wire of a module by number, or a constant: "0", "1", "x"."""

KEPT = ("AREG", "BREG", "CREG", "DREG", "ADREG", "MREG", "PREG", "DOA_REG", "DOB_REG", "REGMODE_A", "REGMODE_B",
        "REG_OUTPUT_CLK", "REG_PIPELINE_CLK", "REG_INPUTA_CLK", "REG_INPUTB_CLK")
"""Parameters of primitives that timing depends on: which registers are used."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A primitive, or an instance of another module.

    Attributes:
        name: of the instance.
        type: of the primitive, or the black box's name.
        pins: bits by port.
        outputs: ports that drive their bits.
        parameters: those of `KEPT` that it has.
    """

    name: str
    type: str
    pins: Mapping[str, list[Bit]]
    outputs: frozenset[str]
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Netlist:
    """A module.

    Attributes:
        ports: bits by port.
        inputs: ports that are driven from outside.
        cells: all of them.
        names: names of bits, as far as they have one.
    """

    ports: Mapping[str, list[Bit]]
    inputs: frozenset[str]
    cells: list[Cell]
    names: Mapping[int, str]


def _names(nets: Mapping[str, Any]) -> dict[int, str]:
    """The best name of each bit: a visible one before a hidden one, a short one before a long one."""
    best: dict[int, tuple[tuple[int, int, str], str]] = {}
    for name, net in nets.items():
        rank = (int(net.get("hide_name", 0)), len(name), name)
        for index, bit in enumerate(net["bits"]):
            if isinstance(bit, int) and (bit not in best or rank < best[bit][0]):
                best[bit] = rank, name if len(net["bits"]) == 1 else f"{name}[{index}]"
    return {bit: name for bit, (_, name) in best.items()}


def of_yosys(module: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a module of Yosys' JSON; for `load`."""
    names = _names(module["netnames"])
    return {
        "ports": {name: [port["direction"], port["bits"]] for name, port in module["ports"].items()},
        "cells": [[name, cell["type"], cell["connections"],
                   [port for port, way in cell["port_directions"].items() if way == "output"],
                   {key: value for key, value in cell["parameters"].items() if key in KEPT}]
                  for name, cell in module["cells"].items() if cell["type"] not in ("$scopeinfo", "GND", "VCC")],
        "names": {str(bit): name for bit, name in names.items()},
    }


def load(text: str) -> Netlist:
    """A netlist of the JSON of what `of_yosys` returns."""
    module = json.loads(text)
    return Netlist(
        ports={name: bits for name, (_, bits) in module["ports"].items()},
        inputs=frozenset(name for name, (way, _) in module["ports"].items() if way == "input"),
        cells=[Cell(name, kind, pins, frozenset(outputs), parameters)
               for name, kind, pins, outputs, parameters in module["cells"]],
        names={int(bit): name for bit, name in module["names"].items()})
