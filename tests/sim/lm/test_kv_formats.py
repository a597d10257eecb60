"""What a format of K and V costs: each format against its definition, the rotation, and the sums of the table."""

import numpy as np
import pytest
from tests.sim.lm.test_sketch_error import captured

from kvattic_sim.lm import kv_formats
from kvattic_sim.lm.kv_formats import FORMATS, ROWS, Cost, Stored, errors, hadamard, turned
from kvattic_sim.lm.sketch_error import heads

RNG = np.random.default_rng(3)
VALUES = RNG.standard_normal((2, 40, 64)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("name, least, largest", [
    ("fp16", 0, 0), ("fp8_e4m3", 0.02, 0.03), ("fp8_e4m3, scaled", 0.02, 0.03), ("fp8_e5m2", 0.04, 0.06),
    ("int8", 0.004, 0.008), ("q8_0", 0.004, 0.007), ("q4_0", 0.06, 0.1)])
def test_relative_errors_of_normal_data(name, least, largest):
    """Errors as published: q8_0 0.53 %, q4_0 8.8 %."""
    if name in ("q8_0", "q4_0"):
        pytest.importorskip("gguf")
    if name.startswith("fp8"):
        pytest.importorskip("torch")
    stored = FORMATS[name].round(VALUES)
    assert stored.dtype == np.float32 and stored.shape == VALUES.shape
    assert least <= np.sqrt(np.square(stored - VALUES).mean() / np.square(VALUES).mean()) <= largest


def test_q8_0_is_ggufs_rule():
    """d = max|x| / 127, kept as fp16; codes by the fp32 d, half away from zero."""
    pytest.importorskip("gguf")
    blocks = VALUES.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.trunc(blocks / d + np.copysign(np.float32(0.5), blocks))
    assert np.array_equal(FORMATS["q8_0"].round(VALUES), (codes * d.astype(np.float16)).reshape(VALUES.shape))


def test_int8_has_a_scale_for_each_token_and_head():
    values = VALUES.copy()
    values[1, 7] *= 1000
    values[0, 3] = 0
    stored = FORMATS["int8"].round(values)
    assert np.abs(stored[1, 7] - values[1, 7]).max() <= np.abs(values[1, 7]).max() / 127 / 2 * 1.01
    assert not stored[0, 3].any()
    assert np.array_equal(np.delete(stored[1], 7, 0), np.delete(FORMATS["int8"].round(VALUES)[1], 7, 0))


def test_fp8_refuses_what_it_cannot_hold():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"float8_e4m3fn must hold all elements: one of 5000 is too large"):
        FORMATS["fp8_e4m3"].round(np.full((1, 1, 64), 5000, np.float32))
    assert FORMATS["fp8_e4m3, scaled"].round(np.full((1, 1, 64), 5000, np.float32)) == pytest.approx(5000)


def test_the_rotation_is_its_own_inverse_and_spreads_an_outlier():
    matrix = hadamard(64)
    assert np.allclose(matrix @ matrix, np.eye(64), atol=1e-6) and np.array_equal(matrix, matrix.T)
    outlier = np.zeros((1, 64), np.float32)
    outlier[0, 5] = 8
    assert np.allclose(np.abs(turned(outlier)), 1)
    with pytest.raises(ValueError, match="size must be a power of two, not 48"):
        hadamard(48)


def test_scores_survive_the_rotation():
    query = RNG.standard_normal((3, 4, 64)).astype(np.float32)
    how = Stored("fp16", "fp16", rotated=True)
    q, k, v = how.store(query, VALUES[:, :4], VALUES[:, :4])
    assert np.allclose(q[0] @ k[0].T, query[0] @ VALUES[0, :4].T, atol=0.05)
    assert np.allclose(turned(v), VALUES[:, :4], atol=0.01)


def test_bits_and_titles():
    assert Stored("q8_0", "q4_0", True).bits == 6.5 and Stored("q8_0", "q4_0", True).title == "K q8_0, V q4_0, rotated"
    assert Stored("fp16", "fp16").title == "fp16" and len({how.title for how in ROWS}) == len(ROWS)


def test_errors_grow_as_bits_shrink_and_fp16_has_none():
    pytest.importorskip("gguf")
    rows = [Stored(name, name) for name in ("fp16", "q8_0", "q4_0")]
    (fp16, sparse), (q8, _), (q4, _) = errors(heads(captured(layers=1), (512,)), rows)
    assert fp16 == 0 < sparse and 0 < q8 < 0.02 < q4 < 0.2


def test_keys_are_of_formats_alone():
    found = {Stored("q8_0", "q8_0"): Cost(1, 2, 3), Stored("q8_0", "q8_0", True): Cost(4, 5, 6),
             Stored("q8_0", "q4_0"): Cost(7, 8, 9), Stored("fp8_e4m3, scaled", "fp8_e4m3, scaled"): Cost(0, 0, 0)}
    assert kv_formats.keys(found) == {
        "format.q8_0.error": 1, "format.q8_0.bits_per_byte": 3,
        "format.q8_0.rotated.error": 4, "format.q8_0.rotated.bits_per_byte": 6}
