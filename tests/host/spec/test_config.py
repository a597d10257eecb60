"""The configuration: every value that is refused, derived geometry, JSON, hash, presets."""

import dataclasses
import json
from typing import Any

import pytest

from kvattic.errors import ConfigError, KvatticError
from kvattic.spec.config import (
    BEAT_BYTES,
    BOARD,
    CRC_BITS,
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
from kvattic.spec.formats import Element
from kvattic.spec.nand import PSLC, TINY_PART, NandPart, is_power_of_two

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "channels must be 1 to 32, not 0"),
    ({"channels": 33}, "channels must be 1 to 32, not 33"),
    ({"beat_bytes": 4}, "beat_bytes must be one of"),
    ({"beat_bytes": 64}, "beat_bytes must be one of"),
    ({"rows": 0}, "rows must be 1 to 16, not 0"),
    ({"rows": 17}, "rows must be 1 to 16, not 17"),
    ({"head_dim": 48}, "head_dim must be one of"),
    ({"element": "fp8"}, "element must be one of .*, not 'fp8'"),
    ({"kv": "fp8"}, "kv must be one of .*, not 'fp8'"),
    ({"part": "pslc"}, "part must be a NandPart, not 'pslc'"),
    ({"part": PSLC.resized(256)}, "page_bytes must be at least codeword_bytes, not 256"),
    ({"part": PSLC.resized(16384, blocks=4096)}, r"dies must be such that a channel has at most 2\*\*24 pages, not 8"),
    ({"lane_channels": 3}, "lane_channels must be one of .*, not 3"),
    ({"lane_channels": 2}, "beat_bytes must be at least 8 for each of 2 channels, not 8"),
    ({"lane_channels": 2, "beat_bytes": 16, "channels": 5}, "channels must be 1, 2, 4, .* lanes of 2 channels, not 5"),
    ({"lane_channels": 2, "beat_bytes": 16, "channels": 6}, "channels must be 1, 2, 4, .* lanes of 2 channels, not 6"),
    ({"dies": 3}, "dies must be a power of two, not 3"),
    ({"dies": 0}, "dies must be a power of two, not 0"),
    ({"cache_reads": 1}, "cache_reads must be a bool, not 1"),
    ({"ecc_t": 0}, "ecc_t must be 1 to 64, not 0"),
    ({"ecc_t": 65}, "ecc_t must be 1 to 64, not 65"),
    ({"ecc_t": 48}, r"ecc_t must be such that 32 codewords of 600 bytes fit a page of 16384 \+ 2208 bytes, not 48"),
    ({"dram_beat_bytes": 48}, "dram_beat_bytes must be a power of two from 8 to 128, not 48"),
    ({"dram_beat_bytes": 256}, "dram_beat_bytes must be a power of two from 8 to 128, not 256"),
    ({"dram_beat_bytes": 8, "beat_bytes": 16}, "dram_beat_bytes must be at least beat_bytes, not 8"),
    ({"codeword_bytes": 64, "head_dim": 32, "dram_beat_bytes": 128},
     "codeword_bytes must be at least dram_beat_bytes, not 64"),
    ({"codeword_bytes": 500}, "codeword_bytes must be a power of two, not 500"),
    ({"codeword_bytes": 128}, r"codeword_bytes must be at least one token \(256 bytes"),
    ({"codeword_bytes": 256, "head_dim": 256}, r"codeword_bytes must be at least one token \(512"),
    ({"score_depth": 1000}, "score_depth must be a power of two, not 1000"),
    ({"score_depth": 32}, r"score_depth must be at least one page of tokens \(64\), not 32"),
    ({"jobs_in_flight": 1}, "jobs_in_flight must be 2 to 16, not 1"),
    ({"jobs_in_flight": 17}, "jobs_in_flight must be 2 to 16, not 17"),
    ({"sparse": 1}, "sparse must be a bool, not 1"),
    ({"groups_in_flight": 1}, "groups_in_flight must be 2, 4, 8, 16 or 32, not 1"),
    ({"groups_in_flight": 6}, "groups_in_flight must be 2, 4, 8, 16 or 32, not 6"),
    ({"groups_in_flight": 64}, "groups_in_flight must be 2, 4, 8, 16 or 32, not 64"),
    ({"clock_mhz": 0.0}, "clock_mhz must be above 0 and at most 10,000, in MHz, not 0.0"),
    ({"clock_mhz": 1e9}, "clock_mhz must be above 0 and at most 10,000, in MHz, not 1000000000.0"),
    ({"clock_mhz": float("nan")}, "clock_mhz must be above 0 and at most 10,000, in MHz, not nan"),
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


