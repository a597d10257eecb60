"""What a job reads, pass by pass and page by page."""

from dataclasses import dataclass, field

from kvattic.spec.commands import Mode

FIRST, KEY, VALUE = range(3)
"""Passes: features, centroids or K of the tail; K; V."""


@dataclass(slots=True)
class Group:
    """Pages of one die that a walker asks for one after the other.

    Attributes:
        pages: (plane and die, page of the block and zone, lengths of the runs of consecutive codewords) of each.
        codewords: all of them, those in DRAM included.
        walk: cycles that the walker takes.
        tokens: of a group of the first pass, those whose scores are worked out from sums of features.
        dram: codewords that lie in device DRAM.
    """

    pages: list[tuple[int, int, tuple[int, ...]]]
    codewords: int
    walk: float
    tokens: int = 0
    dram: int = 0


@dataclass(slots=True)
class LaneWork:
    """What a job reads on one channel.

    Attributes:
        tokens: that the lane scores.
        places: of the score ring.
        units: that the lane's selection looks at.
        first, keys, values: groups of the passes.
    """

    tokens: int = 0
    places: int = 0
    units: int = 0
    first: list[Group] = field(default_factory=list)
    keys: list[Group] = field(default_factory=list)
    values: list[Group] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """A job of the engine: one KV head's rows over its stripes.

    Attributes:
        rows: query rows.
        mode: of the command.
        lanes: what it reads, channel by channel.
        words: cycles in which its query block and table come.
        submitted: cycle in which its command can be fetched.
    """

    rows: int
    mode: Mode
    lanes: list[LaneWork]
    words: float = 0.0
    submitted: float = 0.0


@dataclass(slots=True)
class Operation:
    """A PROGRAM or an ERASE.

    Attributes:
        channel: of the page.
        page: page number on the channel; of an ERASE any page of the block.
        program: PROGRAM; else ERASE.
        submitted: cycle in which its command can be fetched.
    """

    channel: int
    page: int
    program: bool = True
    submitted: float = 0.0
