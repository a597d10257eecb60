"""Parameters and files of verilog/nand_channel.sv: contents, trace, log (its settings: `write_configuration`).

Contents go through files as whole arrays, never word by word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Shape

from kvattic.spec.config import Config
from kvattic_hdl import PhyShapes
from kvattic_sim.nand.twin import Event

__all__ = ["nand_parameters", "read_log", "read_pages", "read_trace", "write_pages"]

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def nand_parameters(config: Config, *, frames: int = 256) -> dict[str, int]:
    """Parameters of nand_channel.sv.

    Args:
        config: geometry and shapes.
        frames: pages whose contents are kept at a time; others are erased, or a load or program of them is lost.
    """
    shapes = PhyShapes(config)
    part = config.part
    return {
        "TARGET_BITS": shapes.target.width,
        "CYCLE_BITS": shapes.cycle.size,
        "CYCLE_ADDRESS_AT": shapes.cycle["address"].offset,
        "CYCLE_BYTE_AT": shapes.cycle["byte"].offset,
        "BURST_BITS": shapes.burst.size,
        "BURST_WRITE_AT": shapes.burst["write"].offset,
        "BURST_BYTES_AT": shapes.burst["bytes"].offset,
        "BURST_BYTES_BITS": Shape.cast(shapes.burst["bytes"].shape).width,
        "WORD_BITS": shapes.word.width,
        "DIES": config.dies,
        "PLANES": part.planes,
        "BLOCKS": part.blocks,
        "PAGES": part.pages,
        "MARK_COLUMN": part.mark_column,
        "RAW_BYTES": part.raw_bytes,
        "PAGE_WORDS": _page_words(config),
        "FRAMES": frames,
        "SEPARATE_BUS": int(part.separate_command_bus),
        "RETRY_LEVELS": part.retry_levels,
        "ENDURANCE": part.endurance,
    }


def _page_words(config: Config) -> int:
    return -(-config.part.raw_bytes // config.word_bytes)


def write_pages(directory: Path, config: Config, pages: Mapping[int, bytes] | tuple[Iterable[int], _Bytes], *,
                channel: int = 0) -> None:
    """Write what the model reads when `load` changes: raw pages, as if they had been programmed.

    Args:
        directory: where the model runs.
        config: geometry.
        pages: raw bytes of each page by its `NandPart.page_index`, or indices and an array with a row for each; bytes
            that are not given are FFh.
        channel: number of the channel.

    Raises:
        ValueError: a page is longer than a raw page.
    """
    if isinstance(pages, Mapping):
        indices = np.fromiter(pages, np.int64, len(pages))
        longest = max(map(len, pages.values()), default=0)
        data = np.full((len(pages), longest), 0xFF, np.uint8)
        for row, page in zip(data, pages.values(), strict=True):
            row[: len(page)] = np.frombuffer(bytes(page), np.uint8)
    else:
        indices = np.asarray(list(pages[0]), np.int64)
        data = pages[1]
    if data.shape[1] > config.part.raw_bytes:
        raise ValueError(f"a page must be at most {config.part.raw_bytes} bytes, not {data.shape[1]}")
    size = config.word_bytes
    words = max(1, -(-data.shape[1] // size))
    records = np.full((len(indices), 8 + words * size), 0xFF, np.uint8)
    records[:, 8 : 8 + data.shape[1]] = data
    records[:, :4] = indices.astype(">u4").view(np.uint8).reshape(-1, 4)
    records[:, 4:8] = np.array([words], ">u4").view(np.uint8)
    # A word's last byte comes first.
    records[:, 8:] = records[:, 8:].reshape(-1, words, size)[:, :, ::-1].reshape(len(indices), -1)
    records.tofile(directory / f"nand{channel}.bin")


def read_pages(directory: Path, config: Config, *, channel: int = 0) -> dict[int, bytes]:
    """What the model wrote when `dump` changed: raw bytes of each page that is not erased, by its index."""
    size, words = config.word_bytes, _page_words(config)
    pages = {}
    with (directory / f"nand{channel}.dump").open("rb") as file:
        for line in file:
            index, text = line.split()
            data = np.frombuffer(bytes.fromhex(text.decode()), np.uint8).reshape(words, size)[:, ::-1]
            pages[int(index)] = data.tobytes()[: config.part.raw_bytes]
    return pages


def read_log(directory: Path, *, channel: int = 0) -> list[str]:
    """What the controller did wrong, as `NandChannel.violations`."""
    path = directory / f"nand{channel}.log"
    return path.read_text().splitlines() if path.exists() else []


def read_trace(directory: Path, *, channel: int = 0) -> list[Event]:
    """What happened when, as `NandChannel.events`; complete after a change of `dump` or at the simulation's end."""
    events = []
    with (directory / f"nand{channel}.trace").open() as file:
        for line in file:
            start, end, die, plane, kind, page = line.split()
            events.append(Event(int(start), int(end), int(die), int(plane), kind, int(page)))
    return events