NO_GROUPS: list[tuple[dict[str, Any], str]] = [
    ({"head_dim": 80}, "3 tokens of 160 bytes leave some of 512; choose a power of two for head_dim"),
    ({"head_dim": 96}, "2 tokens of 192 bytes leave some of 512; choose a power of two for head_dim"),
    ({"head_dim": 32, "part": PSLC.resized(32768)}, "of 512 tokens each, not 0.5"),
    ({"score_depth": 128}, r"has 128 codewords of K, which must fit a lane's score buffer, 64 codewords "
                           r"\(score_depth 128\)"),
]


@pytest.mark.parametrize(("values", "message"), NO_GROUPS)
def test_geometries_without_a_feature_layout(values: dict[str, Any], message: str) -> None:
    """They are refused only with the sparse modes."""
    with pytest.raises(ConfigError, match=f"sparse must be False here: .*{message}"):
        Config(**values)
    assert not Config(**values, sparse=False).sparse


def test_every_field_is_refused_somewhere() -> None:
    # `part` has names of its own for what is wrong with it (tests of kvattic.spec.nand).
    tested = {name for values, message in REFUSED for name in values if message.startswith(name)}
    assert tested == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("channels", [1, 3, MAX_CHANNELS])
@pytest.mark.parametrize("beat_bytes", BEAT_BYTES)
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_geometry(channels: int, beat_bytes: int, rows: int, head_dim: int) -> None:
    """What is derived adds up, for every combination that is allowed."""
    c = Config(channels=channels, beat_bytes=beat_bytes, rows=rows, head_dim=head_dim, sparse=head_dim not in (80, 96))
    assert c.beats_per_token * c.elements_per_beat == head_dim
    assert c.beats_per_token * c.beat_bytes == c.token_bytes
    assert c.tokens_per_codeword * c.token_bytes <= c.codeword_bytes
    assert (c.tokens_per_codeword + 1) * c.token_bytes > c.codeword_bytes
    assert c.beats_per_codeword == c.tokens_per_codeword * c.beats_per_token
    assert c.codewords_per_page * c.codeword_bytes == c.page_bytes == c.part.page_bytes
    # The code's field holds the codeword, and the next smaller one would not.
    data = c.codeword_bytes * 8 + CRC_BITS
    assert data + c.bch_m * c.ecc_t < 1 << c.bch_m
    assert data + (c.bch_m - 1) * c.ecc_t >= 1 << (c.bch_m - 1)
    assert c.check_bytes * 8 >= CRC_BITS + c.bch_m * c.ecc_t > (c.check_bytes - c.beat_bytes) * 8
    assert c.check_bytes % c.beat_bytes == 0
    assert c.raw_codeword_bytes == c.codeword_bytes + c.check_bytes == c.raw_codeword_words * c.beat_bytes
    assert c.raw_page_bytes == c.codewords_per_page * c.raw_codeword_bytes <= c.part.page_bytes + c.part.spare_bytes
    assert c.tokens_per_page == c.codewords_per_page * c.tokens_per_codeword
    assert c.tokens_per_codeword <= 1 << c.slot_bits_per_codeword < 2 * c.tokens_per_codeword
    assert c.ring_codewords << c.slot_bits_per_codeword == c.score_depth
    assert c.ring_codewords >= c.codewords_per_page
    assert c.max_tokens <= channels * c.score_depth
    assert c.max_tokens < 1 << 24
    if c.sparse:
        # A group is whole pages, and a power of two in every unit; its channels fit the codewords that K takes.
        assert c.group_tokens * 2 == c.codeword_bytes == c.group_words * beat_bytes
        assert c.group_tokens == c.group_pages * c.tokens_per_page == c.group_codewords * c.tokens_per_codeword
        assert all(is_power_of_two(n) for n in (c.group_tokens, c.group_pages, c.group_codewords, c.group_words))
        assert head_dim <= c.group_codewords <= c.ring_codewords
        # The largest unit is at most a page, and its mean keys fill whole codewords; a larger one would not do.
        units = c.group_codewords >> c.unit_bits_max
        assert 1 << c.unit_bits_max <= c.codewords_per_page
        assert units % c.tokens_per_codeword == 0
        assert 2 << c.unit_bits_max > c.codewords_per_page or units == c.tokens_per_codeword


PAPER_FIELDS: dict[str, Any] = {
    "lane_channels": 4, "beat_bytes": 32, "score_depth": 32768, "jobs_in_flight": 16, "groups_in_flight": 32}


