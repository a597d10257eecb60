"""What the drive is given to do: jobs with the pages that they read, and operations on pages and blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.scheduling import RUN_PATIENCE

FIRST, KEY, VALUE = range(3)
"""Passes: features, centroids or codes, and K that is scored exactly; K; V."""
FIRST_WALK, SKIP_WALK = 3, 2
"""Cycles of a walker: for a codeword of the first pass; for each place, wanted or not, of a sparse job's K and V (hdl:
FirstWalker, Walker).  A dense job's takes one for a codeword and two between pages."""


class Page(NamedTuple):
    """A page that is read.

    Members:
        unit: plane and die, the low bits of a page number.
        row: page of the block, and zone.
        runs: codewords of each run of consecutive ones that are wanted; () if none are.
    """

    unit: int
    row: int
    runs: tuple[int, ...]


@dataclass(slots=True)
class Group:
    """Pages of one die that a walker asks for one after the other.

    Attributes:
        pages: at most one of each plane.
        codewords: all of them, those in DRAM included.
        walk: cycles that the walker takes.
        tokens: of a group of the first pass, those whose scores are worked out from sums of features or codes.
        dram: codewords that lie in device DRAM.
        features: of the first pass: codewords of the feature layout or of codes.
        opens: groups of accumulators that it takes: 1, or 0 if it belongs to the same stripe as another one.
    """

    pages: list[Page] = field(default_factory=list)
    codewords: int = 0
    walk: float = 0.0
    tokens: int = 0
    dram: int = 0
    features: bool = False
    opens: int = 1


@dataclass(slots=True)
class LaneWork:
    """What a job reads on one channel.

    Attributes:
        tokens: that the lane scores.
        places: of the score ring that it takes.
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
    """An ATTEND command: one KV head's rows over its stripes; `attend_job` makes it.  Or a READ.

    Attributes:
        rows: query rows.
        mode: of the command.
        lanes: what it reads, channel by channel.
        words: cycles in which its query block, table and mean come.
        submitted: cycle in which its command can be fetched.
        copied: words of 8 bytes that a READ writes.
    """

    rows: int
    mode: Mode
    lanes: list[LaneWork]
    words: float = 0.0
    submitted: float = 0.0
    copied: int = 0


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


class Stripe(NamedTuple):
    """A stripe of a job, as its table has it.

    Members:
        channel: whose lane attends it.
        key_page, value_page: first page of K, and of V.
        tokens: of it that the job attends, from its first one on.
        dram: it lies in device DRAM.
        whole: sparse modes: it is attended whole, as one in DRAM always is.
        sketch_page, sketch_codeword: first page of its features; or page and codeword of its first centroids or codes.
    """

    channel: int
    key_page: int
    value_page: int
    tokens: int
    dram: bool = False
    whole: bool = False
    sketch_page: int = 0
    sketch_codeword: int = 0


def runs_of(wanted: Iterable[int]) -> tuple[int, ...]:
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


class _Walk:
    """Pages in a walker's order; where none are passed over, put together by die."""

    def __init__(self, config: Config) -> None:
        self.groups: list[Group] = []
        self._codewords = config.codewords_per_page
        self._late: tuple[int, Sequence[int], int] | None = None    # page, wanted codewords, places before it
        self._at = 0.0
        self._goes_on = (-1, -1)        # page and codeword with which the last centroids would go on
        self._unit_bits, self._plane_bits = config.plane_bits + config.die_bits, config.plane_bits
        self._die, self._seen = -1, 0

    def add(self, page: int, runs: tuple[int, ...], walk: float) -> Group:
        unit = page & (1 << self._unit_bits) - 1
        die, bit = unit >> self._plane_bits, 1 << (unit & (1 << self._plane_bits) - 1)
        if die != self._die or self._seen & bit:
            self.groups.append(Group())
            self._die, self._seen = die, 0
        self._seen |= bit
        group = self.groups[-1]
        group.pages.append(Page(unit, page >> self._unit_bits, runs))
        group.codewords += sum(runs)
        group.walk += walk
        return group

    def separate(self) -> None:
        """What comes next is of another group."""
        self._die = -1

    def centroids(self, page: int, codeword: int, count: int) -> None:
        """Centroids; those that go on where the last ones ended, which another stripe's do, are of one run."""
        if self._goes_on == (page, codeword):
            group = self.groups[-1]
            *before, last = group.pages[-1].runs
            group.pages[-1] = group.pages[-1]._replace(runs=(*before, last + count))
            group.codewords += count
            group.walk += FIRST_WALK * count
        else:
            self.add(page, (count,), float(FIRST_WALK * count))
        self._goes_on = page, codeword + count

    def skim(self, page: int, wanted: Sequence[int], place: int) -> None:
        """A page of a sparse job's K or V, of which its first run is queued when it has ended.

        Args:
            page: its number.
            wanted: codewords of it, ascending.
            place: pages that were walked before it.
        """
        if wanted:
            self._queue_first_run(place * self._codewords + wanted[0])
            self._late = page, wanted, place * self._codewords

    def _queue_first_run(self, following: int | None) -> None:
        """Queue the page that came last; `following` is the place of what is asked for next."""
        if self._late is None:
            return
        page, wanted, place = self._late
        self._late = None
        last = next((w for w, after in pairwise(wanted) if after != w + 1), wanted[-1])
        after = next((place + w for w in wanted if w > last), following)
        wait = RUN_PATIENCE if after is None else min(RUN_PATIENCE, SKIP_WALK * (after - place - last))
        at = float(SKIP_WALK * (place + last + 1) + (0 if last == self._codewords - 1 else wait))
        self.separate()
        self.add(page, runs_of(wanted), max(at - self._at, 0.0))
        self.separate()
        self._at = max(at, self._at)

    def end(self) -> list[Group]:
        """The groups; nothing more comes."""
        self._queue_first_run(None)
        return self.groups

    def add_dram(self, codewords: int, walk: float) -> None:
        self._queue_first_run(None)
        self.groups.append(Group(codewords=codewords, dram=codewords, walk=walk))
        self.separate()


