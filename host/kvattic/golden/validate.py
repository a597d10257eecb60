"""What the golden device refuses of ATTENDs and READs before it reads K or V, in the order in which it is reported."""

from collections.abc import Iterable

import numpy as np

from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue
from kvattic.golden.rejected import RejectedError
from kvattic.spec.blocks import Table
from kvattic.spec.commands import (
    FP32_SPECIAL,
    READ_BYTES,
    AttendCommand,
    Mode,
    Status,
    is_positive_normal,
    query_row_bytes,
    read_token_bytes,
    result_row_bytes,
    table_bytes,
)
from kvattic.spec.config import Config

__all__ = ["check_command", "check_mean", "check_read", "check_table", "is_valid_dense", "stripes_per_lane",
           "unit_tokens"]

_UNUSED: dict[Mode, tuple[str, ...]] = {
    Mode.DENSE: ("features", "top_units", "local_tokens", "sinks", "unit_bits"),
    Mode.SPARF: ("unit_bits",),
    Mode.FETCHED: (),
    Mode.CENTROID: ("features",),
    Mode.CODES: ("features", "unit_bits"),
}
"""Fields that a mode has no use for: they must be zero."""


def unit_tokens(command: AttendCommand, config: Config) -> int:
    """Tokens of a unit of selection."""
    return 1 if Mode(command.mode).by_token else config.tokens_per_codeword << command.unit_bits


def check_command(command: AttendCommand, queue: Queue, config: Config) -> None:
    """Refuse what the command alone shows to be wrong.

    Raises:
        RejectedError: the first mistake.
    """
    _check_fields(command, config)
    if not 1 <= command.rows <= config.rows:
        raise RejectedError(Status.INVALID_ROWS, command.rows)
    _check_length(command, config)
    if command.mode != Mode.DENSE:
        _check_selection(command, config)
    _check_addresses(command, queue, config)
    if not is_positive_normal(command.scale):
        raise RejectedError(Status.INVALID_SCALE)


def check_read(command: AttendCommand, queue: Queue, config: Config) -> None:
    """The same of a READ, given as the dense ATTEND of its tokens.

    Raises:
        RejectedError: the first mistake.
    """
    _check_fields(command, config)
    _check_length(command, config)
    size = command.end_token * read_token_bytes(config.head_dim, config.kv_element_bytes)
    if size > READ_BYTES:
        raise RejectedError(Status.INVALID_LENGTH)
    table = table_bytes(Mode.DENSE, command.stripes, config.head_dim)
    _check_blocks(queue, ((1, command.result, size), (2, command.table, table)))


def is_valid_dense(command: AttendCommand, config: Config) -> bool:
    """Whether it is a dense job with which nothing is wrong but maybe its addresses."""
    try:
        _check_fields(command, config)
        _check_length(command, config)
    except RejectedError:
        return False
    return command.mode == Mode.DENSE and 1 <= command.rows <= config.rows and is_positive_normal(command.scale)


def _check_fields(command: AttendCommand, config: Config) -> None:
    pages = command.stripe_pages
    if command.mode > max(Mode):
        raise RejectedError(Status.INVALID_FIELD)
    mode = Mode(command.mode)
    if mode is not Mode.DENSE and (not config.sparse or pages != config.group_pages):
        raise RejectedError(Status.INVALID_FIELD)
    if mode is Mode.CODES and not config.codes:
        raise RejectedError(Status.INVALID_FIELD)
    if any(getattr(command, name) for name in _UNUSED[mode]):
        raise RejectedError(Status.INVALID_FIELD)
    if pages == 0 or pages & (pages - 1) or pages * config.codewords_per_page > config.ring_codewords:
        raise RejectedError(Status.INVALID_FIELD)


def _check_length(command: AttendCommand, config: Config) -> None:
    tokens, stripes = command.end_token - command.base_token, command.stripes
    stripe = command.stripe_pages * config.tokens_per_page
    fitting = (stripes - 1) * stripe < tokens <= stripes * stripe
    if tokens <= 0 or not fitting or stripes > config.lanes * stripes_per_lane(command, config):
        raise RejectedError(Status.INVALID_LENGTH)


def stripes_per_lane(command: AttendCommand, config: Config) -> int:
    """Stripes whose scores a lane's score buffer holds."""
    return config.ring_codewords // (command.stripe_pages * config.codewords_per_page)


def _check_selection(command: AttendCommand, config: Config) -> None:
    tokens, size = command.end_token - command.base_token, unit_tokens(command, config)
    for where, bad in enumerate((
        Mode(command.mode).featured and not 1 <= command.features <= config.head_dim,
        not 1 <= command.top_units <= -(-tokens // size),
        command.local_tokens > command.top_units * size,
        command.unit_bits > config.unit_bits_max,
        command.mode == Mode.CODES and command.sinks > config.codes_sinks_max,
    )):
        if bad:
            raise RejectedError(Status.INVALID_SELECTION, where)


def _check_addresses(command: AttendCommand, queue: Queue, config: Config) -> None:
    _check_blocks(queue, (
        (0, command.query, command.rows * query_row_bytes(config.head_dim)),
        (1, command.result, command.rows * result_row_bytes(config.head_dim)),
        (2, command.table, table_bytes(Mode(command.mode), command.stripes, config.head_dim)),
    ))


def _check_blocks(queue: Queue, blocks: Iterable[tuple[int, int, int]]) -> None:
    """Refuse the first block, (where, address, size), that is not in the queue's window."""
    for where, address, size in blocks:
        if not queue.holds(address, size):
            raise RejectedError(Status.INVALID_ADDRESS, where)


def check_table(command: AttendCommand, table: Table, config: Config, owners: Owners, region_bits: int) -> None:
    """Refuse a table with an entry that is malformed, then not the domain's, then without what the first pass reads.

    Malformed is an entry that names no channel or codeword, has a reserved bit set, or is one more than its lane's
    score buffer holds.

    Raises:
        RejectedError: names the first such entry.
    """
    entries, sketches, mode = table.entries, table.sketches, Mode(command.mode)
    bad = (entries.channel >= config.channels) | table.reserved
    places = stripes_per_lane(command, config)
    for lane in range(config.lanes):
        bad[np.flatnonzero(entries.channel % config.lanes == lane)[places:]] = True
    if mode is not Mode.DENSE:
        # The feature layout begins with a page.
        codewords = 1 if mode.featured else config.codewords_per_page
        bad |= (sketches.written > 1) | (sketches.codeword >= codewords)
    if bad.any():
        raise RejectedError(Status.INVALID_TABLE, int(bad.argmax()))
    foreign = owners.first_foreign(command, entries, sketches, region_bits)
    if foreign is not None:
        raise RejectedError(Status.NOT_OWNED, foreign)
    if mode is not Mode.DENSE:
        missing = ~table.tail & (sketches.written == 0)
        if missing.any():
            raise RejectedError(Status.NO_SKETCH, int(missing.argmax()))


def check_mean(table: Table) -> None:
    """Refuse a mean of V with a NaN or infinity.

    Raises:
        RejectedError: names its feature.
    """
    if table.mean is not None:
        special = (table.mean & FP32_SPECIAL) == FP32_SPECIAL
        if special.any():
            raise RejectedError(Status.NAN_MEAN, int(special.argmax()))
