"""The options of an attend call: one list, checked in one place."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

import kvattic
from kvattic import AttendOptions, Mode, RequestError
from kvattic.driver.planning import AttendKeywords, make_masks


def test_keywords_are_the_fields_of_the_options():
    assert list(AttendKeywords.__annotations__) == [field.name for field in fields(AttendOptions)]


def test_options_are_frozen_and_know_their_mode():
    options = AttendOptions(mode="fetched", features=4, top_units=2, unit_tokens=8)
    assert (options.mode, options.mode_name) == (Mode.FETCHED, "fetched")
    assert AttendOptions().mode is Mode.DENSE
    with pytest.raises(FrozenInstanceError):
        options.mode = Mode.DENSE


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "sparse"}, "mode must be one of dense, sparf, fetched, centroid, codes, not 'sparse'"),
    ({"mode": 1}, "mode must be one of .* not 1"),
    ({"features": 4}, "mode dense has no features: it must not be given"),
    ({"sinks": 4}, "mode dense has no sinks"),
    ({"mode": Mode.CENTROID, "features": 4}, "mode centroid has no features"),
    ({"mode": "sparf", "unit_tokens": 4}, "mode sparf has no unit_tokens"),
])
def test_what_a_mode_does_not_use_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        AttendOptions(**options)


def test_a_plan_takes_keywords_or_options():
    query = np.ones((2, 1, 32))
    with kvattic.open("model", "tiny") as device:
        sequence = device.create_sequence(2, capacity_tokens=64)
        sequence.prefill(*np.random.default_rng(2).standard_normal((2, 2, 64, 32)))
        plans = [sequence.plan(query, scale=0.5, window=9),
                 sequence.plan_with(query, AttendOptions(scale=0.5, window=9))]
        one, two = device.attend_many(plans)
        assert np.array_equal(one.bits, two.bits)
        with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
            sequence.attend(query, windows=9)


def test_masks_of_rows_and_parts():
    masks = make_masks(10, 3, causal=True)
    rows = masks.of_rows(2)
    assert rows.end.tolist() == [8, 8, 9, 9, 10, 10]
    assert rows.cut(slice(1, 4)).end.tolist() == [8, 9, 9]
    assert rows.tree_token == masks.tree_token == 10
