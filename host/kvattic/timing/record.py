"""What a device without time has done, so that it can be timed afterwards: batches of commands in flight together.

The golden device notes what each command reads and writes.  Nothing is modelled until somebody asks for a time, so that
noting costs little; what was modelled once is kept.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.elements import Booleans, Integers
from kvattic.spec.layout import unpack_entries
from kvattic.timing.estimate import Estimate, estimate
from kvattic.timing.work import Operation, Read, job_of_reads

__all__ = ["Batch", "CommandRecord", "Counts", "DenseNotes", "KeepsRecords", "Recorder", "Sampler", "dense_counts"]

T = TypeVar("T")

SAMPLED_JOBS = 64
"""Jobs of a batch that are modelled, at most; the others go on at their rate."""
LEAST_JOBS = 8
"""Jobs that are modelled, however much they read."""
SAMPLED_READS = 16_384
"""Pages that the modelled jobs of a batch read, about, and those that all batches read that wait to be modelled."""
SAMPLED_OPERATIONS = 8_192
"""Operations of a batch that are modelled, at most."""
UNTAKEN = 8_192
"""Records of completions that nobody took, at most: a host that does not ask leaves them."""


class Counts(NamedTuple):
    """What a job read.

    Members:
        flash: codewords from flash, by `Kind`.
        dram: codewords from device DRAM, by `Kind`.
        page_reads: pages read from the arrays; None: not known.
    """

    flash: tuple[int, ...]
    dram: tuple[int, ...]
    page_reads: int | None


@dataclass(slots=True)
class _JobNote:
    """A job, as `job_of_reads` takes it; results keep it, so it is packed: six numbers for a page."""

    mode: Mode
    rows: int
    tokens: Sequence[int]
    unit_tokens: int
    copied: int = 0
    flash: list[int] = field(default_factory=lambda: [0] * len(Kind))
    dram: list[int] = field(default_factory=lambda: [0] * len(Kind))
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    scattered: "array[int]" = field(default_factory=lambda: array("i"))
    page_reads: int = 0

    def add(self, kind: Kind, channel: int, page: int, codewords: Integers, *, dram: bool) -> None:
        """Add codewords, ascending, of a page; most pages are read in one piece."""
        count = len(codewords)
        (self.dram if dram else self.flash)[kind] += count
        self.page_reads += not dram
        first = int(codewords[0])
        if int(codewords[-1]) - first != count - 1:
            first = -1
            self.scattered.extend(codewords.tolist())
        self.pages.extend((kind, channel, page, dram, first, count))

    @property
    def size(self) -> int:
        """Pages that were read."""
        return len(self.pages) // 6

    def reads(self) -> Iterator[Read]:
        """What was read, unpacked."""
        at = 0
        for i in range(0, len(self.pages), 6):
            kind, channel, page, dram, first, count = self.pages[i : i + 6]
            numbers: Sequence[int] = range(first, first + count)
            if first < 0:
                numbers = self.scattered[at : at + count].tolist()
                at += count
            yield Read(Kind(kind), channel, page, numbers, bool(dram))

    @property
    def weight(self) -> int:
        """Codewords."""
        return sum(self.flash) + sum(self.dram)


@lru_cache(maxsize=1024)
def dense_counts(codewords: int, page_codewords: int, stripe_pages: int, in_dram: bytes) -> Counts:
    """What a dense job, or a READ, reads.

    Args:
        codewords: of K, and as many of V.
        page_codewords: codewords of a page.
        stripe_pages: pages of K, and of V, in a stripe.
        in_dram: for each stripe, 1: it is in device DRAM.
    """
    pages = [min(page_codewords, codewords - first) for first in range(0, codewords, page_codewords)]
    flags = [flag for flag in in_dram for _ in range(stripe_pages)][: len(pages)]
    dram = sum(count for count, flag in zip(pages, flags, strict=True) if flag)
    flash, rest = codewords - dram, (0,) * (len(Kind) - 2)
    return Counts((flash, flash, *rest), (dram, dram, *rest), 2 * (len(pages) - sum(flags)))


class DenseNotes:
    """What dense jobs of one shape have read: packed as their tables, and taken apart only for a job that is modelled.

    Each layer of a decode step leaves one behind, so it has nothing that the garbage collector would go through.

    Args:
        config: of the drive.
        tables: the entries of each job.
        in_dram: of each job, for each stripe, 1: it is in device DRAM.
        rows: of each job.
        stripe_pages: pages of K, and of V, in a stripe.
        tokens: of each job.

    Attributes:
        tokens: the same.
        pages: of K, and of V, that each job reads.
        size: pages that each job reads.
        weight: codewords that each job reads.
    """

    __slots__ = ("_all", "_config", "_in_dram", "_rows", "_stripe_pages", "_tables", "pages", "size", "tokens",
                 "weight")

    def __init__(self, config: Config, tables: Iterable[bytes], in_dram: Iterable[bytes], *, rows: int,
                 stripe_pages: int, tokens: int) -> None:
        self.tokens = tokens
        self._all = -(-tokens // config.tokens_per_codeword)
        self.pages = -(-self._all // config.codewords_per_page)
        self.size, self.weight = 2 * self.pages, 2 * self._all
        self._config = config
        self._tables = tuple(tables)
        self._in_dram = tuple(in_dram)
        self._rows = rows
        self._stripe_pages = stripe_pages

    def of(self, chosen: Booleans) -> "DenseNotes":
        """Those of some of the jobs."""
        tables, in_dram = (compress(column, chosen) for column in (self._tables, self._in_dram))
        return DenseNotes(self._config, tables, in_dram, rows=self._rows, stripe_pages=self._stripe_pages,
                          tokens=self.tokens)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Of all jobs: codewords of K (and as many of V) from flash and from device DRAM, and page reads."""
        each = [self.counts(job) for job in range(len(self._tables))]
        return (sum(counts.flash[Kind.KEY] for counts in each), sum(counts.dram[Kind.KEY] for counts in each),
                sum(counts.page_reads or 0 for counts in each))

    def counts(self, job: int) -> Counts:
        """What a job has read."""
        return dense_counts(self._all, self._config.codewords_per_page, self._stripe_pages, self._in_dram[job])

    def note(self, job: int) -> _JobNote:
        """A job's note."""
        config, size = self._config, self._stripe_pages
        entries = unpack_entries(np.frombuffer(self._tables[job], "<u8"))
        tokens = np.full(len(entries.channel), size * config.tokens_per_page)
        tokens[-1] = self.tokens - int(tokens[:-1].sum())
        lanes = np.zeros(config.channels, np.int64)
        np.add.at(lanes, entries.channel, tokens)
        note = _JobNote(Mode.DENSE, self._rows, lanes.tolist(), config.tokens_per_codeword)
        for kind, first_pages in ((Kind.KEY, entries.key_page), (Kind.VALUE, entries.value_page)):
            for page, first in enumerate(range(0, self._all, config.codewords_per_page)):
                stripe, inside = divmod(page, size)
                count = min(config.codewords_per_page, self._all - first)
                note.add(kind, int(entries.channel[stripe]), int(first_pages[stripe]) + inside, np.arange(count),
                         dram=bool(entries.dram[stripe]))
        return note


