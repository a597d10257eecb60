"""K and V in 8 bits through the host library: against float64 over the stored values, with scales, in every mode."""

from dataclasses import replace

import numpy as np
import pytest
from tests.host.plain import mask_of, reference

import kvattic
from kvattic import selftest
from kvattic.array import DriveArray
from kvattic.driver.device import Device
from kvattic.errors import ConfigMismatchError, DeviceStatusError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec import layout
from kvattic.spec.commands import Kind
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import element_table
from kvattic_sim import oracle

torch = pytest.importorskip("torch")

FP8 = [KvFormat.FP8_E4M3, KvFormat.FP8_E5M2]
DTYPES = {KvFormat.FP8_E4M3: torch.float8_e4m3fn, KvFormat.FP8_E5M2: torch.float8_e5m2}
LAW = 5e-7
"""Relative RMS error, against float64 over the same stored values."""
E4M3 = replace(TINY, kv=KvFormat.FP8_E4M3)
GROUP = E4M3.group_tokens


def numbers(seed, *shape, size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def stored(values, kv, scale=1.0):
    """What PyTorch says is stored, and what it stands for, in float64."""
    scale = np.float32(scale)
    code = (torch.from_numpy(values) / torch.from_numpy(np.broadcast_to(scale, values.shape).copy())).to(DTYPES[kv])
    return code.double().numpy() * np.float64(scale)


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("kv", FP8)
@pytest.mark.parametrize("kernel", ["c", "numpy"])
def test_dense_attention_is_within_the_law(kv, element, kernel):
    """Tokens in flash and in DRAM, appended in pieces, in codewords with and without a rest."""
    for config, tokens in ((replace(TINY, kv=kv, element=element), 345),
                           (replace(PAPER, kv=kv, element=element, head_dim=96, sparse=False), 700)):
        dim = config.head_dim
        key, value = numbers(1, 2, tokens, dim), numbers(2, 2, tokens, dim)
        query = from_bits(to_bits(numbers(3, 4, 3, dim), element), element)
        with Device(GoldenDevice(config, kernel=kernel)) as device:
            sequence = device.create_sequence(2, capacity_tokens=tokens)
            for begin, end in ((0, 5), (5, 6), (6, 300), (300, tokens)):
                sequence.append(key[:, begin:end], value[:, begin:end])
            result = sequence.attend(query, causal=True)
            wanted, _ = reference(query, stored(key, kv), stored(value, kv), mask_of(tokens, 3, causal=True))
            assert oracle.relative_rms(result.output, wanted) <= LAW
            for found, given in zip(sequence.read(), (key, value), strict=True):
                assert np.array_equal(found.astype(np.float64), stored(given, kv))


@pytest.mark.parametrize("kv", FP8)
def test_both_kernels_have_the_same_bits(kv):
    config = replace(PAPER, kv=kv)
    key, value, query = numbers(1, 3, 1500, 128), numbers(2, 3, 1500, 128), numbers(3, 3, 1, 128)
    found = []
    for kernel in ("c", "numpy"):
        with Device(GoldenDevice(config, kernel=kernel)) as device:
            sequence = device.create_sequence(3, capacity_tokens=1500)
            sequence.prefill(key, value)
            found.append(sequence.attend(query))
    for name in ("bits", "maximum", "denominator"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name))


# Scales.


KEY_SCALE = np.array([[0.25, 0.0371], [3.0, 1.0]], np.float32)
VALUE_SCALE = np.array([[17.0, 0.5], [1.0, 0.003]], np.float32)


def scaled(sequence, key, value, layer):
    """Append numbers whose sizes are the scales'."""
    sizes = (scale[layer][:, None, None] for scale in (KEY_SCALE, VALUE_SCALE))
    key, value = (values * size for values, size in zip((key, value), sizes, strict=True))
    sequence.append(key, value, layer=layer)
    return key, value


