"""The oracle's attention sinks and its mean of V, by hand."""

import numpy as np
import pytest

from kvattic_sim import oracle

RNG = np.random.default_rng(7)


def head(tokens=96, rows=3, head_dim=16):
    return tuple(RNG.standard_normal((n, head_dim)) for n in (rows, tokens, tokens))


def chosen(result):
    return np.flatnonzero(result.selected).tolist()


def hidden_sinks(tokens=96):
    """A head in which no row wants the first tokens."""
    q, k, v = head(tokens)
    q[:, 0], k[:, 0] = 10.0, 0.0
    k[:20, 0] = -50.0
    return q, k, v


def attend(mode, q, k, v, unit_tokens, **more):
    if mode == "sparf":
        return oracle.sparf(q, k, v, 0.25, features=4, **more)
    if mode == "fetched":
        return oracle.fetched(q, k, v, 0.25, features=4, unit_tokens=unit_tokens, **more)
    return oracle.centroid(q, k, v, 0.25, centroids=oracle.mean_keys(k, unit_tokens), unit_tokens=unit_tokens, **more)


@pytest.mark.parametrize("mode, unit_tokens", [("sparf", 1), ("fetched", 4), ("centroid", 8)])
@pytest.mark.parametrize("sinks", [1, 4, 9, 16])
def test_units_that_touch_a_sink_come_first_and_count(mode, unit_tokens, sinks):
    q, k, v = hidden_sinks()
    touched, count = -(-sinks // unit_tokens), 24 // unit_tokens + 3
    without = attend(mode, q, k, v, unit_tokens, top_units=count)
    assert 0 not in chosen(without)
    result = attend(mode, q, k, v, unit_tokens, top_units=count, sinks=sinks)
    assert chosen(result)[:touched] == list(range(touched)) and result.selected.sum() == count
    assert result.forced[:touched].all() and not result.forced[touched:].any()
    # What is left goes to the best of the others, as before.
    best = [u for u in np.argsort(-result.mass, kind="stable") if u >= touched][: count - touched]
    assert set(chosen(result)[touched:]) == set(best)
    taken = np.repeat(result.selected, unit_tokens)
    right = oracle.attention(q, k, v, 0.25, np.broadcast_to(taken, (3, 96)))
    assert np.abs(result.exact - right).max() < 1e-12


def test_sinks_and_the_local_window_share_the_units():
    q, k, v = hidden_sinks()
    both = attend("fetched", q, k, v, 4, top_units=5, sinks=8, local_tokens=12)
    assert chosen(both) == [0, 1, 21, 22, 23]
    few = attend("fetched", q, k, v, 4, top_units=3, sinks=8, local_tokens=12)
    assert chosen(few) == [0, 1, 21]  # the lower ones of equals


def test_sinks_in_the_tail_are_attended_anyway():
    q, k, v = head(32)
    tail = np.ones(32, np.bool_)
    result = attend("centroid", q, k, v, 8, top_units=1, sinks=8, tail=tail)
    assert not result.selected.any() and result.attended.all()


def test_mean_keys():
    k = RNG.standard_normal((22, 16))
    assert np.allclose(oracle.mean_keys(k, 8), [k[:8].mean(0), k[8:16].mean(0), k[16:].mean(0)], atol=1e-15)
    # Of 11 sinks 8 fill a unit, which has nothing else, and 3 are left out of the next one.
    assert np.allclose(oracle.mean_keys(k, 8, 11), [k[:8].mean(0), k[11:16].mean(0), k[16:].mean(0)], atol=1e-15)
    assert np.allclose(oracle.mean_keys(k, 8, 16), oracle.mean_keys(k, 8), atol=1e-15)
    assert np.allclose(oracle.mean_keys(k, 8, 20)[2], k[20:].mean(0), atol=1e-15)
    assert np.allclose(oracle.mean_keys(k, 8, 99), oracle.mean_keys(k, 8), atol=1e-15)


@pytest.mark.parametrize("mode, unit_tokens", [("sparf", 1), ("fetched", 4)])
def test_the_mean_is_that_of_what_a_row_may_attend(mode, unit_tokens):
    q, k, v = head()
    mask = np.zeros((3, 96), np.bool_)
    mask[0, :40] = mask[1, 10:96] = True
    result = attend(mode, q, k, v, unit_tokens, top_units=16 // unit_tokens, mask=mask)
    for row in (0, 1):
        blended = result.alpha[row] * result.exact[row] + (1 - result.alpha[row]) * v[mask[row]].mean(axis=0)
        assert 0 < result.alpha[row] < 1
        assert np.abs(result.output[row] - blended).max() < 1e-12
    assert not result.output[2].any()
    # What no row may attend has no part in it.
    other = v.copy()
    other[40:] = 1e6
    again = attend(mode, q, k, other, unit_tokens, top_units=16 // unit_tokens, mask=mask)
    assert np.array_equal(again.output[0], result.output[0])


def test_a_given_mean_is_taken_for_all_rows_or_for_each():
    q, k, v = head()
    each = RNG.standard_normal((3, 16))
    one, many = (attend("sparf", q, k, v, 1, top_units=8, mean=mean) for mean in (each[1], each))
    assert np.array_equal(one.output[1], many.output[1]) and not np.array_equal(one.output[0], many.output[0])
    ours = attend("sparf", q, k, v, 1, top_units=8)
    assert np.abs(ours.output - attend("sparf", q, k, v, 1, top_units=8, mean=v.mean(axis=0)).output).max() < 1e-12
