"""The language model in NumPy: any attention can take the place of its own.

A byte-level Llama-architecture decoder: RMSNorm, rotary positions, SwiGLU, several query heads for each KV head, the
embedding also the output matrix. It computes in float32, but queries, keys and values are rounded to float16, as the
drive gets them.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Attention",
    "Decoder",
    "HeldOut",
    "Layer",
    "Memory",
    "Shape",
    "bits_per_byte",
    "dense",
    "load",
    "load_held_out",
]

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]

EPSILON = np.float32(1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model.

    Members:
        layers, width, query_heads, kv_heads, head_dim: of the decoder; query head i reads KV head
            i // (query_heads // kv_heads).
        hidden: of the feed-forward part.
        vocabulary: 256 bytes; byte 0 parts the files that it was trained on.
        context: positions that it was trained with.
        rope_base: base of the rotary positions' wavelengths.
    """

    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    context: int
    rope_base: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """What one layer's attention is given.

    Members:
        query: float16, (tokens, query_heads, head_dim), before the scaling by head_dim**-0.5.
        key: float16, (tokens, kv_heads, head_dim).
        value: float16, of the same shape.
    """

    query: Halves
    key: Halves
    value: Halves

    def after(self, first: "Layer") -> "Layer":
        """These tokens behind those of `first`."""
        return Layer(
            query=np.concatenate([first.query, self.query]),
            key=np.concatenate([first.key, self.key]),
            value=np.concatenate([first.value, self.value]),
        )


Attention = Callable[[int, Layer, int], NDArray[np.floating[Any]]]
"""(layer's number, all tokens so far, number of the first whose output is wanted) -> floats, (tokens from that one on,
query_heads, head_dim). Token t attends tokens 0 to t."""


class Memory(Protocol):
    """Where K and V live, if not in the model: the drive's sequence, or what stands for it.

    `Decoder.decode` calls, for each layer, `prefill` once, then for each token `append` and `attend`.
    """

    def prefill(self, layer: int, key: Halves, value: Halves) -> None:
        """Take K and V of the first tokens: float16, (tokens, kv_heads, head_dim)."""

    def append(self, layer: int, key: Halves, value: Halves) -> None:
        """Take K and V of one more token: float16, (kv_heads, head_dim)."""

    def attend(self, layer: int, query: Halves, position: int) -> NDArray[np.floating[Any]]:
        """Attend tokens 0 to position, which is the newest, from query, float16, (query_heads, head_dim).

        Returns:
            floats, (query_heads, head_dim).
        """


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def dense(layer: int, tokens: Layer, first: int) -> Floats:
    """Causal attention over all tokens, in float32: an `Attention`. It does not depend on `layer`, the number."""
    del layer
    length, heads, head_dim = tokens.query.shape
    group = heads // tokens.key.shape[1]
    q = tokens.query[first:].astype(np.float32).transpose(1, 0, 2)
    k, v = (np.repeat(x.astype(np.float32).transpose(1, 0, 2), group, axis=0) for x in (tokens.key, tokens.value))
    scores = q @ k.transpose(0, 2, 1) * np.float32(head_dim**-0.5)
    future = np.arange(length) > np.arange(first, length)[:, None]
    return np.asarray((_softmax(np.where(future, np.float32(-np.inf), scores)) @ v).transpose(1, 0, 2))


