"""Runs of ATTENDs that wait in a queue, served together: their dense jobs are computed in one pass (`together`).

What the host and the registers see is what serving them one after the other shows.  A command that is not a plain dense job,
or that is to end with anything but OK, is left to `kvattic.golden.attention`; so is a run in which a command writes where
another one reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.golden.memory import HostMemory
from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue
from kvattic.golden.registers import Registers
from kvattic.golden.rejected import RejectedError
from kvattic.golden.storage import Storage
from kvattic.golden.together import DenseJobs, DenseResults
from kvattic.golden.validate import is_valid_dense, stripes_per_channel
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
from kvattic.spec.elements import Booleans, Integers
from kvattic.timing.record import DenseNotes

__all__ = ["Kernel", "Run", "Runs"]

Kernel = Callable[[DenseJobs], DenseResults]

_KNOWN = 1024
"""Commands, without their addresses, that are remembered as valid, at most."""
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


class _Places:
    """Addresses of pages by table entry, as long as nothing is erased, mapped or given away.

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
        self._known: dict[tuple[int, int], tuple[dict[int, int], list[tuple[int, ...]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the device has its pages elsewhere.
        return self.__dict__ | {"_valid": (), "_known": {}}

    def find(self, entries: NDArray[np.uint64], domain: int, pages: int,
             region_bits: int) -> tuple[Integers, Integers, Booleans]:
        """Addresses of the pages of K and of V, and which jobs have all of them.

        Args:
            entries: uint64, (jobs, stripes).
            domain: that must own them.
            pages: of a stripe.
            region_bits: the register.

        Returns:
            int64, (jobs, stripes * pages), twice; bool, (jobs,).
        """
        valid = (self._storage.flash.version, self._storage.version, self._owners.version, region_bits)
        if valid != self._valid:
            self._valid = valid
            self._known.clear()
        numbers, addresses = self._known.setdefault((domain, pages), ({}, [(0,) * (2 * pages)]))
        flat = entries.ravel().tolist()
        for entry in set(flat).difference(numbers):
            if (found := self._addresses(entry, domain, pages, region_bits)) is not None:
                numbers[entry] = len(addresses)
                addresses.append(found)
        places = np.array([addresses[numbers.get(entry, 0)] for entry in flat], np.int64)
        places = places.reshape(*entries.shape, 2, pages)
        shape = (len(entries), -1)
        return (places[:, :, 0].reshape(shape), places[:, :, 1].reshape(shape),
                (places[:, :, 0, 0] != 0).all(axis=1))

    def _addresses(self, entry: int, domain: int, pages: int, region_bits: int) -> tuple[int, ...] | None:
        """Of the pages of K, then of V; None: one cannot be read, or is not the domain's."""
        channel, flags = entry >> _CHANNEL & 0xFF, entry >> _FLAGS
        firsts = (entry & _PAGE, entry >> _VALUE & _PAGE)
        if channel >= self._config.channels or flags & ~TableFlag.DRAM:
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
        tables = self._memory.gather(group.table, stripes * TABLE_ENTRY.size)
        entries = np.frombuffer(tables, "<u8").reshape(-1, stripes)
        keys, values, good = self._places.find(entries, command.domain, command.stripe_pages,
                                               self._registers.region_bits)
        if stripes > (places := stripes_per_channel(command, config)):
            good &= _most_alike(entries >> np.uint64(_CHANNEL) & np.uint64(0xFF), config.channels) <= places
        if not good.all():
            group, entries, keys, values = group.of(good), entries[good], keys[good], values[good]
            if not group.members:
                return
        shape = (len(entries), command.rows)
        queries = unpack_queries(self._memory.gather(group.query, group.sizes[1]), shape[0] * shape[1], config.head_dim)
        notes = DenseNotes(config, entries, rows=command.rows, stripe_pages=command.stripe_pages,
                           tokens=command.end_token - command.base_token)
        results = self._kernel(DenseJobs(
            config, *(np.ascontiguousarray(pages[:, : notes.pages]) for pages in (keys, values)),
            queries.query.reshape(*shape, -1), *(column.reshape(shape) for column in queries[1:]), notes.tokens,
            command.base_token, command.tree_token, command.scale))
        self._finish(group, results, notes, run)

    def _finish(self, group: _Group, results: DenseResults, notes: DenseNotes, run: Run) -> None:
        """Write the results, and count what was read."""
        config, clean = self._config, results.clean
        if not clean.all():
            group, notes = group.of(clean), notes.of(clean)
            results = DenseResults(*(column[clean] for column in results))
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


def _most_alike(channels: NDArray[np.uint64], count: int) -> Integers:
    """How many stripes of the busiest channel each job has: int64, (jobs,)."""
    most = np.zeros(len(channels), np.int64)
    for channel in range(count):
        most = np.maximum(most, (channels == channel).sum(axis=1))
    return most
