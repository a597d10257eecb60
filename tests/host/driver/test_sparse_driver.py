"""Sparse attention through the host library: plans, jobs and errors; results as `sparse.attend_sparse` has them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvattic
from kvattic import Mode
from kvattic.driver.device import Device
from kvattic.driver.diagnosis import explain, where_unreadable
from kvattic.errors import CapacityError, ConfigError, DeviceStatusError, DeviceTimeoutError, RequestError
from kvattic.golden import sparse
from kvattic.golden.device import FlashFaults, GoldenDevice
from kvattic.spec import codes, layout
from kvattic.spec.commands import Status, query_row_bytes, result_row_bytes
from kvattic.spec.config import TINY, Config
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.layout import page_place
from kvattic.spec.nand import TINY_PART

GROUP = TINY.group_tokens
"""128 tokens, in 32 codewords on 8 pages."""
BF16 = replace(TINY, element=Element.BF16, channels=3, rows=3)
QUAD = replace(TINY, part=TINY_PART.resized(4096), rows=4, score_depth=1024)    # two pages in a group, of 64 tokens
CONFIGS = {"tiny": TINY, "bf16": BF16, "quad": QUAD}
WIDE = replace(TINY, beat_bytes=16)
"""With as many elements to a beat as a token's half: octets of another order."""
WIDE_BF16 = replace(BF16, beat_bytes=32, dram_beat_bytes=32)
WIDE_CONFIGS = [WIDE, WIDE_BF16, replace(QUAD, beat_bytes=16)]


def tensors(config, kv_heads, tokens, q_heads, n_queries=1, seed=0):
    """(key, value, query): bit patterns."""
    rng = np.random.default_rng(seed)
    shapes = ((kv_heads, tokens), (kv_heads, tokens), (q_heads, n_queries))
    return [to_bits(rng.standard_normal((*shape, config.head_dim)), config.element) for shape in shapes]


def mean_of(value, config):
    """The mean of V as the library keeps it, from all tokens at once."""
    total = np.cumsum(from_bits(value, config.element).astype(np.float64), axis=1)[:, -1]
    return (total / value.shape[1]).astype(np.float32).view(np.uint32)


def means_of(keys, unit_tokens, config, sinks=0):
    """Mean keys, in float64, of one head; sinks: of the first tokens."""
    values = from_bits(keys, config.element).astype(np.float64).reshape(-1, unit_tokens, config.head_dim)
    counted = [unit_values[max(sinks - i * unit_tokens, 0) if sinks < (i + 1) * unit_tokens else 0 :]
               for i, unit_values in enumerate(values)]
    return to_bits(np.stack([tokens.mean(axis=0) for tokens in counted]), config.element)