class Decoder:
    """The model.

    Args:
        shape: its sizes.
        weights: by name, matrices as (inputs, outputs), of any float type; computed with in float32.
    """

    def __init__(self, shape: Shape, weights: dict[str, NDArray[Any]]) -> None:
        self.shape = shape
        self._weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
        angle = np.arange(shape.context)[:, None] * float(shape.rope_base) ** (
            -np.arange(0, shape.head_dim, 2) / shape.head_dim
        )
        self._cos = np.cos(angle).astype(np.float32)[:, None]
        self._sin = np.sin(angle).astype(np.float32)[:, None]

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPSILON)
        return np.asarray(x / scale * self._weights[name])

    def _project(self, number: int, x: Floats, first: int) -> Layer:
        """Queries, keys and values of a layer for tokens that begin at position `first`."""
        inner = self._norm(x, f"{number}.attention_norm")
        cos, sin = self._cos[first : first + len(x)], self._sin[first : first + len(x)]

        def heads(name: str, rotated: bool) -> Halves:
            y = (inner @ self._weights[f"{number}.{name}"]).reshape(len(x), -1, self.shape.head_dim)
            if rotated:
                low, high = np.split(y, 2, axis=-1)
                y = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
            return y.astype(np.float16)

        return Layer(query=heads("query", True), key=heads("key", True), value=heads("value", False))

    def _finish(self, number: int, x: Floats, mixed: NDArray[Any]) -> Floats:
        """The rest of a layer after its attention."""
        w = self._weights
        x = x + mixed.reshape(len(x), -1).astype(np.float32) @ w[f"{number}.output"]
        inner = self._norm(x, f"{number}.mlp_norm")
        gate = inner @ w[f"{number}.gate"]
        return np.asarray(x + (gate / (1 + np.exp(-gate)) * (inner @ w[f"{number}.up"])) @ w[f"{number}.down"])

    def _logits(self, x: Floats) -> Floats:
        return np.asarray(self._norm(x, "norm") @ self._weights["embedding"].T)

    def _check(self, tokens: NDArray[np.integer[Any]]) -> None:
        if tokens.ndim != 1 or not 1 <= len(tokens) <= self.shape.context:
            raise ValueError(f"tokens must be one row of 1 to {self.shape.context}, not of shape {tokens.shape}")

    def forward(
        self, tokens: NDArray[np.integer[Any]], attention: Attention = dense, prefix: Sequence[Layer] | None = None
    ) -> tuple[Floats, list[Layer]]:
        """Run the model over a sequence, or the rest of one, all of its tokens at once.

        Args:
            tokens: integers below the vocabulary, (tokens,); no more than the context, with the prefix.
            attention: what each layer attends with. Since nothing depends on later tokens, this is the same as to
                decode token after token.
            prefix: what an earlier call returned for the tokens before these.

        Returns:
            The logits of each token's successor, float32, (tokens, vocabulary), and for each layer the queries, keys
            and values of all tokens, the prefix included.

        Raises:
            ValueError: tokens is no row of 1 to context, or goes beyond the context behind the prefix.
        """
        self._check(tokens)
        first = len(prefix[0].query) if prefix else 0
        if first + len(tokens) > self.shape.context:
            raise ValueError(f"prefix and tokens must be at most {self.shape.context}, not {first} + {len(tokens)}")
        x = self._weights["embedding"][tokens]
        layers = []
        for number in range(self.shape.layers):
            layer = self._project(number, x, first)
            if prefix:
                layer = layer.after(prefix[number])
            layers.append(layer)
            x = self._finish(number, x, attention(number, layer, first))
        return self._logits(x), layers

    def decode(self, tokens: NDArray[np.integer[Any]], prefix: int, memory: Memory) -> Floats:
        """Run the model over a sequence as it is served: a dense prefill, then token after token from `memory`.

        Args:
            tokens: integers below the vocabulary, (tokens,); no more than the context. Each is fed, whatever the model
                predicted (teacher forcing).
            prefix: number of the tokens that are prefilled, from 1.
            memory: it gets all K and V, and computes the attention of all tokens behind the prefix.

        Returns:
            The logits of each token's successor, float32, (tokens, vocabulary).

        Raises:
            ValueError: tokens is no row of 1 to context, or prefix not from 1 to their number.
        """
        self._check(tokens)
        if not 1 <= prefix <= len(tokens):
            raise ValueError(f"prefix must be from 1 to {len(tokens)}, not {prefix}")
        head, layers = self.forward(tokens[:prefix])
        for number, layer in enumerate(layers):
            memory.prefill(number, layer.key, layer.value)
        logits = [head]
        for position in range(prefix, len(tokens)):
            x = self._weights["embedding"][tokens[position : position + 1]]
            for number in range(self.shape.layers):
                layer = self._project(number, x, position)
                memory.append(number, layer.key[0], layer.value[0])
                x = self._finish(number, x, memory.attend(number, layer.query[0], position))
            logits.append(self._logits(x))
        return np.concatenate(logits)


def bits_per_byte(logits: Floats, targets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """What each byte costs, in bits: -log2 of the probability that the model gave it.

    Args:
        logits: float32, (bytes, vocabulary).
        targets: the bytes that came, (bytes,).

    Returns:
        float64, (bytes,).
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    return np.asarray((total - wide[np.arange(len(targets)), targets]) / math.log(2))


def _read(name: str) -> dict[str, NDArray[Any]]:
    packed = resources.files(__package__).joinpath(name).read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return dict(arrays)


def load() -> Decoder:
    """The trained model, from `model.npz`."""
    arrays = _read("model.npz")
    shape = Shape(**{field.name: int(arrays.pop(f"shape.{field.name}")) for field in fields(Shape)})
    return Decoder(shape, arrays)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Text that the model has not seen: files of the Python 3.11 standard library.

    Members:
        windows: uint8, (windows, 1,025): each is the context and one byte more, which the last position predicts.
        origins: file and first byte of each window.
        licence: of the text.
    """

    windows: Bytes
    origins: tuple[str, ...]
    licence: str


def load_held_out() -> HeldOut:
    """The held-out text, from `heldout.npz`."""
    arrays = _read("heldout.npz")
    return HeldOut(
        windows=arrays["windows"],
        origins=tuple(str(origin) for origin in arrays["origins"]),
        licence=str(arrays["licence"]),
    )
