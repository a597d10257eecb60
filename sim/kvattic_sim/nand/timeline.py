"""The timeline of every channel and die: read from a run of the drive, written as a Perfetto trace and as a picture.

The NAND models keep what each die and bus did, and when.  `write_perfetto` makes Chrome's trace-event JSON of it, which
https://ui.perfetto.dev opens.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from kvattic.spec.config import Config
from kvattic.support.files import whole, write_whole
from kvattic_sim.nand.files import read_trace

__all__ = ["Event", "Kind", "bus_use", "draw", "read", "write_perfetto"]


class Kind(StrEnum):
    """What happened."""

    READ = "read"
    """Array to page register."""
    PROGRAM = "program"
    """Page register to array."""
    ERASE = "erase"
    """A block is erased."""
    COMMAND = "command"
    """Command and address cycles on the bus."""
    DATA_OUT = "out"
    """Data from a die on the bus."""
    DATA_IN = "in"
    """Data into a die on the bus."""
    FEATURE = "feature"
    """Features are set or read."""
    RESET = "reset"
    """The die is reset."""

    @property
    def on_bus(self) -> bool:
        """Whether it occupies the channel's bus, and not a die's array."""
        return self in (Kind.COMMAND, Kind.DATA_OUT, Kind.DATA_IN)


COLOURS = {
    Kind.READ: "#9ecae1",
    Kind.PROGRAM: "#fdae6b",
    Kind.ERASE: "#d9a5d0",
    Kind.COMMAND: "#d62728",
    Kind.DATA_OUT: "#3182bd",
    Kind.DATA_IN: "#e6550d",
    Kind.FEATURE: "#c7c7c7",
    Kind.RESET: "#969696",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a die did.

    Attributes:
        channel, die, plane: where.
        start, end: cycles; end is one past the last one.
        kind: what.
        page: `NandPart.page_index`, or -1.
    """

    channel: int
    die: int
    plane: int
    start: int
    end: int
    kind: Kind
    page: int


def read(folder: Path, config: Config) -> list[Event]:
    """All events that the NAND models of a run left in its folder, by start.

    Raises:
        FileNotFoundError: a channel left no trace; was the run told to keep one?
    """
    events = []
    for channel in range(config.channels):
        events += [Event(channel, e.die, e.plane, e.start, e.end, Kind(e.kind), e.page)
                   for e in read_trace(folder, channel=channel)]
    return sorted(events, key=lambda event: event.start)


def bus_use(events: Iterable[Event], first: int, last: int, channels: int) -> float:
    """Share of the buses' time in [first, last) in which data moved."""
    moved = sum(max(0, min(event.end, last) - max(event.start, first))
                for event in events if event.kind in (Kind.DATA_OUT, Kind.DATA_IN))
    return moved / (channels * (last - first))


def write_perfetto(events: Sequence[Event], config: Config, path: Path) -> None:
    """Write trace-event JSON: a process for each channel, with a track for its bus and one for each die."""
    microseconds = 1 / config.clock_mhz
    records: list[dict[str, object]] = []
    for channel in range(config.channels):
        records.append({"ph": "M", "name": "process_name", "pid": channel, "args": {"name": f"channel {channel}"}})
        for track in range(config.dies + 1):
            name = "bus" if track == 0 else f"die {track - 1}"
            records.append({"ph": "M", "name": "thread_name", "pid": channel, "tid": track, "args": {"name": name}})
            records.append({"ph": "M", "name": "thread_sort_index", "pid": channel, "tid": track,
                            "args": {"sort_index": track}})
    for event in events:
        records.append({
            "ph": "X", "name": event.kind.name.lower(), "pid": event.channel,
            "tid": 0 if event.kind.on_bus else event.die + 1,
            "ts": round(event.start * microseconds, 4), "dur": round((event.end - event.start) * microseconds, 4),
            "args": {"die": event.die, "plane": event.plane, "page": event.page,
                     "cycles": event.end - event.start}})
    write_whole(path, json.dumps({"displayTimeUnit": "ns", "traceEvents": records}, separators=(",", ":")))


def draw(events: Sequence[Event], config: Config, path: Path, *, first: int, last: int, title: str) -> None:
    """Draw [first, last): the buses of all channels above, bus and dies of channel 0 below.

    Args:
        events: from `read`.
        config: geometry and clock.
        path: PNG to write.
        first: first cycle shown.
        last: one past the last one.
        title: heading.
    """
    scale = 1 / config.clock_mhz
    inside = [event for event in events if event.end > first and event.start < last]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(15, 8.5), sharex=True, height_ratios=(config.channels, config.dies + 1), layout="constrained")

    def bars(axes: Axes, rows: Sequence[tuple[str, Sequence[Event]]]) -> None:
        for row, (_, chosen) in enumerate(rows):
            for kind in Kind:
                spans = [(max(e.start, first) * scale, (min(e.end, last) - max(e.start, first)) * scale)
                         for e in chosen if e.kind is kind]
                if spans:
                    axes.broken_barh(spans, (row - 0.42, 0.84), facecolors=COLOURS[kind], linewidth=0)
        axes.set_yticks(np.arange(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)

    buses = [[e for e in inside if e.channel == c and e.kind.on_bus] for c in range(config.channels)]
    bars(above, [(f"channel {c}: bus", buses[c]) for c in range(config.channels)])
    bars(below, [("channel 0: bus", buses[0]),
                 *((f"die {d}", [e for e in inside if e.channel == 0 and e.die == d and not e.kind.on_bus])
                   for d in range(config.dies))])
    share = bus_use(inside, first, last, config.channels)
    above.set_title(f"{title}: data on the buses {share:.1%} of the time shown", loc="left")
    below.set_xlabel(f"microseconds at {config.clock_mhz:g} MHz")
    below.set_xlim(first * scale, last * scale)
    seen = [kind for kind in Kind if any(event.kind is kind for event in inside)]
    figure.legend(handles=[Patch(color=COLOURS[kind], label=kind.name.lower().replace("_", " ")) for kind in seen],
                  loc="outside lower center", ncols=len(seen), frameon=False)
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    plt.close(figure)
