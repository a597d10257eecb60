"""The host library over the golden device, against plain float64 attention."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.host.plain import mask_of, reference

import kvattic
from kvattic.driver.device import Device
from kvattic.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    DeviceStatusError,
    DeviceTimeoutError,
    RequestError,
)
from kvattic.golden import dense
from kvattic.golden.device import GoldenDevice
from kvattic.spec import layout
from kvattic.spec.commands import Kind, Opcode, query_row_bytes, result_row_bytes
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import SCORE_MASKED, VALUE_FRACTION, Element
from kvattic.spec.nand import TINY_PART
from kvattic.spec.registers import COUNTERS

PAGE = TINY.tokens_per_page
BF16 = replace(TINY, element=Element.BF16, channels=3, rows=3)
ODD = Config(
    channels=3, rows=4, head_dim=80, sparse=False, part=TINY_PART, dies=2, codeword_bytes=512, score_depth=256
)  # 3 tokens and 32 bytes of padding in a codeword
SHORT = replace(TINY, sparse=False, score_depth=16)  # 32 tokens for a job, so that sequences are split
CONFIGS = {"tiny": TINY, "bf16": BF16, "odd": ODD, "short": SHORT}
TOLERANCE = 1e-6


def open_device(config=TINY, **sizes):
    return Device(GoldenDevice(config, **sizes))


def pages_of(device, channel, dram, first, count):
    """Images of consecutive pages, as they lie in DRAM or in flash."""
    config, golden_device = device.config, device.transport
    for page in range(first, first + count):
        if dram:
            yield np.frombuffer(golden_device.read_dram(page * config.page_bytes, config.page_bytes), np.uint8)
        else:
            block = golden_device.flash.blocks[device.media.allocator.block(channel, page)]
            yield block.pages[layout.page_place(page, config).page].image


def content(sequence, layer=0):
    """K and V of a layer as the device has them, (kv_heads, K or V, tokens, head_dim), found by the jobs' tables."""
    device, config = sequence.device, sequence.device.config
    plan = sequence.plan(np.ones((sequence.kv_heads, 1, config.head_dim)), layer=layer)
    images = [([], []) for _ in range(sequence.kv_heads)]
    for part in plan.parts:
        for job in plan.jobs[part.jobs.start : part.jobs.stop]:
            entries = layout.unpack_entries(job.table)
            for channel, key_page, value_page, dram, _ in zip(*(column.tolist() for column in entries), strict=True):
                for kind, first in ((Kind.KEY, key_page), (Kind.VALUE, value_page)):
                    images[part.kv_head][kind].extend(pages_of(device, channel, dram, first, job.stripe_pages))
    return np.array([[layout.unpack_pages(np.array(pages), config)[: sequence.length(layer)] for pages in head]
                     for head in images])


def tensors(config, kv_heads, tokens, q_heads, n_queries, seed=0):
    """(key, value, query) in float32, exact in the storage format."""
    rng = np.random.default_rng(seed)
    shapes = ((kv_heads, tokens), (kv_heads, tokens), (q_heads, n_queries))
    return [
        from_bits(
            to_bits(rng.standard_normal((*shape, config.head_dim)), config.element),
            config.element,
        )
        for shape in shapes
    ]


def assert_close(result, expected, lse):
    scale = np.sqrt(np.mean(expected**2)) or 1.0
    assert np.sqrt(np.mean((result.output - expected) ** 2)) <= TOLERANCE * scale
    assert np.abs(result.output - expected).max() <= 1e-5 * scale
    assert np.array_equal(np.isinf(lse), np.isinf(result.lse))
    finite = np.isfinite(lse)
    # The score's least bit is 2**-22.
    assert np.abs(result.lse[finite] - lse[finite]).max(initial=0) <= 1e-6 * np.abs(
        lse[finite]
    ).max(initial=1)


@st.composite
def calls(draw):
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    page = config.tokens_per_page
    edges = [1, page - 1, page, page + 1, config.channels * page, config.channels * page + 1]
    tokens = draw(st.one_of(st.sampled_from(edges), st.integers(1, 130)))
    n_queries = draw(st.integers(1, 5))
    arguments = {"causal": n_queries <= tokens and draw(st.booleans())}
    if draw(st.booleans()):
        arguments["window"] = draw(st.integers(1, tokens + 2))
    if draw(st.booleans()):
        n_draft = draw(st.integers(1, min(32, tokens)))
        flags = draw(
            st.lists(st.booleans(), min_size=n_queries * n_draft, max_size=n_queries * n_draft)
        )
        arguments["tree"] = np.array(flags).reshape(n_queries, n_draft)
    for name in ("start", "end"):
        if draw(st.integers(0, 2)) == 0:
            arguments[name] = draw(st.lists(st.integers(0, tokens), min_size=n_queries, max_size=n_queries))
    return config, tokens, draw(st.integers(1, 3)), draw(st.integers(1, 4)), n_queries, arguments


