"""What an answer costs: energy of a token of OPT-13B, modelled; and what it costs to know.

The golden device notes what each job reads; how much slower that makes its attends is measured.
"""

import time
from typing import Any

import numpy as np

import kvattic
from kvattic.spec.commands import LINE_BYTES, Mode, query_row_bytes, result_row_bytes, table_bytes
from kvattic.spec.config import OCTET_FEATURES, PAPER, Config
from kvattic.timing import Estimate, estimate
from kvattic.timing.energy import Range, Work, energy_of
from kvattic.timing.life import programmed_bytes
from kvattic_sim.reports.benches.decode_step import HEADS, UNIT, step_jobs
from kvattic_sim.reports.benches.engine import Bench

__all__ = ["BENCHES", "ENERGY_KEYS", "NOTES_KEYS", "energy", "notes", "token_energy"]

LAYERS, TOKENS, BATCH = 40, 2048, 64
"""OPT-13B's, and the paper's prompt and batch."""
SAMPLE = 80
"""Jobs of a step that are modelled; the others go on at their rate."""
MODES = {
    "dense": Mode.DENSE, "sparf": Mode.SPARF, "fetched": Mode.FETCHED, "centroid": Mode.CENTROID, "codes": Mode.CODES}
ENERGY_KEYS = tuple(f"energy.token_mj.{mode}{bound}" for mode in MODES for bound in ("", ".low", ".high"))
NOTES: dict[str, dict[str, Any]] = {"dense": {}, "sparf": {"mode": "sparf", "features": 16, "top_units": 64}}
NOTES_KEYS = tuple(f"host.notes_ratio.{mode}" for mode in NOTES)
NOTES_HEADS, NOTES_TOKENS, ROUNDS = 4, 1024, 30


def _work(config: Config, found: Estimate, jobs: int, mode: Mode) -> Work:
    """What jobs of the same kind do."""
    stripes = -(-TOKENS // (config.group_tokens if mode is not Mode.DENSE else config.tokens_per_page))
    blocks = config.rows * (query_row_bytes(config.head_dim) + result_row_bytes(config.head_dim))
    octets = found.codewords["codes"]
    macs = (sum(found.codewords.values()) - octets) * config.codeword_bytes // config.kv_element_bytes
    return Work(page_reads=found.page_reads, bus_bytes=found.flash_bytes,
                link_bytes=jobs * (blocks + table_bytes(mode, stripes, config.head_dim) + 2 * LINE_BYTES),
                macs=config.rows * (macs + 2 * OCTET_FEATURES * octets), seconds=found.seconds)


def token_energy(mode: Mode, config: Config = PAPER) -> Range:
    """Joules of the drive for a token: its attention in all layers, and writing its K and V.

    Args:
        mode: of the attends.
        config: of the drive.
    """
    jobs = HEADS * BATCH
    found = estimate(config, step_jobs(config, SAMPLE, TOKENS, mode), in_all=jobs)
    attend = energy_of(config, _work(config, found, jobs, mode)).joules * (LAYERS / BATCH)
    written = programmed_bytes(config, layers=LAYERS, kv_heads=HEADS, features=mode.featured,
                               centroids=UNIT if mode is Mode.CENTROID else None, codes=mode is Mode.CODES)
    # A thousand tokens, because one programs a part of a page.
    pages = round(1000 * written / config.page_bytes)
    writing = energy_of(config, Work(page_programs=pages, bus_bytes=pages * config.raw_page_bytes,
                                     dram_bytes=2 * pages * config.page_bytes,
                                     link_bytes=pages * config.page_bytes)).joules * 1e-3
    return Range(*(a + b for a, b in zip(attend, writing, strict=True)))


def energy() -> dict[str, float]:
    """Millijoules of a token by mode, with their bounds."""
    figures: dict[str, float] = {}
    for name, mode in MODES.items():
        low, typical, high = token_energy(mode) * 1e3
        figures |= {f"energy.token_mj.{name}": typical, f"energy.token_mj.{name}.low": low,
                    f"energy.token_mj.{name}.high": high}
    return figures


def notes() -> dict[str, float]:
    """Processor time of the golden device's attend with its notes over that without; the fastest of each."""
    rng = np.random.default_rng(0)
    key = rng.standard_normal((NOTES_HEADS, NOTES_TOKENS, PAPER.head_dim)).astype(np.float16)
    query = key[:, :1]
    figures: dict[str, float] = {}
    with kvattic.open("model", PAPER) as noting, kvattic.open("model", PAPER, timed=False) as plain:
        sequences = [device.create_sequence(NOTES_HEADS, capacity_tokens=NOTES_TOKENS, sparse=True)
                     for device in (noting, plain)]
        for sequence in sequences:
            sequence.prefill(key, key)
        for mode, options in NOTES.items():
            fastest = [float("inf")] * 2
            for _ in range(ROUNDS):
                for which, sequence in enumerate(sequences):
                    begin = time.process_time()
                    sequence.attend(query, **options)
                    fastest[which] = min(fastest[which], time.process_time() - begin)
            figures[f"host.notes_ratio.{mode}"] = fastest[0] / fastest[1]
    return figures


BENCHES = (
    Bench(keys=NOTES_KEYS, measure=lambda lab: notes()),
    Bench(keys=ENERGY_KEYS, measure=lambda lab: energy()),
)
