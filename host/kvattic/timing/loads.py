"""Work from statistics: how many heads and tokens, what is selected; placed as a prefill of the driver places it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.spec.codes import check_codes
from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.layout import PagePlace, centroid_codewords, page_number, page_place, stripe_channel, stripe_pages
from kvattic.timing.work import Job, Operation, Stripe, attend_job

Choice: TypeAlias = tuple[NDArray[np.bool_], Sequence[int]]
"""What a head's queries choose: for each token whether it is selected; the features, ascending."""


class _Placement:
    """Hands out page numbers as the driver's zones do (kvattic.placement.zones): planes, then dies, then pages."""

    def __init__(self, config: Config, pages: int, zone: int) -> None:
        row = config.dies * config.part.planes
        self._config = config
        self._width = min(pages, row)
        self._high = max(1, pages // row)
        self._limit = config.part.pages // self._high
        self._zone = zone
        self._fill = [[0] * (row // self._width) for _ in range(config.channels)]

    def take(self, channel: int, die: int | None) -> int:
        """First page number of the next run, on a die if it is given."""
        config, fill = self._config, self._fill[channel]
        planes = config.part.planes
        column = fill.index(min(fill))
        if die is not None:
            first = die * planes // self._width
            here = fill[first : first + max(1, planes // self._width)]
            column = first + here.index(min(here))
        zone, page = divmod(fill[column], self._limit)
        fill[column] += 1
        place = PagePlace(self._zone + zone, page * self._high, *divmod(column * self._width, planes))
        return int(page_number(place, config))


class Layer:
    """Where a prefill puts one layer of a sequence, or of several that are written one after the other.

    Args:
        config: of the drive.
        heads: KV heads, of all sequences.
        tokens: of each.
        features: K is written in the feature layout, too.
        centroids: tokens of a unit whose mean keys are written; 0: none are.
        codes: codes of K are written.

    Raises:
        RequestError: there are no heads or tokens, or sketches and the last stripe is not full.
        ConfigError: codes, and the configuration is without them.
    """

    def __init__(self, config: Config, heads: int, tokens: int, *, features: bool = False, centroids: int = 0,
                 codes: bool = False) -> None:
        for name, value in (("heads", heads), ("tokens", tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} must be a positive int, not {value!r}")
        if codes:
            check_codes(config)
        sparse = features or bool(centroids) or codes
        self.config, self.heads, self.tokens, self.centroids = config, heads, tokens, centroids
        self.features, self.codes = features, codes
        self.pages = stripe_pages(config, sparse=sparse)
        self.size = self.pages * config.tokens_per_page
        if sparse and tokens % self.size:
            raise RequestError(f"tokens must be whole stripes of {self.size} in a sequence with sketches, not {tokens}")
        self.stripes = -(-tokens // self.size)
        # Packed sketches have zones of their own, which are taken first.
        placement = _Placement(config, self.pages, bool(centroids) + codes)
        self._packed: dict[Kind, dict[tuple[int, int], tuple[int, int]]] = {}
        self._pages: dict[tuple[int, int], list[int]] = {}
        self.runs: list[list[int]] = [[] for _ in range(config.channels)]
        """Page numbers of each channel, all of them."""
        if centroids:
            self._place_packed(Kind.SKETCH, centroid_codewords(centroids, config))
        if codes:
            self._place_packed(Kind.CODES, config.octets)
        kinds = 2 + features
        in_turn = self.pages >= config.part.planes and tokens // self.size > 1
        for head in range(heads):
            for channel, stripes in enumerate(self._of_channels(head)):
                for kind in range(kinds):
                    for stripe in stripes:
                        # A single one is put on a die far from its head's others (docs/placement.md).
                        number = head // config.channels + stripe // config.channels
                        die = (number + kind * config.dies // kinds) % config.dies
                        first = placement.take(channel, die if len(stripes) == 1 and not in_turn else None)
                        self._pages.setdefault((head, stripe), []).append(first)
                        self.runs[channel] += range(first, first + self.pages)

    def _of_channels(self, head: int) -> list[list[int]]:
        """A head's stripes on each channel."""
        found: list[list[int]] = [[] for _ in range(self.config.channels)]
        for stripe in range(self.stripes):
            found[stripe_channel(stripe, head, self.config)].append(stripe)
        return found

    def _place_packed(self, kind: Kind, each: int) -> None:
        """A sketch of `each` codewords a stripe: a head's stripes beside each other, several heads in a page."""
        config, places = self.config, dict[tuple[int, int], tuple[int, int]]()
        zone = len(self._packed) << config.zone_page_bits
        self._packed[kind] = places
        used = [0] * config.channels
        for head in range(self.heads):
            for channel, stripes in enumerate(self._of_channels(head)):
                for stripe in stripes:
                    page, codeword = divmod(used[channel] * each, config.codewords_per_page)
                    places[head, stripe] = zone + page, codeword
                    used[channel] += 1
        for channel, count in enumerate(used):
            self.runs[channel] += range(zone, zone - (-count * each // config.codewords_per_page))

    def table(self, head: int, mode: Mode = Mode.DENSE) -> list[Stripe]:
        """A head's stripes, with the sketches that a mode's first pass reads."""
        packed = self._packed.get(mode.sketch, {})
        found = []
        for stripe in range(self.stripes):
            key, value, *feature = self._pages[head, stripe]
            page, codeword = packed.get((head, stripe), (feature[0] if feature else 0, 0))
            tokens = min(self.size, self.tokens - stripe * self.size)
            found.append(Stripe(stripe_channel(stripe, head, self.config), key, value, tokens, False, False, page,
                                codeword))
        return found

    def prefill(self) -> list[Operation]:
        """The PROGRAM commands that write it, in the order in which the driver submits them."""
        config = self.config
        full = self.tokens // self.size
        pages = self.runs
        if full < self.stripes:     # the last stripe waits in DRAM
            late = {(stripe_channel(full, head, config), page + i) for head in range(self.heads)
                    for page in self._pages[head, full] for i in range(self.pages)}
            pages = [[page for page in numbers if (channel, page) not in late] for channel, numbers in enumerate(pages)]
        return in_turn(config, pages, program=True)

    def attend(self, *, mode: Mode = Mode.DENSE, rows: int | None = None, features: int = 0, top_units: int = 0,
               sinks: int = 0, unit_tokens: int = 0, run: int = 1, seed: int = 0,
               choose: Callable[[int], Choice] | None = None) -> Iterator[Job]:
        """The jobs of one attend over all heads.

        Args:
            mode: of the commands.
            rows: query rows of each; those of the configuration if None.
            features: SPARF and FETCHED: features that the first pass reads, chosen at random.
            top_units: units that are selected.
            sinks: CODES: first tokens that are scored exactly; of them nothing is selected beside `top_units`.
            unit_tokens: tokens of a unit; 0: 1 in SPARF and CODES, a codeword's in FETCHED, `centroids` in CENTROID.
            run: important tokens come in runs of so many (their scores' correlation is 0.99); 1: at random.
            seed: of the random choice.
            choose: what a head's queries choose, instead of a random choice.

        Raises:
            RequestError: there are not so many features or units, or the sketches are missing.
        """
        config = self.config
        sparse = mode is not Mode.DENSE
        unit = unit_tokens or (1 if mode.by_token else self.centroids if mode is Mode.CENTROID
                               else config.tokens_per_codeword)
        if sparse and choose is None:
            if mode is Mode.CENTROID and unit != self.centroids:
                raise RequestError(f"unit_tokens must be those of the centroids, {self.centroids}, not {unit}")
            if mode is Mode.CODES and not self.codes:
                raise RequestError("mode codes reads codes, which this layer is without")
            if mode.featured and not (self.features and 1 <= features <= config.head_dim):
                raise RequestError(f"features must be 1 to {config.head_dim} of a layer with features, not {features}")
            if self.tokens % unit or not 1 <= top_units <= self.tokens // unit:
                raise RequestError(f"top_units must be 1 to {self.tokens // unit}, not {top_units}")
        rng = np.random.default_rng(seed)
        for head in range(self.heads):
            marked = None
            chosen: Sequence[int] = ()
            if sparse:
                tokens, chosen = (
                    choose(head) if choose is not None else self._choose(rng, features, top_units, unit, run))
                marked = np.any(tokens.reshape(self.stripes, -1, config.tokens_per_codeword), axis=2)
            yield attend_job(config, self.table(head, mode), rows=rows, mode=mode, marked=marked, features=chosen,
                             sinks=sinks, unit_tokens=unit, stripe_pages=self.pages)

    def _choose(self, rng: np.random.Generator, features: int, top_units: int, unit: int, run: int) -> Choice:
        scores = rng.standard_normal(-(-self.tokens // run)).repeat(run)[: self.tokens]
        if run > 1:
            scores = np.sqrt(0.99) * scores + 0.1 * rng.standard_normal(self.tokens)
        units = scores.reshape(-1, unit).sum(axis=1)
        marked = np.zeros(len(units), np.bool_)
        marked[np.argsort(-units, kind="stable")[:top_units]] = True
        return marked.repeat(unit), sorted(rng.choice(self.config.head_dim, features, replace=False).tolist())


def in_turn(config: Config, pages: Sequence[Sequence[int]], *, program: bool) -> list[Operation]:
    """Operations in the driver's order: round the channels, on each by page number, two dies plane by plane in turn.

    Args:
        config: geometry.
        pages: page numbers of each channel; of an ERASE one of each block.
        program: PROGRAM; else ERASE.
    """
    def order(page: int) -> tuple[int, ...]:
        place = page_place(page, config)
        return place.zone, place.page, place.die >> 1, place.plane, place.die & 1

    queues = [sorted(numbers, key=order) for numbers in pages]
    return [Operation(channel, queue[i], program) for i in range(max(map(len, queues), default=0))
            for channel, queue in enumerate(queues) if i < len(queue)]
