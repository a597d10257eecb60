"""The sketch's error against bytes and its footprint, on data that stand in for a real model's attention."""

import math

import numpy as np
import pytest

from kvattic_sim.lm import sketch_error
from kvattic_sim.lm.methods import Dense, Sketched, Sparf
from kvattic_sim.lm.sketch_error import Error, at_equal_bytes, errors, footprint, heads
from kvattic_sim.lm.smollm2 import Captured
from kvattic_sim.reports import bench
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.benches.engine import Lab, UnavailableError


def captured(layers=2, tokens=512, seed=0):
    """Two KV heads with three query heads each, some features larger than others."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((layers, count, tokens, 64)) for count in (6, 2, 2))
    query *= rng.gamma(1, 1, 64)
    return Captured(*(x.astype(np.float16) for x in (query, key, value)), loss=0.0)


def test_heads_are_grouped_and_causal():
    data = captured()
    every = list(heads(data, (300, 512)))
    assert len(every) == 4 and every[0].lengths.tolist() == [300, 512]
    assert np.array_equal(every[3].query[0], data.query[1, 3:6, 299]) and every[3].query.shape == (2, 3, 64)
    assert np.array_equal(every[3].key, data.key[1, 1]) and every[3].key.dtype == np.float32
    assert len(list(heads(data, (512,), every=2))) == 2
    with pytest.raises(ValueError, match=r"lengths must be from 1 to 512, not \(0, 512\)"):
        list(heads(data, (0, 512)))


def test_three_positions_and_three_rows():
    data = captured(layers=1)
    (first, _) = heads(data, (100, 200, 300))
    assert np.array_equal(first.query[2], data.query[0, :3, 299])


def test_errors_are_of_all_outputs_together():
    every = list(heads(captured(), (511, 512)))
    method = Sketched(share=1 / 8)
    found = errors(iter(every), {"some": method, "all": Dense()})
    pairs = [(method.attend(*parts), Dense().attend(*parts)) for parts in (
        (head.query, head.key, head.value, head.lengths) for head in every)]
    wrong = sum(np.square(ours.output - right.output).sum() for ours, right in pairs)
    size = sum(np.square(right.output).sum() for _, right in pairs)
    assert found["some"].error == pytest.approx(math.sqrt(wrong / size), rel=1e-5)
    assert found["some"].flash_bytes == sum(ours.flash_bytes.sum() for ours, _ in pairs) / (4 * 768 * 256)
    assert found["all"] == Error(0, 1, 1)


def test_equal_bytes_lie_between_points():
    curve = [Error(0.4, 0.1, 0.2), Error(0.1, 0.3, 0.4), Error(0.2, 0.2, 0.3)]
    assert at_equal_bytes(curve, 0.2) == pytest.approx(0.2)
    assert at_equal_bytes(curve, 0.15) == pytest.approx(math.sqrt((0.4**2 + 0.2**2) / 2))
    assert at_equal_bytes(curve, 0.35, elements=True) == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2))
    with pytest.raises(ValueError, match=r"points must have 0.350 of the bytes between them, not \[0.1, 0.2, 0.3\]"):
        at_equal_bytes(curve, 0.35)


def test_footprint():
    """2 bits for each of a key's elements, of 32 with the value's; the levels lie in what the last feature leaves."""
    assert footprint(64) == footprint(128) == 1 + 1 / 16


def test_measure_gives_its_keys(monkeypatch):
    monkeypatch.setattr(sketch_error, "capture", lambda tokens: captured(layers=1, tokens=tokens))
    monkeypatch.setattr(sketch_error, "TOKENS", 1024)
    monkeypatch.setattr(sketch_error, "SHORT", (1024,))
    monkeypatch.setattr(sketch_error, "LONG", (1023,))
    found = sketch_error.measure()
    assert set(found) == set(sketch_error.KEYS) <= set(BARS)
    assert found["sparse.sketch.footprint"] == 1 + 1 / 16
    assert BARS["sparse.sketch.error_ratio"].limits == (0.55,) and BARS["sparse.sketch.footprint"].limits == (1.08,)


def test_the_ratio_is_to_sparf_as_it_is_better():
    found = {"sparf": Error(0.1, 0.2, 0.125), "sparf_sinks": Error(0.08, 0.19, 0.125),
             "sketch_1": Error(0.06, 0.1, 0.1), "sketch_2": Error(0.02, 0.3, 0.15)}
    monotone = {name: one for name, one in found.items() if name != "sparf"}
    assert sketch_error.ratio(found) == sketch_error.ratio(monotone | {"sparf": Error(1, 0.2, 0.125)})
    assert sketch_error.ratio(found, elements=True) == pytest.approx(math.sqrt((0.06**2 + 0.02**2) / 2) / 0.08)


def test_the_tables_have_every_method(monkeypatch):
    monkeypatch.setattr(sketch_error, "SHORT", (512,))
    monkeypatch.setattr(sketch_error, "LONG", (511,))
    grid = {"SparF, r = d/8": lambda share: Sparf(features=8, share=share),
            "2 bits": lambda share: Sketched(share=share)}
    monkeypatch.setattr(sketch_error, "grid", lambda: grid)
    short, long = sketch_error.tables(captured(layers=1))
    assert [list(table.columns[0].cells) for table in (short, long)] == [list(grid)] * 2
    assert list(short.columns[1].cells) == ["0.062", "0.098"]      # of 512 tokens, 16 sinks are a 32nd
    assert "255" in str(long.title)


def test_the_grid_is_of_methods_that_run():
    (head, *_) = heads(captured(), (512,))
    for of in sketch_error.grid().values():
        of(1 / 8).attend(head.query, head.key, head.value, head.lengths)


@pytest.mark.parametrize("key", ["sparse.sketch.error_ratio", "sparse.sketch.needle"])
def test_a_bench_without_its_packages_says_so(monkeypatch, key):
    def missing(*arguments, **keywords):
        raise ImportError("No module named 'gguf'")

    monkeypatch.setattr(sketch_error, "capture", missing)
    monkeypatch.setattr("kvattic_sim.lm.decoding.load", missing)
    (one,) = (b for b in bench.benches() if key in b.keys)
    with pytest.raises(UnavailableError, match=r"gguf.*pip install 'kvattic\[quality\]'"):
        one.measure(Lab())
