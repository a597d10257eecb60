"""What a completion's status means, in words, and which codeword could not be read."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from kvattic.driver.jobs import Job, ReadJob
from kvattic.errors import DeviceStatusError
from kvattic.spec import layout
from kvattic.spec.commands import Completion, MediaCause, Mode, Status
from kvattic.spec.config import PAGE_NUMBER_BITS

if TYPE_CHECKING:
    from kvattic.driver.media import Media

__all__ = ["PAGE_MASK", "explain", "job_failure", "where_unreadable"]

PAGE_MASK = (1 << PAGE_NUMBER_BITS) - 1
"""The page number in a place of flash, `channel << PAGE_NUMBER_BITS | page`."""

Words: TypeAlias = Callable[[int], str]
"""Makes words of a completion's `where`."""


def _one_of(*names: str, before: str = "") -> Words:
    """Words that pick a name by its number, `where`."""
    return lambda where: before + names[min(where, len(names) - 1)]


_WORDS: dict[Status, str | Words] = {
    Status.OK: "no error",
    Status.INVALID_OPCODE: lambda where: f"there is no opcode {where:#04x}",
    Status.INVALID_FIELD: "a reserved byte is not zero, the device has no such mode, a field is given that the mode "
                          "does not use, or stripe_pages is not a power of two, is more than the score buffer holds, "
                          "or is not a group in a sparse mode",
    Status.INVALID_ROWS: lambda where: f"the number of query rows, {where}, is zero or more than the device has",
    Status.INVALID_LENGTH: "no token, more tokens than the score buffers hold, or a number of stripes that does not "
                           "match the tokens",
    Status.INVALID_ADDRESS: lambda where: (
        f"the {_one_of('query block', 'result block', 'table')(where)} is unaligned or out of the buffer window"),
    Status.INVALID_SCALE: "scale is not a positive normal fp32",
    Status.NAN_QUERY: lambda where: f"NaN or infinity in query row {where >> 16}, feature {where & 0xFFFF}",
    Status.NAN_KEY: lambda where: f"NaN or infinity in K at token {where}",
    Status.NAN_VALUE: lambda where: f"NaN or infinity in V at token {where}",
    Status.CODEWORD_TIMEOUT: lambda where: (
        f"channel {where >> 16} still owes {where & 0x7FFF} codewords of "
        f"{'V' if where >> 15 & 1 else 'K (or of what the first pass reads)'}"),
    Status.BUS_ERROR: "the host memory or the device DRAM answered with an error",
    Status.INVALID_TABLE: lambda where: (
        f"entry {where} of the table names a channel that does not exist, has a reserved bit set, or is one too many "
        "for its channel (or the sequence was freed)"),
    Status.INVALID_PLACE: "there is no such channel, page or block",
    Status.UNREADABLE_KEY: lambda where: f"K of token {where} on cannot be read",
    Status.UNREADABLE_VALUE: lambda where: f"V of token {where} on cannot be read",
    Status.PROGRAM_FAILED: "the page was not programmed",
    Status.ERASE_FAILED: "the block was not erased",
    Status.BAD_BLOCK: "the block has the factory's mark of a bad block",
    Status.DIE_TIMEOUT: "the die stays busy",
    Status.INVALID_SELECTION: _one_of(
        "features is none or more than head_dim", "units is none or more than the tokens make",
        "local tokens is more than the units hold", "codewords of a unit is more than the device can have",
        "sinks is more than half a stripe's tokens",
        before="the number of "),
    Status.NO_SKETCH: lambda where: (
        f"the stripe of entry {where} was written without what the mode's first pass reads: K in the feature layout, "
        "centroids or codes"),
    Status.NAN_MEAN: lambda where: (
        f"NaN or infinity in the mean of V, feature {where}: V holds one in this feature"),
    Status.UNREADABLE_SKETCH: lambda where: f"what the first pass reads for token {where} on cannot be read",
    Status.NOT_PERMITTED: _one_of("the opcode is for queue 0 alone", "the domain is not given to the queue"),
    Status.NOT_OWNED: lambda where: (
        f"what entry {where} of the table names belongs to another domain (PROGRAM, ERASE: 0 the flash page, 1 the "
        "page of device DRAM)"),
    Status.INVALID_QUEUE: _one_of(
        "number cannot be created or deleted", "entries are not a power of two in range",
        "submission ring is unaligned", "completion ring is unaligned", before="the queue's "),
    Status.QUEUE_BUSY: "commands of the queue are under way; delete it again later",
    Status.INVALID_GRANT: _one_of("kind", "zone, region or queue", "domain", before="there is no such "),
}


