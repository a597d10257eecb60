"""Runs of ATTENDs that wait in a queue, served together: their dense jobs are computed in one pass (`together`).

What the host and the registers see is what serving them one after the other shows.  A command that is not a plain dense
job, or that is to end with anything but OK, is left to `kvattic.golden.attention`; so is a run in which a command
writes where another one reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from kvattic.golden.memory import HostMemory
from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue
from kvattic.golden.registers import Registers
from kvattic.golden.rejected import RejectedError
from kvattic.golden.storage import Storage
from kvattic.golden.together import DenseJobs, DenseResults
from kvattic.golden.validate import is_valid_dense, stripes_per_lane
from kvattic.spec.blocks import Results, pack_results, unpack_queries
from kvattic.spec.commands import (
    COMMAND,
    LINE_BYTES,
    TABLE_ENTRY,
    AttendCommand,
    Kind,
    Mode,
    Opcode,
    TableFlag,
    lines,
    query_row_bytes,
    result_row_bytes,
    table_bytes,
)
from kvattic.spec.config import Config
from kvattic.spec.elements import Booleans
from kvattic.timing.record import DenseNotes

__all__ = ["Kernel", "Run", "Runs"]

Kernel = Callable[[DenseJobs], DenseResults]

_KNOWN = 1024
"""Commands, without their addresses, that are remembered as valid, at most."""
_KNOWN_TABLES = 65_536
"""Tables whose places are remembered, at most."""
_CUT = slice(COMMAND["table"].offset, COMMAND["result"].place.stop)
"""Addresses in a command's line: table, query, result."""
_HEAD = COMMAND["domain"].offset
"""Behind the identifier."""
_LINE = Struct(f"<{COMMAND['identifier'].offset}xH{_CUT.start - COMMAND['identifier'].place.stop}xQQQ")
"""Identifier, table, query and result of a command's line."""
_CHANNEL, _VALUE, _FLAGS = (8 * TABLE_ENTRY[name].offset for name in ("channel", "value_page", "flags"))
"""Least bits of a table entry's fields."""
_PAGE = (1 << _CHANNEL) - 1


class Run(NamedTuple):
    """Commands of a queue, the oldest first.

    Members:
        identifiers: of the commands.
        done: for each, what was noted of a job that is computed, with its results written, and its number there; None:
            the command is to be served.
    """

    identifiers: list[int]
    done: list[tuple[DenseNotes, int] | None]


@dataclass(slots=True, eq=False)
class _Group:
    """Commands of a run that differ in their addresses alone.

    Attributes:
        command: any of them.
        sizes: bytes of table (whole lines), query and result.
        members: their numbers in the run.
        table, query, result: addresses, one for each member.
    """

    command: AttendCommand
    sizes: tuple[int, int, int]
    members: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    query: list[int] = field(default_factory=list)
    result: list[int] = field(default_factory=list)

    def of(self, chosen: Booleans) -> "_Group":
        """Some of the members."""
        keep = chosen.tolist()
        return _Group(self.command, self.sizes, *(list(compress(column, keep)) for column in (
            self.members, self.table, self.query, self.result)))


class _Place(NamedTuple):
    """Where the stripes of a job lie.

    Members:
        keys: addresses of the pages of K, int64, as bytes.
        values: likewise of V.
        dram: of each stripe, 1: it is in device DRAM.
    """

    keys: bytes
    values: bytes
    dram: bytes


