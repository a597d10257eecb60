"""The golden device's ATTEND and READ: reads blocks, K and V; writes what the golden model says, or K and V."""

from typing import Any, NamedTuple

import numpy as np

from kvattic.golden import dense, sparse
from kvattic.golden.first_pass import Layout, first_pass, lowest, top_features
from kvattic.golden.memory import HostMemory
from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue
from kvattic.golden.registers import Registers
from kvattic.golden.rejected import RejectedError, raise_first
from kvattic.golden.storage import Storage
from kvattic.golden.stripes import StripeReader
from kvattic.golden.validate import check_command, check_mean, check_read, check_table, unit_tokens
from kvattic.spec.blocks import Queries, Results, Table, pack_results, pack_tokens, unpack_queries, unpack_table
from kvattic.spec.codes import KeyCodes
from kvattic.spec.commands import (
    LINE_BYTES,
    AttendCommand,
    CompletionFlag,
    Kind,
    Mode,
    ReadCommand,
    Status,
    lines,
    query_row_bytes,
    read_token_bytes,
    table_bytes,
)
from kvattic.spec.config import Config
from kvattic.spec.elements import Bits, Integers
from kvattic.timing.record import Recorder

__all__ = ["Attention"]


class _Computed(NamedTuple):
    """What the golden model says; and, by status, the first token that could not be read, or None."""

    trace: dense.Trace | sparse.SparseTrace
    lost: tuple[tuple[Status, int | None], ...]