@settings(deadline=None, max_examples=150)
@given(calls(), st.integers(0, 1000))
def test_attention_equals_float64(call, seed):
    config, tokens, kv_heads, group, n_queries, arguments = call
    key, value, query = tensors(config, kv_heads, tokens, kv_heads * group, n_queries, seed)
    with open_device(config) as device:
        # Another sequence in front, so that page 0 and channel 0 are not the only case.
        other = device.create_sequence(1, capacity_tokens=40)
        other.prefill(*np.ones((2, 1, 40, config.head_dim)))
        sequence = device.create_sequence(kv_heads, capacity_tokens=tokens)
        sequence.prefill(key, value)
        result = sequence.attend(query, **arguments)
    mask = mask_of(tokens, n_queries, **arguments)
    expected, lse = reference(query, key, value, mask, 1 / math.sqrt(config.head_dim))
    assert result.output.dtype == np.float32
    assert result.output.shape == query.shape
    assert result.bits.dtype == np.uint32
    assert result.maximum.dtype == np.int64
    assert result.denominator.dtype == np.uint64
    assert result.maximum.shape == result.denominator.shape == result.lse.shape == query.shape[:2]
    assert_close(result, expected, lse)
    empty = ~mask.any(axis=1)
    assert (result.maximum[:, empty] == SCORE_MASKED).all()
    assert not result.output[:, empty].any()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 3),
)
@example("odd", [1, 4, 3, 8, 2], 2)  # from within a codeword with a rest into the next one
def test_appends_in_any_pieces_equal_one_prefill(name, pieces, kv_heads):
    config = CONFIGS[name]
    total = sum(pieces)
    key, value, _ = tensors(config, kv_heads, total, kv_heads, 1)
    once = open_device(config).create_sequence(kv_heads, capacity_tokens=total)
    once.prefill(key, value)
    sequence = open_device(config).create_sequence(kv_heads, capacity_tokens=total)
    at = 0
    for piece in pieces:
        sequence.append(key[:, at : at + piece], value[:, at : at + piece])
        at += piece
        assert sequence.length() == at
        assert sequence.flushed() == at - at % config.tokens_per_page
    expected = to_bits(np.stack([key, value], axis=1), config.element)
    assert np.array_equal(content(once), expected)
    assert np.array_equal(content(sequence), expected)


def test_attention_between_appends_sees_what_was_written():
    key, value, query = tensors(TINY, 1, 3 * PAGE, 2, 1)
    with open_device() as device, device.create_sequence(1, capacity_tokens=3 * PAGE) as sequence:
        for t in range(3 * PAGE):
            sequence.append(key[:, t : t + 1], value[:, t : t + 1])
            if t % 7 == 0 or t % PAGE in (0, PAGE - 1):
                mask = np.ones((1, t + 1), bool)
                expected = reference(query, key[:, : t + 1], value[:, : t + 1], mask, 32**-0.5)
                assert_close(sequence.attend(query), *expected)


def test_layers_and_sequences_do_not_mix():
    with open_device(BF16) as device:
        made = []
        for seed, (layers, heads, tokens) in enumerate([(2, 2, 30), (1, 1, 5), (3, 1, 61)]):
            sequence = device.create_sequence(heads, layers=layers, capacity_tokens=tokens + seed)
            for layer in range(layers):
                key, value, query = tensors(BF16, heads, tokens, heads, 2, 10 * seed + layer)
                sequence.prefill(key, value, layer=layer)
                made.append((sequence, layer, query, key, value))
        for sequence, layer, query, key, value in made:
            mask = mask_of(key.shape[1], 2, causal=True)
            expected = reference(query, key, value, mask, 32**-0.5)
            assert_close(sequence.attend(query, layer=layer, causal=True), *expected)
        plans = [s.plan(query, layer=layer, causal=True) for s, layer, query, _, _ in made]
        many = device.attend_many(plans)
        for (sequence, layer, query, _, _), result in zip(made, many, strict=True):
            alone = sequence.attend(query, layer=layer, causal=True)
            assert np.array_equal(alone.bits, result.bits)


def test_heads_start_on_different_channels_over_sequences_too():
    with open_device(BF16) as device:
        homes = []
        for kv_heads in (1, 1, 2, 1):
            sequence = device.create_sequence(kv_heads, capacity_tokens=4)
            sequence.prefill(*np.ones((2, kv_heads, 4, 32)))
            homes += [int(layout.unpack_entries(job.table).channel[0])
                      for job in sequence.plan(np.ones((kv_heads, 1, 32))).jobs]
    assert homes == [0, 1, 2, 0, 1]