class _Places:
    """Where jobs read, by their tables, as long as nothing is erased, mapped or given away: checked once.

    Args:
        config: geometry.
        storage: flash and device DRAM.
        owners: of both.
    """

    def __init__(self, config: Config, storage: Storage, owners: Owners) -> None:
        self._config = config
        self._storage = storage
        self._owners = owners
        self._valid: tuple[int, ...] = ()
        self._known: dict[tuple[int, int, bytes], _Place] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the device has its pages elsewhere.
        return self.__dict__ | {"_valid": (), "_known": {}}

    def find(self, tables: list[bytes], command: AttendCommand, region_bits: int) -> list[_Place | None]:
        """Where jobs read; None: a page of the job cannot be read, or is not the domain's, or its table is malformed.

        Args:
            tables: the entries of each job.
            command: that of all of them, but for addresses.
            region_bits: the register.
        """
        valid = (self._storage.flash.version, self._storage.version, self._owners.version, region_bits)
        if valid != self._valid or len(self._known) > _KNOWN_TABLES:
            self._valid = valid
            self._known.clear()
        domain, pages = command.domain, command.stripe_pages
        places: list[_Place | None] = []
        for table in tables:
            place = self._known.get((domain, pages, table))
            if place is None and (place := self._place(table, command, region_bits)) is not None:
                self._known[domain, pages, table] = place
            places.append(place)
        return places

    def _place(self, table: bytes, command: AttendCommand, region_bits: int) -> _Place | None:
        entries: list[int] = np.frombuffer(table, "<u8").tolist()
        pages, keys, values = command.stripe_pages, list[int](), list[int]()
        lanes = [(entry >> _CHANNEL & 0xFF) % self._config.lanes for entry in entries]
        if len(entries) > (most := stripes_per_lane(command, self._config)) and max(
                map(lanes.count, set(lanes))) > most:
            return None
        for entry in entries:
            found = self._addresses(entry, command.domain, pages, region_bits)
            if found is None:
                return None
            keys += found[:pages]
            values += found[pages:]
        return _Place(np.array(keys, np.int64).tobytes(), np.array(values, np.int64).tobytes(),
                      bytes(entry >> _FLAGS & TableFlag.DRAM for entry in entries))

    def _addresses(self, entry: int, domain: int, pages: int, region_bits: int) -> tuple[int, ...] | None:
        """Of the pages of K, then of V; None: one cannot be read, or is not the domain's."""
        channel, flags = entry >> _CHANNEL & 0xFF, entry >> _FLAGS
        firsts = (entry & _PAGE, entry >> _VALUE & _PAGE)
        if channel >= self._config.channels or flags & ~int(TableFlag.DRAM):
            return None
        in_dram, found = bool(flags & TableFlag.DRAM), list[int]()
        for first in firsts:
            owned = (self._owners.owns_dram(domain, first, pages, region_bits) if in_dram
                     else self._owners.owns_pages(domain, first, pages))
            if not owned:
                return None
            for page in range(first, first + pages):
                address = self._storage.dram_address(page) if in_dram else self._storage.flash.address(channel, page)
                if address is None:
                    return None
                found.append(address)
        return tuple(found)


