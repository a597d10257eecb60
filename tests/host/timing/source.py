"""One channel alone under a steady load, as `kvattic_sim.rtl.channels` runs it in the RTL."""

from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from kvattic.spec.commands import Mode
from kvattic.timing.channel import Channel
from kvattic.timing.lane import Lane
from kvattic.timing.states import NEVER, JobState
from kvattic.timing.times import times_of
from kvattic.timing.work import KEY, Group, Job, LaneWork, Page, runs_of


class Source(Lane):
    """Asks for groups in their order, and keeps so many codewords in flight."""

    def __init__(self, groups, in_flight, *args):
        super().__init__(*args)
        self.groups = iter(groups)
        self.job = JobState(0, Job(1, Mode.DENSE, [LaneWork()]), 1)
        self.coming = []
        self.left = in_flight
        self.following = next(self.groups)
        self.steady = []       # (time, codewords) while there is more to ask for

    def start_walks(self, now):
        while self.coming and self.coming[0][0] <= now:
            at, n = heappop(self.coming)
            self.left += n
            if self.following is not None:
                self.steady.append((at, n))
        if self.following is not None and self.pending[KEY] is None and self.following.codewords <= self.left:
            self.left -= self.following.codewords
            self.clock[KEY] = max(now, self.clock[KEY]) + self.following.walk
            self.pending[KEY] = (self.clock[KEY], self.job, KEY, self.following)
            self.following = next(self.groups, None)

    def arrived(self, job, kind, codewords, group, at):
        heappush(self.coming, (at, codewords))

    def next_walk(self):
        return min(super().next_walk(), self.coming[0][0] if self.coming else NEVER)


@dataclass
class Alone:
    """What a channel wants of a drive."""

    now: float = 0.0
    events: list = field(default_factory=list)


def group_of(config, pages):
    """A group of (page number, ascending codewords)."""
    unit_bits = config.plane_bits + config.die_bits
    found = [Page(page & (1 << unit_bits) - 1, page >> unit_bits, runs_of(wanted)) for page, wanted in pages]
    codewords = sum(sum(page.runs) for page in found)
    return Group(found, codewords, codewords + 2.0 * sum(len(page.runs) for page in found))


def bus_use(config, groups, in_flight):
    """Share of the bus time that moves codewords under the steady load."""
    times = times_of(config)
    drive = Alone()
    channel = Channel(0, times, [], drive)
    source = channel.lane = Source(groups, in_flight, 0, times, [], drive, channel)
    now = 0.0
    while now < NEVER:
        drive.now = now
        now = max(channel.wake(now), now)
    assert source.following is None
    begin = next(i for i, (at, _) in enumerate(source.steady) if at > source.steady[0][0])
    moved = sum(n for _, n in source.steady[begin:])
    window = source.steady[-1][0] - source.steady[begin - 1][0]
    return moved * times.codeword / window


def scattered(config, jobs, wanted, seed=1):
    """`channels.scattered` with two stripes and one channel."""
    rng = np.random.default_rng(seed)
    planes, count = config.part.planes, 16 * config.dies
    for job in range(jobs):
        for kind, ahead in ((2, 2), (0, 1), (1, 0)):
            for stripe in range(2):
                number = ((job + ahead) * 3 + kind) * 2 + stripe
                pages = []
                for plane in range(planes):
                    chosen = np.sort(rng.choice(config.codewords_per_page, wanted, replace=False)).tolist()
                    pages.append((number % count * planes + plane, chosen))
                yield group_of(config, pages)


def dense(config):
    """Whole pages in their order."""
    for page in range(16 * config.dies * config.part.planes):
        yield group_of(config, [(page, range(config.codewords_per_page))])
