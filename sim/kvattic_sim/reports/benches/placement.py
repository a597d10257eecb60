"""Write amplification and wear of the host's placement: a thousand sequences that come, grow and go.

Dense ones; and in a geometry with larger pages also some with K in the feature layout, with centroids, or both.

The host library runs over the golden device, which takes no program out of order and no page twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from kvattic import TINY, Config, Device, Sequence
from kvattic.errors import CapacityError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.nand import TINY_PART

__all__ = ["CONFIG", "KEYS", "MIXED", "Life", "live", "write_amplification"]

SEQUENCES = 1000
BATCH = 64
"""Sequences that live at once, at most: the paper's largest batch."""
KV_HEADS = 2
CONFIG = Config(channels=2, rows=2, head_dim=32, part=TINY_PART.resized(256, blocks=64, spare_bytes=64), dies=2,
                dram_beat_bytes=16, codeword_bytes=256, score_depth=256)
"""62 zones of 64 pages in all, so that a thousand sequences take seconds.  `BATCH` of them, whose lengths are spread as
`live` says, take up to 45 percent of it; as many of the longest in the `paper` drive would take 41 percent."""
LONGEST = 1.6
"""Zones that the longest sequence takes: 2,048 tokens of OPT-13B (40 layers of 40 heads) in zones of 1 GiB."""
MIXED = replace(TINY, part=TINY_PART.resized(1024, pages=32, blocks=64))
"""Zones of 128 pages on each channel: 16 runs of a group, or single pages."""
SKETCHES: tuple[dict[str, Any], ...] = ({}, {"sparse": True}, {"centroids": 16}, {"sparse": True, "centroids": 4})
"""What the sequences of a mixed run may have beside K and V."""
LARGE_BATCH, LARGE = 16, 6.0
"""Fewer and larger ones, so that each block is erased about ten times."""
SEEDS = (0, 1, 2)
KEYS = ("flash.write_amplification", "flash.wear_spread", "flash.wear_spread.large", "flash.erases.mean",
        "flash.erases.mean.large")


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What a device has gone through.

    Attributes:
        amplification: pages programmed for each page of data.
        spread: most minus fewest erases of a block, at any time.
        erases: of a block, on average.
        occupancy: zones in use, as a share of all, at most.
        sequences: that lived.
        alive: at once, at most.
    """

    amplification: float
    spread: int
    erases: float
    occupancy: float
    sequences: int
    alive: int


def live(*, batch: int = BATCH, longest: float = LONGEST, sequences: int = SEQUENCES, seed: int = 0,
         mixed: bool = False) -> Life:
    """Create, grow and free sequences in random order, until a given number has lived and all are gone.

    Each step takes one at random of: a new sequence (twice as likely, if there is room), a piece more for one, an end
    of one.  Lengths are spread evenly over powers of two up to the longest, so most sequences share zones.

    Args:
        batch: sequences at once, at most.
        longest: zones that the longest sequence takes.
        sequences: how many in all.
        seed: of everything random.
        mixed: in `MIXED` instead of `CONFIG`, each with one of `SKETCHES`.
    """
    random, config = Random(seed), MIXED if mixed else CONFIG
    zone_tokens = config.zone_pages * config.channels // (2 * KV_HEADS) * config.tokens_per_page
    ones = np.ones((KV_HEADS, 1, config.head_dim), np.float16)
    spread, most, alive, created = 0, 0.0, 0, 0
    living: list[Sequence] = []
    with Device(GoldenDevice(config, dram_bytes=1 << 20)) as device:
        zones = device.free_zones

        def steps() -> Iterator[str]:
            while created < sequences or living:
                choice = ["grow", "free"] if living else []
                if created < sequences and len(living) < batch:
                    choice += ["create"] * 2
                yield random.choice(choice)

        for step in steps():
            if step == "create":
                tokens = max(1, round(longest * zone_tokens * 2 ** random.uniform(-6, 0)))
                try:
                    sketches = random.choice(SKETCHES) if mixed else {}
                    living.append(device.create_sequence(KV_HEADS, capacity_tokens=tokens, **sketches))
                    created += 1
                except CapacityError:
                    step = "free"
            if step == "grow":
                sequence = random.choice(living)
                tokens = min(sequence.capacity_tokens - sequence.length(), 1 + sequence.capacity_tokens // 2)
                if tokens:
                    sequence.append(*[np.repeat(ones, tokens, axis=1)] * 2)
            if step == "free":
                living.pop(random.randrange(len(living))).free()
                spread = max(spread, device.wear.spread)
            most, alive = max(most, 1 - device.free_zones / zones), max(alive, len(living))
        return Life(amplification=device.write_amplification, spread=spread, erases=device.wear.mean, occupancy=most,
                    sequences=created, alive=alive)


def write_amplification() -> dict[str, float]:
    """The worst of several runs: a batch as the paper's, fewer and larger sequences, and mixed ones."""
    lives = [live(seed=seed) for seed in SEEDS]
    large = [live(batch=LARGE_BATCH, longest=LARGE, seed=seed) for seed in SEEDS]
    mixed = [live(batch=LARGE_BATCH, longest=LARGE, sequences=SEQUENCES // 4, seed=seed, mixed=True) for seed in SEEDS]
    return {
        "flash.write_amplification": max(life.amplification for life in lives + large + mixed),
        "flash.wear_spread": max(life.spread for life in lives),
        "flash.wear_spread.large": max(life.spread for life in large),
        "flash.erases.mean": sum(life.erases for life in lives) / len(lives),
        "flash.erases.mean.large": sum(life.erases for life in large) / len(large),
    }