class Runs:
    """Takes what waits in a queue and computes what is plain in it.

    Args:
        config: geometry.
        registers: of the device.
        memory: of the host.
        storage: flash and device DRAM.
        owners: of what the jobs read.
        kernel: computes the jobs.
    """

    def __init__(self, config: Config, registers: Registers, memory: HostMemory, storage: Storage, owners: Owners,
                 kernel: Kernel) -> None:
        self._config = config
        self._registers = registers
        self._memory = memory
        self._storage = storage
        self._owners = owners
        self._kernel = kernel
        self._places = _Places(config, storage, owners)
        self._known: dict[bytes, AttendCommand | None] = {}

    def take(self, queue: Queue) -> Run | None:
        """Compute the dense jobs that wait in front of a queue, as far as their completions have room.

        Nothing of the queue changes: the caller fetches and completes the commands of the run.

        Returns:
            None: the next command must be served alone.
        """
        if self._storage.flash.has_read_faults or not queue.rings_inside(self._memory.size):
            return None
        data = b"".join([self._memory.dma_read(begin, end - begin) for begin, end in queue.submissions(queue.waiting)])
        identifiers, groups = self._groups(data, queue)
        if not identifiers or _conflict(queue, len(identifiers), groups):
            return None
        run = Run(identifiers, [None] * len(identifiers))
        for group in groups:
            if group.members and self._permitted(group.command, queue):
                self._attend(group, run)
        return run

    def _groups(self, data: bytes, queue: Queue) -> tuple[list[int], list[_Group]]:
        """Identifiers of the dense jobs in front that are valid but maybe for their addresses; and those of valid ones.

        Args:
            data: entries of the queue.
            queue: with the window that addresses must be in.
        """
        identifiers, groups = list[int](), dict[bytes, _Group]()
        base, limit = queue.base, min(queue.limit, self._memory.size)
        for at in range(0, len(data), LINE_BYTES):
            key = data[at + _HEAD : at + _CUT.start] + data[at + _CUT.stop : at + LINE_BYTES]
            if data[at] != Opcode.ATTEND or data[at + 1]:
                break
            group = groups.get(key)
            if group is None:
                command = self._command(key, data[at : at + LINE_BYTES])
                if command is None:
                    break
                groups[key] = group = _Group(command, self._sizes(command))
            identifier, table, query, result = _LINE.unpack_from(data, at)
            ends = (table + group.sizes[0], query + group.sizes[1], result + group.sizes[2])
            if not (table | query | result) % LINE_BYTES and base <= min(table, query, result) and max(ends) <= limit:
                group.members.append(len(identifiers))
                group.table.append(table)
                group.query.append(query)
                group.result.append(result)
            identifiers.append(identifier)
        return identifiers, list(groups.values())

    def _sizes(self, command: AttendCommand) -> tuple[int, int, int]:
        """See `_Group`."""
        head_dim = self._config.head_dim
        return (lines(table_bytes(Mode.DENSE, command.stripes, head_dim)) * LINE_BYTES,
                command.rows * query_row_bytes(head_dim), command.rows * result_row_bytes(head_dim))

    def _command(self, key: bytes, line: bytes) -> AttendCommand | None:
        """A dense job that is valid but for its addresses, which the key does not have; None: it is something else."""
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            command = AttendCommand.unpack(line)
            good = COMMAND.reserved_is_zero(line) and is_valid_dense(command, self._config)
            self._known[key] = command if good else None
        return self._known[key]

    def _permitted(self, command: AttendCommand, queue: Queue) -> bool:
        try:
            self._owners.check_permitted(command.domain, queue.number)
        except RejectedError:
            return False
        return True

    def _attend(self, group: _Group, run: Run) -> None:
        """Compute the jobs of a group, write their results, and note them in the run."""
        config, command, stripes = self._config, group.command, group.command.stripes
        size = stripes * TABLE_ENTRY.size
        tables = self._memory.blocks(group.table, size)
        places = self._places.find(tables, command, self._registers.region_bits)
        if None in places:
            good = np.array([place is not None for place in places])
            group, tables = group.of(good), list(compress(tables, good))
            if not tables:
                return
        found = [place for place in places if place is not None]
        shape = (len(tables), command.rows)
        queries = unpack_queries(b"".join(self._memory.blocks(group.query, group.sizes[1])), shape[0] * shape[1],
                                 config.head_dim)
        notes = DenseNotes(config, tables, [place.dram for place in found], rows=command.rows,
                           stripe_pages=command.stripe_pages, tokens=command.end_token - command.base_token)
        keys, values = (np.frombuffer(b"".join([place[kind] for place in found]), np.int64).reshape(shape[0], -1)
                        for kind in (Kind.KEY, Kind.VALUE))
        if keys.shape[1] != notes.pages:
            keys, values = (np.ascontiguousarray(pages[:, : notes.pages]) for pages in (keys, values))
        start, end, tree = (column.reshape(shape) for column in (queries.start, queries.end, queries.tree))
        results = self._kernel(DenseJobs(
            config, keys, values, queries.query.reshape(*shape, -1), start, end, tree, notes.tokens, command.base_token,
            command.tree_token, command.scale))
        self._finish(group, results, notes, run)

    def _finish(self, group: _Group, results: DenseResults, notes: DenseNotes, run: Run) -> None:
        """Write the results, and count what was read."""
        config, clean = self._config, results.clean
        if not clean.all():
            group, notes = group.of(clean), notes.of(clean)
            results = results.of(clean)
            if not group.members:
                return
        blocks = pack_results(Results(results.output.reshape(-1, config.head_dim), results.maximum.ravel(),
                                      results.denominator.ravel()))
        self._memory.scatter(group.result, group.sizes[2], blocks)
        for index, member in enumerate(group.members):
            run.done[member] = (notes, index)
        flash, dram, pages = notes.totals
        registers, traffic = self._registers, self._storage.traffic
        registers.count("BEATS", 2 * (flash + dram) * config.beats_per_codeword)
        registers.count("CODEWORDS", 2 * flash)
        registers.count("FLASH_WORDS", 2 * flash * config.raw_codeword_words)
        registers.count("PAGE_READS", pages)
        traffic.page_reads += pages
        for kind in (Kind.KEY, Kind.VALUE):
            traffic.flash[kind] += flash
            traffic.dram[kind] += dram


def _conflict(queue: Queue, count: int, groups: list[_Group]) -> bool:
    """Whether a command writes where another one reads or writes, or a ring lies."""
    ranges = [(begin, end, False) for begin, end in queue.submissions(count)]
    ranges += [(begin, end, True) for begin, end in queue.completions(count)]
    for group in groups:
        for addresses, size, writes in zip((group.table, group.query, group.result), group.sizes, (False, False, True),
                                           strict=True):
            ranges += [(address, address + size, writes) for address in addresses]
    ranges.sort()
    taken = written = 0     # the furthest ends so far, of all and of those that are written
    for begin, end, writes in ranges:
        if begin < (taken if writes else written):
            return True
        taken = max(taken, end)
        if writes:
            written = max(written, end)
    return False
