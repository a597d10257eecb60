"""The ideal flash twin alone, on each simulator; what is checked stands in flash_channel_bench.py."""

from importlib import resources
from pathlib import Path

import pytest
from tests.cosim.flash_channel_bench import BEATS, FRAMES, PAGES, QUEUE, WORDS

from kvattic.spec.config import TINY
from kvattic_sim.rtl.testbench import ideal_parameters
from kvattic_sim.simulators.build import Simulator, compile_model, icarus_available, run_model


@pytest.mark.parametrize("simulator", list(Simulator))
def test_flash_channel(simulator: Simulator, tmp_path: Path) -> None:
    if simulator is Simulator.ICARUS and not icarus_available():
        pytest.skip("Icarus Verilog is not installed")
    parameters = ideal_parameters(TINY, FRAMES, QUEUE) | {"BEATS": BEATS, "WORDS": WORDS, "PAGES": PAGES}
    with resources.as_file(resources.files("kvattic_sim") / "verilog" / "flash_channel.sv") as source:
        model = compile_model([source], "flash_channel", simulator, parameters=parameters)
    results = run_model(
        model, test_module="flash_channel_bench", python_path=[Path(__file__).parent], run_dir=tmp_path, timeout_s=3600
    )
    assert len(results.tests) == 5
