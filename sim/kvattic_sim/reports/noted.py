"""What a drive was given to do, as work of the timing model: where jobs read, what they choose, what is programmed.

Where a job's stripes lie is taken from the drive that ran it, RTL or golden; what its queries choose from the golden
device, whose bits are the RTL's. Neither takes anything from what the RTL needed for it.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvattic import timing
from kvattic.driver.device import Device
from kvattic.driver.futures import Future
from kvattic.driver.jobs import FlashOperation, Job
from kvattic.driver.results import JobResult
from kvattic.spec import layout
from kvattic.spec.commands import Completion, Kind, Mode, Opcode
from kvattic.spec.config import Config

__all__ = ["Choice", "JobNote", "NotedOperations", "burst_of", "note_job", "run_noted", "timing_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNote:
    """Where an ATTEND reads.

    Attributes:
        rows: query rows.
        mode: of the command.
        stripes: in the order of its table.
        stripe_pages: pages of K of a stripe.
        unit_tokens: tokens of a unit of selection.
        sinks: CODES: first tokens that the first pass scores exactly.
    """

    rows: int
    mode: Mode
    stripes: tuple[timing.Stripe, ...]
    stripe_pages: int
    unit_tokens: int
    sinks: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a job's queries choose; a dense job's choose nothing.

    Attributes:
        marked: bool, (stripes, codewords of a stripe), codewords of K and V that are read; None in a dense job.
        features: numbers of the features that the first pass reads, ascending.
    """

    marked: NDArray[np.bool_] | None = None
    features: tuple[int, ...] = ()


def note_job(config: Config, job: Job) -> JobNote:
    """Where a job reads, as of now: its table changes when a stripe moves from device DRAM to flash."""
    entries = job.table if job.sketch is None else layout.mark_whole(job.table, job.whole)
    at = layout.unpack_entries(entries)
    size = job.stripe_pages * config.tokens_per_page
    count = len(entries)
    sketches = layout.unpack_sketches(np.zeros(count, np.uint64) if job.sketch is None else job.sketch)
    tokens = job.end_token - job.base_token
    stripes = tuple(
        timing.Stripe(int(at.channel[i]), int(at.key_page[i]), int(at.value_page[i]), min(size, tokens - i * size),
                      bool(at.dram[i]), bool(at.whole[i]), int(sketches.page[i]), int(sketches.codeword[i]))
        for i in range(count))
    unit = 1 if job.mode.by_token else config.tokens_per_codeword << job.unit_bits
    return JobNote(rows=job.rows, mode=job.mode, stripes=stripes, stripe_pages=job.stripe_pages, unit_tokens=unit,
                   sinks=job.sinks if job.base_token == 0 else 0)


def timing_job(config: Config, note: JobNote, choice: Choice) -> timing.Job:
    """The job of the timing model.

    Args:
        config: of the drive.
        note: where it reads.
        choice: what it chooses.

    Raises:
        RequestError: the choice is not one of such a job.
    """
    return timing.attend_job(
        config, note.stripes, rows=note.rows, mode=note.mode, marked=choice.marked, features=choice.features,
        sinks=note.sinks, unit_tokens=note.unit_tokens, stripe_pages=note.stripe_pages)


def run_noted(device: Device, jobs: Iterable[Job]) -> tuple[list[JobResult], list[Choice]]:
    """Run jobs on a golden device one by one; their results, and what each of them chooses.

    Args:
        device: of the host library, over a golden device that notes what it reads.
        jobs: in order.

    Raises:
        DeviceStatusError: a job ended with a status other than OK.
    """
    results, choices = [], []
    for job in jobs:
        (result,) = device.run([job])
        record = result.account.passage.record if result.account is not None else None
        assert record is not None, "the device notes nothing"
        results.append(result)
        choices.append(_choice(device.config, job, record.batch.job_reads(record.number)))
    return results, choices


def _choice(config: Config, job: Job, reads: Iterable[timing.Read]) -> Choice:
    """What a job has chosen, from what it has read."""
    if job.mode is Mode.DENSE:
        return Choice()
    note, per_page = note_job(config, job), config.codewords_per_page
    marked = np.zeros((len(note.stripes), note.stripe_pages * per_page), np.bool_)
    pages = {(stripe.dram, stripe.channel, stripe.key_page + page): (number, page * per_page)
             for number, stripe in enumerate(note.stripes) for page in range(note.stripe_pages)}
    first = {(stripe.channel, stripe.sketch_page + page): page * per_page
             for stripe in note.stripes if not (stripe.dram or stripe.whole) for page in range(note.stripe_pages)}
    features: set[int] = set()
    for read in reads:
        if read.kind is Kind.KEY:
            number, at = pages[read.dram, read.channel, read.page]
            marked[number, at + np.array(read.codewords)] = True
        elif read.kind is Kind.FEATURE:
            features |= {first[read.channel, read.page] + codeword for codeword in read.codewords}
    return Choice(marked, tuple(sorted(features)))


@dataclass(slots=True, eq=False)
class NotedOperations:
    """Notes the flash commands of a device in the order in which they are submitted.

    Attributes:
        bursts: those that were submitted before the drive had nothing else to do, and so on.
    """

    bursts: list[list[FlashOperation]] = field(default_factory=list)

    def watch(self, device: Device) -> None:
        """Note what is submitted to a device from now on."""
        media = device.media
        inner = media.submit

        def submit(operations: Series[FlashOperation]) -> list[Future[Completion]]:
            if operations and (not self.bursts or not device.dispatcher.working):
                self.bursts.append([])
            if operations:
                self.bursts[-1].extend(operations)
            return inner(operations)

        media.submit = submit  # type: ignore[method-assign]

    def take(self) -> list[list[FlashOperation]]:
        """The bursts so far; they are forgotten."""
        found = [burst for burst in self.bursts if burst]
        self.bursts = []
        return found


def burst_of(operations: Iterable[FlashOperation]) -> list[timing.Operation]:
    """PROGRAMs and ERASEs of the timing model; the others take it no time."""
    return [timing.Operation(one.channel, one.page, one.opcode is Opcode.PROGRAM) for one in operations
            if one.opcode in (Opcode.PROGRAM, Opcode.ERASE)]
