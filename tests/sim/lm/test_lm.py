"""The language model and the attention methods that it is evaluated with."""

from fractions import Fraction

import numpy as np
import pytest

import kvattic
from kvattic_sim import oracle
from kvattic_sim.lm import evaluate, methods, model
from kvattic_sim.lm.methods import (
    Centroid,
    Dense,
    Fetched,
    HeavyHitters,
    Local,
    PageSparf,
    Quest,
    Sparf,
    Sparq,
    largest,
)

HEAD_DIM = 64
BITS = 1.536
"""Bits per byte of window 28 in dense attention."""
SPARSE = [name for name in evaluate.METHODS if name != "dense"]


@pytest.fixture(scope="module")
def decoder():
    return model.load()


@pytest.fixture(scope="module")
def text():
    return model.load_held_out()


def random_head(tokens, rows=2, head_dim=HEAD_DIM, seed=0):
    """(query of all tokens, key, value), float64; some features and tokens matter more than others."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((tokens, rows, head_dim)) * rng.gamma(1.0, 2.0, head_dim)
    key = rng.standard_normal((tokens, head_dim)) * rng.gamma(1.0, 1.0, (tokens, 1))
    return query, key, rng.standard_normal((tokens, head_dim))


# The model.


def test_the_model_has_the_stated_shape(decoder):
    assert decoder.shape == model.Shape(layers=5, width=256, query_heads=4, kv_heads=2, head_dim=64, hidden=640,
                                        vocabulary=256, context=1024, rope_base=10_000)


def test_the_held_out_text(text):
    assert text.windows.shape == (32, 1025) and text.windows.dtype == np.uint8
    assert len(text.origins) == 32 and "PSF License Agreement" in text.licence
    assert b"def " in text.windows.tobytes()


def test_bits_per_byte_of_dense_attention(decoder, text):
    window = text.windows[28]
    bits = model.bits_per_byte(decoder.forward(window[:-1])[0], window[1:])
    assert bits.mean() == pytest.approx(BITS, abs=0.01)
    # Far tokens help: with less than 256 before them, the same bytes cost more.
    near, _ = decoder.forward(window[768:-1])
    assert bits[768:].mean() < model.bits_per_byte(near, window[769:]).mean() - 0.1


def test_bits_per_byte_of_even_odds():
    assert model.bits_per_byte(np.zeros((3, 256), np.float32), np.array([0, 7, 255])) == pytest.approx(8.0)


def test_a_prefix_goes_before(decoder, text):
    tokens = text.windows[0][:200]
    whole, layers = decoder.forward(tokens)
    _, prefix = decoder.forward(tokens[:150])
    rest, joined = decoder.forward(tokens[150:], prefix=prefix)
    assert np.abs(rest - whole[150:]).max() < 0.05  # K and V are rounded to float16 after sums of another order
    assert joined[4].key.shape == layers[4].key.shape == (200, 2, 64)
    assert joined[4].key.dtype == np.float16


def test_the_model_is_causal(decoder, text):
    tokens = text.windows[0][:100].copy()
    before, _ = decoder.forward(tokens)
    tokens[60:] = 65
    after, _ = decoder.forward(tokens)
    assert np.array_equal(before[:60], after[:60]) and not np.array_equal(before[60], after[60])


@pytest.mark.parametrize("method", [Dense(), Sparf(features=8, share=1 / 16)], ids=lambda m: m.name)
def test_decoding_token_after_token_is_the_same(decoder, text, method):
    window = text.windows[3][:267]
    stepwise = evaluate.teacher_forced(decoder, window, evaluate.MethodMemory(method), 262)
    _, prefix = decoder.forward(window[:262])
    logits, _ = decoder.forward(window[262:-1], evaluate._Measured(method), prefix)
    assert stepwise == pytest.approx(model.bits_per_byte(logits, window[263:]), abs=0.02)


DRIVE = [Dense(), Sparf(features=8, share=1 / 16), Fetched(features=8, share=1 / 16), Centroid(share=1 / 8)]


@pytest.mark.parametrize("method", DRIVE, ids=lambda m: m.name)
def test_the_golden_device_serves_the_model(decoder, text, method):
    window = text.windows[3][:259]  # a group is full from the second decode step on
    config = kvattic.Config(channels=2, head_dim=64, rows=2)
    with kvattic.open("model", config) as device:
        memory = evaluate.DriveMemory(device, decoder.shape, method)
        drive = evaluate.teacher_forced(decoder, window, memory, 254)
    numpy = evaluate.teacher_forced(decoder, window, evaluate.MethodMemory(method), 254)
    # The same K and V, rounded in the same steps: only a last bit of an output can differ, and seldom changes one.
    assert drive == pytest.approx(numpy, abs=1e-3)


def test_what_a_drive_is_told():
    assert evaluate.selection(Dense(), 512, 64) == {}
    assert evaluate.selection(Sparf(features=8, share=1 / 16), 512, 64) == {
        "mode": "sparf", "features": 8, "top_units": 32, "local_tokens": 8}
    assert evaluate.selection(Fetched(features=4, share=1 / 16), 512, 128) == {
        "mode": "fetched", "features": 4, "top_units": 16, "local_tokens": 8, "unit_tokens": 2}
    assert evaluate.selection(Centroid(share=1 / 16), 512, 64) == {
        "mode": "centroid", "top_units": 2, "local_tokens": 0, "unit_tokens": 16}
    assert all(evaluate.selection(method, 0, 64) == {} for method in DRIVE)
    with pytest.raises(ValueError, match="method must be dense, sparf, fetched or centroid, not pages"):
        evaluate.selection(PageSparf(features=8, share=1 / 16), 512, 64)
    with pytest.raises(ValueError, match="not quest"):
        evaluate.selection(Quest(share=1 / 16), 512, 64)


@pytest.mark.parametrize("tokens, message", [
    (np.zeros(0, np.uint8), "one row of 1 to 1024"),
    (np.zeros(1025, np.uint8), "one row of 1 to 1024"),
    (np.zeros((2, 8), np.uint8), "one row of 1 to 1024"),
])
def test_wrong_tokens(decoder, tokens, message):
    with pytest.raises(ValueError, match=message):
        decoder.forward(tokens)


def test_beyond_the_context(decoder):
    _, prefix = decoder.forward(np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match=r"at most 1024, not 8 \+ 1017"):
        decoder.forward(np.zeros(1017, np.uint8), prefix=prefix)


def test_a_prefix_of_nothing(decoder):
    with pytest.raises(ValueError, match="prefix must be from 1 to 4, not 0"):
        decoder.decode(np.zeros(4, np.uint8), 0, evaluate.MethodMemory(Dense()))


# The methods.


def naive_sparf(query, key, value, features, wanted, local, flash):
    """One step of SparF, token by token and row by row, for tokens below `flash` in flash."""
    rows, head_dim = query.shape
    order = sorted(range(head_dim), key=lambda c: (-sum(abs(query[row, c]) for row in range(rows)), c))
    kept = order[:features]
    masses = []
    for row in query:
        scale = np.sqrt(head_dim * sum(abs(row[c]) for c in kept) / sum(abs(row)))
        scores = np.array([
            sum(row[c] * key[t, c] for c in kept) / scale if t < flash else row @ key[t] / np.sqrt(head_dim)
            for t in range(len(key))
        ])
        weights = np.exp(scores - max(scores))
        masses.append(weights / sum(weights))
    masses = np.array(masses)
    rank = sorted(range(flash), key=lambda t: (t < len(key) - local, -sum(masses[:, t]), t))
    chosen = sorted(rank[:wanted]) + list(range(flash, len(key)))
    outputs = []
    for row, mass in zip(query, masses, strict=True):
        scores = key[chosen] @ row / np.sqrt(head_dim)
        weights = np.exp(scores - max(scores))
        alpha = sum(mass[chosen])
        exact = weights @ value[chosen] / sum(weights)
        outputs.append(alpha * exact + (1 - alpha) * value.mean(axis=0))
    return np.array(outputs), chosen


@pytest.mark.parametrize("length", [256, 300, 511, 512, 520])
def test_sparf_is_its_algorithm(length):
    query, key, value = random_head(length)
    outcome = Sparf(features=8, share=1 / 16).decode(query, key, value, length - 1)
    flash = length // 256 * 256
    output, chosen = naive_sparf(query[-1], key, value, 8, flash // 16, flash // 64, flash)
    assert np.flatnonzero(outcome.attended[0]).tolist() == chosen
    assert np.abs(outcome.output[0] - output).max() < 1e-12


@pytest.mark.parametrize("length", [256, 300, 530])
@pytest.mark.parametrize("method", [
    Sparf(features=8, share=1 / 16),
    Fetched(features=8, share=1 / 16),
    Fetched(features=8, share=1 / 8, unit_tokens=16),
    Centroid(share=1 / 16),
], ids=["sparf", "fetched", "fetched_16", "centroid"])
def test_the_oracle_says_the_same(method, length):
    query, key, value = random_head(length)
    flash = length // 256 * 256
    outcome = method.decode(query, key, value, length - 1)
    unit = {"sparf": 1, "fetched": getattr(method, "unit_tokens", None) or 4, "centroid": 16}[method.name]
    units = round(method.share * flash / unit)
    arguments = {"tail": np.arange(length) >= flash, "top_units": units}
    if method.name != "sparf":
        arguments |= {"unit_tokens": unit}
    if method.name == "centroid":
        means = key[: length // unit * unit].reshape(-1, unit, HEAD_DIM).mean(axis=1).astype(np.float16)
        # Oracle and methods have no use for that of the last unit, which is in the tail.
        arguments |= {"centroids": np.concatenate([means, np.zeros((-(-length // unit) - len(means), HEAD_DIM))])}
    else:
        arguments |= {"features": 8, "mean": value.mean(axis=0), "local_tokens": round(units / 4) * unit}
    right = getattr(oracle, method.name)(query[-1], key, value, HEAD_DIM**-0.5, **arguments)
    assert np.array_equal(np.broadcast_to(outcome.attended[0], right.attended.shape), right.attended)
    assert np.abs(outcome.alpha[0] - right.alpha).max() < 1e-12
    assert np.abs(outcome.output[0] - right.output).max() < 1e-12


def test_sparq_is_its_algorithm():
    query, key, value = random_head(320)
    outcome = Sparq(features=8, share=1 / 16).decode(query, key, value, 319)
    output, chosen = naive_sparf(query[-1], key, value, 8, 20, 5, 320)
    assert np.flatnonzero(outcome.attended[0]).tolist() == chosen
    assert np.abs(outcome.output[0] - output).max() < 1e-12
    assert outcome.flash_bytes[0] == 2 * (8 * 320 + 2 * 20 * 64)


def test_a_paper_page_is_the_same_selection():
    query, key, value = random_head(600)
    ours = Sparf(features=8, share=1 / 16).decode(query, key, value, 500)
    pages = PageSparf(features=8, share=1 / 16).decode(query, key, value, 500)
    assert np.array_equal(ours.output, pages.output)
    assert (pages.flash_bytes > ours.flash_bytes).all()


@pytest.mark.parametrize("name", SPARSE)
def test_at_ratio_1_a_method_is_dense_attention(name):
    query, key, value = random_head(600)
    dense = Dense().decode(query, key, value, 500)
    outcome = evaluate.method_at(name, Fraction(1), HEAD_DIM).decode(query, key, value, 500)
    assert outcome.attended.sum(axis=1).tolist() == list(range(501, 601))
    assert (outcome.alpha == 1).all()
    assert np.abs(outcome.output - dense.output).max() < 1e-12


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "sparq"])
def test_what_is_in_device_dram_is_attended_and_costs_nothing(name):
    query, key, value = random_head(255)
    outcome = evaluate.method_at(name, Fraction(1, 16), HEAD_DIM).decode(query, key, value, 100)
    assert not outcome.flash_bytes.any()
    assert np.abs(outcome.output - Dense().decode(query, key, value, 100).output).max() < 1e-12


@pytest.mark.parametrize("name", evaluate.METHODS)
def test_a_method_is_causal(name):
    query, key, value = random_head(600)
    ratio = Fraction(1) if name == "dense" else Fraction(1, 8)
    method = evaluate.method_at(name, ratio, HEAD_DIM)
    before = method.decode(query, key, value, 400)
    other = random_head(600, seed=1)
    for mine, theirs in zip((query, key, value), other, strict=True):
        mine[550:] = theirs[550:]
    after = method.decode(query, key, value, 400)
    assert np.array_equal(before.attended[:150], after.attended[:150])
    assert np.array_equal(before.flash_bytes[:150], after.flash_bytes[:150])
    assert np.abs(before.output[:150] - after.output[:150]).max() < 1e-12
    assert np.abs(before.output[150:] - after.output[150:]).max() > 1e-3


@pytest.mark.parametrize("name", SPARSE)
def test_nominal_bytes_are_the_ratio(name):
    query, key, value = random_head(1024)
    for ratio in evaluate.RATIOS[1:]:
        method = evaluate.method_at(name, ratio, HEAD_DIM)
        outcome = method.decode(query, key, value, 1023)
        dense = 1024 * 2 * HEAD_DIM * 2
        described = method.features * 1024 * 2 if name in ("sparq", "sparf", "pages", "fetched") else 0
        unit = evaluate.setting_of(name, ratio).unit_tokens
        described += {"centroid": dense // (2 * unit), "quest": dense // unit}.get(name, 0)
        nominal = described + int(outcome.attended.sum()) * 2 * HEAD_DIM * 2
        # Whole pages: at 1/16 of 1,024 tokens Quest has one of 32 for a half, at 1/8 of them three.
        whole = unit * 2 * HEAD_DIM * 2 if name in ("centroid", "quest") and unit > 16 else 0
        assert abs(nominal - ratio * dense) <= whole / 2
        if name in ("sparq", "fetched", "centroid", "quest", "local", "sinks"):  # they use all that moves
            assert outcome.flash_bytes[0] == nominal
        else:
            assert outcome.flash_bytes[0] > nominal


def marked_head(tokens, marked):
    """A head of one row in which all but the marked tokens score 0, and feature 3 alone counts."""
    query = np.zeros((tokens, 1, HEAD_DIM))
    query[..., 3] = 1.0
    key = np.zeros((tokens, HEAD_DIM))
    for rank, token in enumerate(marked):
        key[token, 3] = 40.0 - rank
    return query, key, np.ones((tokens, HEAD_DIM))


@pytest.mark.parametrize("marked, token_codewords, token_pages", [
    ((4, 5, 6, 7), 1, 1),  # 4 tokens make a codeword, 32 a page
    ((3, 4), 2, 1),
    ((0, 31, 32, 255), 4, 3),
])
def test_bytes_of_sparf(marked, token_codewords, token_pages):
    head = marked_head(300, marked)
    share = len(marked) / 256
    ours = Sparf(features=1, share=share, local=0.0).decode(*head, 299)
    assert np.flatnonzero(ours.attended[0, :256]).tolist() == list(marked) and ours.attended[0, 256:].all()
    assert ours.flash_bytes[0] == 512 + 2 * 512 * token_codewords
    pages = PageSparf(features=1, share=share, local=0.0).decode(*head, 299)
    assert pages.flash_bytes[0] == 4 * 256 * 2 + 2 * 4096 * token_pages


def test_bytes_of_channels_grow_with_the_groups():
    query, key, value = marked_head(768, (0,))
    query[..., 7] = 0.5
    outcome = Sparf(features=2, share=1 / 768, local=0.0).decode(query, key, value, 255)
    assert outcome.flash_bytes[[0, 255, 256, 512]].tolist() == [(2 * groups + 2) * 512 for groups in (1, 1, 2, 3)]


def test_bytes_and_tokens_of_fetched():
    head = marked_head(300, (9, 100))
    outcome = Fetched(features=1, share=2 / 64, local=0.0).decode(*head, 299)
    assert np.flatnonzero(outcome.attended[0, :256]).tolist() == [8, 9, 10, 11, 100, 101, 102, 103]
    assert outcome.flash_bytes[0] == 512 + 2 * 512 * 2
    wide = Fetched(features=1, share=1 / 16, local=0.0, unit_tokens=16).decode(*head, 299)
    assert np.flatnonzero(wide.attended[0, :256]).tolist() == list(range(16))
    assert wide.flash_bytes[0] == 512 + 2 * 512 * 4


def test_bytes_and_tokens_of_centroid_and_quest():
    head = marked_head(300, (100,))
    for method, described in ((Centroid(share=1 / 16), 16 * 128), (Quest(share=1 / 16), 16 * 256)):
        outcome = method.decode(*head, 299)
        assert np.flatnonzero(outcome.attended[0, :256]).tolist() == list(range(96, 112))
        assert outcome.flash_bytes[0] == described + 2 * 512 * 4
    small = Centroid(share=1 / 64, unit_tokens=4).decode(*head, 299)
    assert np.flatnonzero(small.attended[0, :256]).tolist() == [100, 101, 102, 103]
    assert small.flash_bytes[0] == 64 * 128 + 2 * 512


def test_the_newest_tokens_in_flash():
    outcome = Local(share=8 / 256).decode(*marked_head(300, (5,)), 299)
    assert np.flatnonzero(outcome.attended[0]).tolist() == list(range(248, 300))
    assert outcome.flash_bytes[0] == 2 * 512 * 2
    sinks = Local(share=8 / 256, sinks=4).decode(*marked_head(300, (5,)), 299)
    assert np.flatnonzero(sinks.attended[0]).tolist() == [0, 1, 2, 3, *range(252, 300)]


def test_heavy_hitters_stay_and_what_is_dropped_is_gone():
    query, key, value = marked_head(600, (5,))
    key[10, 4] = 80.0
    query[400:, 0] = 0.0
    query[400:, 0, 4] = 1.0  # token 10 is wanted from now on, but it was dropped at token 256
    outcome = HeavyHitters(share=4 / 256).decode(query, key, value, 300)
    kept = np.flatnonzero(outcome.attended[-1, :512]).tolist()
    assert 5 in kept and 10 not in kept and kept[-4:] == [508, 509, 510, 511]
    assert np.flatnonzero(outcome.attended[0, :256]).tolist()[-2:] == [254, 255]
    assert not outcome.attended[:, 10].any()


def test_the_largest():
    x = np.array([[1.0, 3.0, 3.0, 2.0, 3.0], [-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    assert largest(x, 2).tolist() == [[False, True, True, False, False], [False, True, False, True, False]]
    each = largest(x, np.array([3, 1]))
    assert each.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert not largest(x, 0).any() and largest(x, 9).sum(axis=1).tolist() == [5, 2]


def test_equal_scores_go_to_the_lower_index():
    query, key, value = np.ones((300, 1, HEAD_DIM)), np.zeros((300, HEAD_DIM)), np.ones((300, HEAD_DIM))
    outcome = Sparf(features=4, share=1 / 16, local=0.0).decode(query, key, value, 299)
    assert np.flatnonzero(outcome.attended[0, :256]).tolist() == list(range(16))
    assert outcome.alpha[0] == pytest.approx((16 + 44) / 300)


def test_a_query_of_zeros():
    _, key, value = random_head(300)
    outcome = Sparf(features=4, share=1 / 16).decode(np.zeros((300, 2, HEAD_DIM)), key, value, 299)
    assert np.isfinite(outcome.output).all()


def test_wrong_arguments():
    query, key, value = random_head(300)
    with pytest.raises(ValueError, match="features must be from 1 to 64, not 65"):
        Sparf(features=65, share=0.1).decode(query, key, value, 299)
    with pytest.raises(ValueError, match=r"query must be \(positions, rows, head_dim\)"):
        Dense().decode(query[:, :, :32], key, value, 299)
    with pytest.raises(ValueError, match="lengths must be one for each position"):
        Dense().attend(query, key, value, np.full(300, 301))
    with pytest.raises(ValueError, match="unit_tokens must be whole codewords of 4 tokens that divide 256, not 6"):
        Centroid(share=0.1, unit_tokens=6).decode(query, key, value, 299)
    with pytest.raises(ValueError, match="method must be one of"):
        evaluate.method_at("dense", Fraction(1, 2), HEAD_DIM)


# Settings.


@pytest.mark.parametrize("name, ratio", evaluate.BEST)
def test_the_best_setting_is_one_that_is_tried(name, ratio):
    found = evaluate.possible(name, ratio, HEAD_DIM)
    assert evaluate.method_at(name, ratio, HEAD_DIM) in list(found.values())
    assert evaluate.describe(name, ratio, evaluate.setting_of(name, ratio)) in {
        evaluate.describe(name, ratio, setting) for setting in found}


@pytest.mark.parametrize("name", evaluate.GRIDS)
@pytest.mark.parametrize("ratio", evaluate.RATIOS[1:])
def test_a_setting_keeps_the_bytes(name, ratio):
    """Of all layers together, if single elements could be read."""
    found = evaluate.possible(name, ratio, HEAD_DIM)
    assert found
    for setting, method in found.items():
        described = Fraction(0)
        if name in ("centroid", "quest"):
            described = Fraction(method.entries, 2 * setting.unit_tokens)
        elif name in ("sparq", "sparf", "fetched"):
            described = Fraction(method.features, 2 * HEAD_DIM)
        layer = described + Fraction(method.share).limit_denominator(10_000)
        dense = Fraction(setting.dense_layers, evaluate.LAYERS)
        assert dense + (1 - dense) * layer == ratio, setting


def test_a_setting_that_leaves_nothing_for_tokens():
    message = r"at 1/16 of the bytes, setting .*unit_tokens=16.* must leave some for tokens of quest"
    with pytest.raises(ValueError, match=message):
        evaluate.method_at("quest", Fraction(1, 16), HEAD_DIM, evaluate.Setting(unit_tokens=16))
    with pytest.raises(ValueError, match="must leave some"):
        evaluate.method_at("quest", Fraction(1, 8), HEAD_DIM, evaluate.Setting(dense_layers=1))


def test_the_pages_of_the_paper_have_the_setting_of_sparf(monkeypatch):
    monkeypatch.setitem(evaluate.BEST, ("sparf", Fraction(1, 8)), evaluate.Setting(features=Fraction(1, 2)))
    assert evaluate.method_at("pages", Fraction(1, 8), HEAD_DIM).features == HEAD_DIM // 16


def test_the_model_has_as_many_layers_as_settings_suppose(decoder):
    assert (decoder.shape.layers, decoder.shape.context) == (evaluate.LAYERS, evaluate.CONTEXT)


def test_settings_that_round_up_too_far_are_left_out():
    """Of 512 and 768 tokens: 1.75 and 2.6 units of 32, so 2 and 3."""
    units = {ratio: {setting.unit_tokens for setting in evaluate.possible("centroid", ratio, HEAD_DIM)}
             for ratio in evaluate.RATIOS[1:]}
    assert units[Fraction(1, 8)] == {8, 16, 64} and units[Fraction(1, 16)] == {16, 32}
    # Quest has at least a page; with bounds, that is more than 1/16 in any case, and least with pages of 32.
    assert {setting.unit_tokens for setting in evaluate.possible("quest", Fraction(1, 16), HEAD_DIM)} == {32}


def test_scores_of_a_group_may_be_summed():
    """Row 0 wants page 0 a little; row 1 wants page 2 so much that its softmax knows nothing else."""
    query, key, value = np.zeros((256, 2, HEAD_DIM)), np.zeros((256, HEAD_DIM)), np.ones((256, HEAD_DIM))
    query[:, 0, 0] = query[:, 1, 1] = 8.0
    key[16:32, 0], key[32:48, 1], key[48:64, 1] = 6.0, 20.0, 19.0
    for rows, pages in (("softmax", [1, 2]), ("sum", [2, 3])):
        for method in (Quest(share=2 / 16, rows=rows), Centroid(share=2 / 16, rows=rows)):
            attended = method.decode(query, key, value, 255).attended[0]
            assert (np.flatnonzero(attended.reshape(16, 16).any(axis=1)) == pages).all()
    with pytest.raises(ValueError, match="rows must be 'softmax' or 'sum', not 'max'"):
        Quest(share=1 / 8, rows="max").decode(query, key, value, 255)


def test_heavy_hitters_and_the_newest_share_what_is_kept():
    query, key, value = random_head(300)
    for heavy, newest in ((0.0, 8), (0.25, 6), (1.0, 0)):
        kept = HeavyHitters(share=8 / 256, heavy=heavy).decode(query, key, value, 299).attended[0, :256]
        assert kept.sum() == 8 and kept[256 - newest :].all()


def test_dense_layers_are_dense_and_cost_their_bytes(decoder, text):
    window = text.windows[0, :521]
    _, prefix = decoder.forward(window[:260])
    method = Local(share=1 / 16)
    every, none, one = (evaluate._Measured(method, layers) for layers in (evaluate.LAYERS, 0, 1))
    dense = evaluate._Measured(Dense())
    logits = [decoder.forward(window[260:-1], attention, prefix)[0] for attention in (every, none, one, dense)]
    assert np.array_equal(logits[0], logits[3]) and every.flash_bytes == dense.flash_bytes == dense.dense_bytes
    assert one.flash_bytes * 5 == none.flash_bytes * 4 + one.dense_bytes
    assert not np.array_equal(logits[2], logits[1])


def test_settings_are_tried(decoder, text):
    lines = []
    found = evaluate.tune(decoder, text.windows[1:2, :521], lines.append, ("quest", "sinks"), (Fraction(1, 2),))
    quest = found["quest", Fraction(1, 2)]
    assert set(quest) == set(evaluate.possible("quest", Fraction(1, 2), HEAD_DIM))
    assert {setting.dense_layers for setting in quest} == {0, 2} and len(set(quest.values())) == len(quest)
    best = min(quest, key=lambda setting: quest[setting])
    assert lines[0] == f"quest at 1/2, {evaluate.describe('quest', Fraction(1, 2), best)}: {quest[best]:.4f}"
    assert len(lines) == len(quest) + len(evaluate.GRIDS["sinks"])


# The evaluation.


def test_fetched_is_compared_at_equal_bytes():
    heads = [evaluate.Head(q[-64:], k, v, np.arange(449, 513)) for q, k, v in (random_head(512),)]
    result = evaluate.error_ratio(heads, 8, 1 / 16)
    assert 8 / 128 < result.flash_bytes < 8 / 128 + 4 / 16
    assert result.ratio == result.fetched / result.sparf < 1


def test_quality_of_a_short_window(decoder, text):
    methods_at = {
        ("dense", Fraction(1)): Dense(),
        ("local", Fraction(1, 16)): evaluate.method_at("local", Fraction(1, 16), HEAD_DIM),
    }
    result = evaluate.quality(decoder, text.windows[:2, :521], methods_at)
    assert result["dense", Fraction(1)].flash_bytes == 1
    assert result["local", Fraction(1, 16)].flash_bytes == pytest.approx(1 / 16, rel=0.01)
    assert abs(result["local", Fraction(1, 16)].bits - result["dense", Fraction(1)].bits) < 0.3


def test_a_picture(tmp_path):
    point = evaluate.Quality(bits=1.0, flash_bytes=0.5, error=0.0, short_tail=1.0)
    evaluate.draw({(name, ratio): point for name in evaluate.METHODS for ratio in evaluate.RATIOS},
                  tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_group_is_a_codeword_of_one_feature():
    assert methods.GROUP == 256
