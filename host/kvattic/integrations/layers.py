"""Which layers a `DriveCache` has: attention in the drive, everything else in transformers' own."""

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DummyLayer,
    DynamicLayer,
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


class _PictureLayer(DynamicLayer):
    """K and V of a picture: they stay, whatever is removed of the text."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing."""


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
    kinds = list(zip(*get_layer_types_and_kwargs(text), strict=True))
    visits = _visits(text, kinds)
    # Layers that attend a picture and nothing else, Mllama's: its K and V are few and stay in this machine.
    pictures = set(getattr(text, "cross_attention_layers", None) or ())
    layers: list[Any] = []
    attending = [number for number in visits if kinds[number][0] in _ATTENTION | _HYBRID and number not in pictures]
    for number, (kind, options) in enumerate(kinds):
        window = options.get("sliding_window")
        if number in pictures:
            layers.append(_PictureLayer())
        elif kind in _ATTENTION:
            layers.append(DriveLayer(cache, number, attending.index(number), window=window))
        elif kind in _HYBRID:
            layers.append(HybridLayer(cache, number, attending.index(number), options.get("number_of_states", 1),
                                      window=window))
        else:
            made = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
            if made is None or not issubclass(made, (LinearAttentionLayer, DummyLayer)):
                raise RequestError(f"layer {number} is of the kind {kind!r}, which the drive lacks: "
                                   f"{_MISSING.get(kind, 'it is not known to attend a range of tokens')}")
            layers.append(made(**options))
    if not attending:
        raise RequestError(f"{type(text).__name__}: no layer of the model has attention, there is nothing for a drive")
    return layers


def _visits(text: Any, kinds: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """Layers in the order in which a step comes to them.

    Args:
        text: the decoder's configuration.
        kinds: kind and options of each layer; those are added that a model has for further passes through some of its
            layers (Dory), behind all others, where it looks for them.
    """
    count, passes = len(kinds), getattr(text, "n_recurrent_loops", 1)
    if passes == 1:
        return list(range(count))
    first = text.n_input_layers
    last = first + text.n_recurrent_layers
    kinds += kinds[first:last] * (passes - 1)
    return [*range(last), *range(count, len(kinds)), *range(last, count)]
