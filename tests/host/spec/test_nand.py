"""NAND parts: geometry, addresses, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvattic.errors import ConfigError
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.nand import PARTS, PSLC, TINY_PART, NandPart, part


@pytest.mark.parametrize("name", PARTS)
def test_parts(name: str) -> None:
    """Each has a source, a sane order of times, and room for its parity in a drive of eight channels and eight dies."""
    p = part(name)
    assert p.name == name
    assert len(p.source) > 20
    assert p.t_rcbsy <= p.t_r < p.t_prog < p.t_bers
    assert p.t_dbsy < p.t_r
    base = TINY if p is TINY_PART else PAPER
    config = replace(base, part=p)
    assert config.raw_page_bytes <= p.raw_bytes
    assert config.codewords_per_page * config.raw_codeword_bytes == config.raw_page_bytes
    assert config.pages_per_channel >> config.zone_page_bits == p.blocks
    assert Config.from_json(config.to_json()).part == p


def test_figures() -> None:
    """What the benchmarks rest on."""
    assert (PSLC.t_r, PSLC.planes, PSLC.page_bytes, PSLC.bus_mts) == (25_000, 4, 16384, 1400)
    lowlatency, bar = part("lowlatency"), part("mqsim_1000")
    assert (lowlatency.t_r, lowlatency.planes, lowlatency.page_bytes) == (4_000, 16, 4096)
    assert (bar.bus_mts, bar.page_bytes, bar.t_r, bar.planes) == (1000, 16384, 50_000, 2)
    mqsim = part("mqsim")
    assert (mqsim.bus_mts, mqsim.t_r, mqsim.t_prog, mqsim.t_bers) == (333, 75_000, 750_000, 3_800_000)
    assert (part("paper").bus_mts, part("paper").page_bytes) == (1400, 4096)
    assert part("femu").t_r == 40_000 and part("nvmevirt_zn540").t_prog == 561_000
    assert [p.name for p in PARTS.values() if p.separate_command_bus] == ["sca"]


def test_unknown_part() -> None:
    with pytest.raises(ConfigError, match="there is no NAND part 'nor'; parts are pslc, tlc, lowlatency"):
        part("nor")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"pages": 0}, "x: pages must be a positive int, not 0"),
        ({"pages": 1.5}, "x: pages must be a positive int, not 1.5"),
        ({"endurance": True}, "x: endurance must be a positive int, not True"),
        ({"t_r": 0}, "x: t_r must be a positive number, not 0"),
        ({"t_ccs": float("inf")}, "x: t_ccs must be a positive number, not inf"),
        ({"t_ccs": False}, "x: t_ccs must be a positive number, not False"),
        ({"page_bytes": 3000}, "x: page_bytes must be a power of two, not 3000"),
        ({"planes": 6}, "x: planes must be a power of two, not 6"),
        ({"page_bytes": 65536}, r"x: page_bytes must be such that a page and its spare have at most 2\*\*16 bytes"),
        ({"mark_pages": ()}, r"x: mark_pages must be pages of a block, 0 to 255, or from the last one on -1 to -256, "
                             r"at least one, not \(\)"),
        ({"mark_pages": (0, 256)}, r"x: mark_pages must be pages of a block, .*, not \(0, 256\)"),
        ({"mark_pages": (-257,)}, r"x: mark_pages must be pages of a block, .*, not \(-257,\)"),
        ({"mark_pages": (True,)}, r"x: mark_pages must be pages of a block, .*, not \(True,\)"),
        ({"mark_pages": "0"}, r"x: mark_pages must be pages of a block, .*, not '0'"),
        ({"mark_byte": 2208}, "x: mark_byte must be a byte of the spare, 0 to 2207, not 2208"),
        ({"mark_byte": -1}, "x: mark_byte must be a byte of the spare, 0 to 2207, not -1"),
        ({"mark_byte": False}, "x: mark_byte must be a byte of the spare, 0 to 2207, not False"),
        ({"blocks": 1 << 15}, "x: blocks must be such that a row address has at most 24 bits, not 32768"),
    ],
)
def test_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NandPart(**{"name": "x", "source": "none"} | values)


def test_times_are_floats() -> None:
    assert isinstance(NandPart(name="x", source="none", t_r=5).t_r, float)


def test_marks() -> None:
    """Where the factory's marks are."""
    assert (PSLC.marked_pages, PSLC.mark_column) == ((0, 255), 16384)
    assert part("lowlatency").marked_pages == (0, 1)
    assert part("nvmevirt_970pro").marked_pages == (255,)
    assert part("mt29f128g08").marked_pages == (0,)
    odd = NandPart(name="x", source="none", pages=6, mark_pages=(-1, 1, 5, -6), mark_byte=7)
    assert (odd.marked_pages, odd.mark_column) == ((0, 1, 5), 16391)
    assert replace(odd, pages=1, mark_pages=(0, -1)).marked_pages == (0,)
    assert replace(odd, mark_pages=[0, 1]) == replace(odd, mark_pages=(0, 1))     # as JSON gives it


@pytest.mark.parametrize("p", [PSLC, TINY_PART, replace(TINY_PART, planes=1, pages=6, blocks=5)], ids=lambda p: p.name)
def test_addresses(p: NandPart) -> None:
    places = [(plane, block, page) for plane in {0, p.planes - 1} for block in {0, 3, p.blocks - 1}
              for page in {0, 1, p.pages - 1}]
    rows = [p.row(*place) for place in places]
    assert len(set(rows)) == len(rows)
    assert [p.place(row) for row in rows] == places
    for place, row in zip(places, rows, strict=True):
        address = p.address(*place, column=0x1234)
        assert len(address) == 5
        assert address[:2] == b"\x34\x12"
        assert int.from_bytes(address[2:], "little") == row
    # ONFI's order: page of the block, plane, block.
    assert p.row(0, 0, 1) == 1
    if p.planes > 1:
        assert p.row(1, 0, 0) == 1 << p.row_page_bits
    assert p.row(0, 1, 0) == 1 << p.row_page_bits + p.row_plane_bits


def test_page_index() -> None:
    p = replace(TINY_PART, pages=6, blocks=5)
    seen = [p.page_index(die, plane, block, page) for die in range(2) for plane in range(2) for block in range(5)
            for page in range(6)]
    assert seen == list(range(120)), "without gaps"
    assert p.page_place(seen[77]) == (1, 0, 2, 5)


def test_resized() -> None:
    small = PSLC.resized(4096)
    assert (small.page_bytes, small.spare_bytes) == (4096, 552)
    assert replace(small, page_bytes=16384, spare_bytes=2208) == PSLC
    assert PSLC.resized(512).spare_bytes == 69
    assert PSLC.resized(8192, spare_bytes=100, t_r=1.0) == replace(PSLC, page_bytes=8192, spare_bytes=100, t_r=1.0)
    with pytest.raises(ConfigError, match="page_bytes must be a power of two, not 5000"):
        PSLC.resized(5000)


def test_documented() -> None:
    """docs/nand.md has the parts as they are."""
    text = (Path(__file__).parents[3] / "docs" / "nand.md").read_text()
    names = {0: "first", 1: "second", -1: "last"}
    for p in PARTS.values():
        row = (f"| `{p.name}` | {p.page_bytes} + {p.spare_bytes} | {p.planes} | {p.pages} | {p.cell_bits} | "
               f"{p.bus_mts:g} | {p.t_r / 1000:g} | {p.t_prog / 1000:g} | {p.t_bers / 1000:g} | "
               f"{', '.join(names[page] for page in p.mark_pages)} | {p.source} |\n")
        assert row in text, f"docs/nand.md should have:\n{row}"
