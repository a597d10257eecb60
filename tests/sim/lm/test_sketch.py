"""The sketch of K: its codes, the method that chooses by it, and methods at a number of bytes."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from kvattic.spec import codes
from kvattic.spec.config import PAPER
from kvattic.spec.elements import to_bits
from kvattic_sim import oracle
from kvattic_sim.lm import budgets, sketch
from kvattic_sim.lm.methods import Centroid, Coded, Dense, Fetched, Quest, Sketched, Sparf, Sparq
from kvattic_sim.lm.sketch import encode, sketch_bytes


def keys(tokens, head_dim=8, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, head_dim)).astype(np.float16).astype(np.float64)


# The codes.


@pytest.mark.parametrize("levels", sketch.LEVELS)
@pytest.mark.parametrize("bits", sketch.BITS)
@pytest.mark.parametrize("block", [16, 64])
def test_no_element_is_clipped(bits, block, levels):
    key = keys(150)
    key[70] *= 64
    found = encode(key, bits=bits, block_tokens=block, levels=levels)
    width = (found.high.astype(float) - found.low)[np.arange(150) // block]
    step = width / ((1 << bits) - 1 if levels == "ends" else 1 << bits)
    assert (np.abs(found.decode() - key) <= step / 2 + 1e-12).all()
    assert found.codes.max() == (1 << bits) - 1 and found.codes.min() == 0


def test_codes_by_hand():
    key = np.array([[0.0], [0.9], [1.1], [2.6], [3.0], [-1.0], [7.0], [2.9]])
    found = encode(key, bits=2, block_tokens=5, levels="ends")
    assert found.codes[:, 0].tolist() == [0, 1, 1, 3, 3, 0, 3, 1]
    assert found.low[:, 0].tolist() == [0, -1] and found.high[:, 0].tolist() == [3, 7]
    assert found.decode()[:5, 0].tolist() == [0, 1, 1, 3, 3]
    centres = encode(key[:5], bits=1, block_tokens=5, levels="centres")
    assert centres.decode()[:, 0].tolist() == [0.75, 0.75, 0.75, 2.25, 2.25]


def test_the_ends_are_exact():
    key = keys(64)
    found = encode(key, bits=3, block_tokens=64, levels="ends").decode()
    for of in (np.argmin, np.argmax):
        at = of(key, axis=0), np.arange(8)
        assert np.array_equal(found[at], key[at])


def test_a_constant_feature_is_exact():
    key = keys(32)
    key[:, 3] = 2.5
    for levels in sketch.LEVELS:
        assert (encode(key, bits=2, block_tokens=16, levels=levels).decode()[:, 3] == 2.5).all()


@pytest.mark.parametrize("sinks, left_out", [(4, 4), (16, 0), (20, 20), (0, 0)])
def test_sinks_are_left_out_of_the_bounds(sinks, left_out):
    key = keys(48)
    key[:sinks] *= 128
    found = encode(key, bits=2, block_tokens=16, sinks=sinks)
    block = left_out // 16
    counted = key[max(left_out, 16 * block) : 16 * block + 16]
    assert np.array_equal(found.low[block], counted.min(axis=0))
    assert np.array_equal(found.high[block], counted.max(axis=0))


def test_bytes_of_a_sketch():
    found = encode(keys(128, 64), bits=2, block_tokens=64)
    assert found.nbytes == 128 * 64 * 2 // 8 + 2 * 64 * 2 * 2
    assert sketch_bytes(np.array([128, 0, 130]), 64, 2, 64).tolist() == [found.nbytes, 0, 2080 + 3 * 256]
    assert sketch_bytes(np.array(256), 32, 3, 256) == 256 * 32 * 3 // 8 + 128


@pytest.mark.parametrize("wrong, message", [
    ({"bits": 5}, r"bits must be one of 1, 2, 3, 4, not 5"),
    ({"block_tokens": 0}, r"block_tokens must be at least 1, not 0"),
    ({"levels": "middle"}, r"levels must be one of centres, ends, not 'middle'"),
])
def test_wrong_parameters(wrong, message):
    with pytest.raises(ValueError, match=message):
        encode(keys(16), **{"bits": 2, "block_tokens": 16, **wrong})


# The method.


def steps(tokens=600, head_dim=16, lengths=(512, 600), seed=1):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((len(lengths), 3, head_dim)) * 2
    key, value = (rng.standard_normal((tokens, head_dim)).astype(np.float16).astype(np.float64) for _ in range(2))
    return query, key, value, np.array(lengths)


def by_hand(method, query, key, value, length):
    """One step of `Sketched`, from its words, beside the oracle's SparF with K replaced."""
    head_dim, flash = key.shape[1], length // 256 * 256
    rough = encode(key[:flash], bits=method.bits, block_tokens=method.block_tokens, sinks=method.sinks,
                   levels=method.levels).decode()
    run = method.feature_run
    size = np.abs(query).sum(axis=0).reshape(-1, run).sum(axis=1)
    runs = sorted(range(head_dim // run), key=lambda c: (-size[c], c))[: (method.features or head_dim) // run]
    chosen = [run * each + c for each in runs for c in range(run)]
    scale = np.sqrt(np.abs(query).sum(axis=1) / np.abs(query[:, chosen]).sum(axis=1) / head_dim)
    scores = query @ key[:length].T / np.sqrt(head_dim)
    exact = method.sinks if method.exact_sinks else 0
    scores[:, exact:flash] = (query[:, chosen] @ rough[exact:, chosen].T) * scale[:, None]
    mass = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    wanted = round(method.share * flash)
    local = round(method.local * wanted)
    forced = [t for t in range(flash) if t < method.sinks or t >= length - local]
    rest = sorted((t for t in range(flash) if t not in forced), key=lambda t: (-mass[:, t].sum(), t))
    taken = np.zeros(length, bool)
    taken[(forced + rest)[:wanted]] = taken[flash:] = True
    exact = oracle.attention(query, key[:length], value[:length], head_dim**-0.5, np.broadcast_to(taken, (3, length)))
    alpha = mass[:, taken].sum(axis=1, keepdims=True)
    return taken, alpha * exact + (1 - alpha) * value[:length].mean(axis=0)


@pytest.mark.parametrize("parameters", [{}, {"features": 4}, {"bits": 4, "block_tokens": 64}, {"bits": 1, "sinks": 3},
                                        {"features": 8, "feature_run": 4, "levels": "ends"}, {"exact_sinks": False}])
def test_the_method_is_its_words(parameters):
    method = Sketched(share=1 / 8, **parameters)
    query, key, value, lengths = steps()
    found = method.attend(query, key, value, lengths)
    for at, length in enumerate(lengths):
        taken, output = by_hand(method, query[at], key, value, length)
        assert np.array_equal(found.attended[at, :length], taken) and not found.attended[at, length:].any()
        assert np.abs(found.output[at] - output).max() < 1e-12


@pytest.mark.parametrize("pairs", [False, True])
def test_codes_are_the_oracles_of_the_drives_codes(pairs):
    query, key, value, lengths = steps(head_dim=32)
    found = Coded(share=1 / 8, sinks=5, pairs=pairs).attend(query, key, value, lengths)
    config = replace(PAPER, head_dim=32)
    for at, length in enumerate(lengths):
        flash = length // 256 * 256
        estimate = key[:length].copy()
        estimate[:flash] = codes.decode(codes.encode(to_bits(key[:flash], config.element), config, skip=5), config)
        tail = np.arange(length) >= flash
        wanted = round(flash / 8)
        right = oracle.codes(query[at], key[:length], value[:length], 32**-0.5, estimate=estimate, top_units=wanted,
                             sinks=5, tail=tail, local_tokens=round(wanted / 4), codeword_tokens=4 if pairs else 8)
        assert np.array_equal(found.attended[at, :length], right.attended[0])
        assert np.abs(found.output[at] - right.output).max() < 1e-6
        # 4 octets for each stripe; codewords of 8 tokens of K or V, or of 4 of both.
        size = 4 if pairs else 8
        chosen = np.unique(np.flatnonzero(found.attended[at, :flash]) // size)
        codewords = flash // 256 * 4 + -(-5 // size) + len(chosen) * (1 if pairs else 2)
        assert found.flash_bytes[at] == codewords * 512


def test_more_bits_choose_more_like_exact_scores():
    query, key, value, lengths = steps(tokens=1024, head_dim=64, lengths=(1024,))
    right = Sparf(features=64, share=1 / 8, sinks=16).attend(query, key, value, lengths).attended
    same = [(Sketched(share=1 / 8, bits=bits).attend(query, key, value, lengths).attended & right).sum()
            for bits in sketch.BITS]
    assert same == sorted(same) and same[-1] > 0.9 * right.sum()


def test_wrong_scores_of_sinks_would_spoil_alpha():
    query, key, value, lengths = steps(lengths=(512,))
    # The first token has most of the weight.
    key[0], value[0] = 0, 0
    query[..., 0], key[0, 0], key[1:, 0] = 8.0, 6.0, -1.0
    dense = Dense().attend(query, key, value, lengths).output
    exact, codes = (Sketched(share=1 / 8, exact_sinks=each).attend(query, key, value, lengths)
                    for each in (True, False))
    assert (exact.alpha > 0.99).all() and np.abs(exact.output - dense).max() < 0.02
    assert (codes.alpha < 0.9).all()


def test_without_a_blend_it_is_attention_alone():
    query, key, value, lengths = steps()
    blended, alone = (Sketched(share=1 / 8, blend=each).attend(query, key, value, lengths) for each in (True, False))
    assert np.array_equal(blended.attended, alone.attended) and np.array_equal(blended.flash_bytes, alone.flash_bytes)
    right = oracle.attention(query[1], key, value, 0.25, np.broadcast_to(alone.attended[1], (3, 600)))
    assert np.abs(alone.output[1] - right).max() < 1e-12 and (alone.alpha == 1).all()
    assert (blended.alpha < 1).all()


def test_bytes_of_the_method():
    query, key, value, lengths = steps(head_dim=64, lengths=(600, 100))
    found = Sketched(share=1 / 8, features=32, block_tokens=64).attend(query, key, value, lengths)
    first = 512 * 32 * 2 // 8 + 8 * 32 * 4 + 8 * 512      # codes, bounds, 16 sinks in 8 codewords
    touched = len(set(np.flatnonzero(found.attended[0, :512]) // 2))
    assert found.flash_bytes.tolist() == [first + 512 * touched, 0]
    assert found.element_bytes.tolist() == [first + 64 * 256, 0]
    right = Dense().attend(query[1:], key, value, lengths[1:]).output[0]
    np.testing.assert_allclose(found.output[1], right, rtol=0, atol=1e-12)      # BLAS rounds by the batch


def test_a_token_larger_than_a_codeword():
    query, key, value, lengths = steps(head_dim=256, lengths=(512,))
    found = Sketched(share=1 / 8, sinks=0).attend(query, key, value, lengths)
    assert found.flash_bytes[0] == sketch_bytes(np.array(512), 256, 2, 256) + 64 * 1024 == found.element_bytes[0]


@pytest.mark.parametrize("wrong, message", [
    ({"block_tokens": 96}, "block_tokens must divide 256, not 96"),
    ({"features": 12, "feature_run": 8}, "feature_run must divide 12 and 16 features, not be 8"),
    ({"features": 12, "feature_run": 0}, "feature_run must divide 12 and 16 features, not be 0"),
    ({"features": 17}, "features must be from 1 to 16, not 17"),
])
def test_what_does_not_fit_the_keys(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sketched(share=0.5, **wrong).attend(*steps())


# Sinks of the other methods.


@pytest.mark.parametrize("method", [Sparf(features=2, share=1 / 8, sinks=16), Sparq(features=2, share=1 / 8, sinks=16),
                                    Fetched(features=2, share=1 / 8, sinks=16, unit_tokens=16),
                                    Centroid(share=1 / 8, sinks=16), Quest(share=1 / 8, sinks=16)])
def test_sinks_are_always_attended(method):
    query, key, value, lengths = steps()
    key[:16] = -10 * np.sign(query[0].sum(axis=0))
    assert method.attend(query, key, value, lengths).attended[0, :16].all()


def test_mean_keys_leave_sinks_out():
    query, key, value, lengths = steps(lengths=(512,))
    cut = Centroid(share=1 / 4, unit_tokens=32, sinks=8)
    right = oracle.centroid(query[0], key[:512], value[:512], 0.25, unit_tokens=32, sinks=8, top_units=4,
                            centroids=oracle.mean_keys(key[:512], 32, 8).astype(np.float16))
    assert np.array_equal(cut.attend(query, key, value, lengths).attended[0, :512], right.attended[0])


# Methods at a number of bytes.


@pytest.mark.parametrize("ratio", budgets.RATIOS[:2])
@pytest.mark.parametrize("name", budgets.CONTENDERS)
def test_a_method_needs_its_bytes(name, ratio):
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(shape) for shape in ((1024, 1, 64), (1024, 64), (1024, 64)))
    method = budgets.at_bytes(name, ratio, 64)
    # The sinks of a sketch are read twice: that is not in the ratio, as it does not grow with the text.
    sinks = budgets.SINKS / 1024 if isinstance(method, (Sketched, Coded)) else 0
    needed = method.decode(query, key, value, 1023).element_bytes[0] / (1024 * 256)
    assert needed == pytest.approx(float(ratio) + sinks, rel=0.01)


def test_first_passes():
    assert budgets.sketch_first_pass(2, 64) == Fraction(5, 64)
    assert budgets.sketch_first_pass(2, 256, Fraction(1, 2)) == Fraction(17, 512)
    assert budgets.possible("sketch", Fraction(1, 8), 64) and not budgets.possible("sketch", Fraction(17, 256), 64)
    assert budgets.possible("dense", Fraction(1), 64)


@pytest.mark.parametrize("name, ratio, message", [
    ("sketch", Fraction(1, 16), r"ratio must be above 17/256, the first pass of sketch, not 1/16"),
    ("other", Fraction(1, 4), r"method must be one of dense, codes, sketch, .*, not 'other'"),
])
def test_no_such_budget(name, ratio, message):
    with pytest.raises(ValueError, match=message):
        budgets.at_bytes(name, ratio, 64)
