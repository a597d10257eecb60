"""The NAND model against its twin, on each simulator; what is compared stands in nand_channel_bench.py."""

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from tests.cosim.nand_channel_bench import CONFIGS, FRAMES

from kvattic_sim.nand.files import nand_parameters
from kvattic_sim.nand.twin import Fault, Violation
from kvattic_sim.simulators.build import Simulator, compile_model, icarus_available, run_model


def run(simulator: Simulator, name: str, run_dir: Path, cycles: int, **env: str) -> None:
    if simulator is Simulator.ICARUS and not icarus_available():
        pytest.skip("Icarus Verilog is not installed")
    with resources.as_file(resources.files("kvattic_sim") / "verilog" / "nand_channel.sv") as source:
        model = compile_model(
            [source], "nand_channel", simulator, parameters=nand_parameters(CONFIGS[name], frames=FRAMES)
        )
    results = run_model(
        model, test_module="nand_channel_bench", python_path=[Path(__file__).parent], run_dir=run_dir, timeout_s=3600,
        env={"NAND_CONFIG": name, "NAND_CYCLES": str(cycles)} | env,
    )
    assert len(results.tests) == 1


@pytest.mark.campaign
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("simulator", list(Simulator))
def test_same_as_twin(
    simulator: Simulator, name: str, tmp_path: Path, campaign: Callable[[int, int], int]
) -> None:
    """With mistakes and faults of all kinds."""
    cycles = campaign(120_000, 40_000) if simulator is Simulator.VERILATOR else campaign(40_000, 24_000)
    run(simulator, name, tmp_path, cycles)


@pytest.mark.campaign
@pytest.mark.parametrize("name", CONFIGS)
def test_legal_sequences(name: str, tmp_path: Path, campaign: Callable[[int, int], int]) -> None:
    """A controller that does everything right is told so."""
    run(Simulator.VERILATOR, name, tmp_path, campaign(120_000, 40_000), NAND_ERRORS="0", NAND_FAULTS="none",
        NAND_SEED="7")


def test_numbers_and_texts() -> None:
    """The Verilog's violations and faults are the twin's, also those that no sequence brought about."""
    source = (resources.files("kvattic_sim") / "verilog" / "nand_channel.sv").read_text()
    for number, violation in enumerate(Violation, 1):
        assert re.search(rf"\b{violation.name} = {number}[,;]", source), violation
        last = number == len(Violation)
        assert f'{"default" if last else violation.name}: text = "{violation.value}";' in source
    for fault in Fault:
        assert re.search(rf"\b{fault.name} = {fault.value}[,;]", source), fault
