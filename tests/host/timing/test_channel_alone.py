"""A channel of the timing model beside a channel of the RTL (docs/controller.md, both tables)."""

from dataclasses import replace

import pytest
from tests.host.timing.source import bus_use, dense, scattered

from kvattic.spec.config import PAPER
from kvattic.spec.nand import part

SHARED = replace(PAPER.with_lane_channels(1), channels=1)
SEPARATE = replace(SHARED, part=replace(PAPER.part, name="pslc, separate command bus", separate_command_bus=True))


@pytest.mark.parametrize("config, recorded", [
    (SHARED, 0.972), (SEPARATE, 0.998), (replace(SHARED, part=part("tlc")), 0.972),
    (replace(SHARED, part=part("lowlatency")), 0.887), (replace(SHARED, dies=2), 0.959),
], ids=("shared", "separate", "tlc", "lowlatency", "two dies"))
def test_dense_pages(config, recorded):
    assert bus_use(config, dense(config), 1024) == pytest.approx(recorded, rel=0.005)


@pytest.mark.parametrize("config, recorded", [
    (SHARED, {64: 0.551, 96: 0.667, 128: 0.707, 192: 0.707}),
    (SEPARATE, {64: 0.592, 96: 0.765, 128: 0.936, 192: 0.960}),
], ids=("shared", "separate"))
def test_scattered_codewords(config, recorded):
    for in_flight, share in recorded.items():
        assert bus_use(config, scattered(config, 48, 4), in_flight) == pytest.approx(share, rel=0.02), in_flight
