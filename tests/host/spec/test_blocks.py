"""The blocks of an ATTEND: what one side packs, the other unpacks; and where each number lies."""

import numpy as np
import pytest

from kvattic.spec import layout
from kvattic.spec.blocks import (
    Queries,
    Results,
    pack_queries,
    pack_results,
    pack_table,
    put_column,
    unpack_queries,
    unpack_results,
    unpack_table,
)
from kvattic.spec.commands import (
    COMMAND,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    TRAILER,
    Mode,
    TableFlag,
    query_row_bytes,
    result_row_bytes,
    table_bytes,
)

HEAD_DIMS = pytest.mark.parametrize("head_dim", [32, 80, 96, 256])
rng = np.random.default_rng(5)


@HEAD_DIMS
def test_queries(head_dim):
    query = rng.integers(0, 1 << 16, (3, head_dim)).astype(np.uint16)
    start, end, tree = np.array([0, 7, (1 << 32) - 1]), np.array([1, 1 << 24, 9]), np.array([0, 1 << 31, 5])
    data = pack_queries(Queries(query, start, end, tree))
    size = query_row_bytes(head_dim)
    assert len(data) == 3 * size
    for r in range(3):
        row = data[r * size : (r + 1) * size]
        assert row.startswith(
            ROW.pack(start_token=int(start[r]), end_token=int(end[r]), tree=int(tree[r])) + query[r].tobytes())
        assert not any(row[ROW.size + head_dim * 2 :])
    for got, want in zip(unpack_queries(data, 3, head_dim), (query, start, end, tree), strict=True):
        np.testing.assert_array_equal(got, want)


@HEAD_DIMS
def test_results(head_dim):
    output = rng.integers(0, 1 << 32, (2, head_dim)).astype(np.uint32)
    maximum, denominator = np.array([-(1 << 40), 5]), np.array([0, (1 << 63) + 1], np.uint64)
    data = pack_results(Results(output, maximum, denominator))
    size = result_row_bytes(head_dim)
    assert len(data) == 2 * size
    for r in range(2):
        row = data[r * size : (r + 1) * size]
        assert row.startswith(output[r].tobytes())
        assert not any(row[head_dim * 4 : -TRAILER.size])
        trailer = TRAILER.unpack(row[-TRAILER.size :])
        assert trailer == {"maximum": int(maximum[r]) % (1 << 64), "denominator": int(denominator[r])} | {
            name: 0 for name in trailer if name.startswith("reserved")}
    for got, want in zip(unpack_results(data, 2, head_dim), (output, maximum, denominator), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", Mode)
@HEAD_DIMS
def test_table(mode, head_dim):
    """Entry by entry, each followed by its sketch entry in a sparse mode, behind the mean of V in a blended one."""
    stripes = 5
    flags = np.array([0, 1, 0, 0, 1])
    entries = layout.pack_entries(channel=np.arange(5), key_page=np.arange(5) << 8, value_page=np.arange(5) + 9,
                                  dram=flags)
    sketches = None if mode is Mode.DENSE else layout.pack_sketches(
        page=np.arange(5) + 77, codeword=np.arange(5), written=1 - flags)
    mean = rng.integers(0, 1 << 32, head_dim).astype(np.uint32) if mode.blended else None
    data = pack_table(entries, sketches, mean)
    assert len(data) % 64 == 0
    assert not any(data[table_bytes(mode, stripes, head_dim) :])
    table = unpack_table(data, mode, stripes, head_dim)
    assert (table.mean is None) == (not mode.blended)
    if mean is not None:
        assert data.startswith(mean.tobytes())
        np.testing.assert_array_equal(table.mean, mean)
    np.testing.assert_array_equal(table.entries, layout.unpack_entries(entries))
    assert not table.reserved.any()
    assert table.tail.tolist() == flags.astype(bool).tolist()
    if sketches is not None:
        np.testing.assert_array_equal(table.sketches, layout.unpack_sketches(sketches))


@pytest.mark.parametrize("mode", Mode)
def test_reserved_bits_of_a_table(mode):
    """Each bit of an entry that means nothing in the mode; `whole` means nothing in DENSE."""
    entry, sketch = TABLE_ENTRY.pack(), b"" if mode is Mode.DENSE else SKETCH_ENTRY.pack()
    known = TableFlag.DRAM if mode is Mode.DENSE else TableFlag.DRAM | TableFlag.WHOLE
    places = {8 * TABLE_ENTRY["flags"].offset + bit for bit in range(8) if not known >> bit & 1}
    if sketch:
        places |= {64 + bit for f in SKETCH_ENTRY.fields if f.name == "reserved"
                   for bit in range(8 * f.offset, 8 * (f.offset + f.size))}
    mean = bytes(128) if mode.blended else b""
    for bit in range(8 * len(entry + sketch)):
        bad = (int.from_bytes(entry + sketch, "little") | 1 << bit).to_bytes(len(entry + sketch), "little")
        table = unpack_table(mean + entry + sketch + bad, mode, 2, 32)
        assert table.reserved.tolist() == [False, bit in places]


def test_columns():
    block = np.full((2, 64), 0xFF, np.uint8)
    put_column(block, COMMAND["end_token"], np.array([0x010203, 4]))
    assert block[0].tobytes() == b"\xff" * 12 + bytes((3, 2, 1)) + b"\xff" * 49
    assert block[1].tobytes() == b"\xff" * 12 + bytes((4, 0, 0)) + b"\xff" * 49
