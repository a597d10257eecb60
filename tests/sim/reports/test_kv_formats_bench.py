"""The bench of formats of K and V: its figures at small sizes; the RTL is in tests/cosim."""

import numpy as np
import pytest

from kvattic import TINY, KvFormat
from kvattic.spec import stored
from kvattic_sim.reports import bench
from kvattic_sim.reports.benches import kv_formats


@pytest.mark.parametrize("name", kv_formats.SPEEDUPS)
def test_figures_that_need_no_simulator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e-8 < kv_formats.relative_rms(name, TINY, tokens=300) <= 5e-7
    pytest.importorskip("torch")
    assert kv_formats.reference(name, patterns=1000) == 1.0

    def truncated(values: np.ndarray, kv: KvFormat, element: object) -> np.ndarray:
        return stored.to_kv_bits(values * 0.97, kv, element)

    monkeypatch.setattr(kv_formats, "to_kv_bits", truncated)
    assert kv_formats.reference(name, patterns=1000) < 0.9


def test_each_format_has_its_bars() -> None:
    keys = {key for one in kv_formats.BENCHES for key in one.keys}
    assert keys == {f"format.{name}.{figure}" for name in ("fp8_e4m3", "fp8_e5m2")
                    for figure in ("speedup", "rel_rms", "reference")}
    assert keys <= {key for one in bench.benches() for key in one.keys}
    assert bench.BARS["format.fp8_e4m3.speedup"] == bench.Bar(">=", (1.9,))
    assert bench.verdict("format.fp8_e5m2.rel_rms", 6e-7, {}) is bench.Verdict.SHORT
    assert bench.verdict("format.fp8_e5m2.reference", 0.999, {}) is bench.Verdict.SHORT