def test_freed_flash_is_used_again_and_old_tokens_are_gone():
    key, value, query = tensors(TINY, 1, 40, 1, 1)
    with open_device() as device:
        zones, pages = device.free_zones, device.free_dram_pages
        for _ in range(20):
            with device.create_sequence(1, capacity_tokens=64) as sequence:
                sequence.prefill(np.full_like(key, 3), value)
                assert device.free_zones == zones - 1
                assert device.free_dram_pages == pages - 2
            assert (device.free_zones, device.free_dram_pages) == (zones, pages)
            assert not list(device.transport.written())
        sequence = device.create_sequence(1, capacity_tokens=64)
        sequence.prefill(key[:, :17], value[:, :17])
        expected = reference(query, key[:, :17], value[:, :17], np.ones((1, 17), bool), 32**-0.5)
        assert_close(sequence.attend(query), *expected)


@pytest.mark.parametrize("scale", [1e-3, 0.125, 2.0])
def test_scale(scale):
    key, value, query = tensors(TINY, 1, 20, 1, 1)
    with open_device() as device, device.create_sequence(1, capacity_tokens=20) as sequence:
        sequence.prefill(key, value)
        expected = reference(query, key, value, np.ones((1, 20), bool), scale)
        assert_close(sequence.attend(query, scale=scale), *expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16])
def test_every_dtype_gives_the_same_bits(dtype):
    arrays = [a.astype(np.float16) for a in tensors(TINY, 1, 20, 1, 1)]
    key, value, query = (
        a.view(np.uint16) if dtype is np.uint16 else a.astype(dtype) for a in arrays
    )
    with open_device() as device, device.create_sequence(1, capacity_tokens=20) as sequence:
        sequence.prefill(key, value)
        bits = sequence.attend(query).bits
        trace = dense.attend(
            arrays[2][0].view(np.uint16),
            arrays[0][0].view(np.uint16),
            arrays[1][0].view(np.uint16),
            element=Element.FP16,
            scale_bits=sequence.plan(query).jobs[0].scale_bits,
            start=np.array([0]),
            end=np.array([20]),
            tree=np.array([0]),
            tree_token=20,
            base_token=0,
            end_token=20,
        )
    assert np.array_equal(bits[0], trace.output)


def test_rows_share_jobs_and_windows_skip_pages():
    key, value, query = tensors(ODD, 2, 100, 6, 4)
    with open_device(ODD) as device, device.create_sequence(2, capacity_tokens=100) as sequence:
        sequence.prefill(key, value)
        plan = sequence.plan(query, causal=True, window=10)
        # Three heads of the group times four queries: twelve rows, four at a time, for each of
        # two KV heads.
        assert [job.rows for job in plan.jobs] == [4] * 6
        for job in plan.jobs:
            assert job.base_token % ODD.tokens_per_page == 0
            assert job.base_token > 100 - 4 - 10 - ODD.tokens_per_page
            assert job.base_token == job.start.min() - job.start.min() % ODD.tokens_per_page
            assert job.end_token == job.end.max()
        assert plan.jobs[0].end_token < plan.jobs[2].end_token == 100


def test_each_query_has_its_own_bounds():
    key, value, query = tensors(ODD, 2, 100, 6, 3)
    bounds = {"start": np.array([90, 40, 7]), "end": np.array([100, 58, 7])}
    with open_device(ODD) as device, device.create_sequence(2, capacity_tokens=100) as sequence:
        sequence.prefill(key, value)
        whole = sequence.attend(query, **bounds)
        for i in range(2):
            alone = sequence.attend(query[:, i : i + 1], start=bounds["start"][i : i + 1], end=bounds["end"][i : i + 1])
            assert np.array_equal(alone.bits, whole.bits[:, i : i + 1])
        assert not whole.output[:, 2].any()
        # What a window leaves is counted from the end that the other masks set.
        windows = sequence.attend(query, window=5, end=bounds["end"])
        assert np.array_equal(windows.bits, sequence.attend(query, start=bounds["end"] - 5, end=bounds["end"]).bits)
        # Tokens before the first start and behind the last end are not read.
        plan = sequence.plan(query, start=[41, 50, 50], end=[58, 60, 59])
        page = ODD.tokens_per_page
        # Three heads times three queries, four rows a job, for each of two KV heads.
        assert [(job.base_token, job.end_token) for job in plan.jobs] == 2 * [
            (41 - 41 % page, 60), (50 - 50 % page, 60), (50 - 50 % page, 59)]
        # The masks are read when the plan is made.
        later = sequence.plan(query, **bounds)
        bounds["start"][:] = 0
        assert np.array_equal(device.attend_many([later])[0].bits, whole.bits)
        waiting = sequence.attend_async(query, start=[90, 40, 7], end=[100, 58, 7])
        assert np.array_equal(waiting.result().bits, whole.bits)


