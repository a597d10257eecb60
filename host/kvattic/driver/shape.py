"""`SequenceShape`: what a sequence holds, and on which channels and dies its stripes lie."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvattic.driver.scales import Scales
from kvattic.spec import layout
from kvattic.spec.commands import Kind
from kvattic.spec.config import Config

__all__ = ["SequenceShape"]


@dataclass(frozen=True, kw_only=True)
class SequenceShape:
    """What a sequence was created as; see `Sequence` and `Device.create_sequence`.

    Attributes:
        config: of the drive.
        number: of the sequence; messages name it.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
        first_head: number of its first KV head, counted over all layers and sequences.
        sparse: K is also written in the feature layout.
        centroids: tokens of the units whose mean keys are also written; None: there are none.
        codes: codes of K are also written.
        sinks: first tokens that sparse modes always attend.
        window: newest tokens whose V the host keeps; None: none.
        domain: owner of its flash and DRAM.
        key_scale: what a stored 1.0 of K stands for, by layer and KV head; None: 1.
        value_scale: likewise of V.
        turn: dies by which its single stripes lie further on, so that those of forks do not all lie on the same one.
    """

    config: Config
    number: int
    kv_heads: int
    layers: int
    capacity_tokens: int
    first_head: int
    sparse: bool
    centroids: int | None
    sinks: int
    window: int | None
    domain: int
    key_scale: Scales | None = None
    value_scale: Scales | None = None
    turn: int = 0
    codes: bool = False

    @cached_property
    def pages(self) -> int:
        """Pages of K (and of V) in a stripe."""
        return layout.stripe_pages(self.config, sparse=bool(self.sketch_kinds))

    @cached_property
    def stripe_tokens(self) -> int:
        """Tokens of a stripe."""
        return self.pages * self.config.tokens_per_page

    @property
    def stripe_dram_pages(self) -> int:
        """Pages of device DRAM that K and V of a stripe of all heads take."""
        return 2 * self.kv_heads * self.pages

    @cached_property
    def sketch_kinds(self) -> list[Kind]:
        """What is written for sparse modes beside K and V."""
        return [Kind.FEATURE] * self.sparse + self.packed_kinds

    @cached_property
    def packed_kinds(self) -> list[Kind]:
        """Sketches of which several stripes share pages: each has flash of its own."""
        return [Kind.SKETCH] * (self.centroids is not None) + [Kind.CODES] * self.codes

    def packed_codewords(self, kind: Kind) -> int:
        """Codewords of a stripe's packed sketch, a power of two."""
        if kind is Kind.CODES:
            return self.config.octets
        assert self.centroids is not None
        return layout.centroid_codewords(self.centroids, self.config)

    def allocation(self, kind: Kind) -> int:
        """Number of the allocation whose flash this lies in: that of K, V and the feature layout is the first."""
        return 1 + self.packed_kinds.index(kind) if kind in self.packed_kinds else 0

    @property
    def blended(self) -> bool:
        """Whether there are modes that blend in the mean of V, for which sums of it are kept."""
        return self.sparse or self.codes

    @cached_property
    def kinds(self) -> list[Kind]:
        """All that is written of a stripe."""
        return [Kind.KEY, Kind.VALUE, *self.sketch_kinds]

    def channel(self, layer: int, head: Any, stripe: Any) -> Any:
        """The channel of a stripe; works on arrays."""
        return layout.stripe_channel(stripe, self.first_head + layer * self.kv_heads + head, self.config)

    def die(self, layer: int, stripe: int, head: int, kind: Kind) -> int:
        """The die for a single stripe: not the one of the stripe before, and far from the head's other kinds."""
        config = self.config
        number = (self.first_head + layer * self.kv_heads + head) // config.channels + stripe // config.channels
        die: int = (number + self.turn + self.kinds.index(kind) * config.dies // len(self.kinds)) % config.dies
        return die

    def whole_from(self, stop: int, held_tokens: int) -> int:
        """First token of the tail of a query whose last token is before `stop`: a stripe's first."""
        return max(stop - held_tokens, 0) // self.stripe_tokens * self.stripe_tokens
