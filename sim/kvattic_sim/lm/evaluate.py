"""What sparse attention costs the language model: bits per byte against the flash bytes that each method moves.

``python -m kvattic_sim.lm.evaluate`` prints the table, keeps the figures in build/bench.json and draws
docs/lm_quality.png; ``... --windows 4`` is a fast look, ``... --golden`` runs the golden device, ``... --tune`` tries
the settings of which `BEST` are the best. The first half of each
held-out window is prefilled densely, the second half decoded with the method in every layer, each byte fed whatever was
predicted.

To run the model over anything that attends, give `teacher_forced` a `model.Memory`; `DriveMemory` is that of a drive,
golden device or RTL.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvattic
from kvattic.driver.device import Device
from kvattic.spec.config import Config
from kvattic_sim.data import load_minilm
from kvattic_sim.lm.methods import (
    CODEWORD_BYTES,
    ELEMENT_BYTES,
    GROUP,
    Centroid,
    Dense,
    Fetched,
    HeavyHitters,
    Local,
    Method,
    PageSparf,
    Quest,
    Sparf,
    Sparq,
    Stateless,
    share_of,
)
from kvattic_sim.lm.model import Decoder, Halves, Layer, Memory, Shape, bits_per_byte, load, load_held_out
from kvattic_sim.reports import figures

__all__ = [
    "BEST",
    "GRIDS",
    "KEYS",
    "METHODS",
    "RATIOS",
    "DriveMemory",
    "ErrorRatio",
    "Head",
    "MethodMemory",
    "Quality",
    "Setting",
    "describe",
    "draw",
    "error_ratio",
    "golden_quality",
    "lm_heads",
    "main",
    "measure",
    "method_at",
    "minilm_heads",
    "possible",
    "quality",
    "selection",
    "setting_of",
    "teacher_forced",
    "tune",
]

Floats = NDArray[np.floating[Any]]

RATIOS = tuple(Fraction(1, 1 << n) for n in range(5))
METHODS = ("dense", "sparq", "sparf", "fetched", "centroid", "quest", "h2o", "local", "sinks", "pages")
"""By key: `sinks` is `local` with 4 first tokens, `pages` SparF with the paper's page reads."""
WINDOWS = 16
PLOT = Path("docs") / "lm_quality.png"
GOLDEN_WINDOW = 17
TUNE_EVERY = 3
"""Of the windows that are not reported, settings are tried on one in so many."""
SHORT_TAIL = 32
"""Tokens: of a long context the tail is a small part, of the windows' it is an eighth and more."""
ERROR_SETTINGS = tuple((features, share) for features in (8, 4, 2) for share in (8, 16, 32))
"""(head_dim / r, tokens / k) for which fetched is compared with SparF; the keys' figures are of `ERROR_KEY`."""
ERROR_KEY = (8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a method leaves open at a given number of bytes; each method heeds what concerns it.

    Attributes:
        features: r over head_dim, relative to the ratio of bytes: with 1, half of the bytes are of features.
        local: share of the selected tokens that goes to the newest.
        unit_tokens: tokens of a unit or page.
        rows: how the scores of a group's rows become one.
        heavy: share of H2O's tokens that goes to the heavy hitters.
        sinks: first tokens that are always attended.
        dense_layers: first layers with dense attention, whose bytes count; the other layers have fewer.
    """

    features: Fraction = Fraction(1)
    local: float = 0.25
    unit_tokens: int = 16
    rows: str = "softmax"
    heavy: float = 0.5
    sinks: int = 4
    dense_layers: int = 0

    def remaining(self, ratio: Fraction, layers: int) -> Fraction:
        """Bytes of a layer that is not dense, over those of dense attention, if all layers together have `ratio`."""
        return (layers * ratio - self.dense_layers) / (layers - self.dense_layers)


LAYERS, CONTEXT = 5, 1024
"""Of the language model."""
EXCESS = 0.1
GRIDS: dict[str, tuple[Setting, ...]] = {
    **dict.fromkeys(("sparq", "sparf", "fetched"), tuple(
        Setting(features=Fraction(halves, 2)) for halves in (2, 1, 3))),
    "centroid": tuple(Setting(unit_tokens=unit) for unit in (16, 8, 32, 64)),
    "quest": tuple(Setting(unit_tokens=unit, rows=rows, dense_layers=dense)
                   for dense in (0, 2) for unit in (16, 8, 32) for rows in ("softmax", "sum")),
    "h2o": tuple(Setting(heavy=heavy) for heavy in (0.5, 0.25, 0.75)),
    "sinks": tuple(Setting(sinks=sinks) for sinks in (4, 16)),
}
"""Settings that `tune` tries; `pages` has those of `sparf`, whose selection it is, and `local` has none. Of Quest the
paper keeps the first two layers dense."""
BEST: dict[tuple[str, Fraction], Setting] = {
    ("sparf", Fraction(1, 16)): Setting(features=Fraction(3, 2)),
    ("centroid", Fraction(1, 2)): Setting(unit_tokens=8),
    ("centroid", Fraction(1, 4)): Setting(unit_tokens=8),
    ("centroid", Fraction(1, 8)): Setting(unit_tokens=8),
    ("centroid", Fraction(1, 16)): Setting(unit_tokens=32),
    ("quest", Fraction(1, 2)): Setting(unit_tokens=8),
    ("quest", Fraction(1, 4)): Setting(unit_tokens=8),
    ("quest", Fraction(1, 16)): Setting(unit_tokens=32, rows="sum"),
    **{("h2o", ratio): Setting(heavy=0.25) for ratio in RATIOS[1:]},
}
"""Where `tune` found another one than `Setting()` better by 0.0005 bits or more, on windows that are not reported. Of
H2O, whose figures scatter most, the one that is best over all columns."""
_HEEDED = {"sparq": ("features",), "sparf": ("features",), "fetched": ("features",), "centroid": ("unit_tokens",),
           "quest": ("unit_tokens", "rows", "dense_layers"), "h2o": ("heavy",),
           "sinks": ("sinks",)}


def describe(name: str, ratio: Fraction, setting: Setting) -> str:
    """What a method heeds of a setting, in words."""
    values = {part: getattr(setting, part) for part in _HEEDED[name]}
    if "features" in values:
        values["features"] = f"{setting.features * ratio} d"
    return ", ".join(f"{part} {value}" for part, value in values.items())


def setting_of(name: str, ratio: Fraction) -> Setting:
    """The best setting of a method at a ratio."""
    return BEST.get(("sparf" if name == "pages" else name, ratio), Setting())


def method_at(name: str, ratio: Fraction, head_dim: int, setting: Setting | None = None) -> Method:
    """The method with parameters such that its nominal bytes are `ratio` of dense's.

    Nominal bytes are those of the elements that a method needs, if they could be read singly: SparF's are
    r / (2 head_dim) + k / tokens; mean keys of units of n tokens are 1 / (2 n), Quest's bounds 1 / n; the rest is for
    tokens. At 1, everything is attended.

    Args:
        name: one of `METHODS`.
        ratio: above 0, at most 1.
        head_dim: of the model.
        setting: what the bytes leave open; the best by default.

    Raises:
        ValueError: there is no such method, dense is wanted at another ratio than 1, or the setting leaves no bytes for
            tokens.
    """
    whole = ratio == 1
    setting = setting or setting_of(name, ratio)

    def rest(described: Fraction) -> float:
        left = setting.remaining(ratio, LAYERS) - described
        if left <= 0 and not whole:
            raise ValueError(f"at {ratio} of the bytes, setting ({setting}) must leave some for tokens of {name}")
        return 1.0 if whole else float(left)

    features = head_dim if whole else max(1, round(setting.features * ratio * head_dim))
    blended: dict[str, Any] = {"features": features, "local": setting.local}
    match name:
        case "dense" if whole:
            return Dense()
        case "sparq":
            return Sparq(share=rest(Fraction(features, 2 * head_dim)), **blended)
        case "sparf":
            return Sparf(share=rest(Fraction(features, 2 * head_dim)), **blended)
        case "pages":
            return PageSparf(share=rest(Fraction(features, 2 * head_dim)), **blended)
        case "fetched":
            return Fetched(share=rest(Fraction(features, 2 * head_dim)), **blended)
        case "centroid":
            return Centroid(share=rest(Fraction(1, 2 * setting.unit_tokens)), unit_tokens=setting.unit_tokens,
                            rows=setting.rows)
        case "quest":
            return Quest(share=rest(Fraction(1, setting.unit_tokens)), unit_tokens=setting.unit_tokens,
                         rows=setting.rows)
        case "h2o":
            return HeavyHitters(share=rest(Fraction(0)), heavy=setting.heavy)
        case "local":
            return Local(share=rest(Fraction(0)))
        case "sinks":
            return Local(share=rest(Fraction(0)), sinks=setting.sinks)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, dense at 1 only, not {name!r} at {ratio}")


def dense_bytes(method: Method, tokens: int, first: int, head_dim: int) -> int:
    """Flash bytes that dense attention moves in the decode steps from token `first`, of one KV head."""
    lengths = np.arange(first, tokens) + 1
    stored = lengths if isinstance(method, Sparq) else lengths // GROUP * GROUP
    return int(stored.sum()) * 2 * ELEMENT_BYTES * head_dim


@dataclass(slots=True, eq=False)
class _Measured:
    """A method as a `model.Attention` that counts what flash moves; the first layers may be dense."""

    method: Method
    dense_layers: int = 0
    flash_bytes: int = 0
    dense_bytes: int = 0

    def __call__(self, layer: int, tokens: Layer, first: int) -> Floats:
        parts = []
        for query, key, value in _heads(tokens, np.float32):
            everything = dense_bytes(self.method, len(key), first, key.shape[1])
            method = Dense() if layer < self.dense_layers else self.method
            outcome = method.decode(query, key, value, first)
            self.flash_bytes += everything if layer < self.dense_layers else int(outcome.flash_bytes.sum())
            self.dense_bytes += everything
            parts.append(outcome.output)
        return np.concatenate(parts, axis=1)


def _heads(tokens: Layer, kind: type[np.floating[Any]]) -> Iterator[tuple[Floats, Floats, Floats]]:
    """(query (tokens, rows, head_dim), key, value (tokens, head_dim)) of each KV head."""
    heads = tokens.key.shape[1]
    rows = tokens.query.shape[1] // heads
    for head in range(heads):
        yield (
            tokens.query[:, head * rows : (head + 1) * rows].astype(kind),
            np.ascontiguousarray(tokens.key[:, head]).astype(kind),
            np.ascontiguousarray(tokens.value[:, head]).astype(kind),
        )


class MethodMemory(Memory):
    """A method as a `model.Memory`, one decode step at a time: what the drive does, in NumPy.

    Args:
        method: the same in every layer.
        kind: float type that it computes in.
    """

    def __init__(self, method: Stateless, kind: type[np.floating[Any]] = np.float32) -> None:
        self._method, self._kind = method, kind
        self._layers: dict[int, tuple[Halves, Halves]] = {}

    def prefill(self, layer: int, key: Halves, value: Halves) -> None:
        """See `Memory`."""
        self._layers[layer] = key, value

    def append(self, layer: int, key: Halves, value: Halves) -> None:
        """See `Memory`."""
        keys, values = self._layers[layer]
        self._layers[layer] = np.concatenate([keys, key[None]]), np.concatenate([values, value[None]])

    def attend(self, layer: int, query: Halves, position: int) -> Floats:
        """See `Memory`."""
        key, value = self._layers[layer]
        # Only the last query counts; the other positions are there to fit.
        tokens = Layer(query=np.broadcast_to(query, (len(key), *query.shape)), key=key, value=value)
        return np.concatenate([
            self._method.attend(q[-1:], k, v, np.array([position + 1])).output[0]
            for q, k, v in _heads(tokens, self._kind)
        ])


def selection(method: Method, flash: int, head_dim: int) -> dict[str, Any]:
    """The arguments of `kvattic.Sequence.attend` that make the drive do what the method does.

    Args:
        method: Dense, Sparf, Fetched or Centroid.
        flash: tokens in flash; with none of them, every mode is dense attention.
        head_dim: of the drive.

    Raises:
        ValueError: the drive has no such mode.
    """
    codeword = CODEWORD_BYTES // (ELEMENT_BYTES * head_dim)

    def units(unit: int) -> dict[str, Any]:
        assert isinstance(method, (Sparf, Fetched, Centroid))
        wanted = share_of(method.share, np.array(flash // unit))
        local = 0 if isinstance(method, Centroid) else unit * int(share_of(method.local, wanted, 0))
        return {"mode": method.name, "top_units": int(wanted), "local_tokens": local}

    if not flash and isinstance(method, (Sparf, Fetched, Centroid)):
        return {}
    match method:
        case Dense():
            return {}
        case PageSparf():
            pass
        case Sparf():
            return {**units(1), "features": method.features}
        case Fetched():
            unit = method.unit_tokens or codeword
            return {**units(unit), "features": method.features, "unit_tokens": unit}
        case Centroid():
            return {**units(method.unit_tokens), "unit_tokens": method.unit_tokens}
    raise ValueError(f"method must be dense, sparf, fetched or centroid, not {method.name}")


class DriveMemory(Memory):
    """A sequence in a drive as a `model.Memory`: the golden device's, or that of simulated RTL.

    Args:
        device: of the model's head_dim, with at least as many rows as query heads share a KV head; fp16.
        shape: the model's.
        method: the same in every layer; see `selection`.
    """

    def __init__(self, device: Device, shape: Shape, method: Method) -> None:
        self._method = method
        self.sequence = device.create_sequence(
            shape.kv_heads,
            capacity_tokens=shape.context,
            layers=shape.layers,
            sparse=isinstance(method, (Sparf, Fetched)),
            centroids=method.unit_tokens if isinstance(method, Centroid) else None,
        )
        """Freed by whoever made the memory."""

    def prefill(self, layer: int, key: Halves, value: Halves) -> None:
        """See `Memory`."""
        self.sequence.prefill(key.swapaxes(0, 1), value.swapaxes(0, 1), layer=layer)

    def append(self, layer: int, key: Halves, value: Halves) -> None:
        """See `Memory`."""
        self.sequence.append(key[:, None], value[:, None], layer=layer)

    def attend(self, layer: int, query: Halves, position: int) -> Floats:
        """See `Memory`."""
        del position  # the newest of the sequence
        arguments = selection(self._method, self.sequence.flushed(layer), query.shape[1])
        return self.sequence.attend(query[:, None], layer=layer, **arguments).output[:, 0]


def golden_quality(decoder: Decoder, window: NDArray[np.uint8], method: Method) -> NDArray[np.float64]:
    """Bits of each byte of a window's second half, decoded on the golden device: a minute.

    Args:
        decoder: the model.
        window: uint8, (tokens + 1,).
        method: Dense, Sparf, Fetched or Centroid.

    Returns:
        float64, (tokens / 2,).
    """
    shape = decoder.shape
    config = Config(head_dim=shape.head_dim, rows=shape.query_heads // shape.kv_heads)
    with kvattic.open("model", config) as device:
        memory = DriveMemory(device, shape, method)
        with memory.sequence:
            return teacher_forced(decoder, window, memory, (len(window) - 1) // 2)


def teacher_forced(decoder: Decoder, window: NDArray[np.uint8], memory: Memory, prefix: int) -> NDArray[np.float64]:
    """Bits of each byte of a window that was decoded from `memory`, behind a densely prefilled prefix.

    Args:
        decoder: the model.
        window: uint8, (tokens + 1,): the last byte is predicted and never fed.
        memory: it stores K and V, and attends.
        prefix: number of bytes that are prefilled, from 1.

    Returns:
        float64, (tokens - prefix,): for the bytes from number prefix + 1.
    """
    logits = decoder.decode(window[:-1], prefix, memory)
    return bits_per_byte(logits[prefix:], window[prefix + 1 :])


@dataclass(frozen=True, slots=True)
class Quality:
    """A point of the plot.

    Attributes:
        bits: bits per byte.
        flash_bytes: bytes moved from flash, relative to dense attention.
        error: standard error of the difference to dense attention's bits per byte, over windows.
        short_tail: bits per byte where at most `SHORT_TAIL` tokens are in device DRAM.
    """

    bits: float
    flash_bytes: float
    error: float
    short_tail: float


def quality(
    decoder: Decoder,
    windows: NDArray[np.uint8],
    methods: Mapping[tuple[str, Fraction], Method],
    report: Callable[[str], None] = lambda line: None,
    dense_layers: Mapping[tuple[str, Fraction], int] = MappingProxyType({}),
) -> dict[tuple[str, Fraction], Quality]:
    """Measure each method on the second half of each window.

    Args:
        decoder: the model.
        windows: uint8, (windows, tokens + 1).
        methods: by name and ratio; ("dense", 1) among them.
        report: is told how it goes.
        dense_layers: first layers with dense attention, by name and ratio; none where there is nothing.

    Returns:
        The qualities, by the same keys.
    """
    first = (windows.shape[1] - 1) // 2
    measured = {key: _Measured(method, dense_layers.get(key, 0)) for key, method in methods.items()}
    bits: dict[tuple[str, Fraction], list[NDArray[np.float64]]] = {key: [] for key in methods}
    for number, window in enumerate(windows):
        begin = time.monotonic()
        _, prefix = decoder.forward(window[:first])
        for key, attention in measured.items():
            logits, _ = decoder.forward(window[first:-1], attention, prefix)
            bits[key].append(bits_per_byte(logits, window[first + 1 :]))
        report(f"window {number + 1} of {len(windows)}: {time.monotonic() - begin:.1f} s")
    dense = np.array(bits["dense", RATIOS[0]])
    short = np.arange(first + 1, windows.shape[1]) % GROUP <= SHORT_TAIL
    result = {}
    for key, attention in measured.items():
        each = np.array(bits[key])
        differences = (each - dense).mean(axis=1)
        result[key] = Quality(
            bits=float(each.mean()),
            flash_bytes=attention.flash_bytes / attention.dense_bytes,
            error=float(differences.std(ddof=1) / math.sqrt(len(windows))) if len(windows) > 1 else 0.0,
            short_tail=float(each[:, short].mean()),
        )
    return result


# The best settings.


def possible(name: str, ratio: Fraction, head_dim: int) -> dict[Setting, Method]:
    """The settings of a method's grid that leave bytes for tokens at a ratio.

    Units are whole, and the model's contexts short: rounded, a setting may read more than its share. Those that exceed
    it by more than `EXCESS` are left out; if all do, all but those of the least.
    """
    found, bytes_read = {}, {}
    for setting in GRIDS[name]:
        try:
            found[setting] = method_at(name, ratio, head_dim, setting)
        except ValueError:
            continue
        bytes_read[setting] = _rounded(found[setting]) / float(setting.remaining(ratio, LAYERS))
    limit = max(1 + EXCESS, min(bytes_read.values()) + 1e-9)
    return {setting: method for setting, method in found.items() if bytes_read[setting] <= limit}


def _rounded(method: Method) -> float:
    """Bytes of a `Centroid` or `Quest` with whole units, over those of dense attention; 0 for what reads tokens."""
    if not isinstance(method, (Centroid, Quest)):
        return 0.0
    flash = np.arange(CONTEXT // 2, CONTEXT, GROUP)
    tokens = share_of(method.share, flash // method.unit_tokens) * method.unit_tokens
    return float(tokens.sum() / flash.sum()) + method.entries / (2 * method.unit_tokens)


def tune(decoder: Decoder, windows: NDArray[np.uint8], report: Callable[[str], None] = lambda line: None,
         names: Sequence[str] = tuple(GRIDS), ratios: Sequence[Fraction] = RATIOS[1:],
         ) -> dict[tuple[str, Fraction], dict[Setting, float]]:
    """Bits per byte of every setting of every method's grid: 20 minutes.

    Args:
        decoder: the model.
        windows: uint8, (windows, tokens + 1), other ones than those that are reported.
        report: is told how it goes.
        names: methods.
        ratios: of bytes.

    Returns:
        By method and ratio.
    """
    first = (windows.shape[1] - 1) // 2
    prefixes = [decoder.forward(window[:first])[1] for window in windows]

    def bits(method: Method, setting: Setting) -> float:
        attention = _Measured(method, setting.dense_layers)
        return float(np.mean([bits_per_byte(decoder.forward(window[first:-1], attention, prefix)[0],
                                            window[first + 1 :]).mean()
                              for window, prefix in zip(windows, prefixes, strict=True)]))

    found: dict[tuple[str, Fraction], dict[Setting, float]] = {}
    for name in names:
        for ratio in ratios:
            tried = found[name, ratio] = {
                setting: bits(method, setting)
                for setting, method in possible(name, ratio, decoder.shape.head_dim).items()}
            for setting in sorted(tried, key=lambda setting: tried[setting]):
                report(f"{name} at {ratio}, {describe(name, ratio, setting)}: {tried[setting]:.4f}")
    return found


# Fetched against SparF.


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Decode steps of one KV head, float64: the arguments of `Stateless.attend`."""

    query: Floats
    key: Floats
    value: Floats
    lengths: NDArray[np.int64]


def lm_heads(decoder: Decoder, windows: NDArray[np.uint8]) -> Iterator[Head]:
    """Every layer and KV head of the language model, the second half of each window, in dense attention."""
    first = (windows.shape[1] - 1) // 2
    for window in windows:
        for layer in decoder.forward(window[:-1])[1]:
            for query, key, value in _heads(layer, np.float64):
                yield Head(query[first:], key, value, np.arange(first, len(key)) + 1)


def minilm_heads() -> Iterator[Head]:
    """Every layer and head of the MiniLM data: each of the 512 positions attends all tokens; there is no tail."""
    data = load_minilm()
    shape = data.q.shape
    for q, k, v in zip(*(x.astype(np.float64).reshape(-1, *shape[2:]) for x in (data.q, data.k, data.v)), strict=True):
        yield Head(q[:, None], k, v, np.full(len(k), len(k)))


def _error(heads: Sequence[Head], dense: Sequence[Floats], method: Stateless) -> tuple[float, float]:
    """(relative RMS error of the outputs, flash bytes)."""
    wrong = size = moved = 0.0
    for head, right in zip(heads, dense, strict=True):
        outcome = method.attend(head.query, head.key, head.value, head.lengths)
        wrong += float(np.square(outcome.output - right).sum())
        size += float(np.square(right).sum())
        moved += float(outcome.flash_bytes.sum())
    return math.sqrt(wrong / size), moved


@dataclass(frozen=True, slots=True)
class ErrorRatio:
    """Fetched against SparF at equal bytes.

    Attributes:
        sparf: relative RMS error of SparF's outputs.
        fetched: of fetched's, where it moves the same bytes.
        flash_bytes: those, relative to dense attention.
    """

    sparf: float
    fetched: float
    flash_bytes: float

    @property
    def ratio(self) -> float:
        """Fetched's error over SparF's."""
        return self.fetched / self.sparf


def error_ratio(heads: Sequence[Head], features: int, share: float) -> ErrorRatio:
    """Compare the output errors of fetched and SparF where both move the same bytes.

    Both have the same r. The share of codewords that fetched reads is chosen between two 64ths whose bytes are below
    and above SparF's, and its squared error interpolated between them.

    Args:
        heads: what is attended.
        features: r of both.
        share: k of SparF, as a share of the tokens in flash.
    """
    dense, everything = [], 0.0
    for head in heads:
        outcome = Dense().attend(head.query, head.key, head.value, head.lengths)
        dense.append(outcome.output)
        everything += float(outcome.flash_bytes.sum())
    sparf, moved = _error(heads, dense, Sparf(features=features, share=share))
    # What is not of the first pass is K and V of tokens.
    low = math.floor((moved / everything - features / (2 * heads[0].key.shape[1])) * 64)
    below, above = (_error(heads, dense, Fetched(features=features, share=n / 64)) for n in (low, low + 1))
    part = (moved - below[1]) / (above[1] - below[1])
    fetched = math.sqrt((1 - part) * below[0] ** 2 + part * above[0] ** 2)
    return ErrorRatio(sparf, fetched, moved / everything)


# The report.


def _name(ratio: Fraction) -> str:
    return str(ratio).replace("/", "_")


def _table(qualities: Mapping[tuple[str, Fraction], Quality]) -> Table:
    table = Table(title="Bits per byte on held-out text, and flash bytes moved relative to dense attention")
    table.add_column("method")
    for ratio in RATIOS:
        table.add_column(str(ratio), justify="right")
        table.add_column("bytes", justify="right", style="dim")
    for method in METHODS:
        cells = []
        for ratio in RATIOS:
            point = qualities.get((method, ratio))
            cells += [f"{point.bits:.4f}", f"{point.flash_bytes:.3f}"] if point else ["", ""]
        table.add_row(method, *cells)
    return table


def _settings_table() -> Table:
    table = Table(title="The best settings, found on other windows (--tune); those of pages are SparF's")
    table.add_column("method")
    for ratio in RATIOS[1:]:
        table.add_column(str(ratio))
    for name in GRIDS:
        table.add_row(name, *(describe(name, ratio, setting_of(name, ratio)) for ratio in RATIOS[1:]))
    return table


def _loss_table(qualities: Mapping[tuple[str, Fraction], Quality]) -> Table:
    table = Table(title=f"Bits per byte more than dense; in brackets where {SHORT_TAIL} tokens or fewer are in DRAM")
    table.add_column("method")
    for ratio in RATIOS[1:]:
        table.add_column(str(ratio), justify="right")
    dense = qualities["dense", RATIOS[0]]
    for method in METHODS[1:]:
        table.add_row(method, *(
            f"{point.bits - dense.bits:+.4f} ± {point.error:.4f} ({point.short_tail - dense.short_tail:+.4f})"
            for point in (qualities[method, ratio] for ratio in RATIOS[1:])
        ))
    return table


_LABELS = {
    "sparq": "SparQ, in memory",
    "sparf": "SparF",
    "fetched": "fetched",
    "centroid": "centroid",
    "quest": "Quest",
    "h2o": "H2O",
    "local": "newest tokens",
    "sinks": "first and newest tokens",
    "pages": "SparF, 4 KB pages (the paper)",
}


def draw(qualities: Mapping[tuple[str, Fraction], Quality], path: Path) -> None:
    """Plot bits per byte against flash bytes moved, a curve for each method, and write it to a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    styles = {
        "sparf": ("C0", "o", "-", 2.2),
        "fetched": ("C2", "s", "-", 2.2),
        "centroid": ("C1", "^", "-", 2.2),
        "pages": ("C3", "X", "-", 2.2),
        "sparq": ("C9", "p", ":", 1.5),
        "quest": ("C4", "v", "--", 1.2),
        "h2o": ("C5", "D", "--", 1.2),
        "local": ("0.45", "P", "--", 1.2),
        "sinks": ("0.65", "*", "--", 1.2),
    }
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    dense = qualities["dense", RATIOS[0]].bits
    axes.axhline(dense, color="black", linewidth=1)
    axes.annotate("dense", (0.01, dense), (0, -3), axes.get_yaxis_transform(), "offset points", va="top")
    for name, (colour, marker, line, width) in styles.items():
        points = sorted(
            (point.flash_bytes, point.bits) for (method, ratio), point in qualities.items()
            if method == name and ratio != RATIOS[0]
        )
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=width,
                  markersize=5, label=_LABELS[name])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(Fraction(x).limit_denominator(64))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes moved from flash, relative to dense attention")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _errors_table(name: str, results: Mapping[tuple[int, int], ErrorRatio]) -> Table:
    table = Table(title=f"Output error of fetched and SparF at equal flash bytes, {name}")
    for column in ("r", "k", "bytes / dense", "SparF", "fetched", "ratio"):
        table.add_column(column, justify="right")
    for (features, share), result in results.items():
        table.add_row(f"d/{features}", f"S/{share}", f"{result.flash_bytes:.3f}", f"{result.sparf:.4f}",
                      f"{result.fetched:.4f}", f"{result.ratio:.3f}")
    return table


def _golden(console: Console, decoder: Decoder, window: NDArray[np.uint8]) -> None:
    """Print and keep what the golden device gives, beside the methods in NumPy."""
    first = (len(window) - 1) // 2
    _, prefix = decoder.forward(window[:first])
    table = Table(title=f"Bits per byte of window {GOLDEN_WINDOW}, bytes {first + 1} to {len(window) - 1}")
    for column in ("mode", "NumPy", "golden device", "largest difference of a byte"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for name in ("dense", "sparf", "fetched", "centroid"):
        ratio = Fraction(1) if name == "dense" else Fraction(1, 8)
        method = method_at(name, ratio, decoder.shape.head_dim, Setting())
        logits, _ = decoder.forward(window[first:-1], _Measured(method), prefix)
        numpy = bits_per_byte(logits, window[first + 1 :])
        golden = golden_quality(decoder, window, method)
        table.add_row(name, f"{numpy.mean():.5f}", f"{golden.mean():.5f}", f"{np.abs(golden - numpy).max():.5f}")
        figures.record({f"lm.golden.bits_per_byte.{name}.{_name(ratio)}": float(golden.mean())})
    console.print(table)


KEYS = (
    *(f"lm.{kind}.{name}.{_name(ratio)}" for name in METHODS for ratio in (RATIOS[:1] if name == "dense" else RATIOS)
      for kind in ("bits_per_byte", "bits_per_byte.short_tail", "flash_bytes")),
    *(f"sparse.fetched.error_ratio.{key}" for key in ("lm", "minilm")),
)
"""What `measure` returns."""


def _reported(count: int, every: int) -> NDArray[np.int64]:
    """Numbers of the windows that are reported: spread over the files, of which some have several windows."""
    return np.linspace(0, every - 1, count).round().astype(np.int64)


def measure(windows: int = WINDOWS, plot: Path = PLOT, progress: Callable[[str], None] = lambda line: None,
            console: Console | None = None) -> dict[str, float]:
    """All figures of `KEYS`; draws the plot, and prints the tables if there is a console.

    Args:
        windows: held-out windows.
        plot: where the plot goes.
        progress: told what is being done.
        console: for the tables.
    """
    decoder, text = load(), load_held_out()
    chosen = text.windows[_reported(windows, len(text.windows))]
    methods = {
        (name, ratio): method_at(name, ratio, decoder.shape.head_dim)
        for name in METHODS for ratio in (RATIOS[:1] if name == "dense" else RATIOS)
    }
    qualities = quality(decoder, chosen, methods, progress,
                        {(name, ratio): setting_of(name, ratio).dense_layers for name, ratio in methods})
    draw(qualities, plot)
    found = {
        f"lm.{kind}.{name}.{_name(ratio)}": value
        for (name, ratio), point in qualities.items()
        for kind, value in (
            ("bits_per_byte", point.bits),
            ("bits_per_byte.short_tail", point.short_tail),
            ("flash_bytes", point.flash_bytes),
        )
    }
    tables = [_table(qualities), _loss_table(qualities), _settings_table()]
    # A quarter of the windows is enough for an error of all layers' outputs.
    for key, title, heads in (
        ("lm", "the language model", list(lm_heads(decoder, chosen[::4]))),
        ("minilm", "MiniLM", list(minilm_heads())),
    ):
        progress(f"fetched against SparF on {title}")
        head_dim = heads[0].key.shape[1]
        results = {
            (features, share): error_ratio(heads, head_dim // features, 1 / share)
            for features, share in ERROR_SETTINGS
        }
        tables.append(_errors_table(title, results))
        found[f"sparse.fetched.error_ratio.{key}"] = results[ERROR_KEY].ratio
    if console is not None:
        for table in tables:
            console.print(table)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=PLOT, help="(default: %(default)s)")
    parser.add_argument("--tune", action="store_true",
                        help="instead: try every setting of every method, on windows that are not reported")
    parser.add_argument("--golden", action="store_true",
                        help="instead: decode half a window on the golden device, with each of its modes at 1/8")
    args = parser.parse_args(arguments)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    text = load_held_out()
    if not 1 <= args.windows <= len(text.windows):
        parser.error(f"--windows must be from 1 to {len(text.windows)}, not {args.windows}")
    if args.tune:
        others = np.setdiff1d(np.arange(len(text.windows)), _reported(WINDOWS, len(text.windows)))[::TUNE_EVERY]
        tune(load(), text.windows[others], lambda line: console.print(line, highlight=False))
        return 0
    if args.golden:
        _golden(console, load(), text.windows[GOLDEN_WINDOW])
        return 0
    figures.record(measure(args.windows, args.plot, lambda line: console.print(line, style="dim"), console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