class Batch:
    """Commands that were in flight together, from an idle drive on.

    Of many jobs the first ones are modelled, and the others go on at the rate of the middle half of these, in
    proportion to their codewords (`estimate`'s `in_all`).

    Args:
        config: of the drive.
    """

    __slots__ = ("_config", "_jobs", "_modelled", "_operation_count", "_operations", "_reads", "_weights")

    def __init__(self, config: Config) -> None:
        self._config = config
        self._jobs: list[_JobNote | tuple[DenseNotes, int]] = []
        self._weights = array("q")
        self._reads = 0
        self._operations: list[Operation] = []
        self._operation_count = 0
        self._modelled: tuple[int, int, Estimate] | None = None

    @property
    def weight(self) -> int:
        """Codewords read and pages written."""
        return sum(self._weights) + self._operation_count

    @property
    def kept(self) -> int:
        """Pages and operations that are kept to be modelled."""
        return self._reads + len(self._operations)

    def add_job(self, note: _JobNote) -> int:
        """Add a job; its number."""
        return self._add(note, note.weight, note.size)

    def add_noted(self, notes: DenseNotes, job: int) -> int:
        """Add a job of several that were noted together; its number."""
        return self._add((notes, job), notes.weight, notes.size)

    def _add(self, note: "_JobNote | tuple[DenseNotes, int]", weight: int, size: int) -> int:
        self._weights.append(weight)
        kept = len(self._jobs)
        # The first ones, without a gap.
        if kept == len(self._weights) - 1 and (
                kept < LEAST_JOBS or (kept < SAMPLED_JOBS and self._reads < SAMPLED_READS)):
            self._jobs.append(note)
            self._reads += size
        return len(self._weights) - 1

    def _note(self, number: int) -> _JobNote:
        """Of a job that is kept."""
        found = self._jobs[number]
        if isinstance(found, tuple):
            found = self._jobs[number] = found[0].note(found[1])
        return found

    def add_operation(self, operation: Operation) -> int:
        """Add a PROGRAM or an ERASE; its number."""
        self._operation_count += 1
        if len(self._operations) < SAMPLED_OPERATIONS:
            self._operations.append(operation)
        return self._operation_count - 1

    def _estimate(self) -> Estimate:
        """What it costs, as far as it has come."""
        size = (len(self._weights), self._operation_count)
        if self._modelled is None or self._modelled[:2] != size:
            config = self._config
            notes = [self._note(number) for number in range(len(self._jobs))]
            jobs = [job_of_reads(config, note.reads(), note.tokens, rows=note.rows, mode=note.mode,
                                 unit_tokens=note.unit_tokens, copied=note.copied) for note in notes]
            in_all = len(jobs)
            if len(self._weights) > len(jobs):
                share = sum(self._weights) / max(sum(self._weights[: len(jobs)]), 1)
                in_all = max(round(len(jobs) * share), len(jobs))
            self._modelled = (*size, estimate(config, jobs, self._operations, in_all=in_all))
        return self._modelled[2]

    @property
    def cycles(self) -> int:
        """From the first doorbell to the last completion."""
        found = self._estimate()
        if self._operation_count == len(self._operations):
            return found.cycles
        return max(found.cycles, round(max(found.operations) * self._operation_count / len(self._operations)))

    def job_reads(self, number: int) -> Iterator[Read]:
        """What a job has read, page by page.

        Raises:
            IndexError: it is not one of the first jobs, of which that is kept.
        """
        return self._note(number).reads()

    def job_completed(self, number: int) -> int:
        """Cycle of a job's completion, from the first doorbell on."""
        found = self._estimate()
        if number < len(found.jobs):
            return found.jobs[number].completed
        kept = len(found.jobs)
        first, before = found.jobs[-1].completed, sum(self._weights[:kept])
        all_behind = max(sum(self._weights) - before, 1)
        last = max(found.cycles, first)
        return round(first + (last - first) * (sum(self._weights[: number + 1]) - before) / all_behind)

    def operation_completed(self, number: int) -> int:
        """Cycle of an operation's completion, likewise."""
        found = self._estimate()
        if number < len(found.operations):
            return found.operations[number]
        return round(max(found.operations) * (number + 1) / len(found.operations))


