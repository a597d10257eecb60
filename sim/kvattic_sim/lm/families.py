"""Small models with random weights of every architecture of transformers that has attention.

`shrink` makes a configuration of any class small by the names of its fields, and its parts likewise: 2 to 8 layers, 4
heads of 32, 256 tokens, by the tables of `recipes`.
No weights are downloaded.  Needs torch and transformers (the extra `transformers`).
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from kvattic_sim.lm.recipes import HEADS, KEEP, MAX_LAYERS, OWN, RULES

__all__ = ["Architecture", "architectures", "build", "shrink", "usual"]

MOST_WEIGHTS = 20_000_000
"""Of a model, so that the survey takes a minute or two."""


class Architecture(NamedTuple):
    """A model that generates text.

    Members:
        name: of its class.
        model_type: of its configuration.
        model: the class.
        config: the class of its configuration.
        encoder: whether it has an encoder.
    """

    name: str
    model_type: str
    model: Any
    config: Any
    encoder: bool


def architectures() -> Iterator[Architecture]:
    """Every class that transformers have for generating text, once, by name within each mapping."""
    seen: set[str] = set()
    for encoder, mapping in ((False, MODEL_FOR_CAUSAL_LM_MAPPING), (True, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
                             (True, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING), (True, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)):
        found = []
        for config in mapping:
            kinds = mapping[config]
            for model in kinds if isinstance(kinds, tuple) else (kinds,):
                own = config if getattr(model, "config_class", None) is None else model.config_class
                found.append(Architecture(model.__name__, config.model_type, model, own,
                                          encoder and own.is_encoder_decoder))
        # First the configuration that a model is made for, then those that borrow it.
        found.sort(key=lambda one: (one.name, getattr(one.model, "config_class", None) is not one.config))
        for one in found:
            if one.name not in seen:
                seen.add(one.name)
                yield one


def _value(config: Any, name: str) -> Any:
    """A field's value; None if layers have their own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _small(name: str, value: Any) -> Any:
    """What a field becomes; None: it stays."""
    if name in KEEP or isinstance(value, (bool, str, list, dict, tuple)) or value is None:
        return None
    if name.endswith("_per_layer_input") and not value:     # the model has no such inputs
        return None
    return next((small for pattern, small in RULES if re.fullmatch(pattern, name)), None)


def _chosen(kinds: list[Any]) -> list[int]:
    """A few layers among which is each kind: the first ones, if they have them all."""
    names = list(map(str, kinds))
    first = [names.index(name) for name in dict.fromkeys(names)]
    if max(first) < MAX_LAYERS:
        return list(range(min(max(2, max(first) + 1), len(names))))
    return sorted(first)


def usual(config: Any) -> Any:
    """The configuration that a class has by default.

    Args:
        config: the class.

    Raises:
        Exception: whatever the class says if it has none.
    """
    return config(**OWN.get(config.model_type, {}).get("default", {}))


def shrink(config: Any, default: Any = None, **more: Any) -> Any:
    """A small configuration of a class.

    Args:
        config: the class.
        default: a configuration of it to be made small, such as a part of another one; the class's default if None.
        more: fields to be set, last.

    Raises:
        Exception: whatever the class says if its fields do not go together.
    """
    own = OWN.get(config.model_type, {})
    kinds_of = {field.name: str(field.type) for field in fields(config) if field.init}
    kept: dict[str, Any] = {}
    if default is None:
        default = usual(config)
    else:
        plain = config()
        kept = {name: found for name in kinds_of if (found := _value(default, name)) != _value(plain, name)}
    values = {name: _value(default, name) for name in kinds_of}
    small = kept | {name: found for name, value in values.items() if (found := _small(name, value)) is not None}
    for name in ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups",
                 "num_global_key_value_heads"):
        if (heads := values.get(name)) is not None:
            small[name] = HEADS if heads == getattr(default, "num_attention_heads", None) else 2
    small |= _few_layers(values, small)
    for name in ("bos_token_id", "eos_token_id"):
        if name in kinds_of:
            small[name] = None if "None" in kinds_of[name] else 1
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(type(value), value).to_dict()
    small |= {name: value for name, value in own.items() if name != "default"} | more
    return config(**{name: value for name, value in small.items() if name in kinds_of or name in own})


def _few_layers(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Fields of a few layers, among which is each kind that a configuration has."""
    kinds = values.get("layer_types") or values.get("layers_block_type") or values.get("block_types")
    if not kinds:
        return {}
    chosen = _chosen(kinds)
    found: dict[str, Any] = {name: [value[number] for number in chosen] for name, value in values.items()
                             if isinstance(value, list) and len(value) == len(kinds)}
    found |= {name: len(chosen) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in small}
    if values.get("num_kv_shared_layers") == len(kinds):    # all of them
        found["num_kv_shared_layers"] = len(chosen)
    return found


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A small model with random weights, in float32, for inference.

    Args:
        architecture: what to build.
        seed: of the weights.

    Raises:
        Exception: whatever transformers say if they cannot build it.
    """
    with torch.device("meta"), _without_timm():     # the former takes no memory
        size = sum(weight.numel() for weight in architecture.model(shrink(architecture.config)).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"not small: {size / 1e6:,.0f} million weights, as its configuration shrinks by names of "
                         "fields alone")
    torch.manual_seed(seed)
    with _without_timm():
        return architecture.model(shrink(architecture.config)).eval()


def _without_timm() -> Any:
    """Build pictures' models of the package timm (Gemma 3n's) empty: they are large, and text does not come to them."""
    return patch.object(TimmWrapperModel, "__init__", PreTrainedModel.__init__)
