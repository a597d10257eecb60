"""build/bench.json: the figures that benches and synthesis measured, by key."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

PATH = Path("build") / "bench.json"


def load() -> dict[str, float | bool]:
    """All figures recorded so far."""
    figures: dict[str, float | bool] = json.loads(PATH.read_text()) if PATH.exists() else {}
    return figures


def record(figures: Mapping[str, float | bool]) -> None:
    """Add or replace figures; the others stay."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    part = PATH.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(dict(sorted({**load(), **figures}.items())), indent=2) + "\n")
    part.replace(PATH)   # a reader never sees half a file
