"""How much flash a sequence takes, and how large the regions of device DRAM are: arithmetic."""

from collections.abc import Iterator

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
                  centroids: int | None) -> Iterator[tuple[int, list[int]]]:
    """What a sequence takes of flash at most: (pages of a run, runs on each channel) of each of its allocations.

    Args:
        config: geometry.
        heads: of all layers, numbered over all sequences.
        kv_heads: of a layer.
        stripes: full ones of each head.
        pages: of a run of K.
        kinds: runs of a stripe: K, V, the feature layout.
        centroids: tokens of a unit.
    """
    rounds, rest = divmod(stripes, config.channels)
    # (stripe of a round, layer, head): its channel.
    channels = layout.stripe_channel(np.arange(config.channels)[:, None], np.array(heads), config)
    channels = channels.reshape(config.channels, -1, kv_heads)
    # (stripe of a round, layer, channel): heads that have it there.
    counts = (channels[:, :, :, None] == np.arange(config.channels)).sum(axis=2)

    def total(runs: NDArray[np.int64]) -> list[int]:
        each: list[int] = (rounds * runs.sum(axis=(0, 1)) + runs[:rest].sum(axis=(0, 1))).tolist()
        return each

    yield pages, total(kinds * counts)
    if centroids is not None:
        # Heads of a layer share pages when their stripes are full, at the same time; a run is what one stripe takes.
        run = layout.centroid_pages(1, centroids, config)
        yield run, total(layout.centroid_pages(counts, centroids, config) // run)
