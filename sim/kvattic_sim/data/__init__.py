"""Real attention inputs: queries, keys and values of a trained MiniLM on 512 tokens of English.

`minilm.npz` was made by `make_minilm.py` beside this file, which says from which model and which text.
"""

import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MiniLM", "load_minilm"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniLM:
    """Attention inputs of some layers of a trained MiniLM, one sequence, full (non-causal) attention.

    Members:
        q: queries before the scaling by 1/sqrt(head_dim), float16, (layers, heads, tokens, head_dim).
        k: keys, of the same type and shape.
        v: values, of the same type and shape.
        layers: the model's index of each layer along the first axis, from 0.
    """

    q: NDArray[np.float16]
    k: NDArray[np.float16]
    v: NDArray[np.float16]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("q", "k", "v"):
            array: NDArray[Any] = getattr(self, name)
            if array.dtype != np.float16:
                raise ValueError(f"{name} must be float16, not {array.dtype}")
            if array.ndim != 4 or array.shape != self.q.shape:
                raise ValueError(
                    f"{name} must be (layers, heads, tokens, head_dim) and shaped as q is, {self.q.shape}, "
                    f"not {array.shape}"
                )
        if len(self.layers) != self.q.shape[0]:
            raise ValueError(f"layers must name each of the {self.q.shape[0]} layers of q, not {self.layers!r}")


def load_minilm() -> MiniLM:
    """Load the data set: 2 layers, 12 heads, 512 tokens, head_dim 32. Each call returns arrays of its own."""
    packed = resources.files(__name__).joinpath("minilm.npz").read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return MiniLM(
            q=arrays["q"],
            k=arrays["k"],
            v=arrays["v"],
            layers=tuple(int(layer) for layer in arrays["layers"]),
        )
