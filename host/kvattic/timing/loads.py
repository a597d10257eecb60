"""Jobs from statistics: how many heads and tokens, and what is selected, placed as a prefill places it."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.layout import PagePlace, page_number, page_place
from kvattic.timing.work import Group, Job, LaneWork, Operation


def runs_of(wanted: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the runs of consecutive numbers in an ascending list."""
    runs: list[int] = []
    last = -2
    for number in wanted:
        if number == last + 1:
            runs[-1] += 1
        else:
            runs.append(1)
        last = number
    return tuple(runs)


def groups_of(pages: list[tuple[int, tuple[int, ...], float]], config: Config) -> list[Group]:
    """Put pages that are asked for one after the other together by die.

    Args:
        pages: page number, runs, cycles of the walker.
        config: geometry.
    """
    groups: list[Group] = []
    unit_bits, plane_bits = config.plane_bits + config.die_bits, config.plane_bits
    die, seen = -1, 0
    for page, runs, walk in pages:
        unit = page & (1 << unit_bits) - 1
        bit = 1 << (unit & (1 << plane_bits) - 1)
        if unit >> plane_bits != die or seen & bit:
            groups.append(Group([], 0, 0.0))
            die, seen = unit >> plane_bits, 0
        seen |= bit
        group = groups[-1]
        group.pages.append((unit, page >> unit_bits, runs))
        group.codewords += sum(runs)
        group.walk += walk
    return groups


