"""How much flash a sequence takes, and how large the regions of device DRAM are: arithmetic."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvattic.spec import layout
from kvattic.spec.config import Config
from kvattic.spec.registers import MAX_REGIONS

__all__ = ["region_bits", "reservations"]


def region_bits(pages: int, config: Config) -> int:
    """log2 of the pages of a region of device DRAM: few enough regions, and each at least as large as a stripe."""
    stripe = max(layout.stripe_pages(config, sparse=sparse) for sparse in {False, config.sparse})
    return max((-(-pages // MAX_REGIONS) - 1).bit_length() if pages else 0, (stripe - 1).bit_length())


def reservations(config: Config, heads: range, kv_heads: int, stripes: int, pages: int, kinds: int,
                 packed: Sequence[int] = (), shared: Sequence[int] = ()) -> Iterator[tuple[int, list[int]]]:
    """What a sequence takes of flash at most: (pages of a run, runs on each channel) of each of its allocations.

    Args:
        config: geometry.
        heads: of all layers, numbered over all sequences.
        kv_heads: of a layer.
        stripes: full ones of each head.
        pages: of a run of K.
        kinds: runs of a stripe: K, V, the feature layout.
        packed: codewords of a stripe, of each of its packed sketches.
        shared: for each layer, the first stripes that another sequence has written already; none of any if empty.
    """
    layers = len(heads) // kv_heads
    # (stripe of a round, layer, head): its channel.
    channels = layout.stripe_channel(np.arange(config.channels)[:, None], np.array(heads), config)
    channels = channels.reshape(config.channels, -1, kv_heads)
    # (stripe of a round, layer, channel): heads that have it there.
    counts = (channels[:, :, :, None] == np.arange(config.channels)).sum(axis=2)

    def first(runs: NDArray[np.int64], layer: int, count: int) -> NDArray[np.int64]:
        rounds, rest = divmod(count, config.channels)
        found: NDArray[np.int64] = rounds * runs[:, layer].sum(axis=0) + runs[:rest, layer].sum(axis=0)
        return found

    def total(runs: NDArray[np.int64]) -> list[int]:
        each = np.zeros(config.channels, np.int64)
        for layer, written in enumerate(shared or [0] * layers):
            each += first(runs, layer, stripes) - first(runs, layer, min(written, stripes))
        found: list[int] = each.tolist()
        return found

    yield pages, total(kinds * counts)
    for codewords in packed:
        # Heads of a layer share pages when their stripes are full, at the same time; a run is what one stripe takes.
        run = layout.packed_pages(1, codewords, config)
        yield run, total(layout.packed_pages(counts, codewords, config) // run)
