"""What the timing model says: `estimate`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvattic.errors import RequestError
from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.timing.drive import Drive
from kvattic.timing.states import JobState
from kvattic.timing.work import Job, Operation


@dataclass(frozen=True, slots=True)
class JobTimes:
    """When a job got how far, in cycles: modelled, from the first doorbell on; measured, as the counter CYCLES says.

    Attributes:
        fetched: the drive requested its command.
        first_beat, last_beat: a lane took the first and the last beat of it (modelled: it had the whole codeword); both
            0 if it has none.
        completed: its completion was written.
    """

    fetched: int
    first_beat: int
    last_beat: int
    completed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What some work costs; modelled, not measured.

    Attributes:
        config: of the drive.
        cycles: from the first doorbell to the last completion.
        jobs: times of each job that was modelled.
        operations: cycle of each operation's completion.
        codewords: codewords read, by kind: "feature", "codes", "sketch" (centroids, and K of the tail and of sinks in
            the first pass), "key", "value"; of flash and DRAM together.
        dram_codewords: those of them that lie in device DRAM.
        written_codewords: codewords that were programmed.
        page_reads, page_programs, block_erases: operations of the planes.
        command_cycles: command and address cycles on all channels.
        die_busy: cycles of all dies' arrays.
    """

    config: Config
    cycles: int
    jobs: tuple[JobTimes, ...]
    operations: tuple[int, ...]
    codewords: dict[str, int]
    dram_codewords: int
    written_codewords: int
    page_reads: int
    page_programs: int
    block_erases: int
    command_cycles: int
    die_busy: int

    @property
    def seconds(self) -> float:
        """`cycles` at the configuration's clock."""
        return seconds(self.config, self.cycles)

    @property
    def flash_bytes(self) -> int:
        """Bytes, parity included, that the flash buses moved."""
        read = sum(self.codewords.values()) - self.dram_codewords
        return (read + self.written_codewords) * self.config.raw_codeword_bytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Data bytes read, by kind."""
        return {kind: count * self.config.codeword_bytes for kind, count in self.codewords.items()}

    @property
    def bus_use(self) -> float:
        """Share of all cycles in which the flash buses moved data, parity included."""
        config = self.config
        moved = self.flash_bytes / config.part.bus_mts * config.clock_mhz
        return moved / (config.channels * self.cycles) if self.cycles else 0.0

    @property
    def bus_use_in_window(self) -> float:
        """The same from the first to the last beat of a lane."""
        beats = [job for job in self.jobs if job.last_beat]
        window = max(j.last_beat for j in beats) - min(j.first_beat for j in beats) if beats else 0
        return self.bus_use * self.cycles / window if window else 0.0

    @property
    def die_use(self) -> float:
        """Share of the time in which the dies' arrays were busy."""
        return self.die_busy / (self.config.channels * self.config.dies * self.cycles) if self.cycles else 0.0


def seconds(config: Config, cycles: float) -> float:
    """Cycles as seconds at a configuration's clock."""
    return cycles / (config.clock_mhz * 1e6)


def estimate(config: Config, jobs: Iterable[Job] = (), operations: Sequence[Operation] = (), *,
             in_all: int | None = None) -> Estimate:
    """Model what jobs and operations cost together, from an idle drive.

    Args:
        config: of the drive.
        jobs: in the order of their submission.
        operations: likewise; of queues of their own, so that both go on side by side.
        in_all: there are so many jobs, of which `jobs` are the first and the others are like them: these go on at the
            rate of the middle half, and counts grow in proportion.  None: `jobs` are all.

    Raises:
        RequestError: a job or an operation is not for such a drive; or `in_all` is less than there are jobs, or there
            are fewer than 8 to go by.
    """
    jobs = list(jobs)
    if any(len(job.lanes) != config.channels for job in jobs):
        raise RequestError(f"a job must have a lane for each of the {config.channels} channels")
    if bad := next((o for o in operations if not (0 <= o.channel < config.channels
                                                 and 0 <= o.page < config.pages_per_channel)), None):
        raise RequestError(f"an operation must be on channel 0 to {config.channels - 1} and a page below "
                           f"{config.pages_per_channel}, not {bad}")
    lanes = [job.lanes[number :: config.lanes] for job in jobs for number in range(config.lanes)]
    if any(sum(channel.places for channel in lane) > config.ring_codewords for lane in lanes):
        raise RequestError(f"a job must fit the score buffer, {config.ring_codewords} codewords of K on a channel")
    if in_all is not None and in_all != len(jobs) and (in_all < len(jobs) or len(jobs) < 8):
        raise RequestError(f"in_all must be at least the number of jobs, {len(jobs)}, of which 8 or more are needed to "
                           f"go on from, not {in_all}")
    drive = Drive(config, jobs, operations)
    drive.run()
    cycles = max([job.completed for job in drive.jobs] + [o.ended for o in drive.operations], default=0.0)
    scale = 1.0
    if in_all is not None and in_all > len(jobs):
        ends = sorted(job.completed for job in drive.jobs)
        low, high = len(ends) // 4, len(ends) * 3 // 4
        cycles += (in_all - len(jobs)) * (ends[high] - ends[low]) / (high - low)
        scale = in_all / len(jobs)
    counts, dram = _codewords(jobs)

    def counted(name: str) -> int:
        total: float = sum(getattr(channel, name) for channel in drive.channels)
        return round(total * scale)

    return Estimate(
        config=config, cycles=round(cycles), jobs=tuple(_times(job) for job in drive.jobs),
        operations=tuple(round(o.ended) for o in drive.operations),
        codewords={kind: round(count * scale) for kind, count in counts.items()}, dram_codewords=round(dram * scale),
        written_codewords=sum(o.program for o in operations) * config.codewords_per_page,
        page_reads=counted("page_reads"), page_programs=counted("page_programs"), block_erases=counted("erases"),
        command_cycles=counted("commands"), die_busy=counted("die_busy"))


def _times(job: JobState) -> JobTimes:
    first = 0 if job.last_beat == 0 else round(job.first_beat)
    return JobTimes(round(job.fetched), first, round(job.last_beat), round(job.completed))


def _codewords(jobs: Iterable[Job]) -> tuple[dict[str, int], int]:
    """Codewords by kind, and how many of them lie in DRAM."""
    counts = dict.fromkeys(("feature", "codes", "sketch", "key", "value"), 0)
    dram = 0
    for job in jobs:
        of_features = "codes" if job.mode is Mode.CODES else "feature"
        for lane in job.lanes:
            for group in lane.first:
                counts[of_features if group.features else "sketch"] += group.codewords
                dram += group.dram
            for kind, groups in (("key", lane.keys), ("value", lane.values)):
                counts[kind] += sum(group.codewords for group in groups)
                dram += sum(group.dram for group in groups)
    return counts, dram