def test_long_sequences_are_split_and_merged():
    key, value, query = tensors(SHORT, 1, 3 * SHORT.max_tokens + 5, 2, 1)
    with open_device(SHORT) as device, device.create_sequence(1, capacity_tokens=200) as sequence:
        sequence.prefill(key, value)
        plan = sequence.plan(query)
        assert [(job.base_token, job.end_token) for job in plan.jobs] == [
            (0, 32),
            (32, 64),
            (64, 96),
            (96, 101),
        ]
        result = sequence.attend(query)
        assert len(result.completions) == 4
    with open_device(TINY) as device, device.create_sequence(1, capacity_tokens=200) as sequence:
        sequence.prefill(key, value)
        whole = sequence.attend(query)
    assert np.array_equal(result.maximum, whole.maximum)
    assert np.allclose(result.denominator.astype(float), whole.denominator.astype(float), rtol=1e-6)
    assert np.allclose(result.output, whole.output, rtol=1e-6, atol=1e-7)
    assert whole.denominator.min() >= 1 << VALUE_FRACTION


def test_results_do_not_depend_on_channels():
    key, value, query = tensors(TINY, 2, 70, 4, 3)
    found = []
    for channels in (1, 2, 3, 5):
        config = replace(TINY, channels=channels)
        with (
            open_device(config) as device,
            device.create_sequence(2, capacity_tokens=70) as sequence,
        ):
            sequence.prefill(key, value)
            found.append(sequence.attend(query, causal=True))
    for result in found[1:]:
        assert np.array_equal(result.bits, found[0].bits)
        assert np.array_equal(result.maximum, found[0].maximum)
        assert np.array_equal(result.denominator, found[0].denominator)


RINGS = 3 * 2 * 2 * 64
"""Bytes of the smallest rings, of three queues."""


def test_small_memory_gives_the_same_bits():
    """Room for one job at a time, or two; the rings are as small as can be."""
    key, value, query = tensors(TINY, 3, 20, 6, 8)
    job = 2 * (query_row_bytes(32) + result_row_bytes(32)) + 64     # two rows, a table
    found = []
    with open_device(memory_bytes=1 << 20) as device:
        sequence = device.create_sequence(3, capacity_tokens=20)
        sequence.prefill(key, value)
        found.append(sequence.attend(query).bits)
    config = replace(TINY, rows=8)
    job = 8 * (query_row_bytes(32) + result_row_bytes(32)) + 64
    assert job > 2048
    for memory in (RINGS + 2 * job, RINGS + job):
        with open_device(config, memory_bytes=memory) as device:
            sequence = device.create_sequence(3, capacity_tokens=20)
            sequence.prefill(key, value)
            calls = []
            found.append(sequence.attend(query, progress=lambda *a, calls=calls: calls.append(a)).bits)
            assert calls[-1] == (6, 6)
            assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert all(np.array_equal(bits, found[0]) for bits in found)
    with open_device(config, memory_bytes=RINGS + job - 1) as device:
        sequence = device.create_sequence(1, capacity_tokens=20)
        sequence.prefill(key[:1], value[:1])
        with pytest.raises(CapacityError, match=r"job 0 of 2 needs 2,624 bytes of host memory, there are 2,560"):
            sequence.attend(query[:2])
    with pytest.raises(CapacityError, match="at least 2,816 bytes of host memory, there are 2,815"):
        open_device(memory_bytes=RINGS + 2048 - 1)


# Errors.


@pytest.fixture
def sequence():
    with (
        open_device() as device,
        device.create_sequence(2, capacity_tokens=40) as made,
    ):
        yield made


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            zeros(2, 4, 31),
            zeros(2, 4, 31),
            r"key must be .* = \(2, at least 1, 32\), not \(2, 4, 31\)",
        ),
        (
            zeros(2, 4, 32),
            zeros(3, 4, 32),
            r"value must be .* = \(2, at least 1, 32\), not \(3, 4, 32\)",
        ),
        (zeros(2, 0, 32), zeros(2, 0, 32), r"not \(2, 0, 32\)"),
        (zeros(4, 32), zeros(4, 32), r"not \(4, 32\)"),
        (zeros(2, 4, 32), zeros(2, 5, 32), r"same shape, not \(2, 4, 32\) and \(2, 5, 32\)"),
        (zeros(2, 4, 32, dtype=np.int32), zeros(2, 4, 32), "key must be float16, .* not int32"),
        (zeros(2, 4, 32), np.full((2, 4, 32), np.nan), r"value\[0, 0, 0\] is nan"),
        (np.full((2, 4, 32), 1e6), zeros(2, 4, 32), r"key\[0, 0, 0\] is 1000000.0.* fp16"),
    ],
)
@pytest.mark.parametrize("method", ["prefill", "append"])
def test_bad_tokens(sequence, method, key, value, message):
    with pytest.raises(RequestError, match=message):
        getattr(sequence, method)(key, value)
    assert sequence.length() == 0