class CommandRecord(NamedTuple):
    """A command that has completed.

    Members:
        batch: in which it was in flight.
        number: of the job or operation in it.
        counts: what an ATTEND or a READ has read; None: it is a PROGRAM or an ERASE.
    """

    batch: Batch
    number: int
    counts: Counts | None

    @property
    def completed(self) -> int:
        """Cycle of its completion, from the batch's first doorbell on; modelled when it is asked for."""
        if self.counts is None:
            return self.batch.operation_completed(self.number)
        return self.batch.job_completed(self.number)


@runtime_checkable
class KeepsRecords(Protocol):
    """A transport whose device has no time of its own and notes what it does."""

    def take_record(self, queue: int, identifier: int) -> CommandRecord | None:
        """What the command of a completion that was just taken did; None: nothing that takes time."""
        ...

    def modelled_cycles(self) -> int | None:
        """Cycles of everything since the last reset; None if the device keeps no records."""
        ...


class Sampler(Generic[T]):
    """A sum of times that are modelled late.

    What waits to be modelled is bounded: when it is too much, every second item of it is counted by its weight alone,
    at the rate of those that are modelled in the end.  Which ones depends on their order alone.

    Args:
        model: gives the cycles of an item.
    """

    def __init__(self, model: Callable[[T], int]) -> None:
        self._model = model
        self._total = 0
        self._waiting: list[tuple[int, int, T]] = []    # weight, size, item
        self._size = self._count = self._skipped = 0
        self._stride = 1

    def add(self, weight: int, size: int, item: T) -> None:
        """Add something.

        Args:
            weight: what its time is about proportional to.
            size: pages that are kept for it.
            item: what is modelled.
        """
        self._count += 1
        if self._count % self._stride:
            self._skipped += weight
            return
        self._waiting.append((weight, size, item))
        self._size += size
        while self._size > 4 * SAMPLED_READS and len(self._waiting) > 1:
            self._skipped += sum(weight for weight, _, _ in self._waiting[::2])
            self._waiting = self._waiting[1::2]
            self._size = sum(size for _, size, _ in self._waiting)
            self._stride *= 2

    def total(self) -> int:
        """The sum; models what waits."""
        found = sum(self._model(item) for _, _, item in self._waiting)
        if self._skipped:
            found += round(found * self._skipped / max(sum(weight for weight, _, _ in self._waiting), 1))
        self._total += found
        self._waiting, self._size, self._count, self._skipped, self._stride = [], 0, 0, 0, 1
        return self._total


