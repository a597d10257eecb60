"""The configuration: every value that is refused, derived geometry, JSON, hash, presets."""

import dataclasses
import json
from typing import Any

import pytest

from kvattic.config import (
    BEAT_BYTES,
    BOARD,
    GQA,
    HEAD_DIMS,
    MAX_CHANNELS,
    MAX_ROWS,
    PAPER,
    PRESETS,
    TINY,
    Config,
    preset,
)
from kvattic.errors import ConfigError, KvatticError
from kvattic.formats import Element

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "channels must be 1 to 32, not 0"),
    ({"channels": 33}, "channels must be 1 to 32, not 33"),
    ({"beat_bytes": 4}, "beat_bytes must be one of"),
    ({"beat_bytes": 64}, "beat_bytes must be one of"),
    ({"rows": 0}, "rows must be 1 to 16, not 0"),
    ({"rows": 17}, "rows must be 1 to 16, not 17"),
    ({"head_dim": 48}, "head_dim must be one of"),
    ({"element": "fp8"}, "element must be one of .*, not 'fp8'"),
    ({"page_bytes": 10000}, "page_bytes must be a power of two, not 10000"),
    ({"page_bytes": 0}, "page_bytes must be a power of two, not 0"),
    ({"page_bytes": 256}, "page_bytes must be at least codeword_bytes, not 256"),
    ({"codeword_bytes": 500}, "codeword_bytes must be a power of two, not 500"),
    ({"codeword_bytes": 128}, r"codeword_bytes must be at least one token \(256 bytes"),
    ({"codeword_bytes": 256, "head_dim": 256}, r"codeword_bytes must be at least one token \(512"),
    ({"score_depth": 1000}, "score_depth must be a power of two, not 1000"),
    ({"score_depth": 32}, r"score_depth must be at least one page of tokens \(64\), not 32"),
    ({"jobs_in_flight": 1}, "jobs_in_flight must be 2 to 16, not 1"),
    ({"jobs_in_flight": 17}, "jobs_in_flight must be 2 to 16, not 17"),
    ({"clock_mhz": 0.0}, "clock_mhz must be positive and finite, not 0.0"),
    ({"clock_mhz": float("nan")}, "clock_mhz must be positive and finite, not nan"),
    ({"channels": 32, "score_depth": 1 << 20}, "score_depth must be such that"),
    ({"channels": 2.0}, "channels must be an int, not 2.0"),
    ({"rows": True}, "rows must be an int, not True"),
    ({"head_dim": "128"}, "head_dim must be an int, not '128'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_refused_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config(**values)
    assert isinstance(caught.value, KvatticError)
    assert isinstance(caught.value, ValueError)


def test_every_field_is_refused_somewhere() -> None:
    tested = {name for values, message in REFUSED for name in values if message.startswith(name)}
    assert tested == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("channels", [1, 3, MAX_CHANNELS])
@pytest.mark.parametrize("beat_bytes", BEAT_BYTES)
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_geometry(channels: int, beat_bytes: int, rows: int, head_dim: int) -> None:
    """What is derived adds up, for every combination that is allowed."""
    c = Config(channels=channels, beat_bytes=beat_bytes, rows=rows, head_dim=head_dim)
    assert c.beats_per_token * c.elements_per_beat == head_dim
    assert c.beats_per_token * c.beat_bytes == c.token_bytes
    assert c.tokens_per_codeword * c.token_bytes <= c.codeword_bytes
    assert (c.tokens_per_codeword + 1) * c.token_bytes > c.codeword_bytes
    assert c.beats_per_codeword == c.tokens_per_codeword * c.beats_per_token
    assert c.codewords_per_page * c.codeword_bytes == c.page_bytes
    assert c.tokens_per_page == c.codewords_per_page * c.tokens_per_codeword
    assert c.tokens_per_codeword <= 1 << c.slot_bits_per_codeword < 2 * c.tokens_per_codeword
    assert c.ring_codewords << c.slot_bits_per_codeword == c.score_depth
    assert c.ring_codewords >= c.codewords_per_page
    assert c.max_tokens <= channels * c.score_depth
    assert c.max_tokens < 1 << 24


def test_the_papers_geometry() -> None:
    assert (PAPER.elements_per_beat, PAPER.token_bytes, PAPER.beats_per_token) == (4, 256, 32)
    assert (PAPER.tokens_per_codeword, PAPER.codewords_per_page, PAPER.tokens_per_page) == (
        2,
        32,
        64,
    )
    assert (PAPER.beats_per_codeword, PAPER.slot_bits_per_codeword, PAPER.ring_codewords) == (
        64,
        1,
        2048,
    )
    assert PAPER.max_tokens == 32768
    assert PAPER.denominator_bits == 56


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), Config(element=Element.BF16, clock_mhz=300.5)]
)
def test_json_round_trip(config: Config) -> None:
    again = Config.from_json(config.to_json())
    assert again == config
    assert again.hash == config.hash
    assert isinstance(again.element, Element)
    # Sorted keys: the text, and so the hash, does not depend on the order of the fields.
    keys = list(json.loads(config.to_json()))
    assert keys == sorted(keys)


def test_json_may_leave_fields_out() -> None:
    assert Config.from_json("{}") == Config()
    assert Config.from_json('{"element": "bf16"}').element is Element.BF16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a configuration must be JSON: "),
        ("[1]", "a configuration must be a JSON object, not list"),
        (
            '{"lanes": 2, "colour": 1}',
            r"unknown configuration fields \['colour', 'lanes'\]; known are",
        ),
        ('{"rows": 99}', "rows must be 1 to 16"),
        ('{"rows": "1"}', "rows must be an int"),
        ('{"element": []}', "element must be one of"),
    ],
)
def test_refused_json(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_json(text)


def test_hash_tells_configurations_apart() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"channels": 4},
        {"beat_bytes": 16},
        {"rows": 2},
        {"head_dim": 64},
        {"element": "bf16"},
        {"page_bytes": 8192},
        {"codeword_bytes": 1024},
        {"score_depth": 8192},
        {"jobs_in_flight": 2},
    ]
    assert {name for change in changes for name in change} | {"clock_mhz"} == {
        f.name for f in dataclasses.fields(Config)
    }
    # The clock changes no hardware.
    assert Config(clock_mhz=300).hash == Config().hash
    hashes = [Config(**change).hash for change in changes]
    assert len(set(hashes)) == len(hashes)
    assert all(0 <= h < 1 << 32 for h in hashes)
    # The default configuration's value, so that a change of the layout does not go unnoticed.
    assert Config().hash == PAPER.hash == 2006886956


def test_config_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.rows = 3  # type: ignore[misc]
    assert len({Config(), PAPER, TINY}) == 2


def test_presets() -> None:
    assert PRESETS == {"tiny": TINY, "board": BOARD, "paper": PAPER, "gqa": GQA}
    for name, config in PRESETS.items():
        assert preset(name) is config
    assert (PAPER.channels, PAPER.rows, PAPER.head_dim, PAPER.clock_mhz) == (8, 1, 128, 285.0)
    assert BOARD.channels == 4
    assert GQA.rows == 8
    with pytest.raises(
        ConfigError, match="there is no preset 'huge'; presets are tiny, board, paper, gqa"
    ):
        preset("huge")