@pytest.mark.parametrize(
    ("query", "arguments", "message"),
    [
        (zeros(2, 1, 16), {}, r"query must be .*, not \(2, 1, 16\)"),
        (zeros(2, 32), {}, r"not \(2, 32\)"),
        (zeros(2, 0, 32), {}, r"not \(2, 0, 32\)"),
        (zeros(3, 1, 32), {}, "multiple of the sequence's 2 KV heads, not 3"),
        (zeros(1, 1, 32), {}, "multiple of the sequence's 2 KV heads, not 1"),
        (zeros(2, 1, 32, dtype=np.int8), {}, "query must be float16, .* not int8"),
        (np.full((2, 1, 32), np.inf), {}, r"query\[0, 0, 0\] is inf"),
        (zeros(2, 11, 32), {"causal": True}, "11 queries are the last tokens .* only 10"),
        (zeros(2, 1, 32), {"window": 0}, "window must be a positive int, not 0"),
        (zeros(2, 1, 32), {"window": 1.5}, "window must be a positive int, not 1.5"),
        (zeros(2, 1, 32), {"scale": 0.0}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": -1.0}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": math.nan}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": math.inf}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": 1e39}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": 1e-39}, "scale must be positive"),
        (zeros(2, 1, 32), {"scale": "1"}, "scale must be positive"),
        (zeros(2, 1, 32), {"tree": np.ones((1, 2))}, r"tree must be bool .* not float64 \(1, 2\)"),
        (zeros(2, 1, 32), {"tree": np.ones((2, 2), bool)}, r"\(1, 1 to 32\), not bool \(2, 2\)"),
        (zeros(2, 1, 32), {"tree": np.ones(2, bool)}, r"not bool \(2,\)"),
        (zeros(2, 1, 32), {"tree": np.ones((1, 0), bool)}, "1 to 10 draft tokens .* not 0"),
        (zeros(2, 1, 32), {"tree": np.ones((1, 11), bool)}, "1 to 10 draft tokens .* not 11"),
        (zeros(2, 2, 32), {"start": [0]}, r"start must be integers \(n_queries,\) = \(2,\), not int64 \(1,\)"),
        (zeros(2, 2, 32), {"end": 3}, r"end must be integers \(n_queries,\) = \(2,\), not int64 \(\)"),
        (zeros(2, 1, 32), {"end": [1.0]}, r"end must be integers .* not float64 \(1,\)"),
        (zeros(2, 1, 32), {"end": [True]}, r"end must be integers .* not bool \(1,\)"),
        (zeros(2, 2, 32), {"start": [0, -1]}, r"start must be 0 to 10, the layer's tokens, not -1 \(query 1\)"),
        (zeros(2, 2, 32), {"end": [11, 0]}, r"end must be 0 to 10, the layer's tokens, not 11 \(query 0\)"),
        (zeros(2, 1, 32), {"layer": 1}, "layer must be 0 to 0, not 1"),
        (zeros(2, 1, 32), {"layer": -1}, "layer must be 0 to 0, not -1"),
        (zeros(2, 1, 32), {"layer": 0.5}, "layer must be 0 to 0, not 0.5"),
    ],
)
def test_bad_attention(sequence, query, arguments, message):
    sequence.prefill(zeros(2, 10, 32), zeros(2, 10, 32))
    with pytest.raises(RequestError, match=message):
        sequence.attend(query, **arguments)


def test_a_tree_of_more_than_32_tokens(sequence):
    sequence.prefill(zeros(2, 40, 32), zeros(2, 40, 32))
    with pytest.raises(RequestError, match=r"1 to 32 draft tokens .* not 33"):
        sequence.attend(zeros(2, 1, 32), tree=np.ones((1, 33), bool))


def test_no_tokens(sequence):
    with pytest.raises(RequestError, match="layer 0 has no tokens"):
        sequence.attend(zeros(2, 1, 32))


def test_capacity(sequence):
    sequence.prefill(zeros(2, 39, 32), zeros(2, 39, 32))
    with pytest.raises(
        CapacityError, match="room for 40 tokens; layer 0 holds 39, 2 more do not fit"
    ):
        sequence.append(zeros(2, 2, 32), zeros(2, 2, 32))
    sequence.append(zeros(2, 1, 32), zeros(2, 1, 32))
    with pytest.raises(RequestError, match=r"has 40 tokens already.* use append"):
        sequence.prefill(zeros(2, 1, 32), zeros(2, 1, 32))


