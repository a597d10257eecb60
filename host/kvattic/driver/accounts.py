"""What commands cost: from completions of hardware, or from what a device without time has noted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.jobs import Job, ReadJob, job_bytes
from kvattic.spec import layout
from kvattic.spec.commands import LINE_BYTES, Completion, Kind, Mode
from kvattic.spec.config import Config
from kvattic.timing import JobTimes, Stripe, attend_job, estimate
from kvattic.timing.cost import KINDS, Cost
from kvattic.timing.record import Batch, CommandRecord, Counts, Sampler, dense_counts

__all__ = ["PARTS", "DenseTally", "JobAccount", "Passage", "Tally", "attend_cost", "cycles_of", "job_account",
           "read_account", "sum_of", "times_of"]

UNSETTLED = 1024
"""Kinds of jobs that a `Tally` notes before it sums them."""
PARTS = ("prefill", "append", "attend")
"""What is summed apart for a sequence: the first tokens of each layer, later ones, and attention."""


class Passage(NamedTuple):
    """When a command was under way.

    Members:
        device: number of the device in this process, whose clock it is.
        began: the last that was known of the counter CYCLES when it was submitted; it stands while the drive is idle.
        completed: CYCLES in the completion; 0: the device keeps no time of its own.
        beats: an ATTEND: how much the counter BEATS grew since the one before it.
        record: what a device without time has noted.
    """

    device: int
    began: int
    completed: int
    beats: int
    record: CommandRecord | None


class JobAccount(NamedTuple):
    """What a job cost.

    Members:
        config: of the drive.
        passage: when it was under way.
        counts: what it read.
        rows: query rows.
        link_bytes: command, blocks, result and completion.
        unsplit: beats of K and V in flash, in equal parts, that `counts` does not have: of what a sparse job has
            selected on hardware.  Lanes run ahead of completions, so that only the sum over jobs is exact.
    """

    config: Config
    passage: Passage
    counts: Counts
    rows: int
    link_bytes: int
    unsplit: int = 0


def times_of(completion: Completion) -> JobTimes | None:
    """When the job of a completion got how far; None: the device keeps no time of its own."""
    end = completion.cycle
    if end == 0:
        return None
    first, last = completion.first_beat, completion.last_beat

    def whole(lower: int) -> int:
        """The number with these lower bits that is not past the end."""
        return end - (end - lower & 0xFFFF_FFFF)

    return JobTimes(whole(completion.fetched), *((whole(first), whole(last)) if first or last else (0, 0)), end)


def job_account(config: Config, job: Job, passage: Passage, table: NDArray[np.uint64], size: int) -> JobAccount:
    """What a job cost.

    Args:
        config: of the drive.
        job: that has completed.
        passage: when.
        table: its table as it was submitted.
        size: its `job_bytes`.
    """
    link = size + 2 * LINE_BYTES
    record = passage.record
    if record is not None and record.counts is not None:
        return JobAccount(config, passage, record.counts, job.rows, link)
    counts = _counts(config, job, table)
    # What a sparse job selected is the rest of the lanes' beats.
    rest = passage.beats - (sum(counts.flash) + sum(counts.dram)) * config.beats_per_codeword
    return JobAccount(config, passage, counts, job.rows, link, 0 if job.mode is Mode.DENSE else rest)


def read_account(config: Config, job: ReadJob, passage: Passage, table: NDArray[np.uint64], size: int) -> JobAccount:
    """What a READ cost.

    Args:
        config: of the drive.
        job: that has completed.
        passage: when.
        table: that of its command.
        size: bytes of its table and of what it wrote.
    """
    record = passage.record
    counts = None if record is None else record.counts
    if counts is None:
        counts = _dense_counts(config, table, 1, job.tokens)
    return JobAccount(config, passage, counts, 0, size + 2 * LINE_BYTES)


def _counts(config: Config, job: Job, table: NDArray[np.uint64]) -> Counts:
    """What a job read as far as its table says, which is all but the K and V that a sparse one selects."""
    tokens = job.end_token - job.base_token
    if job.mode is Mode.DENSE:
        return _dense_counts(config, table, job.stripe_pages, tokens)
    size = job.stripe_pages * config.tokens_per_page
    each = np.full(len(table), size)
    each[-1] = tokens - size * (len(table) - 1)
    used, in_dram = -(-each // config.tokens_per_codeword), layout.unpack_entries(table).dram == 1
    flash, dram = [0] * len(Kind), [0] * len(Kind)
    in_tail = int(used[in_dram].sum())
    dram[Kind.KEY] = dram[Kind.VALUE] = in_tail
    whole = in_dram | (np.arange(len(table)) >= job.whole)
    chosen = int((~whole).sum())
    if job.mode is Mode.CENTROID:
        flash[Kind.SKETCH] = chosen * max((config.group_codewords >> job.unit_bits) // config.tokens_per_codeword, 1)
        return Counts(tuple(flash), tuple(dram), None)
    flash[job.mode.sketch] = chosen * (config.octets if job.mode is Mode.CODES else job.features)
    dram[Kind.SKETCH], flash[Kind.SKETCH] = in_tail, int(used[whole & ~in_dram].sum())
    if job.mode is Mode.CODES and job.base_token == 0 and not whole[0]:
        flash[Kind.SKETCH] += -(-job.sinks // config.tokens_per_codeword)
    return Counts(tuple(flash), tuple(dram), None)


def _dense_counts(config: Config, table: NDArray[np.uint64], stripe_pages: int, tokens: int) -> Counts:
    """What a job reads that reads all K and V of its tokens."""
    in_dram = (layout.unpack_entries(table).dram == 1).tobytes()
    return dense_counts(-(-tokens // config.tokens_per_codeword), config.codewords_per_page, stripe_pages, in_dram)


def _alike(accounts: Iterable[JobAccount]) -> dict[tuple[Counts, int, int, int], int]:
    """How many jobs there are of each kind: counts, rows, link_bytes and unsplit."""
    found: dict[tuple[Counts, int, int, int], int] = {}
    for account in accounts:
        key = account[2:]
        found[key] = found.get(key, 0) + 1
    return found


def _weight(jobs: Mapping[tuple[Counts, int, int, int], int]) -> int:
    """Codewords that jobs have read."""
    return sum(number * (sum(key[0].flash) + sum(key[0].dram)) for key, number in jobs.items())


def _counted(config: Config, jobs: Mapping[tuple[Counts, int, int, int], int]) -> Cost:
    """Bytes and operations of jobs, from `_alike`, without their time."""
    flash, dram = [0] * len(Kind), [0] * len(Kind)
    pages: int | None = 0
    link = macs = unsplit = 0
    beat = config.codeword_bytes // config.beats_per_codeword
    for (counts, rows, link_bytes, beats), number in jobs.items():
        for kind in Kind:
            flash[kind] += number * counts.flash[kind]
            dram[kind] += number * counts.dram[kind]
        pages = None if pages is None or counts.page_reads is None else pages + number * counts.page_reads
        link += number * link_bytes
        unsplit += number * beats
        read = (sum(counts.flash) + sum(counts.dram)) * config.codeword_bytes + beats * beat
        macs += number * (rows * read // config.kv_element_bytes)
    size = config.codeword_bytes
    flash_bytes = {name: size * flash[kind] for kind, name in enumerate(KINDS)}
    for kind in (Kind.KEY, Kind.VALUE):
        flash_bytes[KINDS[kind]] += beat * unsplit // 2
    return Cost(config=config, flash_bytes=flash_bytes,
                dram_bytes={name: size * dram[kind] for kind, name in enumerate(KINDS)}, link_bytes=link,
                page_reads=pages, macs=macs)


def cycles_of(passages: Sequence[Passage]) -> int | None:
    """Cycles from the submission of commands to the last of their completions; None: not known.

    Several drives work side by side: the longest time counts.  A device without time ran the commands in batches, one
    after the other.
    """
    drives: dict[int, list[Passage]] = {}
    for passage in passages:
        drives.setdefault(passage.device, []).append(passage)
    longest = 0
    for mine in drives.values():
        cycles = _drive_cycles(mine)
        if cycles is None:
            return None
        longest = max(longest, cycles)
    return longest


class _Noted(NamedTuple):
    """Commands of a batch of a device without time: what is kept of them until a time is asked for.

    Members:
        device: number of the device.
        batch: in which they were.
        jobs: numbers of the jobs.
        operations: numbers of the operations.
    """

    device: int
    batch: Batch
    jobs: tuple[int, ...]
    operations: tuple[int, ...]


def _noted(passages: Iterable[Passage]) -> tuple[_Noted, ...]:
    """What devices without time have noted, by device and batch."""
    found: dict[tuple[int, Batch], tuple[list[int], list[int]]] = {}
    for passage in passages:
        if (record := passage.record) is not None:
            numbers = found.get((passage.device, record.batch))
            if numbers is None:
                found[passage.device, record.batch] = numbers = ([], [])
            numbers[record.counts is None].append(record.number)
    return tuple([_Noted(device, batch, tuple(jobs), tuple(operations))
                  for (device, batch), (jobs, operations) in found.items()])


def _modelled_cycles(noted: Sequence[_Noted]) -> int:
    """`cycles_of` of what was noted."""
    drives: dict[int, int] = {}
    for device, batch, jobs, operations in noted:
        ends = [*map(batch.job_completed, jobs), *map(batch.operation_completed, operations)]
        drives[device] = drives.get(device, 0) + max(ends)
    return max(drives.values(), default=0)


def _drive_cycles(passages: Sequence[Passage]) -> int | None:
    """The same of one drive."""
    if noted := _noted(passages):
        return _modelled_cycles(noted)
    if any(passage.completed == 0 for passage in passages):
        return None
    return max(passage.completed for passage in passages) - min(passage.began for passage in passages)


def _drives_of(accounts: Iterable[JobAccount]) -> int:
    return max(len({account.passage.device for account in accounts}), 1)


def attend_cost(accounts: Sequence[JobAccount]) -> Cost:
    """What the jobs of an answer cost together; those of several drives ran side by side.

    Args:
        accounts: of the jobs, at least one.
    """
    return replace(_counted(accounts[0].config, _alike(accounts)), drives=_drives_of(accounts),
                   cycles=cycles_of([account.passage for account in accounts]),
                   modelled=any(account.passage.record is not None for account in accounts))


class Tally:
    """Sums of what was done; times that are modelled are so when the sum is asked for.

    Args:
        config: of the drive.
        modelled: its device has no time of its own.
    """

    def __init__(self, config: Config, *, modelled: bool = False) -> None:
        self._settled = Cost(config=config)
        # What is not in it yet: jobs, the drives that they needed, bytes written and pages programmed.
        self._jobs: dict[tuple[Counts, int, int, int], int] = {}
        self._drives, self._written, self._programmed = 1, 0, 0
        self._cycles: int | None = 0
        self._samplers = (Sampler(_modelled_cycles), Sampler(_modelled_cycles))
        self._modelled = modelled

    def add_attend(self, accounts: Sequence[JobAccount]) -> None:
        """Add jobs that were under way together, on one drive or several, and the time that they took."""
        jobs = _alike(accounts)
        self._add_jobs(jobs)
        self._drives = max(self._drives, _drives_of(accounts))
        self._add_time([account.passage for account in accounts], _weight(jobs), self._samplers[0])

    def count_jobs(self, accounts: Sequence[JobAccount]) -> None:
        """Add jobs without their time."""
        self._add_jobs(_alike(accounts))

    def _add_jobs(self, jobs: Mapping[tuple[Counts, int, int, int], int]) -> None:
        for key, number in jobs.items():
            self._jobs[key] = self._jobs.get(key, 0) + number
        if len(self._jobs) > UNSETTLED:
            self._settle()

    def _settle(self) -> None:
        """Put everything into one sum: it costs more than to note it."""
        config = self._settled.config
        found = replace(_counted(config, self._jobs), drives=self._drives, page_programs=self._programmed,
                        written_bytes=self._written)
        self._settled += replace(found, link_bytes=found.link_bytes + self._written)
        self._jobs.clear()
        self._written = self._programmed = 0

    def add_programs(self, passages: Sequence[Passage], programmed: int) -> None:
        """Add PROGRAMs that were under way together, and the time that they took.

        Args:
            passages: of the commands.
            programmed: how many of them the drive carried out.
        """
        self._programmed += programmed
        self._add_time(passages, len(passages), self._samplers[1])

    def add_written(self, size: int) -> None:
        """Add bytes that the host put into device DRAM."""
        self._written += size

    def _add_time(self, passages: Sequence[Passage], weight: int, sampler: Sampler[Sequence[_Noted]]) -> None:
        noted = _noted(passages)
        if noted:
            self._modelled = True
            sampler.add(weight, sum(each.batch.kept for each in noted), noted)
        elif self._cycles is not None:
            cycles = cycles_of(passages)
            self._cycles = None if cycles is None else self._cycles + cycles

    @property
    def counted(self) -> Cost:
        """The sum without any time: its cycles are 0."""
        self._settle()
        return self._settled

    def total(self) -> Cost:
        """The sum so far."""
        cycles = self._cycles
        if cycles is not None:
            cycles += sum(sampler.total() for sampler in self._samplers)
        return replace(self.counted, cycles=cycles, modelled=self._modelled)


def sum_of(parts: Mapping[str, Cost]) -> Cost:
    """The sum of the parts of a sequence's statistics."""
    first, *others = parts.values()
    return sum(others, first)


