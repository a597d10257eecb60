"""A slice of the language model on the RTL: its bytes decoded in each mode, the same bits as on the golden device.

`decoded` runs inside of a simulator process (see kvattic_sim.rtl.jobs), and on the golden device too.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from kvattic import Config, Device
from kvattic.golden.device import GoldenDevice
from kvattic.spec.nand import TINY_PART
from kvattic_sim.lm import evaluate
from kvattic_sim.lm.model import load, load_held_out
from kvattic_sim.rtl.jobs import run_in_simulation
from kvattic_sim.rtl.transport import FlashSettings

CONFIG = Config(channels=4, rows=2, head_dim=64, part=TINY_PART.resized(4096, blocks=64), dies=2, dram_beat_bytes=32,
                score_depth=512, jobs_in_flight=8)
"""The model's geometry: two query heads share a KV head; small pages, so that a group's parts lie on all dies."""
PREFIX, TOKENS = 600, 3
MEMORY = 1 << 20


def decoded(device: Device, name: str) -> Any:
    """Bits of some bytes, and every attention's output on the way."""
    decoder, window = load(), load_held_out().windows[evaluate.GOLDEN_WINDOW][: PREFIX + TOKENS + 1]
    ratio = Fraction(1) if name == "dense" else Fraction(1, 8)
    memory = evaluate.DriveMemory(device, decoder.shape, evaluate.method_at(name, ratio, decoder.shape.head_dim,
                                                                            evaluate.Setting()))
    outputs: list[Any] = []
    attend = memory.attend

    def kept(layer: int, query: Any, position: int) -> Any:
        outputs.append(attend(layer, query, position))
        return outputs[-1]

    memory.attend = kept  # type: ignore[method-assign]
    bits = evaluate.teacher_forced(decoder, window, memory, PREFIX)
    return {"bits": bits, "outputs": np.array(outputs).view(np.uint32)}


@pytest.mark.parametrize("name", ["dense", "sparf", "fetched", "centroid"])
def test_the_language_model(name: str) -> None:
    found = run_in_simulation(
        CONFIG, decoded, {"name": name}, flash=FlashSettings(latency=50, jitter=100, shuffle=True),
        memory_bytes=MEMORY, timeout_cycles=2_000_000, timeout_s=300).result
    expected = decoded(Device(GoldenDevice(CONFIG, memory_bytes=MEMORY)), name)
    assert len(expected["outputs"]) == TOKENS * load().shape.layers
    assert np.array_equal(found["outputs"], expected["outputs"])
    assert np.array_equal(found["bits"], expected["bits"])
