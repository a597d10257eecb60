"""Jobs and operations that are under way in the timing model."""

from kvattic.spec.commands import Mode
from kvattic.timing.work import Job, LaneWork

NEVER = float("inf")
"""A time that is not known yet."""


class JobState:
    """A job that is under way; times are `NEVER` until they are known."""

    __slots__ = (
        "asked", "came", "completed", "end", "fetched", "first_asked", "first_beat", "first_done", "first_end",
        "groups_left", "lanes", "lanes_left", "last_beat", "left", "loaded", "number", "opened", "rows", "selected",
        "sparse", "taken", "values_done", "work")

    def __init__(self, number: int, job: Job, channels: int) -> None:
        self.number = number
        self.work = job
        self.rows = job.rows
        self.lanes: list[LaneWork] = job.lanes
        self.sparse = job.mode is not Mode.DENSE
        self.fetched = self.loaded = self.selected = self.opened = self.completed = NEVER
        self.first_beat, self.last_beat = NEVER, 0.0
        self.end = [0.0, 0.0, 0.0]
        self.lanes_left = [channels] * 3
        self.taken = [False] * channels
        self.first_asked = [False] * channels
        self.first_end = [0.0] * channels
        self.first_done = [False] * channels
        self.groups_left = [len(lane.first) for lane in job.lanes]
        self.asked = [[False] * channels, [False] * channels]
        self.left = [[0] * channels, [sum(g.codewords for g in lane.keys) for lane in job.lanes],
                     [sum(g.codewords for g in lane.values) for lane in job.lanes]]
        self.came = [[0.0] * channels for _ in range(3)]    # when the last codeword from DRAM is there
        self.values_done = [False] * channels


class OperationState:
    """A PROGRAM or ERASE that is under way."""

    __slots__ = ("arrived", "channel", "die", "ended", "plane", "program", "row")

    def __init__(self, channel: int, program: bool, die: int, plane: int, row: int, arrived: float) -> None:
        self.channel, self.program, self.die, self.plane, self.row = channel, program, die, plane, row
        self.arrived = arrived
        self.ended = NEVER