class _DenseWork(NamedTuple):
    """A dense job that might have been."""

    account: JobAccount
    stripes: list[Stripe]
    pages: int


class DenseTally:
    """What attends of other modes would have cost as dense ones, over the same tokens where they lie; modelled.

    Args:
        config: of the drives.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._counted = Cost(config=config, modelled=True)
        self._sampler = Sampler(self._model)

    def add(self, jobs: Iterable[tuple[int, Job]]) -> None:
        """Add jobs that are in flight together.

        Args:
            jobs: drive and job, as they are submitted; those over the same stripes share a pass.
        """
        shared: dict[tuple[int, int, int], list[Job]] = {}
        for drive, job in jobs:
            shared.setdefault((drive, job.table.__array_interface__["data"][0], job.base_token), []).append(job)
        drives: dict[int, list[_DenseWork]] = {}
        for (drive, _, _), each in shared.items():
            longest = max(each, key=lambda job: job.end_token)
            rows = min(sum(job.rows for job in each), self._config.rows)
            drives.setdefault(drive, []).append(self._work(longest, rows))
        accounts = [work.account for mine in drives.values() for work in mine]
        jobs_alike = _alike(accounts)
        self._counted += replace(_counted(self._config, jobs_alike), drives=max(len(drives), 1))
        weight = _weight(jobs_alike)
        self._sampler.add(weight, weight // self._config.codewords_per_page, [*drives.values()])

    def _model(self, drives: Iterable[Sequence[_DenseWork]]) -> int:
        """Time of drives side by side."""
        return max((self._cycles(mine) for mine in drives), default=0)

    def _work(self, job: Job, rows: int) -> _DenseWork:
        config, table = self._config, job.table.copy()
        dense = replace(job, mode=Mode.DENSE)
        account = JobAccount(config, Passage(0, 0, 0, 0, None), _counts(config, dense, table), rows,
                             job_bytes(dense, config.head_dim) + 2 * LINE_BYTES)
        entries = layout.unpack_entries(table)
        size = job.stripe_pages * config.tokens_per_page
        tokens = np.full(len(table), size)
        tokens[-1] = job.end_token - job.base_token - size * (len(table) - 1)
        columns = (entries.channel, entries.key_page, entries.value_page, tokens, entries.dram)
        stripes = [Stripe(channel, key, value, count, bool(dram)) for channel, key, value, count, dram in
                   zip(*(column.tolist() for column in columns), strict=True)]
        return _DenseWork(account, stripes, job.stripe_pages)

    def _cycles(self, mine: Sequence[_DenseWork]) -> int:
        """Time of a drive."""
        config = self._config
        return estimate(config, [attend_job(config, work.stripes, rows=work.account.rows, stripe_pages=work.pages)
                                 for work in mine]).cycles

    def total(self) -> Cost:
        """The sum so far."""
        return replace(self._counted, cycles=self._sampler.total())
