"""What is too large to be computed exactly is an error of whoever asked, not a flag that nobody reads."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic.array import DriveArray
from kvattic.driver.device import Device
from kvattic.errors import KvatticError, RangeError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import CompletionFlag
from kvattic.spec.config import TINY
from kvattic.spec.formats import Element

BF16 = replace(TINY, element=Element.BF16)
STRIPE = TINY.group_tokens


def write(sequence, large, config=TINY, tokens=3 * STRIPE, value=1.0):
    """K of small numbers; one token of KV head 1 has the channel 3 that `large` is put into."""
    rng = np.random.default_rng(0)
    key, values = rng.standard_normal((2, sequence.kv_heads, tokens, config.head_dim))
    key[-1, 40, 3] = large
    values[-1, 40, 7] = value
    sequence.prefill(key, values)
    query = np.ones((sequence.kv_heads, 1, config.head_dim))
    query[:, :, 3] = 60.0
    return query


@pytest.mark.parametrize("options", [
    {}, {"mode": "sparf", "features": 4, "top_units": 300}, {"mode": "centroid", "top_units": 40}], ids=str)
def test_attend(options):
    """A score of 2**17 is right; one beyond 2**18 is refused, in every way to ask."""
    scale = TINY.head_dim**-0.5 * np.log2(np.e)
    with Device(GoldenDevice(TINY)) as device:
        good, bad = (device.create_sequence(2, capacity_tokens=3 * STRIPE, sparse=True, centroids=8) for _ in range(2))
        query = write(good, 2**17 / scale / 60.0)
        assert good.attend(query, **options).flags == CompletionFlag(0)
        query = write(bad, 2**18.1 / scale / 60.0)
        message = "KV head 1, tokens 0 to 383.*: a score, .* beyond the drive's range: .* within 262,14"
        if options.get("mode") == "centroid":
            message = "KV head 1"      # the mean of eight keys is within the range, what it selects is not
        for ask in (lambda: bad.attend(query, **options), lambda: bad.attend_async(query, **options).result(),
                    lambda: device.attend_many([bad.plan(query, **options)])):
            with pytest.raises(RangeError, match=message):
                ask()
        assert issubclass(RangeError, KvatticError)
        # Whoever looks at completions gets them, with the flag.
        flags = [result.completion.flags for result in device.run(bad.plan(query, **options).jobs)]
        assert CompletionFlag.SCORE_OVERFLOW in flags[1]
        assert good.attend(query, **options).output.shape == query.shape


@pytest.mark.parametrize("split", ["heads", "context"])
def test_arrays_of_drives(split):
    with DriveArray([Device(GoldenDevice(TINY)) for _ in range(3)]) as array:
        sequence = array.create_sequence(3, capacity_tokens=3 * STRIPE, split=split)
        query = write(sequence, 60000.0)
        with pytest.raises(RangeError, match="a score"):
            sequence.attend(query, scale=1.0)
        with pytest.raises(RangeError, match="a score"):
            array.attend_many([sequence.plan(query, scale=1.0)])


def test_values_of_bf16():
    """2**19 is right; 2**22 is refused, where it has any weight."""
    with Device(GoldenDevice(BF16)) as device:
        good, bad = (device.create_sequence(2, capacity_tokens=60) for _ in range(2))
        query = write(good, 60.0, BF16, 60, 2.0**19)
        assert good.attend(query).output[1, 0, 7] == pytest.approx(2.0**19)
        write(bad, 60.0, BF16, 60, 2.0**22)
        with pytest.raises(RangeError, match=r"KV head 1, .*: V is beyond the drive's range, about a million"):
            bad.attend(query)
        write_small = device.create_sequence(2, capacity_tokens=60)
        write(write_small, -60.0, BF16, 60, 2.0**22)
        assert write_small.attend(query).flags == CompletionFlag(0)


def test_range_of_codes():
    """A pair of neighbouring features may be beyond the entries of codes, where dense attention is in its range."""
    with Device(GoldenDevice(TINY)) as device, device.create_sequence(1, capacity_tokens=256, codes=True) as sequence:
        key = np.random.default_rng(1).standard_normal((1, 256, 32)) * 60
        sequence.prefill(key, key)
        query = np.full((1, 1, 32), 60.0)
        sequence.attend(query, scale=1.0)
        with pytest.raises(RangeError, match="and by codes that of two neighbouring features within 2,047"):
            sequence.attend(query, scale=1.0, mode="codes", top_units=8)