def explain(completion: Completion) -> str:
    """What a completion's status means, in words."""
    words = _WORDS[completion.status]
    return f"{completion.status.name}: {words if isinstance(words, str) else words(completion.where)}"


def job_failure(index: int, total: int, job: Job | ReadJob, completion: Completion,
                media: "Media") -> DeviceStatusError:
    """The error for a job whose status is not OK.

    Args:
        index: of the job among those that were submitted together.
        total: how many those are.
        job: the job.
        completion: how it ended.
        media: of the device, to name the place that could not be read.
    """
    name = f"job {index} of {total}" + (f" ({job.label})" if job.label else "")
    named = completion
    if isinstance(job, ReadJob) and completion.status in (Status.UNREADABLE_KEY, Status.UNREADABLE_VALUE):
        # The device counts from the job's first token.
        named = replace(completion, where=completion.where + job.base_token)
    text = f"{name} failed: {explain(named)}{where_unreadable(job, named, media)}"
    return DeviceStatusError(text, completion)


def where_unreadable(job: Job | ReadJob, completion: Completion, media: "Media") -> str:
    """Where the codeword lies that could not be read, and why; empty if the status is another.

    Args:
        job: that failed.
        completion: with the token's number in the sequence.
        media: of the device.
    """
    status, config = completion.status, media.config
    if status not in (Status.UNREADABLE_KEY, Status.UNREADABLE_VALUE, Status.UNREADABLE_SKETCH):
        return ""
    table, pages = job.table, job.stripe_pages
    if isinstance(job, ReadJob):
        table, pages = job.page_table(config.tokens_per_page), 1
    stripe, token = divmod(completion.where - job.base_token, pages * config.tokens_per_page)
    if not 0 <= stripe < len(table):
        return ""
    entry = layout.unpack_entries(table[stripe : stripe + 1])
    channel, dram = int(entry.channel[0]), bool(entry.dram[0])
    first = int((entry.value_page if status is Status.UNREADABLE_VALUE else entry.key_page)[0])
    codeword = token // config.tokens_per_codeword
    read = media.transport.read_register
    place, cause = read("MEDIA_ERROR"), read("MEDIA_CAUSE")
    if (status is Status.UNREADABLE_SKETCH and isinstance(job, Job) and not dram and stripe < job.whole
            and job.sketch is not None):
        sketch = layout.unpack_sketches(job.sketch[stripe : stripe + 1])
        begin, page = int(sketch.codeword[0]), int(sketch.page[0])
        if job.mode is Mode.CENTROID:
            first, codeword = page, begin + (codeword >> job.unit_bits) // config.tokens_per_codeword
        elif codeword == 0:     # otherwise it is one of sinks
            # The completion names the stripe only; of the first of the batch the register knows the rest.
            count = config.octets if job.mode is Mode.CODES else config.group_codewords
            known = ((place & PAGE_MASK) - page) * config.codewords_per_page + (cause & 0xFFFF)
            here = place >> PAGE_NUMBER_BITS == channel
            sink = job.mode is Mode.CODES and here and (place & PAGE_MASK, cause & 0xFFFF) == (first, 0)
            if not sink:
                first, codeword = page, known if here and begin <= known < begin + count else begin
    page, codeword = divmod(codeword, config.codewords_per_page)
    number = first + page
    if dram:
        return f": device DRAM, page {number}, codeword {codeword}"
    if (place, cause & 0xFFFF) == (channel << PAGE_NUMBER_BITS | number, codeword):
        why = MediaCause(cause >> 16).name
    else:
        where = f"page number {place & PAGE_MASK} of channel {place >> PAGE_NUMBER_BITS}"
        why = f"not the first of the batch, which is {where}"
    return f": {media.describe(channel, number)}, codeword {codeword} ({why})"
