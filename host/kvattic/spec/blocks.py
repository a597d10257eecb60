"""The blocks of ATTENDs and READs in host memory, packed by the host and unpacked by the device, or the other way."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.spec import layout
from kvattic.spec.commands import (
    LINE_BYTES,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    TRAILER,
    Field,
    Mode,
    TableFlag,
    fp32_block_bytes,
    lines,
    query_row_bytes,
    read_token_bytes,
    result_row_bytes,
)
from kvattic.spec.config import ELEMENT_BYTES, Config
from kvattic.spec.elements import Bits, Booleans, Bytes, Integers

__all__ = [
    "Masks",
    "Queries",
    "Results",
    "Table",
    "pack_queries",
    "pack_results",
    "pack_table",
    "pack_tokens",
    "put_column",
    "unpack_queries",
    "unpack_results",
    "unpack_table",
    "unpack_tokens",
]


class Masks(NamedTuple):
    """Which query, or row, attends which token; one whose end is not behind its start attends nothing.

    Members:
        start: int64, (n,), first token that each attends.
        end: int64, (n,), one past the last.
        tree: int64, (n,), bit i: it attends token tree_token + i.
        tree_token: first token of the draft tree.
    """

    start: Integers
    end: Integers
    tree: Integers
    tree_token: int

    def of_rows(self, group: int) -> "Masks":
        """The same for rows: `group` heads for each query."""
        start, end, tree = (np.repeat(per_query, group) for per_query in self[:3])
        return Masks(start, end, tree, self.tree_token)

    def cut(self, rows: slice) -> "Masks":
        """Those of some queries or rows."""
        return Masks(self.start[rows], self.end[rows], self.tree[rows], self.tree_token)


class Queries(NamedTuple):
    """A query block.

    Members:
        query: uint16, (rows, head_dim), bit patterns.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
    """

    query: Bits
    start: Integers
    end: Integers
    tree: Integers


class Table(NamedTuple):
    """A job's table; the arrays have one entry for each stripe.

    Members:
        mean: uint32, (head_dim,), fp32 bit patterns of the mean of V; None in modes that have none.
        entries: where K and V lie.
        sketches: what the first pass reads; meaningless in a dense job.
        reserved: bool, whether a reserved bit is set.
    """

    mean: NDArray[np.uint32] | None
    entries: layout.Entries
    sketches: layout.Sketches
    reserved: Booleans

    @property
    def tail(self) -> Booleans:
        """Stripes that are attended whole."""
        whole: Booleans = (self.entries.dram == 1) | (self.entries.whole == 1)
        return whole


class Results(NamedTuple):
    """A result block.

    Members:
        output: uint32, (rows, head_dim), fp32 bit patterns.
        maximum: int64, (rows,), largest score of each row.
        denominator: uint64 (or int64, to pack), (rows,), sum of the weights.
    """

    output: NDArray[np.uint32]
    maximum: Integers
    denominator: NDArray[Any]


def put_column(block: Bytes, field: Field, values: NDArray[Any]) -> None:
    """Write a field, in two's complement, into each row of a block of records.

    Args:
        block: uint8, (records, bytes); a record begins with each row.
        field: which one.
        values: integers, (records,), that fit the field.
    """
    column = np.ascontiguousarray(values).astype("<i8" if values.dtype.kind == "i" else "<u8")
    block[:, field.place] = column[:, None].view(np.uint8)[:, : field.size]


def pack_queries(queries: Queries) -> bytes:
    """The bytes of a query block: for each row its `ROW` record and q, padded to whole lines."""
    rows, head_dim = queries.query.shape
    block = np.zeros((rows, query_row_bytes(head_dim) // 4), "<u4")
    for name, column in (("start_token", queries.start), ("end_token", queries.end), ("tree", queries.tree)):
        block[:, ROW[name].offset // 4] = column    # in two's complement
    first = ROW.size // ELEMENT_BYTES
    block.view("<u2")[:, first : first + head_dim] = queries.query
    return block.tobytes()


def unpack_queries(data: bytes, rows: int, head_dim: int) -> Queries:
    """A query block; start, end and tree are int64.

    Args:
        data: rows * query_row_bytes(head_dim) bytes.
        rows: query rows.
        head_dim: elements of each.
    """
    block = np.frombuffer(data, "<u4").reshape(rows, -1)
    first = ROW.size // ELEMENT_BYTES
    query = block.view("<u2")[:, first : first + head_dim].astype(np.uint16)
    start, end, tree = (
        block[:, ROW[name].offset // 4].astype(np.int64) for name in ("start_token", "end_token", "tree"))
    return Queries(query, start, end, tree)


def pack_table(entries: NDArray[np.uint64], sketches: NDArray[np.uint64] | None,
               mean: NDArray[np.uint32] | None) -> bytes:
    """The bytes of a table: the mean of V, then the entries of the stripes, each followed by its sketch entry.

    Args:
        entries: uint64, (stripes,), from `layout.pack_entries`.
        sketches: uint64, (stripes,), from `layout.pack_sketches`; None in a dense job.
        mean: uint32, (head_dim,), fp32 bit patterns; None in modes that have none.
    """
    before = b"" if mean is None else mean.astype("<u4").tobytes().ljust(fp32_block_bytes(len(mean)), b"\0")
    columns = [entries] if sketches is None else [entries, sketches]
    after = np.stack(columns, axis=1).astype("<u8").tobytes()
    return before + after.ljust(lines(len(after)) * LINE_BYTES, b"\0")


def unpack_table(data: bytes, mode: Mode, stripes: int, head_dim: int) -> Table:
    """A job's table.

    Args:
        data: the table, the mean of V in front of it included.
        mode: of the job.
        stripes: entries.
        head_dim: elements of the mean of V.
    """
    begin = fp32_block_bytes(head_dim) if mode.blended else 0
    mean = np.frombuffer(data, "<u4", head_dim).astype(np.uint32) if mode.blended else None
    per_stripe = 1 if mode is Mode.DENSE else 2
    words = np.frombuffer(data, "<u8", stripes * per_stripe, begin).astype(np.uint64).reshape(stripes, per_stripe)
    flags = words[:, 0] >> np.uint64(8 * TABLE_ENTRY["flags"].offset)
    known = TableFlag.DRAM if mode is Mode.DENSE else TableFlag.DRAM | TableFlag.WHOLE
    reserved = flags & ~np.uint64(known) != 0
    if mode is not Mode.DENSE:
        reserved |= words[:, 1] >> np.uint64(8 * SKETCH_ENTRY["reserved"].offset) != 0
    return Table(mean, layout.unpack_entries(words[:, 0]), layout.unpack_sketches(words[:, -1]), reserved)


def pack_results(results: Results) -> bytes:
    """The bytes of a result block: for each row the outputs, padded to whole lines, and its `TRAILER`."""
    rows, head_dim = results.output.shape
    block = np.zeros((rows, result_row_bytes(head_dim) // 8), "<u8")
    block.view("<u4")[:, :head_dim] = results.output
    for name, column in (("maximum", results.maximum), ("denominator", results.denominator)):
        block.view(f"<{column.dtype.kind}8")[:, _trailer(name, head_dim)] = column
    return block.tobytes()


def _trailer(name: str, head_dim: int) -> int:
    """The word of 8 bytes of a result row that has a field of its `TRAILER`."""
    return (fp32_block_bytes(head_dim) + TRAILER[name].offset) // 8


def unpack_results(data: bytes, rows: int, head_dim: int) -> Results:
    """A result block.

    Args:
        data: rows * result_row_bytes(head_dim) bytes.
        rows: query rows.
        head_dim: outputs of each.
    """
    block = np.frombuffer(data, "<u8").reshape(rows, result_row_bytes(head_dim) // 8)
    return Results(
        block.view("<u4")[:, :head_dim].astype(np.uint32),
        block[:, _trailer("maximum", head_dim)].astype(np.int64),
        block[:, _trailer("denominator", head_dim)].astype(np.uint64))


def pack_tokens(key: Bits, value: Bits, config: Config) -> bytes:
    """The bytes that a READ writes: K and V of each token as they are stored, padded with zeros to whole lines.

    Args:
        key: uint16, (tokens, head_dim), bit patterns.
        value: the same.
        config: with the stored format.
    """
    tokens, head_dim = key.shape
    size = config.kv_element_bytes
    block = np.zeros((tokens, 2, read_token_bytes(head_dim, size) // 2 // size), f"<u{size}")
    block[:, 0, :head_dim], block[:, 1, :head_dim] = (layout.pack_codes(bits, config) for bits in (key, value))
    return block.tobytes()


def unpack_tokens(data: bytes, config: Config) -> tuple[Bits, Bits]:
    """K and V of what a READ wrote: uint16, (tokens, head_dim), bit patterns.

    Args:
        data: whole tokens of it.
        config: with the stored format.
    """
    block = np.frombuffer(data, np.uint8).reshape(
        -1, 2, read_token_bytes(config.head_dim, config.kv_element_bytes) // 2)
    key, value = (layout.unpack_codes(np.ascontiguousarray(block[:, kind, : config.token_bytes]), config)
                  for kind in range(2))
    return key, value