@pytest.mark.parametrize("kv", FP8)
def test_scales_of_heads_and_layers(kv):
    config = replace(TINY, kv=kv)
    query = numbers(3, 4, 2, 32).astype(np.float16)
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(2, capacity_tokens=400, layers=2, key_scale=KEY_SCALE,
                                          value_scale=VALUE_SCALE)
        for layer in range(2):
            key, value = scaled(sequence, numbers(1, 2, 333, 32), numbers(2, 2, 333, 32), layer)
            wanted_key, wanted_value = (stored(values, kv, scale[layer][:, None, None]) for values, scale in (
                (key, KEY_SCALE), (value, VALUE_SCALE)))
            found, lse = reference(query, wanted_key, wanted_value, mask_of(333, 2))
            result = sequence.attend(query, layer=layer)
            assert oracle.relative_rms(result.output, found) <= LAW
            assert np.abs(result.lse - lse).max() < 1e-5
            for read, wanted in zip(sequence.read(layer), (wanted_key, wanted_value), strict=True):
                np.testing.assert_allclose(read, wanted, rtol=1e-7)
            assert np.array_equal(sequence.scales(Kind.KEY, layer), KEY_SCALE[layer])
            # What is read can be appended again: it is stored as it was.
            bits = sequence.read_bits(layer)
            again = device.create_sequence(2, capacity_tokens=400, key_scale=KEY_SCALE[layer],
                                           value_scale=VALUE_SCALE[layer])
            again.append(*sequence.read(layer))
            assert all(np.array_equal(*pair) for pair in zip(again.read_bits(), bits, strict=True))


def test_scales_of_one_change_nothing():
    with Device(GoldenDevice(E4M3)) as device:
        plain = device.create_sequence(2, capacity_tokens=40)
        one = device.create_sequence(2, capacity_tokens=40, key_scale=1, value_scale=np.ones((1, 2)))
        for sequence in (plain, one):
            sequence.prefill(numbers(1, 2, 40, 32), numbers(2, 2, 40, 32))
        assert one.scales(Kind.VALUE) is None
        query = numbers(3, 2, 1, 32)
        assert np.array_equal(plain.attend(query).bits, one.attend(query).bits)
        assert one.read()[0].dtype == np.float16


@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
@pytest.mark.parametrize(("bad", "message"), [
    (0.0, "of layer 0, KV head 0 must be positive, finite and a normal fp32, not 0.0"),
    (-1, "must be positive"), (np.nan, "not nan"), (np.inf, "not inf"), (1e-40, "a normal fp32, not 1e-40"),
    (1e39, "must be positive, finite"),
    ([[1.0, 2.0], [1.0, -2.0]], "of layer 1, KV head 1 must be positive, finite and a normal fp32, not -2.0"),
    ([1.0, 2.0, 3.0], r"broadcast to \(layers, kv_heads\) = \(2, 2\), not \(3,\)"), ("one", "must be numbers, not <U3"),
])
def test_bad_scales(name, bad, message):
    with Device(GoldenDevice(E4M3)) as device:
        with pytest.raises(RequestError, match=f"{name} .*{message}|{name} {message}"):
            device.create_sequence(2, capacity_tokens=40, layers=2, **{name: bad})
        device.create_sequence(2, capacity_tokens=40, layers=2).free()      # nothing is lost


def test_a_scale_that_makes_the_command_s_scale_impossible():
    with Device(GoldenDevice(E4M3)) as device:
        sequence = device.create_sequence(1, capacity_tokens=40, key_scale=1e-37)
        sequence.prefill(numbers(1, 1, 4, 32, size=1e-37), numbers(2, 1, 4, 32))
        with pytest.raises(RequestError, match=r"a normal fp32 .*not 0.001 with a scale of K of 9.99"):
            sequence.attend(numbers(3, 1, 1, 32), scale=0.001)


# Formats that do not fit.


def test_what_an_8_bit_drive_refuses():
    with Device(GoldenDevice(E4M3)) as device, device.create_sequence(1, capacity_tokens=40) as sequence:
        good, other = torch.randn(1, 4, 32).to(torch.float8_e4m3fn), torch.randn(1, 4, 32).to(torch.float8_e5m2)
        with pytest.raises(RequestError, match="value is fp8_e5m2, but this drive stores K and V as fp8_e4m3"):
            sequence.append(good, other)
        with pytest.raises(RequestError, match=r"key\[0, 0, 0\] is 500.0: it must be finite and within the range"):
            sequence.append(np.full((1, 4, 32), 500.0), np.zeros((1, 4, 32)))
        with pytest.raises(RequestError, match=r"value\[0, 0, 0\] has the bit pattern 0x3c01 of fp16, which is"):
            sequence.append(np.zeros((1, 4, 32)), np.full((1, 4, 32), 0x3C01, np.uint16))
        assert sequence.length() == 0
        sequence.append(good, good)
        assert np.array_equal(sequence.read()[0], good.float().numpy())