def expected(config, key, value, query, *, mode, flushed, features=0, top_units, local_tokens=0, sinks=0, unit_tokens=1,
             start=0,
             end=None, scale=None):
    """`sparse.attend_sparse` of one job: K and V (tokens, head_dim), query (rows, head_dim), all rows alike."""
    size = config.group_tokens
    end = len(key) if end is None else end
    base = start - start % size
    pad = -len(key) % size
    key, value = (np.pad(array, ((0, pad), (0, 0)))[base:] for array in (key, value))
    stripes = -(-(end - base) // size)
    key, value = key[: stripes * size], value[: stripes * size]
    rows = np.ones(len(query), np.int64)
    arguments = {}
    if mode is Mode.CODES:
        arguments["sketch"] = codes.encode(key, config, skip=sinks - base)
    if mode is Mode.CENTROID:
        arguments["sketch"] = means_of(key, unit_tokens, config, sinks - base)
    return lambda mean: sparse.attend_sparse(
        query, key, value, mode=mode, group_tokens=size, tokens_per_codeword=config.tokens_per_codeword,
        features=features, top_units=top_units, local_tokens=local_tokens, sinks=sinks,
        unit_bits=0 if mode.by_token else (unit_tokens // config.tokens_per_codeword).bit_length() - 1,
        mean=None if mode is Mode.CENTROID else mean, tail=base + np.arange(stripes) * size >= flushed,
        element=config.element, scale_bits=golden_scale(config) if scale is None else scale, start=rows * start,
        end=rows * end, tree=rows * 0, tree_token=end, base_token=base, end_token=end, **arguments)


def golden_scale(config):
    with Device(GoldenDevice(config)) as device, device.create_sequence(1, capacity_tokens=1) as sequence:
        sequence.prefill(*np.ones((2, 1, 1, config.head_dim), np.float16))
        return sequence.plan(np.ones((1, 1, config.head_dim), np.float16)).jobs[0].scale_bits


@st.composite
def calls(draw):
    mode = draw(st.sampled_from(list(Mode)[1:]))
    config = draw(st.sampled_from(WIDE_CONFIGS if mode is Mode.CODES else list(CONFIGS.values())))
    size, codeword = config.group_tokens, config.tokens_per_codeword
    most = min(config.max_tokens, 5 * size)
    tokens = draw(st.one_of(st.sampled_from([1, size - 1, size, size + 1, 3 * size, most]), st.integers(1, most)))
    unit = 1 if mode.by_token else codeword << draw(st.integers(0, config.unit_bits_max))
    units = draw(st.integers(1, -(-tokens // unit)))
    newest, sinks = draw(st.integers(0, tokens)), draw(st.one_of(st.just(0), st.integers(0, tokens)))
    sinks = min(sinks, size // 2) if mode is Mode.CODES else sinks
    while -(-tokens // unit) - (tokens - newest) // unit + -(-sinks // unit) > units:
        newest, sinks = newest // 2, sinks // 2
    selection = {"top_units": units, "local_tokens": newest, "sinks": sinks}
    if mode.featured:
        selection["features"] = draw(st.integers(1, config.head_dim))
    return config, tokens, mode, unit, selection


@settings(deadline=None, max_examples=60)
@given(calls(), st.lists(st.integers(1, 300), max_size=3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 99))
def test_every_mode_equals_the_golden_model(call, pieces, kv_heads, group, seed):
    """Tokens come in any pieces; the heads of a group select together."""
    config, tokens, mode, unit, selection = call
    group = min(group, config.rows)
    key, value, query = tensors(config, kv_heads, tokens, kv_heads * group, seed=seed)
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(kv_heads, capacity_tokens=tokens, sparse=mode.featured,
                                          centroids=unit if mode is Mode.CENTROID else None, codes=mode is Mode.CODES,
                                          sinks=selection["sinks"])
        at = 0
        for piece in [*pieces, tokens]:
            piece = min(piece, tokens - at)
            if piece:
                sequence.append(key[:, at : at + piece], value[:, at : at + piece])
            at += piece
        flushed = tokens // config.group_tokens * config.group_tokens
        assert sequence.flushed() == flushed
        arguments = {"unit_tokens": unit} if mode is Mode.FETCHED else {}
        # What the sequence was created with is the default.
        asked = {name: number for name, number in selection.items() if name != "sinks"}
        result = sequence.attend(query, mode=mode.name.lower(), **asked, **arguments)
    mean = mean_of(value, config)
    for head in range(kv_heads):
        rows = slice(head * group, (head + 1) * group)
        trace = expected(config, key[head], value[head], query[rows, 0], mode=mode, flushed=flushed, unit_tokens=unit,
                         **selection)(mean[head])
        assert np.array_equal(result.bits[rows, 0], trace.output)
        assert np.array_equal(result.maximum[rows, 0], trace.exact.maximum)
        assert np.array_equal(result.denominator[rows, 0].astype(np.int64), trace.exact.denominator)


def test_layers_sequences_and_modes_in_one_stream():
    """All sketches in one sequence, several layers and heads, dense jobs between them."""
    config = replace(WIDE_BF16, part=TINY_PART.resized(1024, blocks=16))
    with Device(GoldenDevice(config)) as device:
        plans, traces = [], []
        for seed, (heads, layers, tokens) in enumerate([(2, 2, 300), (1, 1, 90), (3, 1, 513)]):
            sequence = device.create_sequence(heads, layers=layers, capacity_tokens=600, sparse=True, centroids=8,
                                              codes=True)
            for layer in range(layers):
                key, value, query = tensors(config, heads, tokens, heads * 2, seed=10 * seed + layer)
                sequence.append(key, value, layer=layer)
                for mode, unit, numbers in ((Mode.DENSE, None, {}), (Mode.SPARF, 1, {"features": 5, "top_units": 20}),
                                            (Mode.FETCHED, 16, {"features": 32, "top_units": 3, "local_tokens": 3}),
                                            (Mode.CENTROID, 8, {"top_units": 4, "local_tokens": 9}),
                                            (Mode.CODES, 1, {"top_units": 30, "local_tokens": 5})):
                    arguments = {"unit_tokens": unit} if mode is Mode.FETCHED else {}
                    plans.append(sequence.plan(query, layer=layer, mode=mode, **numbers, **arguments))
                    if mode is Mode.DENSE:
                        traces.append(sequence.attend(query, layer=layer).bits)
                        continue
                    mean = mean_of(value, config)
                    traces.append(np.concatenate([
                        expected(config, key[h], value[h], query[2 * h : 2 * h + 2, 0], mode=mode, unit_tokens=unit,
                                 flushed=tokens // 128 * 128, **numbers)(mean[h]).output for h in range(heads)]))
        results = device.attend_many(plans)
        for result, trace in zip(results, traces, strict=True):
            assert np.array_equal(result.bits.reshape(trace.shape), trace)


def test_each_query_selects_for_itself():
    """Three queries of the last tokens, two heads of the group in a job; a window moves the first stripe."""
    key, value, query = tensors(TINY, 1, 400, 2, 3)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=400, sparse=True)
        sequence.prefill(key, value)
        numbers = {"features": 8, "top_units": 30, "local_tokens": 10}
        plan = sequence.plan(query, causal=True, mode="sparf", **numbers)
        assert [(job.rows, job.base_token, job.end_token) for job in plan.jobs] == [
            (2, 0, 398), (2, 0, 399), (2, 0, 400)]
        result = device.attend_many([plan])[0]
        for i in range(3):
            trace = expected(TINY, key[0], value[0], query[:, i], mode=Mode.SPARF, flushed=384, end=398 + i,
                             **numbers)(mean_of(value[:, : 398 + i], TINY)[0])
            assert np.array_equal(result.bits[:, i], trace.output)
        plan = sequence.plan(query, causal=True, window=200, mode="sparf", **numbers)
        assert [(job.base_token, job.end_token, len(job.table), len(job.sketch)) for job in plan.jobs] == [
            (128, 398, 3, 3), (128, 399, 3, 3), (128, 400, 3, 3)]
        result = device.attend_many([plan])[0]
        trace = expected(TINY, key[0], value[0], query[:, 1], mode=Mode.SPARF, flushed=384, start=199, end=399,
                         **numbers)(mean_of(value[:, 199:399], TINY)[0])
        assert np.array_equal(result.bits[:, 1], trace.output)


def test_what_a_job_says():
    key, value, query = tensors(TINY, 2, 300, 2)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True, centroids=16)
        sequence.prefill(key, value)
        job = sequence.plan(query, mode=Mode.SPARF, features=4, top_units=9, local_tokens=2).jobs[1]
        assert (job.mode, job.features, job.top_units, job.local_tokens, job.unit_bits) == (Mode.SPARF, 4, 9, 2, 0)
        assert np.array_equal(job.mean, mean_of(value, TINY)[1])
        assert np.array_equal(job.mean, sequence.mean_value().view(np.uint32)[1])
        found = layout.unpack_sketches(job.sketch)
        assert found.written.tolist() == [1, 1, 0]
        job = sequence.plan(query, mode="fetched", features=32, top_units=75).jobs[0]
        assert (job.mode, job.features, job.top_units, job.local_tokens, job.unit_bits) == (Mode.FETCHED, 32, 75, 0, 0)
        assert sequence.plan(query, mode="fetched", features=32, top_units=19,
                             unit_tokens=np.int64(16)).jobs[0].unit_bits == 2
        job = sequence.plan(query, mode="centroid", top_units=19).jobs[0]
        assert (job.mode, job.features, job.top_units, job.unit_bits, job.mean) == (Mode.CENTROID, 0, 19, 2, None)
        assert not np.array_equal(layout.unpack_sketches(job.sketch).page, found.page)
        job = sequence.plan(query).jobs[0]
        assert (job.mode, job.features, job.top_units, job.local_tokens, job.unit_bits, job.mean, job.sketch) == (
            Mode.DENSE, 0, 0, 0, 0, None, None)


def test_all_of_a_sequence_is_the_dense_attention_of_it():
    key, value, query = tensors(TINY, 2, 300, 4)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True, centroids=4)
        sequence.prefill(key, value)
        dense = sequence.attend(query)
        for numbers in ({"mode": "sparf", "features": 1, "top_units": 300},
                        {"mode": "centroid", "top_units": 75, "local_tokens": 300},
                        {"mode": "fetched", "features": 32, "top_units": 19, "unit_tokens": 16, "local_tokens": 300}):
            result = sequence.attend(query, **numbers)
            assert np.array_equal(result.bits, dense.bits)
            assert np.array_equal(result.lse, dense.lse)
        result = sequence.attend(query, mode="sparf", features=8, top_units=50)
        assert (result.lse < dense.lse).all()


def test_a_plan_follows_its_stripes_into_flash():
    key, value, query = tensors(TINY, 1, 256, 1)
    numbers = {"mode": "sparf", "features": 32, "top_units": 10}
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=256, sparse=True)
        sequence.append(key[:, :250], value[:, :250])
        plan = sequence.plan(query, **numbers)
        before = device.attend_many([plan])[0].bits
        sequence.append(key[:, 250:], value[:, 250:])
        after = device.attend_many([plan])[0].bits
    # Its tail stays what it was, although the stripe lies in flash now.
    trace = expected(TINY, key[0], value[0], query[:, 0], mode=Mode.SPARF, features=32, top_units=10, flushed=128,
                     end=250)(mean_of(value[:, :250], TINY)[0])
    assert np.array_equal(before[:, 0], trace.output)
    assert np.array_equal(after, before)


def test_small_memory_gives_the_same_bits():
    """The smallest rings, and blocks of one job, or of two: eight rows, a table of three stripes, the mean of V."""
    config = replace(TINY, rows=8)
    key, value, query = tensors(config, 2, 300, 16)
    size, rings = 8 * (query_row_bytes(32) + result_row_bytes(32)) + 64 + 128, 3 * 2 * 2 * 64
    found = []
    for memory in (1 << 20, rings + 2 * size, rings + 2 * size - 1, rings + size):
        with Device(GoldenDevice(config, memory_bytes=memory)) as device:
            sequence = device.create_sequence(2, capacity_tokens=300, sparse=True)
            sequence.prefill(key, value)
            found.append(sequence.attend(query, mode="sparf", features=8, top_units=40).bits)
            assert np.array_equal(found[-1], found[0])
    with Device(GoldenDevice(config, memory_bytes=rings + size - 1)) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True)
        sequence.prefill(key, value)
        with pytest.raises(CapacityError, match=f"job 0 of 2 needs {size:,} bytes of host memory"):
            sequence.attend(query, mode="sparf", features=8, top_units=40)


# The mean of V.


@pytest.mark.parametrize("config", [TINY, BF16], ids=["fp16", "bf16"])
def test_the_mean_is_of_all_tokens_in_any_pieces(config):
    """Values of very different size: the sum depends on the order, which is that of the tokens."""
    rng = np.random.default_rng(0)
    value = to_bits(rng.standard_normal((2, 300, 32)) * np.exp2(rng.integers(-20, 12, (2, 300, 32))), config.element)
    key = np.zeros_like(value)
    with Device(GoldenDevice(config)) as device:
        whole, pieces = (device.create_sequence(2, capacity_tokens=300, layers=2, sparse=True) for _ in range(2))
        whole.prefill(key, value, layer=1)
        at = 0
        for size in (1, 126, 2, 100, 71):
            pieces.append(key[:, at : at + size], value[:, at : at + size], layer=1)
            at += size
            assert np.array_equal(pieces.mean_value(1).view(np.uint32), mean_of(value[:, :at], config))
        assert whole.mean_value(1).dtype == np.float32
        assert np.array_equal(whole.mean_value(1), pieces.mean_value(1))
        with pytest.raises(RequestError, match="layer 0 has no tokens"):
            whole.mean_value(0)
        dense = device.create_sequence(2, capacity_tokens=10, centroids=4)
        dense.prefill(key[:, :1], value[:, :1])
        with pytest.raises(RequestError, match=r"feature layout or codes only .sparse=True."):
            dense.mean_value()


@pytest.mark.parametrize("flushed", [0, 128, 256])
def test_what_is_lost_is_taken_out_of_the_mean(flushed):
    """Lost: an unfinished stripe, and one that was full but could not be programmed."""
    key, value, query = tensors(TINY, 2, 300, 2)
    faults = FlashFaults()
    with Device(GoldenDevice(TINY, faults=faults), timeout_s=0.01) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True, centroids=8)
        if flushed:
            sequence.append(key[:, :flushed], value[:, :flushed])
        sequence.append(key[:, flushed : flushed + 20], value[:, flushed : flushed + 20])
        faults.power_cut = 3
        if flushed == 256:
            sequence.append(key[:, 276:], value[:, 276:])
            device.transport._powered = False
        else:
            with pytest.raises(DeviceTimeoutError):
                sequence.append(key[:, flushed + 20 :], value[:, flushed + 20 :])
        faults.power_cut = None
        device.transport.power_up()
        device.recover()
        assert sequence.length() == sequence.flushed() == flushed
        if flushed:
            assert np.array_equal(sequence.mean_value().view(np.uint32), mean_of(value[:, :flushed], TINY))
        sequence.append(key[:, flushed:], value[:, flushed:])
        assert np.array_equal(sequence.mean_value().view(np.uint32), mean_of(value, TINY))
        for mode, unit, numbers in ((Mode.SPARF, 1, {"features": 5, "top_units": 20}),
                                    (Mode.CENTROID, 8, {"top_units": 4})):
            result = sequence.attend(query, mode=mode, **numbers)
            for head in range(2):
                trace = expected(TINY, key[head], value[head], query[head], mode=mode, unit_tokens=unit, flushed=256,
                                 **numbers)(mean_of(value, TINY)[head])
                assert np.array_equal(result.bits[head], trace.output)


# Errors.


@pytest.mark.parametrize(("arguments", "message"), [
    ({"mode": "sparq"}, "mode must be one of dense, sparf, fetched, centroid, codes, not 'sparq'"),
    ({"mode": 1}, "mode must be one of .*, not 1"),
    ({"features": 4}, "mode dense has no features"),
    ({"top_units": 4}, "mode dense has no top_units"),
    ({"local_tokens": 4}, "mode dense has no local_tokens"),
    ({"unit_tokens": 4}, "mode dense has no unit_tokens: it must not be given"),
    ({"mode": "sparf", "features": 4, "top_units": 4, "unit_tokens": 4}, "mode sparf has no unit_tokens"),
    ({"mode": "centroid", "features": 4, "top_units": 4}, "mode centroid has no features"),
    ({"mode": "sparf", "features": 0, "top_units": 4},
     r"features \(the paper's r\) must be an int from 1 to 32, not 0"),
    ({"mode": "fetched", "features": 33, "top_units": 4}, r"features \(the paper's r\) must be .* not 33"),
    ({"mode": "sparf", "top_units": 4}, r"features \(the paper's r\) must be .* not None"),
    ({"mode": "sparf", "features": 1.0, "top_units": 4}, r"features .* not 1\.0"),
    ({"mode": "sparf", "features": 4}, r"top_units \(the paper's k\) must be an int from 1 to 65,535, not None"),
    ({"mode": "sparf", "features": 4, "top_units": 0}, r"top_units \(the paper's k\) must be .* not 0"),
    ({"mode": "centroid", "top_units": True}, r"top_units \(the paper's k\) must be .* not True"),
    ({"mode": "sparf", "features": 4, "top_units": 301},
     r"top_units \(the paper's k\) must be at most 300, as tokens 0 to 299 make no more units of 1, not 301"),
    ({"mode": "fetched", "features": 4, "top_units": 76}, "at most 75, .* 0 to 299 make no more units of 4, not 76"),
    ({"mode": "centroid", "top_units": 39}, "at most 38, .* units of 8, not 39"),
    ({"mode": "sparf", "features": 4, "top_units": 73, "window": 44}, "at most 44, as tokens 256 to 299"),
    ({"mode": "sparf", "features": 4, "top_units": 4, "local_tokens": -1},
     "local_tokens must be an int from 0 to 4, not -1"),
    ({"mode": "sparf", "features": 4, "top_units": 4, "local_tokens": 5},
     "local_tokens must be an int from 0 to 4, not 5"),
    ({"mode": "centroid", "top_units": 4, "sinks": 33, "local_tokens": 13},
     r"units .* must be at least 5, not 4: of 300 tokens the first 33 .sinks. and the newest 13 .local_tokens. lie "
     "in so"),
    ({"mode": "sparf", "features": 4, "top_units": 4, "sinks": -1}, "sinks must be an int from 0 to 65,535, not -1"),
    ({"sinks": 4}, "mode dense has no sinks"),
    ({"mode": "fetched", "features": 4, "top_units": 4, "unit_tokens": 2},
     "power of two of tokens from 4 .* to 16, not 2"),
    ({"mode": "fetched", "features": 4, "top_units": 4, "unit_tokens": 32}, "not 32"),
    ({"mode": "fetched", "features": 4, "top_units": 4, "unit_tokens": 12}, "not 12"),
    ({"mode": "fetched", "features": 4, "top_units": 4, "unit_tokens": 4.0}, r"not 4\.0"),
    ({"mode": "centroid", "top_units": 4, "unit_tokens": 4},
     "unit_tokens must be 8, of which the sequence's mean keys are, not 4"),
])
def test_bad_requests(arguments, message):
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=300, sparse=True, centroids=8)
        sequence.prefill(*np.zeros((2, 1, 300, 32), np.uint16))
        with pytest.raises(RequestError, match=message):
            sequence.attend(np.ones((1, 1, 32)), **arguments)
        sequence.attend(np.ones((1, 1, 32)), mode="centroid", top_units=3, local_tokens=13, unit_tokens=8)
        sequence.attend(np.ones((1, 1, 32)), mode="centroid", top_units=6, local_tokens=48,
                        window=44)     # all of the window


def test_a_group_larger_than_a_job_is_refused():
    """Two halves would select apart; positions may be many."""
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=300, sparse=True)
        sequence.prefill(*np.zeros((2, 1, 300, 32), np.uint16))
        with pytest.raises(RequestError, match=r"mode sparf selects once for the 3 query heads .* has 2 rows"):
            sequence.attend(np.ones((3, 1, 32)), mode="sparf", features=4, top_units=4)
        assert len(sequence.plan(np.ones((2, 9, 32)), mode="sparf", features=4, top_units=4).jobs) == 9
        assert sequence.attend(np.ones((3, 1, 32))).output.shape == (3, 1, 32)


# Several positions at once.


MODES = [("dense", {}), ("sparf", {"features": 8, "top_units": 40, "local_tokens": 3}),
         ("fetched", {"features": 8, "top_units": 12, "unit_tokens": 8}),
         ("centroid", {"top_units": 9, "local_tokens": 17}), ("codes", {"top_units": 40, "local_tokens": 3})]


def one_by_one(device, key, value, query, first, numbers, options, **limits):
    """What each of the last queries gets when its token is appended alone, and attended."""
    found = []
    with device.create_sequence(1, capacity_tokens=512, **options) as sequence:
        sequence.held_tokens = limits.pop("held", 0)
        sequence.prefill(key[:, :first], value[:, :first])
        for token in range(first, key.shape[1]):
            sequence.append(key[:, token : token + 1], value[:, token : token + 1])
            found.append(sequence.attend(query[:, token : token + 1], **numbers, **limits).bits[:, 0])
    return np.stack(found, axis=1)


@pytest.mark.parametrize(("mode", "numbers"), MODES, ids=[name for name, _ in MODES])
@pytest.mark.parametrize(("config", "limits"), [
    (WIDE, {}), (WIDE, {"window": 150}), (WIDE_BF16, {"held": 20}), (WIDE, {"held": 64, "window": 60})],
    ids=["all", "window", "bf16, held", "held, window"])
def test_several_positions_get_the_bits_of_one_at_a_time(config, mode, numbers, limits):
    """A chunk over the end of a stripe: in one call the stripe is in flash, one at a time it was not yet."""
    first, last = 248, 264
    key, value, query = tensors(config, 1, last, 2, last, seed=5)
    value[0, last - 4 :] = to_bits(np.full((4, 32), 1e4), config.element)    # later tokens that would show in any mean
    options = {"sparse": True, "centroids": 8, "codes": True, "sinks": 5}
    numbers = numbers | {"mode": mode}
    with Device(GoldenDevice(config)) as device:
        want = one_by_one(device, key, value, query, first, numbers, options, **limits)
        limits = dict(limits)
        held = limits.pop("held", 0)
        for pieces in ([16], [6, 10]):
            with device.create_sequence(1, capacity_tokens=512, **options) as sequence:
                sequence.held_tokens = held
                sequence.prefill(key[:, :first], value[:, :first])
                at = first
                for piece in pieces:
                    sequence.append(key[:, at : at + piece], value[:, at : at + piece])
                    at += piece
                got = sequence.attend(query[:, first:], causal=True, **numbers, **limits)
                np.testing.assert_array_equal(got.bits, want)
                # A few of them, whose V is not that of the newest append.
                got = sequence.attend(query[:, 251:254], end=np.arange(252, 255), **numbers, **limits)
                np.testing.assert_array_equal(got.bits, want[:, 3:6])


@pytest.mark.parametrize("config", [WIDE, WIDE_BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("mode", "numbers"), MODES, ids=[name for name, _ in MODES])
def test_drafts_accepted_and_rejected(config, mode, numbers):
    """Drafts are attended as a chain of a tree, and some of them are removed again: bits of the tokens that stay."""
    rng = np.random.default_rng(3)
    key, value, query = tensors(config, 1, 280, 2, 280, seed=6)
    wrong_key, wrong_value, wrong_query = tensors(config, 1, 280, 2, 280, seed=7)
    options = {"sparse": True, "centroids": 8, "codes": True, "sinks": 5}
    numbers = numbers | {"mode": mode}
    first = 240
    with Device(GoldenDevice(config)) as device:
        want = one_by_one(device, key, value, query, first, numbers, options, held=32)
        with device.create_sequence(1, capacity_tokens=512, **options) as sequence:
            sequence.held_tokens = 32
            sequence.prefill(key[:, :first], value[:, :first])
            at, tree = first, bool(rng.integers(2))
            while at < 280:
                good, bad = (int(n) for n in rng.integers(1, 9, 2))
                good = min(good, 280 - at)
                right, later = slice(at, at + good), slice(at + good, at + good + bad)
                drafts = [np.concatenate([a[:, right], b[:, later]], axis=1)
                          for a, b in ((key, wrong_key), (value, wrong_value), (query, wrong_query))]
                sequence.append(*drafts[:2])
                count = drafts[2].shape[1]
                mask = {"tree": np.tril(np.ones((count, count), bool))} if tree else {"causal": True}
                got = sequence.attend(drafts[2], **mask, **numbers)
                np.testing.assert_array_equal(got.bits[:, :good], want[:, at - first : at - first + good])
                at, tree = at + good, not tree
                sequence.truncate(at)


def test_the_mean_is_of_what_a_branch_attends():
    """Two branches of a draft tree: each one's mean has its own drafts, not the other's."""
    key, value, query = tensors(TINY, 1, 140, 1, 2)
    tree = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], bool)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=140, sparse=True)
        sequence.prefill(key, value)
        jobs = sequence.plan(query, tree=tree, mode="sparf", features=4, top_units=4).jobs
        numbers = from_bits(value[0], TINY.element).astype(np.float64)
        for job, row in zip(jobs, tree, strict=True):
            seen = np.concatenate([np.ones(136, bool), row])
            np.testing.assert_array_equal(job.mean.view(np.float32), numbers[seen].mean(axis=0).astype(np.float32))


def test_a_query_with_fewer_units_takes_all():
    key, value, query = tensors(TINY, 1, 140, 1, 140)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=140, sparse=True)
        sequence.prefill(key, value)
        jobs = sequence.plan(query, causal=True, mode="fetched", features=4, top_units=10, local_tokens=33).jobs
        assert [(job.top_units, job.local_tokens) for job in jobs] == [
            (min(-(-n // 4), 10), min(4 * -(-n // 4), 33)) for n in range(1, 141)]
        assert [r.completion.status for r in device.run(jobs)] == [Status.OK] * 140


def test_a_query_that_attends_nothing():
    key, value, query = tensors(TINY, 1, 20, 1, 2)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=20, sparse=True)
        sequence.prefill(key, value)
        tree = np.zeros((2, 20), bool)
        tree[1, 3] = True
        result = sequence.attend(query, tree=tree, mode="sparf", features=4, top_units=4)
        assert np.isneginf(result.lse[0]).tolist() == [True, False]
        assert np.array_equal(result.output[0, 1], from_bits(value[0, 3], TINY.element))
        result = sequence.attend(query[:, :1], tree=tree[:1], mode="sparf", features=4, top_units=20, local_tokens=20)
        assert np.isneginf(result.lse).all()


def test_more_tokens_than_the_score_buffers_hold():
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=600, sparse=True)
        sequence.prefill(*np.zeros((2, 1, 600, 32), np.uint16))
        query = np.ones((1, 1, 32))
        message = r"mode sparf takes at most 512 tokens, .* \(Config.score_depth\), not 600 \(tokens 0 to 599\)"
        with pytest.raises(RequestError, match=message):
            sequence.plan(query, mode="sparf", features=4, top_units=4)
        assert len(sequence.plan(query).jobs) == 2
        job, = sequence.plan(query, mode="sparf", features=4, top_units=4, window=472).jobs
        assert (job.base_token, job.end_token) == (128, 600)
        device.run([job])


def test_sequences_without_what_a_mode_reads():
    odd = Config(channels=3, rows=2, head_dim=80, sparse=False, part=TINY_PART, dies=2, codeword_bytes=512,
                 score_depth=256)
    query = np.ones((1, 1, 32))
    with Device(GoldenDevice(TINY)) as device:
        made = [device.create_sequence(1, capacity_tokens=300, **kinds)
                for kinds in ({}, {"sparse": True}, {"centroids": 4})]
        for sequence in made:
            sequence.prefill(*np.zeros((2, 1, 300, 32), np.uint16))
        for sequence in (made[0], made[2]):
            for mode in ("sparf", "fetched"):
                with pytest.raises(RequestError, match=f"mode {mode} reads K in the feature layout.*sparse=True"):
                    sequence.attend(query, mode=mode, features=4, top_units=4)
        for sequence in made[:2]:
            with pytest.raises(RequestError, match=r"mode centroid reads mean keys.*centroids=\.\.\."):
                sequence.attend(query, mode="centroid", top_units=4)
    with Device(GoldenDevice(odd)) as device, device.create_sequence(1, capacity_tokens=9) as sequence:
        sequence.prefill(*np.zeros((2, 1, 9, 80), np.uint16))
        with pytest.raises(RequestError, match="mode sparf reads K in the feature layout"):
            sequence.attend(np.ones((1, 1, 80)), mode="sparf", features=4, top_units=4)


def test_codes_that_cannot_be():
    query = np.ones((1, 1, 32))
    with (Device(GoldenDevice(replace(TINY, kv=KvFormat.FP8_E4M3))) as device,
          pytest.raises(ConfigError, match="without codes: kv must be element, not fp8_e4m3")):
        device.create_sequence(1, capacity_tokens=300, codes=True)
    with Device(GoldenDevice(WIDE)) as device:
        with pytest.raises(RequestError, match="codes must be a bool, not 2"):
            device.create_sequence(1, capacity_tokens=300, codes=2)
        with pytest.raises(RequestError, match="sinks must be an int from 0 to 64, not 65"):
            device.create_sequence(1, capacity_tokens=300, codes=True, sinks=65)
        without = device.create_sequence(1, capacity_tokens=300, sparse=True, centroids=8)
        without.prefill(*np.zeros((2, 1, 300, 32), np.uint16))
        with pytest.raises(RequestError, match=r"mode codes reads codes, which .* without: create it with codes=True"):
            without.attend(query, mode="codes", top_units=4)
        sequence = device.create_sequence(1, capacity_tokens=300, codes=True, sinks=64)
        sequence.prefill(*np.zeros((2, 1, 300, 32), np.uint16))
        for change, message in (({"sinks": 65}, "sinks must be an int from 0 to 64, not 65"),
                                ({"features": 4}, "mode codes has no features"),
                                ({"unit_tokens": 4}, "mode codes has no unit_tokens"),
                                ({"mode": "sparf", "features": 4}, "mode sparf reads K in the feature layout"),
                                ({"top_units": 63}, "top_units .* must be at least 64, not 63")):
            with pytest.raises(RequestError, match=message):
                sequence.attend(query, **{"mode": "codes", "top_units": 64} | change)
        assert np.array_equal(sequence.mean_value(), np.zeros((1, 32)))
        good, = sequence.plan(query, mode="codes", top_units=64).jobs
        assert (good.mode, good.features, good.sinks, good.unit_bits) == (Mode.CODES, 0, 64, 0)
        for change, message in (
            ({"sinks": 65}, "INVALID_SELECTION: the number of sinks is more than half a stripe's tokens"),
            ({"features": 1}, "INVALID_FIELD"), ({"sketch": good.sketch & 0xFFFFFFFF}, "NO_SKETCH"),
        ):
            with pytest.raises(DeviceStatusError, match=message):
                device.run([replace(good, **change)])


def test_what_the_device_says_of_raw_jobs():
    key, value, query = tensors(TINY, 1, 300, 1)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=300, sparse=True, centroids=8)
        sequence.prefill(key, value)
        good = sequence.plan(query, mode="fetched", features=4, top_units=4).jobs[0]
        mean = good.mean.copy()
        mean[7] = 0x7FC0_0000
        for change, message in (
            ({"features": 0}, "INVALID_SELECTION: the number of features is none or more than head_dim"),
            ({"features": 33}, "INVALID_SELECTION: the number of features"),
            ({"top_units": 76}, "INVALID_SELECTION: the number of units is none or more than the tokens make"),
            ({"local_tokens": 17}, "INVALID_SELECTION: the number of local tokens is more than the units hold"),
            ({"unit_bits": 3}, "INVALID_SELECTION: the number of codewords of a unit is more"),
            ({"mean": mean}, "NAN_MEAN: .* in the mean of V, feature 7"),
            ({"sketch": good.sketch & 0xFFFFFFFF}, "NO_SKETCH: the stripe of entry 0 was written without"),
            ({"mode": Mode.SPARF, "unit_bits": 1}, "INVALID_FIELD: .* the device has no such mode"),
            ({"mode": Mode.DENSE, "sketch": None, "mean": None}, "INVALID_FIELD"),
            ({"mode": Mode.DENSE, "sketch": None, "mean": None, "features": 0, "top_units": 0, "local_tokens": 0,
              "unit_bits": 0,
              "sinks": 1}, "INVALID_FIELD"),
        ):
            with pytest.raises(DeviceStatusError, match=message):
                device.run([replace(good, **change)])
        with pytest.raises(RequestError, match="sketch must have an entry for each of the 3 stripes, not 2"):
            device.run([replace(good, sketch=good.sketch[:2])])
        for change, message in (
            ({"mean": None}, "mode FETCHED must have a mean of V of 32 features .*, not 0"),
            ({"mean": mean[:31]}, "mode FETCHED must have a mean of V of 32 features .*, not 31"),
            ({"mode": Mode.DENSE}, "mode DENSE must have a mean of V of 0 features .*, not 32"),
        ):
            with pytest.raises(RequestError, match=message):
                device.run([replace(good, **change)])
        with pytest.raises(RequestError, match="a number of job 0 does not fit its field"):
            device.run([replace(good, top_units=1 << 16)])
        assert device.run([good])[0].completion.status is Status.OK


def test_every_status_is_explained():
    completion = kvattic.Completion.unpack(bytes(64))
    for status in Status:
        for where in (0, 3, 1 << 24):
            assert explain(replace(completion, status=status, where=where)).startswith(f"{status.name}: ")


def test_special_numbers_in_bit_patterns():
    """A NaN in K is found in the feature layout, in a centroid or in the levels of codes; one in V in the mean."""
    key, value, query = tensors(TINY, 1, 300, 1)
    for where, bits in (("key", 0x7E00), ("key", 0xFC00), ("value", 0x7C00)):
        bad = {"key": key.copy(), "value": value.copy()}
        bad[where][0, 77, 5] = bits
        with Device(GoldenDevice(WIDE)) as device:
            sequence = device.create_sequence(1, capacity_tokens=300, sparse=True, centroids=16, codes=True)
            sequence.prefill(bad["key"], bad["value"])
            if where == "value":
                with pytest.raises(DeviceStatusError, match=r"NAN_MEAN: .*, feature 5"):
                    sequence.attend(query, mode="sparf", features=32, top_units=1)
                continue
            with pytest.raises(DeviceStatusError, match="NAN_KEY: NaN or infinity in K at token 77"):
                sequence.attend(query, mode="sparf", features=32, top_units=1)
            with pytest.raises(DeviceStatusError, match="NAN_KEY: NaN or infinity in K at token 64"):
                sequence.attend(query, mode="centroid", top_units=1)
            with pytest.raises(DeviceStatusError, match="NAN_KEY: NaN or infinity in K at token 0"):
                sequence.attend(query, mode="codes", top_units=1)


# What cannot be read.


@pytest.mark.parametrize("mode", ["sparf", "centroid", "codes"])
def test_what_the_first_pass_cannot_read_is_named(mode):
    key, value, query = tensors(TINY, 3, 300, 3)
    numbers = {"features": 32, "top_units": 4} if mode == "sparf" else {"top_units": 4}
    with Device(GoldenDevice(WIDE)) as device:
        device.create_sequence(1, capacity_tokens=5)
        sequence = device.create_sequence(3, capacity_tokens=300, layers=2, sparse=True, centroids=8,
                                          codes=True)
        for layer in range(2):
            sequence.prefill(key, value, layer=layer)
        jobs = sequence.plan(query, layer=1, mode=mode, **numbers).jobs
        channel = int(layout.unpack_entries(jobs[2].table).channel[1])
        found = layout.unpack_sketches(jobs[2].sketch)
        page, codeword = int(found.page[1]), int(found.codeword[1])
        if mode == "sparf":
            page, codeword, token = page + 3, 2, 128        # feature 14
        elif mode == "codes":
            assert codeword == 0    # a page of four octets
            codeword, token = 3, 128
        else:
            codeword, token = codeword + 1, 128 + 4 * 8
            page, codeword = page + codeword // 4, codeword % 4
        block, place = device.media.allocator.block(channel, page), page_place(page, WIDE)
        device.transport.faults.unreadable.add((block, place.page, codeword))
        with pytest.raises(DeviceStatusError) as error:
            sequence.attend(query, layer=1, mode=mode, **numbers)
        assert str(error.value) == (
            f"job 2 of 3 (sequence 1, layer 1, KV head 2, tokens 0 to 299, {mode}) failed: UNREADABLE_SKETCH: what the "
            f"first pass reads for token {token} on cannot be read: {block} (zone {place.zone}), page {place.page}, "
            f"codeword {codeword} (UNCORRECTABLE)")
        # Not the first of its batch.
        jobs[0].table[0] = layout.pack_entries(0, 6 << 5, 6 << 5, 0)    # zone 6: nothing is there
        jobs[0].sketch[0] = layout.pack_sketches(6 << 5, 0, 1)
        results = device.run(jobs, check=False)
        assert [r.completion.status for r in results] == [Status.UNREADABLE_SKETCH, Status.OK, Status.UNREADABLE_SKETCH]
        text = where_unreadable(jobs[2], results[2].completion, device.media)
        assert re.search(r", codeword \d \(not the first of the batch, which is page number 192 of channel 0\)$", text)


@pytest.mark.parametrize("token", [0, 4])
def test_sinks_that_cannot_be_read_are_named(token):
    """Of the first codeword the completion says no more than of an octet; the register tells them apart."""
    key, value, query = tensors(WIDE, 1, 300, 1)
    with Device(GoldenDevice(WIDE)) as device:
        sequence = device.create_sequence(1, capacity_tokens=300, codes=True, sinks=6)
        sequence.prefill(key, value)
        job, = sequence.plan(query, mode="codes", top_units=10).jobs
        entry = layout.unpack_entries(job.table)
        channel, page, codeword = int(entry.channel[0]), int(entry.key_page[0]), token // 4
        block, place = device.media.allocator.block(channel, page), page_place(page, WIDE)
        device.transport.faults.unreadable.add((block, place.page, codeword))
        with pytest.raises(DeviceStatusError) as error:
            device.run([job])
        assert str(error.value).endswith(
            f"for token {token} on cannot be read: {block} (zone {place.zone}), page {place.page}, codeword {codeword} "
            "(UNCORRECTABLE)")


def test_a_tail_that_cannot_be_read_is_named():
    key, value, query = tensors(TINY, 1, 40, 1)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=40, sparse=True)
        sequence.append(key, value)
        jobs = sequence.plan(query, mode="sparf", features=4, top_units=4).jobs
        completion = replace(device.run(jobs)[0].completion, status=Status.UNREADABLE_SKETCH, where=24)
        first = int(layout.unpack_entries(jobs[0].table).key_page[0])
        assert where_unreadable(jobs[0], completion, device.media) == f": device DRAM, page {first + 1}, codeword 2"
        # What there is not, is nobody's.
        sequence._writer.layers[0].table[0, 0] = layout.pack_entries(0, 1 << 23, 0, 1)
        with pytest.raises(DeviceStatusError, match="NOT_OWNED: what entry 0 of the table names belongs to another"):
            sequence.attend(query, mode="sparf", features=4, top_units=4)
