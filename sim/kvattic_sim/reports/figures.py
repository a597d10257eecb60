"""build/bench.json: the figures that benches and synthesis measured, by key."""

import json
from collections.abc import Mapping
from pathlib import Path

from kvattic.support.files import write_whole

PATH = Path("build") / "bench.json"


def load() -> dict[str, float | bool]:
    """All figures recorded so far."""
    figures: dict[str, float | bool] = json.loads(PATH.read_text()) if PATH.exists() else {}
    return figures


def record(figures: Mapping[str, float | bool]) -> None:
    """Add or replace figures; the others stay."""
    write_whole(PATH, json.dumps(dict(sorted({**load(), **figures}.items())), indent=2) + "\n")