def test_nan_comes_back_and_is_reported():
    table = element_table(KvFormat.FP8_E4M3, Element.FP16)
    key, value = (layout.kv_bits(numbers(i, 1, 60, 32), E4M3) for i in (1, 2))
    value[0, 37, 5] = table[0xFF]
    with Device(GoldenDevice(E4M3)) as device, device.create_sequence(1, capacity_tokens=60) as sequence:
        sequence.prefill(key, value)
        assert np.array_equal(sequence.read_bits()[1], value)
        with pytest.raises(DeviceStatusError, match="token 37"):
            sequence.attend(numbers(3, 1, 1, 32))


# Sparse modes.


@pytest.mark.parametrize("kv", FP8)
@pytest.mark.parametrize("tokens", [2 * GROUP + 19, 3 * GROUP])
@pytest.mark.parametrize("mode", ["sparf", "fetched", "centroid"])
def test_sparse_modes_equal_the_oracle(mode, tokens, kv):
    """Over what is stored, times its scales: the selection, the blend and the mean of V are in the same units."""
    config = replace(TINY, kv=kv, score_depth=512)
    unit = config.tokens_per_codeword
    query = numbers(3, 4, 1, 32).astype(np.float16)
    how = {"sparf": {"features": 6, "top_units": 60}, "fetched": {"features": 6, "top_units": 12, "unit_tokens": unit},
           "centroid": {"top_units": 12}}[mode]
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(2, capacity_tokens=tokens, layers=2, sparse=True, centroids=unit,
                                          key_scale=KEY_SCALE, value_scale=VALUE_SCALE)
        key, value = scaled(sequence, numbers(1, 2, tokens, 32), numbers(2, 2, tokens, 32), 0)
        result = sequence.attend(query, mode=mode, local_tokens=9, **how)
        mean = sequence.mean_value()
    tail = np.arange(tokens) >= tokens // GROUP * GROUP
    for head in range(2):
        sizes = KEY_SCALE[0, head], VALUE_SCALE[0, head]
        k, v = (stored(values[head], kv, size) for values, size in zip((key, value), sizes, strict=True))
        rows = query[2 * head : 2 * head + 2, 0].astype(np.float64)
        arguments = {"top_units": how["top_units"], "local_tokens": 9, "tail": tail}
        if mode == "centroid":
            means = oracle.mean_keys(k / sizes[0], unit)
            means = stored(means.astype(np.float32), kv) * np.float64(sizes[0])
            wanted = oracle.centroid(rows, k, v, 32**-0.5, centroids=means, unit_tokens=unit, **arguments)
        else:
            function = oracle.sparf if mode == "sparf" else oracle.fetched
            arguments |= {} if mode == "sparf" else {"unit_tokens": unit}
            wanted = function(rows, k, v, 32**-0.5, features=6, **arguments)
        assert oracle.relative_rms(result.output[2 * head : 2 * head + 2, 0], wanted.output) <= LAW
        np.testing.assert_allclose(mean[head], v.mean(axis=0), rtol=1e-5, atol=1e-6 * sizes[1])


@pytest.mark.parametrize("kv", FP8)
def test_pieces_hold_the_same_as_one_prefill(kv):
    """The tail's bytes, centroids and the feature layout included."""
    config = replace(TINY, kv=kv, score_depth=512)
    tokens, unit = 2 * GROUP + 9, config.tokens_per_codeword
    key, value, query = numbers(1, 2, tokens, 32), numbers(2, 2, tokens, 32), numbers(3, 2, 1, 32)
    found = []
    for pieces in ([tokens], [1] * 40 + [GROUP - 40 - 3, 5, 1, tokens - GROUP - 3]):
        with Device(GoldenDevice(config)) as device:
            sequence = device.create_sequence(2, capacity_tokens=tokens, sparse=True, centroids=unit)
            at = 0
            for piece in pieces:
                sequence.append(key[:, at : at + piece], value[:, at : at + piece])
                at += piece
            found.append([sequence.attend(query, **how).bits for how in (
                {}, {"mode": "sparf", "features": 4, "top_units": 30}, {"mode": "centroid", "top_units": 9})])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


# Forks, rollback, files, arrays.


