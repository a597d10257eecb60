"""Which layers a `DriveCache` has: attention in the drive, everything else in transformers' own."""

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DummyLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from kvattic.errors import RequestError
from kvattic.integrations.layer import CrossLayer, DriveLayer, HybridLayer

if TYPE_CHECKING:
    from kvattic.integrations.cache import DriveCache

__all__ = ["make_layers"]

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_HYBRID = {"hybrid", "hybrid_sliding"}
_MISSING = {
    "indexed_attention": "each of its tokens attends those that an indexer of the model chooses",
    "heavily_compressed_attention": "the model merges K of several tokens",
    "compressed_sparse_attention": "the model merges K of several tokens, and an indexer chooses among them",
    "minimax_m3_sparse": "an indexer of the model chooses blocks of tokens",
    "reference_sliding_attention": "each of its tokens attends a reference besides a window",
}
"""Kinds of layers that the drive lacks, and why."""


def make_layers(cache: "DriveCache", text: Any, *, cross: bool) -> list[Any]:
    """Layers for a model's configuration.

    Args:
        cache: which they will be part of.
        text: the decoder's configuration.
        cross: whether they hold an encoder's tokens.

    Raises:
        RequestError: the model has layers that the drive lacks, or none with attention.
    """
    if cross:
        return [CrossLayer(cache, number, number) for number in range(int(text.num_hidden_layers))]
    layers: list[Any] = []
    slot = 0
    for number, (kind, options) in enumerate(zip(*get_layer_types_and_kwargs(text), strict=True)):
        if kind in _ATTENTION:
            layers.append(DriveLayer(cache, number, slot))
        elif kind in _HYBRID:
            layers.append(HybridLayer(cache, number, slot, options.get("number_of_states", 1)))
        else:
            made = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
            if made is None or not issubclass(made, (LinearAttentionLayer, DummyLayer)):
                raise RequestError(f"layer {number} is of the kind {kind!r}, which the drive lacks: "
                                   f"{_MISSING.get(kind, 'it is not known to attend a range of tokens')}")
            layers.append(made(**options))
            continue
        slot += 1
    if not slot:
        raise RequestError(f"{type(text).__name__}: no layer of the model has attention, there is nothing for a drive")
    return layers