def attend_job(config: Config, stripes: Sequence[Stripe], *, rows: int | None = None, mode: Mode = Mode.DENSE,
               marked: NDArray[np.bool_] | None = None, features: Sequence[int] = (), sinks: int = 0,
               unit_tokens: int = 0, stripe_pages: int = 1, submitted: float = 0.0) -> Job:
    """What an ATTEND command reads.

    Args:
        config: of the drive.
        stripes: of the job, in the order of its table.
        rows: query rows; those of the configuration if None.
        mode: of the command.
        marked: sparse modes: (stripes, codewords of a stripe), which codewords of K and V are wanted; whole stripes
            are wanted whole, whatever it says.
        features: SPARF and FETCHED: the chosen features, ascending.
        sinks: CODES: first tokens of the first stripe that are scored exactly, unless it is whole.
        unit_tokens: tokens of a unit of selection; 0: 1 in SPARF and CODES, else a codeword's.
        stripe_pages: pages of K of a stripe.
        submitted: cycle in which the command can be fetched.

    Raises:
        RequestError: rows, channels, `marked` or the size of a unit are not those of such a job.
    """
    rows = config.rows if rows is None else rows
    sparse = mode is not Mode.DENSE
    per_page, per_codeword = config.codewords_per_page, config.tokens_per_codeword
    codewords = stripe_pages * per_page
    unit = unit_tokens or (1 if mode.by_token else per_codeword)
    if not 1 <= rows <= config.rows:
        raise RequestError(f"rows must be 1 to {config.rows}, not {rows!r}")
    if sparse and not config.sparse:
        raise RequestError("this configuration has no sparse modes")
    if sparse and (marked is None or marked.shape != (len(stripes), codewords)):
        shape = None if marked is None else marked.shape
        raise RequestError(f"marked must have the shape ({len(stripes)}, {codewords}), not {shape}")
    if bad := [s.channel for s in stripes if not 0 <= s.channel < config.channels]:
        raise RequestError(f"channel must be 0 to {config.channels - 1}, not {bad[0]}")
    lanes = [LaneWork() for _ in range(config.channels)]
    walks = [(_Walk(config), _Walk(config)) for _ in range(config.channels)]
    centroids = [_Walk(config) for _ in range(config.channels)]
    walked = [0] * config.channels      # pages of earlier stripes
    for number, stripe in enumerate(stripes):
        lane = lanes[stripe.channel]
        used = -(-stripe.tokens // per_codeword)
        whole = stripe.dram or stripe.whole
        lane.tokens += stripe.tokens
        lane.places += codewords if sparse else used
        if mode is Mode.CENTROID and not whole:
            _read_centroids(config, stripe, centroids[stripe.channel], unit)
        elif mode is Mode.CODES and not whole:
            lane.first += _read_codes(config, stripe, 0 if number else sinks)
        elif sparse and mode is not Mode.CENTROID:
            lane.first += _first_pass(config, stripe, whole, used, features, stripe_pages)
        if sparse:
            lane.units += 0 if whole else -(-stripe.tokens // unit)
        for walk, first in zip(walks[stripe.channel], (stripe.key_page, stripe.value_page), strict=True):
            if stripe.dram:
                walk.add_dram(used, float(used))
                continue
            for page in range(stripe_pages):
                left = min(used - page * per_page, per_page)
                if left <= 0:
                    break
                if not sparse:
                    walk.add(first + page, (left,), left + 2.0)
                else:
                    assert marked is not None
                    here = marked[number, page * per_page : page * per_page + left]
                    walk.skim(first + page, range(left) if whole else np.flatnonzero(here).tolist(),
                              walked[stripe.channel] + page)
        walked[stripe.channel] += stripe_pages
    for lane, (keys, values), sketches in zip(lanes, walks, centroids, strict=True):
        lane.keys, lane.values = keys.end(), values.end()
        lane.first += sketches.groups
    return Job(rows, mode, lanes, _words(config, rows, len(stripes), mode), submitted)


def _words(config: Config, rows: int, stripes: int, mode: Mode) -> float:
    """Words of 8 bytes that a job is loaded with: q; table and sketches; the mean of V."""
    words = rows * config.head_dim / 4 + stripes * (1 + (mode is not Mode.DENSE))
    return words + (config.head_dim / 2 if mode.blended else 0)


def _read_centroids(config: Config, stripe: Stripe, walk: _Walk, unit: int) -> None:
    """What the first pass reads of a stripe's centroids."""
    per_page = config.codewords_per_page
    count = max(1, config.group_codewords * config.tokens_per_codeword // unit // config.tokens_per_codeword)
    page, codeword = stripe.sketch_page, stripe.sketch_codeword
    while count:
        here = min(count, per_page - codeword)
        walk.centroids(page, codeword, here)
        page, codeword, count = page + 1, 0, count - here


def _read_codes(config: Config, stripe: Stripe, sinks: int) -> list[Group]:
    """What the first pass reads of a stripe's codes, and of K of sinks."""
    per_page, walk = config.codewords_per_page, _Walk(config)
    for octets, page, at, left in ((False, stripe.key_page, 0, -(-sinks // config.tokens_per_codeword)),
                                   (True, stripe.sketch_page, stripe.sketch_codeword, config.octets)):
        while left:
            here = min(left, per_page - at)
            group = walk.add(page, (here,), float(FIRST_WALK * here))
            if octets:
                group.features, group.opens = True, 0
            page, at, left = page + 1, 0, left - here
        walk.separate()
    walk.groups[-1].tokens, walk.groups[-1].opens = config.group_tokens, 1
    return walk.groups


def _first_pass(config: Config, stripe: Stripe, whole: bool, used: int, features: Sequence[int],
                stripe_pages: int) -> list[Group]:
    """What the first pass reads of a stripe's features, or of its K: one group."""
    per_page = config.codewords_per_page
    if whole and stripe.dram:
        return [Group(codewords=used, dram=used, walk=float(FIRST_WALK * used))]
    pages: list[tuple[int, tuple[int, ...]]]
    if whole:
        pages = [(stripe.key_page + page, (min(used - page * per_page, per_page),))
                 for page in range(-(-used // per_page))]
    else:
        pages = [(stripe.sketch_page + page, runs_of(f % per_page for f in features if f // per_page == page))
                 for page in range(stripe_pages)]
    walk = _Walk(config)
    for page, runs in pages:
        walk.add(page, runs, float(FIRST_WALK * sum(runs)))
    if not whole:
        for group in walk.groups:
            group.features, group.opens = True, 0
        walk.groups[-1].tokens, walk.groups[-1].opens = config.group_tokens, 1
    return walk.groups


class Read(NamedTuple):
    """Codewords of a page that a job read, as a model of the drive may note them.

    Members:
        kind: what they hold.
        channel: whose lane took them.
        page: page number on the channel, or of device DRAM.
        codewords: their numbers in the page, ascending.
        dram: the page lies in device DRAM.
    """

    kind: Kind
    channel: int
    page: int
    codewords: Sequence[int]
    dram: bool = False


def job_of_reads(config: Config, reads: Iterable[Read], tokens: Sequence[int], *, rows: int, mode: Mode = Mode.DENSE,
                 unit_tokens: int = 0, submitted: float = 0.0, copied: int = 0) -> Job:
    """What an ATTEND or a READ command reads, from what it has read.

    Args:
        config: of the drive.
        reads: in the order of each kind's stripes.
        tokens: of the job on each channel.
        rows: query rows.
        mode: of the command.
        unit_tokens: tokens of a unit of selection; 0: 1 in SPARF and CODES, else a codeword's.
        submitted: cycle in which the command can be fetched.
        copied: words of 8 bytes that a READ writes.

    Raises:
        RequestError: there is not a number of tokens for each channel.
    """
    if len(tokens) != config.channels:
        raise RequestError(f"tokens must have one number for each of the {config.channels} channels, not {len(tokens)}")
    sparse = mode is not Mode.DENSE
    unit = unit_tokens or (1 if mode.by_token else config.tokens_per_codeword)
    lanes = [LaneWork(tokens=here, units=-(-here // unit) if sparse else 0) for here in tokens]
    passes = {Kind.FEATURE: FIRST, Kind.CODES: FIRST, Kind.SKETCH: FIRST, Kind.KEY: KEY, Kind.VALUE: VALUE}
    walks = [[_Walk(config) for _ in range(3)] for _ in range(config.channels)]
    seen: dict[tuple[int, Kind], tuple[int, int]] = {}      # the last stripe's number by its pages, and in its list
    octets = [0] * config.channels
    stripes = 0
    for read in reads:
        which = passes[read.kind]
        walk = walks[read.channel][which]
        runs = runs_of(read.codewords)
        count = sum(runs)
        if read.dram:
            walk.add_dram(count, float(count))
            continue
        if not sparse:
            walk.add(read.page, runs, count + 2.0)
            continue
        if mode is Mode.CODES and which == FIRST:
            if read.kind is Kind.SKETCH or octets[read.channel] % config.octets == 0:
                walk.separate()
            group = walk.add(read.page, runs, float(FIRST_WALK * count))
            if read.kind is Kind.CODES:
                octets[read.channel] += count
                last_one = octets[read.channel] % config.octets == 0
                group.features, group.opens = True, int(last_one)
                group.tokens = config.group_tokens if last_one else 0
            continue
        # The pages of a stripe follow each other from a multiple of their number on.
        of_pages, page = divmod(read.page, config.group_pages)
        last, number = seen.get((read.channel, read.kind), (-1, -1))
        number += of_pages != last
        seen[read.channel, read.kind] = of_pages, number
        if which != FIRST:
            walk.skim(read.page, read.codewords, number * config.group_pages + page)
            continue
        if mode is Mode.CENTROID and len(runs) == 1:
            walk.centroids(read.page, read.codewords[0], count)
            continue
        group = walk.add(read.page, runs, float(FIRST_WALK * count))
        if read.kind is Kind.FEATURE:
            group.tokens = config.group_tokens if of_pages != last else group.tokens
            group.features, group.opens = True, int(group.tokens > 0)
    for lane, (first, keys, values) in zip(lanes, walks, strict=True):
        lane.first, lane.keys, lane.values = first.end(), keys.end(), values.end()
        here = -(-lane.tokens // config.group_tokens) if sparse else 0
        lane.places = here * config.group_codewords if sparse else sum(group.codewords for group in lane.keys)
        stripes += here if sparse else -(-lane.tokens // config.tokens_per_page)
    words = _words(config, rows, stripes, mode)
    return Job(rows, mode, lanes, words, submitted, copied)