def test_device_full(sequence):
    device = sequence.device
    # 448 pages of 16 tokens of K or V; two heads of 1,600 tokens take 400 of them.
    big = device.create_sequence(2, capacity_tokens=1600)
    with pytest.raises(
        CapacityError, match=r"1 layers, 2 KV heads and 400 tokens has no room: the flash is full: 1 more zones of 32 "
                             r"pages on each channel are wanted, and of 7 0 are left: 0 are in use, and 7 are reserved"
    ):
        device.create_sequence(2, capacity_tokens=400)
    big.free()
    device.create_sequence(2, capacity_tokens=400)
    with pytest.raises(CapacityError, match="takes 300 pages of a channel, the device has 7 zones of 32 pages"):
        device.create_sequence(3, layers=2, capacity_tokens=800)
    with pytest.raises(CapacityError, match="16,777,215, not 16,777,216"):
        device.create_sequence(1, capacity_tokens=1 << 24)


@pytest.mark.parametrize("name", ["kv_heads", "layers", "capacity_tokens"])
@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "1"])
def test_bad_sequence(sequence, name, bad):
    arguments = {"kv_heads": 1, "layers": 1, "capacity_tokens": 1, name: bad}
    with pytest.raises(RequestError, match=f"{name} must be a positive int, not {bad!r}"):
        sequence.device.create_sequence(**arguments)


def test_use_after_free(sequence):
    sequence.prefill(zeros(2, 10, 32), zeros(2, 10, 32))
    plan = sequence.plan(zeros(2, 1, 32))
    sequence.free()
    sequence.free()
    for use in (
        lambda: sequence.append(zeros(2, 1, 32), zeros(2, 1, 32)),
        lambda: sequence.prefill(zeros(2, 1, 32), zeros(2, 1, 32)),
        lambda: sequence.attend(zeros(2, 1, 32)),
        lambda: sequence.length(),
        lambda: sequence.device.attend_many([plan]),
    ):
        with pytest.raises(RequestError, match="the sequence was freed"):
            use()


def test_use_after_close(sequence):
    device = sequence.device
    device.close()
    device.close()
    for use in (
        lambda: device.create_sequence(1, capacity_tokens=1),
        lambda: device.run([]),
        lambda: device.reset(),
        lambda: sequence.length(),
    ):
        with pytest.raises(RequestError, match="the device was closed"):
            use()


def test_a_plan_of_another_device(sequence):
    sequence.prefill(zeros(2, 10, 32), zeros(2, 10, 32))
    with open_device() as other, pytest.raises(RequestError, match="another device"):
        other.attend_many([sequence.plan(zeros(2, 1, 32))])


def test_nan_in_bit_patterns_is_reported_by_the_device(sequence):
    key = zeros(2, 10, 32, dtype=np.uint16)
    key[1, 7, 3] = 0x7C00
    sequence.prefill(key, zeros(2, 10, 32))
    message = "job 1 of 2 .sequence 0, layer 0, KV head 1, tokens 0 to 9. failed: NAN_KEY: .* in K at token 7"
    with pytest.raises(DeviceStatusError, match=message) as error:
        sequence.attend(zeros(2, 1, 32))
    assert error.value.completion.where == 7
    assert error.value.completion.status is kvattic.Status.NAN_KEY
    # The next command is served.
    jobs = sequence.plan(zeros(2, 1, 32)).jobs
    results = sequence.device.run(jobs, check=False)
    assert [r.completion.status for r in results] == [kvattic.Status.OK, kvattic.Status.NAN_KEY]


def test_a_job_that_does_not_fit_the_command(sequence):
    sequence.prefill(zeros(2, 10, 32), zeros(2, 10, 32))
    job = replace(sequence.plan(zeros(2, 1, 32)).jobs[0], stripe_pages=256)
    with pytest.raises(RequestError, match="a number of job 0 does not fit its field"):
        sequence.device.run([job])


class Wrapped(GoldenDevice):
    """A golden device whose registers can be made to lie."""

    def __init__(self, config=TINY, **lies):
        super().__init__(config)
        self.lies = lies

    def read_register(self, name):
        return self.lies.get(name, super().read_register(name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ID", 0xFFFFFFFF, "not a kvattic device: ID is 0xffffffff, not 0x5441564b"),
        ("VERSION", 0x0001_0003, r"version 1.3, this library needs 4\.x"),
        ("CONFIG_HASH", 1, "another configuration: CONFIG_HASH is 0x00000001"),
    ],
)
def test_a_wrong_device_is_refused(name, value, message):
    with pytest.raises(ConfigMismatchError, match=message):
        Device(Wrapped(**{name: value}))