class Attention:
    """Runs ATTENDs and READs.

    Args:
        config: geometry.
        registers: of the device.
        memory: of the host.
        storage: flash and device DRAM.
        owners: of what the jobs read.
        recorder: notes what they read.
    """

    def __init__(self, config: Config, registers: Registers, memory: HostMemory, storage: Storage,
                 owners: Owners, recorder: Recorder) -> None:
        self._config = config
        self._registers = registers
        self._memory = memory
        self._storage = storage
        self._owners = owners
        self._recorder = recorder

    def run(self, command: AttendCommand, queue: Queue) -> CompletionFlag:
        """Run one command, and write its results.

        Raises:
            RejectedError: it does not end OK.
        """
        config = self._config
        check_command(command, queue, config)
        self._owners.check_permitted(command.domain, queue.number)
        queries = unpack_queries(
            self._memory.dma_read(command.query, command.rows * query_row_bytes(config.head_dim)),
            command.rows, config.head_dim)
        table = self._read_table(command)
        check_table(command, table, config, self._owners, self._registers.region_bits)
        # A query or mean with a NaN reaches no lane, so nothing is read for it.
        if (nan := dense.first_special(queries.query, config.element)) is not None:
            raise RejectedError(Status.NAN_QUERY, nan[0] << 16 | nan[1])
        check_mean(table)

        self._recorder.begin_job(Mode(command.mode), command.rows, self._lane_tokens(command, table),
                                 unit_tokens(command, config))
        computed = self._compute(command, queries, table)
        trace = computed.trace
        raise_first(*computed.lost, (Status.NAN_KEY, trace.nan_key), (Status.NAN_VALUE, trace.nan_value),
                    flags=trace.flags)
        results = Results(trace.output, trace.maximum, trace.denominator)
        if not self._memory.dma_write(command.result, pack_results(results)):
            raise RejectedError(Status.BUS_ERROR, flags=trace.flags)
        return trace.flags

    def read(self, command: ReadCommand, queue: Queue) -> None:
        """Run one READ: write K and V as they are, with zeros for what cannot be read.

        Raises:
            RejectedError: it does not end OK.
        """
        config = self._config
        job = AttendCommand(
            opcode=command.opcode, domain=command.domain, end_token=command.tokens, rows=1, table=command.table,
            result=command.result, stripe_pages=command.stripe_pages, stripes=command.stripes)
        check_read(job, queue, config)
        self._owners.check_permitted(job.domain, queue.number)
        table = self._read_table(job)
        check_table(job, table, config, self._owners, self._registers.region_bits)
        data_words = command.tokens * read_token_bytes(config.head_dim, config.kv_element_bytes) // 8
        self._recorder.begin_job(Mode.DENSE, 1, self._lane_tokens(job, table), config.tokens_per_codeword, data_words)
        reader, codewords = StripeReader(config, self._storage, job, table), self._codewords(job)
        key, value = reader.tokens(Kind.KEY, codewords), reader.tokens(Kind.VALUE, codewords)
        written = self._memory.dma_write(
            command.result, pack_tokens(key.bits[: command.tokens], value.bits[: command.tokens], config))
        raise_first((Status.BUS_ERROR, None if written else 0), (Status.UNREADABLE_KEY, key.lost),
                    (Status.UNREADABLE_VALUE, value.lost))

    def _lane_tokens(self, command: AttendCommand, table: Table) -> list[int]:
        """Tokens of the job on each channel."""
        size = command.stripe_pages * self._config.tokens_per_page
        tokens = np.full(command.stripes, size)
        tokens[-1] = command.end_token - command.base_token - size * (command.stripes - 1)
        lanes = np.zeros(self._config.channels, np.int64)
        np.add.at(lanes, table.entries.channel, tokens)
        found: list[int] = lanes.tolist()
        return found

    def _read_table(self, command: AttendCommand) -> Table:
        mode, head_dim = Mode(command.mode), self._config.head_dim
        # Its lines are read whole.
        size = lines(table_bytes(mode, command.stripes, head_dim)) * LINE_BYTES
        return unpack_table(self._memory.dma_read(command.table, size), mode, command.stripes, head_dim)

    def _compute(self, command: AttendCommand, queries: Queries, table: Table) -> _Computed:
        """Run the golden model, with zeros for what cannot be read."""
        reader = StripeReader(self._config, self._storage, command, table)
        job: dict[str, Any] = {
            "element": self._config.element, "scale_bits": command.scale, "start": queries.start, "end": queries.end,
            "tree": queries.tree, "tree_token": command.tree_token}
        if command.mode != Mode.DENSE:
            return self._compute_sparse(command, queries.query, table, reader, job)
        codewords = self._codewords(command)
        key, value = reader.tokens(Kind.KEY, codewords), reader.tokens(Kind.VALUE, codewords)
        trace = dense.attend(queries.query, key.bits, value.bits, base_token=command.base_token,
                             end_token=command.end_token, **job)
        return _Computed(trace, ((Status.UNREADABLE_KEY, key.lost), (Status.UNREADABLE_VALUE, value.lost)))

    def _compute_sparse(self, command: AttendCommand, query: Bits, table: Table, reader: StripeReader,
                        job: dict[str, Any]) -> _Computed:
        config, mode = self._config, Mode(command.mode)
        sketch: Bits | KeyCodes
        match mode:
            case Mode.CENTROID:
                sketch, lost = reader.centroids()
            case Mode.CODES:
                sketch, lost = reader.octets()
            case _:
                sketch, lost = reader.features(top_features(query, command.features, config.element))
        key = reader.tokens(Kind.SKETCH, self._exact_codewords(command, table))
        sketch_lost = lowest(lost, key.lost)
        first = first_pass(
            query, key.bits, sketch=sketch, tail=table.tail, features=command.features,
            top_units=command.top_units, local_tokens=command.local_tokens, sinks=command.sinks,
            base_token=command.base_token, end_token=command.end_token, **job, layout=Layout(
                group_tokens=config.group_tokens, tokens_per_codeword=config.tokens_per_codeword, mode=mode,
                unit_bits=command.unit_bits))
        key, value = reader.tokens(Kind.KEY, first.codewords), reader.tokens(Kind.VALUE, first.codewords)
        trace = sparse.second_pass(first, query, key.bits, value.bits, mean=table.mean, **job)
        return _Computed(trace, ((Status.UNREADABLE_SKETCH, sketch_lost), (Status.UNREADABLE_KEY, key.lost),
                                 (Status.UNREADABLE_VALUE, value.lost)))

    def _exact_codewords(self, command: AttendCommand, table: Table) -> Integers:
        """Codewords of K whose tokens the first pass scores exactly: of the tail and, in CODES, of sinks."""
        if command.mode == Mode.CENTROID:
            return np.zeros(0, np.int64)
        config, codewords = self._config, self._codewords(command)
        tail = codewords[table.tail[codewords // config.group_codewords]]
        if command.mode != Mode.CODES or command.base_token or table.tail[0]:
            return tail
        return np.concatenate([np.arange(-(-command.sinks // config.tokens_per_codeword)), tail])

    def _codewords(self, command: AttendCommand) -> Integers:
        """Codewords up to the last token, counted from base_token: those behind it are never read."""
        tokens = command.end_token - command.base_token
        return np.arange(-(-tokens // self._config.tokens_per_codeword))
