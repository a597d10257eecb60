"""Runs of ATTENDs that wait in a queue, served together: their dense jobs are computed in one pass (`together`).

What the host and the registers see is what serving them one after the other shows.  A command that is not a plain dense job,
or that is to end with anything but OK, is left to `kvattic.golden.attention`; so is a run in which a command writes where
another one reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from kvattic.spec.elements import Booleans, Integers, special
from kvattic.timing.record import DenseNotes

__all__ = ["Kernel", "Run", "Runs"]

Kernel = Callable[[DenseJobs], DenseResults]

_KNOWN = 1024
"""Commands, without their addresses, that are remembered as valid, at most."""
_CUT = slice(COMMAND["table"].offset, COMMAND["result"].place.stop)
"""Addresses in a command's line: table, query, result."""
_HEAD = COMMAND["domain"].offset
"""Behind the identifier."""
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
        members: int64, their numbers in the run.
        table, query, result: int64, addresses, one for each member.
    """

    command: AttendCommand
    members: Integers
    table: Integers
    query: Integers
    result: Integers

    def sizes(self, head_dim: int) -> tuple[int, int, int]:
        """Bytes of table (whole lines), query and result."""
        rows, stripes = self.command.rows, self.command.stripes
        return (lines(table_bytes(Mode.DENSE, stripes, head_dim)) * LINE_BYTES, rows * query_row_bytes(head_dim),
                rows * result_row_bytes(head_dim))

    def of(self, chosen: Booleans) -> "_Group":
        """Some of the members."""
        if chosen.all():
            return self
        return _Group(self.command, *(column[chosen] for column in (self.members, self.table, self.query, self.result)))


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
        found = np.array([addresses[numbers.get(entry, 0)] for entry in flat], np.int64)
        found = found.reshape(*entries.shape, 2, pages)
        shape = (len(entries), -1)
        return (found[:, :, 0].reshape(shape), found[:, :, 1].reshape(shape), (found[:, :, 0, 0] != 0).all(axis=1))

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
        block = self._memory.gather(queue.waiting(), LINE_BYTES)
        identifiers, groups = self._groups(block)
        if not identifiers:
            return None
        groups = [self._inside(group, queue) for group in groups]
        if self._conflict(queue, len(identifiers), groups):
            return None
        run = Run(identifiers, [None] * len(identifiers))
        for group in groups:
            if len(group.members) and self._permitted(group.command, queue):
                self._attend(group, run)
        return run

    def _groups(self, block: NDArray[np.uint8]) -> tuple[list[int], list[_Group]]:
        """Identifiers of the dense jobs in front that are valid but for their addresses; and the groups that they make."""
        data, members = block.tobytes(), dict[bytes, list[int]]()
        count = 0
        for at in range(0, len(data), LINE_BYTES):
            key = data[at + _HEAD : at + _CUT.start] + data[at + _CUT.stop : at + LINE_BYTES]
            if data[at] != Opcode.ATTEND or data[at + 1]:
                break
            if (found := members.get(key)) is not None:
                found.append(count)
            elif self._command(key, data[at : at + LINE_BYTES]) is not None:
                members[key] = [count]
            else:
                break
            count += 1
        identifiers = block[:count, COMMAND["identifier"].place].copy().view("<u2")[:, 0].tolist()
        addresses = block[:count, _CUT].copy().view("<i8")
        groups = []
        for key, numbers in members.items():
            command, places = self._known[key], np.array(numbers)
            assert command is not None
            groups.append(_Group(command, places, *addresses[places].T))
        return identifiers, groups

    def _command(self, key: bytes, line: bytes) -> AttendCommand | None:
        """A dense job that is valid but for its addresses, which the key does not have; None: it is something else."""
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            command = AttendCommand.unpack(line)
            good = COMMAND.reserved_is_zero(line) and is_valid_dense(command, self._config)
            self._known[key] = command if good else None
        return self._known[key]

    def _inside(self, group: _Group, queue: Queue) -> _Group:
        """Those whose blocks are aligned and inside of the queue's window and of the memory."""
        good = np.ones(len(group.members), np.bool_)
        limit = min(queue.limit, self._memory.size)
        for addresses, size in zip((group.table, group.query, group.result), group.sizes(self._config.head_dim),
                                   strict=True):
            good &= (addresses % LINE_BYTES == 0) & (addresses >= queue.base) & (addresses <= limit - size)
        return group.of(good)

    def _conflict(self, queue: Queue, count: int, groups: list[_Group]) -> bool:
        """Whether a command writes where another one reads or writes, or a ring lies."""
        reads, writes = [queue.submissions(count)], [queue.completions(count)]
        for group in groups:
            sizes = group.sizes(self._config.head_dim)
            for begins, size, kind in zip((group.table, group.query, group.result), sizes, (reads, reads, writes),
                                          strict=True):
                kind.append(np.stack([begins, begins + size]))
        first, last = np.sort(np.concatenate(writes, axis=1), axis=1)   # sorted apart: the same if they are disjoint
        if (first[1:] < last[:-1]).any():
            return True
        begins, ends = np.concatenate(reads, axis=1)
        before = np.searchsorted(first, ends) - 1   # the last one that begins before the end
        conflict: bool = ((before >= 0) & (last[before] > begins)).any()
        return conflict

    def _permitted(self, command: AttendCommand, queue: Queue) -> bool:
        try:
            self._owners.check_permitted(command.domain, queue.number)
        except RejectedError:
            return False
        return True

    def _attend(self, group: _Group, run: Run) -> None:
        """Compute the jobs of a group, write their results, and note them in the run."""
        config, command, stripes = self._config, group.command, group.command.stripes
        words = self._memory.gather(group.table, stripes * TABLE_ENTRY.size).view("<u8").astype(np.uint64, copy=False)
        keys, values, good = self._places.find(words, command.domain, command.stripe_pages, self._registers.region_bits)
        if stripes > (places := stripes_per_channel(command, config)):
            good &= _most_alike(words >> np.uint64(_CHANNEL) & np.uint64(0xFF), config.channels) <= places
        size = command.rows * query_row_bytes(config.head_dim)
        queries = unpack_queries(self._memory.gather(group.query, size).tobytes(), len(words) * command.rows,
                                 config.head_dim)
        shape = (len(words), command.rows)
        query = queries.query.reshape(*shape, -1)
        if (bad := special(query, config.element)).any():
            good &= ~bad.any(axis=(1, 2))
        if not good.all():
            group, words, keys, values, query = group.of(good), words[good], keys[good], values[good], query[good]
            if not len(words):
                return
        start, end, tree = (column.reshape(shape)[good] for column in queries[1:])
        notes = DenseNotes(config, words, rows=command.rows, stripe_pages=command.stripe_pages,
                           tokens=command.end_token - command.base_token)
        results = self._kernel(DenseJobs(
            config, *(np.ascontiguousarray(pages[:, : notes.pages]) for pages in (keys, values)),
            np.ascontiguousarray(query), start, end, tree, notes.tokens, command.base_token, command.tree_token,
            command.scale))
        self._finish(group, results, notes, run)

    def _finish(self, group: _Group, results: DenseResults, notes: DenseNotes, run: Run) -> None:
        """Write the results, and count what was read."""
        config, clean = self._config, results.clean
        if not clean.all():
            group, notes = group.of(clean), notes.of(clean)
            results = DenseResults(*(column[clean] for column in results))
            if not len(group.members):
                return
        count, rows = results.maximum.shape
        block = pack_results(Results(results.output.reshape(count * rows, -1), results.maximum.ravel(),
                                     results.denominator.ravel()))
        self._memory.scatter(group.result, np.frombuffer(block, np.uint8).reshape(count, -1))
        for index, member in enumerate(group.members.tolist()):
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


def _most_alike(channels: NDArray[np.uint64], count: int) -> Integers:
    """How many stripes of the busiest channel each job has: int64, (jobs,)."""
    most = np.zeros(len(channels), np.int64)
    for channel in range(count):
        most = np.maximum(most, (channels == channel).sum(axis=1))
    return most