def test_a_minor_version_is_no_matter():
    Device(Wrapped(VERSION=0x0004_0007))


def prefilled(transport):
    device = Device(transport)
    sequence = device.create_sequence(1, capacity_tokens=40)
    sequence.prefill(zeros(1, 10, 32), zeros(1, 10, 32))
    return sequence


def test_not_ready():
    transport = Wrapped(STATUS=0)
    with pytest.raises(DeviceTimeoutError, match=r"not ready within 0.01 s"):
        Device(transport, timeout_s=0.01)


def test_another_identity():
    class Other(GoldenDevice):
        def __init__(self, said):
            super().__init__(TINY)
            self.said = said

        def _write_block(self, command, queue):
            self.memory.dma_write(command.result, self.said.encode().ljust(2048, b"\0"))

    with pytest.raises(ConfigMismatchError, match=r"another configuration: it is .*bf16"):
        Device(Other(BF16.to_json()))
    for nonsense in ("", "[1]", "null", "{\"no\": 2}", "{\"channels\": 0}"):
        with pytest.raises(ConfigMismatchError, match="cannot be parsed"):
            Device(Other(nonsense))


def test_identify_and_counters():
    with open_device(ODD) as device:
        assert device.identify() == ODD
        sequence = device.create_sequence(1, capacity_tokens=30)
        before = device.counters()
        sequence.prefill(zeros(1, 30, 80), zeros(1, 30, 80))
        written = device.counters()
        assert list(written) == [register.name for register in COUNTERS]
        pages = sequence.counters()["PAGE_PROGRAMS"]
        assert pages == 2 * (30 // ODD.tokens_per_page) > 0
        assert differences(before, written) == {
            "PAGE_PROGRAMS": pages, "FLASH_WORDS": pages * (ODD.codewords_per_page * ODD.raw_codeword_words + 1)}
        # Looking, and times without work, clear nothing.
        for number in range(1, 3):
            sequence.attend(zeros(1, 1, 80))
            found = differences(written, device.counters())
            assert found["CODEWORDS"] == number * 2 * 30 // 3
            assert found["FLASH_WORDS"] == found["CODEWORDS"] * ODD.raw_codeword_words
        assert device.counters() == device.counters()
        assert device.counters()["CYCLES"] == 0     # there is no time
        device.reset()
        assert set(device.counters().values()) == {0}


def differences(before, after):
    """The counters that are others."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def test_counters_of_a_sequence():
    with open_device(TINY) as device:
        one = device.create_sequence(2, capacity_tokens=40, layers=2)
        other = device.create_sequence(1, capacity_tokens=16)
        assert one.counters() == {"JOBS": 0, "TOKENS": 0, "PAGE_PROGRAMS": 0}
        before = device.counters()
        one.prefill(zeros(2, 33, 32), zeros(2, 33, 32))
        one.append(zeros(2, 1, 32), zeros(2, 1, 32), layer=1)
        other.prefill(zeros(1, 16, 32), zeros(1, 16, 32))
        one.attend(zeros(2, 1, 32))
        device.attend_many([one.plan(zeros(2, 1, 32), layer=1), other.plan(zeros(1, 1, 32))])
        # 16 tokens are a page: of K and V of two heads two each are full.
        assert one.counters() == {"JOBS": 4, "TOKENS": 34, "PAGE_PROGRAMS": 8}
        assert other.counters() == {"JOBS": 1, "TOKENS": 16, "PAGE_PROGRAMS": 2}
        assert differences(before, device.counters())["PAGE_PROGRAMS"] == 10
        one.free()
        assert one.counters()["TOKENS"] == 34


def test_timeout_and_reset():
    class Stuck(GoldenDevice):
        stuck = False

        def write_register(self, name, value):
            if name != "SUBMISSION_TAIL_1" or not self.stuck:
                super().write_register(name, value)

    transport = Stuck(TINY)
    sequence = prefilled(transport)
    device = sequence.device
    transport.stuck = True
    message = r"1 commands are under way, 0 wait; STATUS is <StatusBit.READY: 2>\); call Device.reset"
    with pytest.raises(DeviceTimeoutError, match=message):
        sequence.attend(zeros(1, 1, 32), timeout_s=0.01)
    transport.stuck = False
    for use in (lambda: sequence.attend(zeros(1, 1, 32)), lambda: device.counters(), lambda: device.operate([PROBE]),
                lambda: sequence.append(zeros(1, 1, 32), zeros(1, 1, 32)), lambda: device.format()):
        with pytest.raises(DeviceTimeoutError, match=r"call Device.reset"):
            use()
    assert sequence.length() == 10
    device.reset()
    assert not sequence.attend(zeros(1, 1, 32)).output.any()


PROBE = kvattic.FlashOperation(Opcode.PROBE, 0, 0)


def test_a_refused_doorbell_is_told():
    class Elsewhere(GoldenDevice):
        def write_register(self, name, value):
            super().write_register(name, 3000 if name == "SUBMISSION_TAIL_1" else value)

    sequence = prefilled(Elsewhere(TINY))
    with pytest.raises(DeviceTimeoutError, match=r"INVALID_DOORBELL.*, DOORBELL_ERROR 0x01000bb8"):
        sequence.attend(zeros(1, 1, 32))


def test_a_missing_completion():
    class Silent(GoldenDevice):
        silent = False

        def read_memory(self, address, size):
            data = super().read_memory(address, size)
            return bytes(size) if self.silent else data

    transport = Silent(TINY)
    sequence = prefilled(transport)
    transport.silent = True
    with pytest.raises(DeviceStatusError, match="raises its interrupt, but none of the 1 commands under way has a "):
        sequence.attend(zeros(1, 1, 32))
    transport.silent = False
    with pytest.raises(DeviceStatusError, match="raises its interrupt"):
        sequence.attend(zeros(1, 1, 32))
    sequence.device.reset()
    sequence.attend(zeros(1, 1, 32))


def test_open():
    with kvattic.open() as device:
        assert device.config == PAPER
    with kvattic.open("model", TINY) as device:
        assert device.config == TINY
    with kvattic.open("model", "gqa") as device:
        assert device.config == kvattic.GQA
    with pytest.raises(RequestError, match="no target 'sim:nothing'; targets are model, sim:"):
        kvattic.open("sim:nothing")
    for target in ("mmio:", "mmio", "sim", 5):
        with pytest.raises(RequestError, match="no target"):
            kvattic.open(target)
    with kvattic.open("model", TINY, dram_bytes=1 << 20, entries=4, timeout_s=1.0) as device:
        assert (device.transport.dram_bytes, device.timeout_s) == (1 << 20, 1.0)
    for entries in (0, 1, 3, 8192, 2.0):
        with pytest.raises(RequestError, match="entries must be a power of two from 2 to 4,096, not"):
            kvattic.open("model", TINY, entries=entries)


def test_other_targets_are_loaded_when_they_are_asked_for(monkeypatch):
    asked = []

    def transport(which, config, **options):
        asked.append((which, config, options))
        return GoldenDevice(config)

    monkeypatch.setattr("kvattic.transport.simulator.open_simulator", transport)
    monkeypatch.setattr("kvattic.transport.mmio.open_mmio", transport)
    for target in ("sim:verilator", "sim:icarus", "mmio:/dev/xdma0"):
        with kvattic.open(target, "tiny", timeout_s=3.0, something=1) as device:
            assert device.timeout_s == 3.0
    assert asked == [(which, TINY, {"something": 1}) for which in ("verilator", "icarus", "/dev/xdma0")]


def test_who_opens_a_transport_closes_it(monkeypatch):
    closed = []
    monkeypatch.setattr(GoldenDevice, "close", lambda self: closed.append(self))
    with kvattic.open("model", TINY) as device:
        assert not closed
    assert closed == [device.transport]
    device.close()
    with Device(GoldenDevice(TINY)):
        pass
    assert len(closed) == 1
    with pytest.raises(RequestError):
        kvattic.open("model", TINY, entries=3)
    assert len(closed) == 2
    with pytest.raises(ConfigError, match="no preset 'huge'"):
        kvattic.open("model", "huge")


def test_config_hash_survives_json():
    assert Config.from_json(json.dumps(json.loads(TINY.to_json()))).hash == TINY.hash


@pytest.mark.parametrize("config", [{"channels": 4}, None, 5, ["tiny"], json.dumps({"channels": 4}).encode()])
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(ConfigError, match=r"config must be a kvattic.Config, .* or a preset's name \(tiny, .*, not .*; "
                                          r"Config\(\*\*fields\) makes one of a dict"):
        kvattic.open("model", config)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_any_size_holds_all_tokens(sequence, causal):
    query = np.random.default_rng(5).standard_normal((2, 3, 32))
    sequence.prefill(query[:, :1].repeat(20, axis=1), query[:, :1].repeat(20, axis=1))
    expected = sequence.attend(query, causal=causal).bits
    for window in (20, 2**31, 2**63 - 1, 2**63, 2**64, 2**200, np.uint64(2**64 - 1)):
        assert np.array_equal(sequence.attend(query, causal=causal, window=window).bits, expected)