def test_forks_and_rollback():
    key, value, query = numbers(1, 2, 400, 32), numbers(2, 2, 400, 32), numbers(3, 2, 1, 32)
    with Device(GoldenDevice(E4M3)) as device:
        def made(tokens):
            sequence = device.create_sequence(2, capacity_tokens=500, sparse=True, key_scale=0.7,
                                              value_scale=[2.0, 3.0])
            sequence.held_tokens = 50
            sequence.append(key[:, :tokens], value[:, :tokens])
            return sequence

        whole = made(400)
        for length in (400, 131, 37):       # in DRAM; inside of what is in flash, which is read and written anew
            fork = whole.fork(length)
            fork.append(key[:, length : length + 3], value[:, length : length + 3]) if length < 400 else None
            length = min(length + 3, 400)
            like = made(length)
            for mode in ({}, {"mode": "sparf", "features": 4, "top_units": min(30, length)}):
                assert np.array_equal(fork.attend(query, **mode).bits, like.attend(query, **mode).bits)
        whole.truncate(380)
        assert np.array_equal(whole.attend(query).bits, made(380).attend(query).bits)


def test_what_is_saved_can_be_attached(tmp_path):
    """Flash, tail and scales outlive the process; a drive of another format refuses the file."""
    key, value, query = numbers(1, 2, GROUP + 19, 32), numbers(2, 2, GROUP + 19, 32), numbers(3, 2, 1, 32)
    path, image = tmp_path / "manifest", tmp_path / "flash"
    how = {"mode": "sparf", "features": 4, "top_units": 30}
    with kvattic.open("model", E4M3, image=image) as device:
        sequence = device.create_sequence(2, capacity_tokens=2 * GROUP, sparse=True, key_scale=0.7,
                                          value_scale=[[2.0, 3.0]])
        sequence.prefill(key, value)
        wanted = [sequence.attend(query, **each).bits for each in ({}, how)]
        sequence.save(path)
    with kvattic.open("model", E4M3, image=image) as device:
        ((again,), _) = device.attach(path)
        assert again.scales(Kind.VALUE).tolist() == [2.0, 3.0]
        assert all(np.array_equal(again.attend(query, **each).bits, bits)
                   for each, bits in zip(({}, how), wanted, strict=True))
        again.append(key[:, :3], value[:, :3])
    with Device(GoldenDevice(replace(E4M3, kv="fp8_e5m2"))) as device, pytest.raises(ConfigMismatchError, match="kv"):
        device.attach(path)
    with pytest.raises(ConfigMismatchError):
        GoldenDevice(TINY, image=image)


@pytest.mark.parametrize("split", ["heads", "context"])
def test_arrays_scale_alike(split):
    key, value, query = numbers(1, 3, 300, 32), numbers(2, 3, 300, 32), numbers(3, 6, 2, 32)
    options = {"capacity_tokens": 300, "layers": 2, "key_scale": np.float32([[0.5, 0.6, 0.7], [1, 1, 2]]),
               "value_scale": np.float32([[1, 1, 1], [3.0, 0.1, 2.0]])}
    array = DriveArray([Device(GoldenDevice(E4M3)) for _ in range(2)])
    with array, Device(GoldenDevice(E4M3)) as device:
        many, one = array.create_sequence(3, split=split, **options), device.create_sequence(3, **options)
        for sequence in (many, one):
            for layer in range(2):
                sequence.append(key, value, layer=layer)
        for layer in range(2):
            found, wanted = (sequence.attend(query, layer=layer) for sequence in (many, one))
            if split == "heads":
                assert np.array_equal(found.bits, wanted.bits)
            assert oracle.relative_rms(found.output, wanted.output) < LAW
        fork = many.fork()
        assert np.array_equal(fork.attend(query, layer=1).bits, found.bits)
        with pytest.raises(RequestError, match="key_scale of layer 0, KV head 2 must be positive"):
            array.create_sequence(3, split=split, capacity_tokens=40, key_scale=[1, 1, -1])


@pytest.mark.parametrize("config", [replace(E4M3, score_depth=512), replace(PAPER, kv="fp8_e5m2", element="bf16")],
                         ids=["e4m3", "e5m2"])
def test_the_selftest_rounds_as_the_drive_does(config):
    with kvattic.open("model", config) as device, kvattic.open("model", config, kernel="numpy") as golden:
        checks = list(selftest.run(device, golden))
    assert len(checks) > 12 and all(check.equal and check.error <= LAW for check in checks), checks