class Recorder:
    """Notes what a device does, command by command.

    Args:
        config: of the drive.
        active: whether anything is noted.
    """

    def __init__(self, config: Config, *, active: bool = True) -> None:
        self._config = config
        self.active = active
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._batch = Batch(self._config)
        self._note: _JobNote | None = None
        self._ended: CommandRecord | None = None
        self._untaken: dict[tuple[int, int], CommandRecord] = {}
        self._sampler = Sampler[Batch](lambda batch: batch.cycles)

    def begin_job(self, mode: Mode, rows: int, tokens: Sequence[int], unit_tokens: int, copied: int = 0) -> None:
        """An ATTEND or a READ begins to read.

        Args:
            mode: of the command.
            rows: likewise.
            tokens: of the job on each channel.
            unit_tokens: of a unit of selection.
            copied: words of 8 bytes that a READ writes.
        """
        if self.active:
            self._note = _JobNote(mode, rows, tokens, unit_tokens, copied)

    def read(self, kind: Kind, channel: int, page: int, codewords: Integers, *, dram: bool) -> None:
        """The job has read codewords, ascending, of a page."""
        if self._note is not None and len(codewords):
            self._note.add(kind, channel, page, codewords, dram=dram)

    def operation(self, channel: int, page: int, *, program: bool) -> None:
        """A PROGRAM or an ERASE runs."""
        if self.active:
            number = self._batch.add_operation(Operation(channel, page, program))
            self._ended = CommandRecord(self._batch, number, None)

    def end_command(self) -> CommandRecord | None:
        """The command has run; its record, if it took time."""
        note, self._note = self._note, None
        if note is not None:
            number = self._batch.add_job(note)
            self._ended = CommandRecord(
                self._batch, number, Counts(tuple(note.flash), tuple(note.dram), note.page_reads))
        ended, self._ended = self._ended, None
        return ended

    def add_noted(self, notes: DenseNotes, job: int) -> CommandRecord | None:
        """A job of several that were noted together has run; its record, None: nothing is noted."""
        if not self.active:
            return None
        return CommandRecord(self._batch, self._batch.add_noted(notes, job), notes.counts(job))

    def posted(self, queue: int, identifier: int, record: CommandRecord | None) -> None:
        """The command's completion was written."""
        if record is None:
            self._untaken.pop((queue, identifier), None)
            return
        self._untaken[queue, identifier] = record
        if len(self._untaken) > UNTAKEN:
            del self._untaken[next(iter(self._untaken))]

    def take(self, queue: int, identifier: int) -> CommandRecord | None:
        """The record of a completion, once."""
        return self._untaken.pop((queue, identifier), None)

    def end_batch(self) -> None:
        """Nothing is in flight any more."""
        batch = self._batch
        if batch.weight:
            self._sampler.add(batch.weight, batch.kept, batch)
            self._batch = Batch(self._config)

    def cycles(self) -> int:
        """Cycles of all batches so far."""
        self.end_batch()
        return self._sampler.total()