class Placement:
    """Hands out page numbers as the driver's zones do (kvattic.placement.zones): planes, then dies, then pages.

    Args:
        config: geometry.
        pages: of a run, which stay together.
        zone: first zone.
    """

    def __init__(self, config: Config, pages: int, zone: int = 0) -> None:
        row = config.dies * config.part.planes
        self.config = config
        self.width = min(pages, row)
        self.high = max(1, pages // row)
        self.limit = config.part.pages // self.high
        self.columns = row // self.width
        self.zone = zone
        self.fill = [[0] * self.columns for _ in range(config.channels)]

    def take(self, channel: int, die: int | None = None) -> int:
        """First page number of the next run, on a die if it is given."""
        config, fill = self.config, self.fill[channel]
        column = fill.index(min(fill))
        if die is not None:
            planes = config.part.planes
            first = die * planes // self.width
            here = fill[first : first + max(1, planes // self.width)]
            column = first + here.index(min(here))
        zone, page = divmod(fill[column], self.limit)
        fill[column] += 1
        place = PagePlace(self.zone + zone, page * self.high, *divmod(column * self.width, config.part.planes))
        return int(page_number(place, config))


def scores(rng: np.random.Generator, tokens: int, run: int) -> NDArray[np.float64]:
    """Random scores; those of a run of tokens are alike (correlation 0.99)."""
    base = rng.standard_normal(-(-tokens // run)).repeat(run)[:tokens]
    return base if run == 1 else np.sqrt(0.99) * base + 0.1 * rng.standard_normal(tokens)


def attend(config: Config, heads: int, tokens: int, *, mode: Mode = Mode.DENSE, rows: int | None = None,
           features: int = 0, top_units: int = 0, unit_tokens: int = 0, run: int = 1, sketches: Sequence[str] = (),
           first_head: int = 0, seed: int = 0, choose=None) -> Iterator[Job]:
    """One attend over heads that were prefilled, job by job."""
    rng = np.random.default_rng(seed)
    rows = config.rows if rows is None else rows
    pages = config.group_pages if sketches else 1
    cpp, tpc = config.codewords_per_page, config.tokens_per_codeword
    size = pages * config.tokens_per_page
    stripes = -(-tokens // size)
    place = Placement(config, pages, 1 if "centroid" in sketches else 0)
    channels = config.channels
    centroids: list[list[tuple[int, int]]] = [[] for _ in range(channels)]     # (head, stripe)
    table: dict[tuple[int, int, str], tuple[int, int]] = {}
    kinds = ["key", "value"] + (["feature"] if "feature" in sketches else [])
    sketch_at: dict[tuple[int, int], tuple[int, int]] = {}
    if "centroid" in sketches:
        per = (config.group_codewords // (unit_tokens // tpc)) // tpc
        for head in range(heads):
            for stripe in range(stripes):
                centroids[(stripe + head + first_head) % channels].append((head, stripe))
        for channel, items in enumerate(centroids):
            base = 0     # a zone of their own
            for i, item in enumerate(items):
                page, codeword = divmod(i * per, cpp)
                sketch_at[item] = base + page, codeword
    for head in range(heads):
        mine: list[list[int]] = [[] for _ in range(channels)]
        for stripe in range(stripes):
            mine[(stripe + head + first_head) % channels].append(stripe)
        for channel, here in enumerate(mine):
            for kind in kinds:
                for stripe in here:
                    die = None
                    if len(here) == 1:
                        number = (first_head + head) // channels + stripe // channels
                        die = (number + kinds.index(kind) * config.dies // len(kinds)) % config.dies
                    table[head, stripe, kind] = channel, place.take(channel, die)
    for head in range(heads):
        lanes = [LaneWork() for _ in range(channels)]
        chosen: list[int] = []
        marked: NDArray[np.bool_] | None = None
        if choose is not None and mode is not Mode.DENSE:
            marked, chosen = choose(head)
            marked = np.resize(marked, stripes * size).reshape(stripes, pages, cpp, tpc).any(axis=3)
        elif mode is not Mode.DENSE:
            if mode is Mode.SPARF:
                marked = np.zeros(stripes * size, bool)
                marked[np.argsort(-scores(rng, tokens, run), kind="stable")[:top_units]] = True
            else:
                units = scores(rng, tokens, run).reshape(-1, unit_tokens).sum(axis=1)
                marked = np.zeros((len(units), unit_tokens), bool)
                marked[np.argsort(-units, kind="stable")[:top_units]] = True
            marked = np.resize(marked, stripes * size).reshape(stripes, pages, cpp, tpc).any(axis=3)
            chosen = sorted(rng.choice(config.head_dim, features, replace=False).tolist())
        passes: list[list[list[tuple[int, tuple[int, ...], float]]]] = [[[], []] for _ in range(channels)]
        for stripe in range(stripes):
            channel, key = table[head, stripe, "key"]
            value = table[head, stripe, "value"][1]
            lane = lanes[channel]
            here = min(size, tokens - stripe * size)
            lane.tokens += here
            lane.places += -(-here // tpc) if marked is None else config.group_codewords
            if marked is None:
                for page in range(pages):
                    left = -(-(here - page * config.tokens_per_page) // tpc)
                    if left > 0:
                        runs = (min(left, cpp),)
                        passes[channel][0].append((key + page, runs, runs[0] + 2.0))
                        passes[channel][1].append((value + page, runs, runs[0] + 2.0))
                continue
            for page in range(pages):
                runs = runs_of(np.flatnonzero(marked[stripe, page]).tolist())
                passes[channel][0].append((key + page, runs, 2.0 * cpp))
                passes[channel][1].append((value + page, runs, 2.0 * cpp))
            if mode is Mode.CENTROID:
                page, codeword = sketch_at[head, stripe]
                lane.units += size // unit_tokens
                group = groups_of([(page, (per,), 3.0 * per)], config)
            else:
                lane.units += size // (unit_tokens or 1)
                feature = table[head, stripe, "feature"][1]
                of_page = [[f % cpp for f in chosen if f // cpp == page] for page in range(pages)]
                group = groups_of([(feature + page, runs_of(f), 3.0 * len(f)) for page, f in enumerate(of_page)],
                                  config)
                group[0].tokens = size
            assert len(group) == 1
            lane.first += group
        for lane, (keys, values) in zip(lanes, passes, strict=True):
            lane.keys, lane.values = groups_of(keys, config), groups_of(values, config)
        words = rows * config.head_dim * 2 / 8 + stripes * (1 + (mode is not Mode.DENSE))
        if mode in (Mode.SPARF, Mode.FETCHED):
            words += config.head_dim / 2
        yield Job(rows, mode, lanes, words)


def prefill(config: Config, heads: int, tokens: int, *, sketches: Sequence[str] = ()) -> list[Operation]:
    """The PROGRAM commands of a prefill of one layer, in the order in which the driver submits them."""
    pages = config.group_pages if sketches else 1
    size = pages * config.tokens_per_page
    place = Placement(config, pages)
    kinds = 2 + ("feature" in sketches)
    found: list[list[int]] = [[] for _ in range(config.channels)]
    for head in range(heads):
        mine: list[int] = [0] * config.channels
        for stripe in range(tokens // size):
            mine[(stripe + head) % config.channels] += 1
        for channel, here in enumerate(mine):
            for kind in range(kinds):
                for _ in range(here):
                    die = (head // config.channels + kind * config.dies // kinds) % config.dies if here == 1 else None
                    first = place.take(channel, die)
                    found[channel] += range(first, first + pages)
    return in_turn(config, found, True)


def in_turn(config: Config, pages: list[list[int]], program: bool) -> list[Operation]:
    """Operations round the channels, and on each by page number, two dies plane by plane in turn."""
    def order(page: int) -> tuple[int, ...]:
        place = page_place(page, config)
        return place.zone, place.page, place.die >> 1, place.plane, place.die & 1

    queues = [sorted(numbers, key=order) for numbers in pages]
    return [Operation(channel, queue[i], program) for i in range(max(map(len, queues)))
            for channel, queue in enumerate(queues) if i < len(queue)]
