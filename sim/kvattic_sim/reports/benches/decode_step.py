"""A decode step of one layer of OPT-13B, as work of the timing model; important tokens are anywhere."""

from collections.abc import Mapping
from types import MappingProxyType

from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.timing import Job, Layer

__all__ = ["HEADS", "UNIT", "WAYS", "step_jobs", "step_layer"]

HEADS = 40
"""KV heads of a layer."""
UNIT = 64
"""Tokens of a mean key."""
WAYS: Mapping[str, Mode] = MappingProxyType({"": Mode.DENSE, ".sparf": Mode.SPARF})
"""Suffix of a figure's key, and how the step is attended."""


def step_layer(config: Config, heads: int, tokens: int, mode: Mode) -> Layer:
    """Where K and V lie, and what a mode keeps beside them.

    Args:
        config: of the drive.
        heads: KV heads, of all sequences.
        tokens: of each.
        mode: of the attends.
    """
    return Layer(config, heads, tokens, features=mode.featured, centroids=UNIT if mode is Mode.CENTROID else 0,
                 codes=mode is Mode.CODES)


def step_jobs(config: Config, heads: int, tokens: int, mode: Mode, *, seed: int = 0) -> list[Job]:
    """The commands, one for each head; sparse ones read an eighth of the features and attend a sixteenth of the tokens.

    Args:
        config: of the drive.
        heads: KV heads, of all sequences.
        tokens: of each.
        mode: of the attends.
        seed: of what is selected.
    """
    unit = {Mode.FETCHED: config.tokens_per_codeword, Mode.CENTROID: UNIT}.get(mode, 1)
    return list(step_layer(config, heads, tokens, mode).attend(
        mode=mode, features=config.head_dim // 8 if mode.featured else 0,
        top_units=0 if mode is Mode.DENSE else tokens // 16 // unit, seed=seed))