def test_the_papers_geometry() -> None:
    assert (PAPER.elements_per_beat, PAPER.token_bytes, PAPER.beats_per_token) == (16, 256, 8)
    assert (PAPER.tokens_per_codeword, PAPER.codewords_per_page, PAPER.tokens_per_page) == (
        2,
        32,
        64,
    )
    assert (PAPER.beats_per_codeword, PAPER.slot_bits_per_codeword, PAPER.ring_codewords) == (
        16,
        1,
        16384,
    )
    assert PAPER.max_tokens == 65536
    assert PAPER.denominator_bits == 57
    # 512 data + 3 CRC + 13 parity.
    assert (PAPER.bch_m, PAPER.check_bytes, PAPER.raw_codeword_bytes) == (13, 16, 528)
    assert (PAPER.raw_codeword_words, PAPER.raw_page_bytes) == (66, 16896)
    assert PAPER.sparse
    assert (PAPER.group_tokens, PAPER.group_pages, PAPER.group_codewords, PAPER.group_words) == (256, 4, 128, 16)
    assert PAPER.unit_bits_max == 5     # a page
    assert (TINY.group_tokens, TINY.group_pages, TINY.group_codewords, TINY.group_words) == (128, 8, 32, 32)
    assert TINY.unit_bits_max == 2


def test_flash_geometry() -> None:
    assert (PAPER.plane_bits, PAPER.die_bits, PAPER.block_page_bits, PAPER.zone_page_bits) == (2, 3, 8, 13)
    assert PAPER.zone_pages == 8192
    assert PAPER.pages_per_channel == 256 * 8192
    # 1 GB in a zone.
    assert PAPER.zone_pages * PAPER.channels * PAPER.page_bytes == 1 << 30
    # A block of 6 pages takes 8 page numbers.
    odd = Config(dies=1, part=TINY_PART.resized(16384, planes=1, pages=6, blocks=5))
    assert (odd.plane_bits, odd.die_bits, odd.block_page_bits, odd.zone_page_bits) == (0, 0, 3, 3)
    assert (odd.zone_pages, odd.pages_per_channel) == (6, 40)


@pytest.mark.parametrize(("mhz", "nanoseconds", "cycles"), [
    (100.0, 10.0, 1), (100.0, 10.01, 2), (100.0, 0.1, 1), (285.0, 25_000.0, 7125), (300.0, 10.0, 3), (300.0, 10.1, 4),
])
def test_cycles_are_rounded_up(mhz: float, nanoseconds: float, cycles: int) -> None:
    assert Config(clock_mhz=mhz).cycles(nanoseconds) == cycles


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), Config(element=Element.BF16, clock_mhz=300.5, part=PSLC.resized(8192, pages=100))]
)
def test_json_round_trip(config: Config) -> None:
    again = Config.from_json(config.to_json())
    assert again == config
    assert again.hash == config.hash
    assert isinstance(again.element, Element)
    assert isinstance(again.part, NandPart)
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
        ('{"part": {"name": "x", "source": "y", "size": 1}}', "part must have the fields of a NandPart: .*size"),
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
        {"beat_bytes": 16, "lane_channels": 2},
        {"rows": 2},
        {"head_dim": 64},
        {"element": "bf16"},
        {"kv": "fp8_e4m3"},
        {"kv": "fp8_e5m2"},
        {"part": PSLC.resized(8192)},
        {"part": PSLC.resized(16384, t_r=30_000.0)},
        {"dies": 4},
        {"cache_reads": True},
        {"ecc_t": 4},
        {"dram_beat_bytes": 32},
        {"codeword_bytes": 1024},
        {"score_depth": 8192},
        {"jobs_in_flight": 2},
        {"sparse": False},
        {"groups_in_flight": 8},
    ]
    assert {name for change in changes for name in change} | {"clock_mhz"} == {
        f.name for f in dataclasses.fields(Config)
    }
    # The controllers' waits are cycles: the clock changes hardware, too.
    assert Config(clock_mhz=300).hash != Config().hash
    hashes = [Config(**change).hash for change in changes]
    assert len(set(hashes)) == len(hashes)
    assert all(0 <= h < 1 << 32 for h in hashes)
    # One value, so that a change of what is hashed does not go unnoticed.
    assert Config(part=TINY_PART).hash == 3895136603
    assert Config(**PAPER_FIELDS).hash == PAPER.hash


def test_config_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.rows = 3  # type: ignore[misc]
    assert len({Config(**PAPER_FIELDS), PAPER, TINY}) == 2


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
