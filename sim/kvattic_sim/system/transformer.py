"""A transformer's geometry: what its weights weigh, what a token's K and V take, what a step computes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvattic.errors import RequestError

__all__ = ["LLAMA2_13B", "LLAMA3_8B", "LLAMA3_70B_INT4", "MODELS", "OPT_13B", "OPT_30B", "Transformer", "load_model"]

_UNKNOWN = (
    (("num_local_experts", "num_experts", "n_routed_experts"), "it has experts, of which each token takes a few"),
    (("kv_lora_rank",), "it keeps a latent vector in place of K and V"),
    (("ssm_cfg", "state_size", "mamba_d_state"), "it has layers without a KV cache"),
)
"""Fields of what this model knows nothing of, and what they say."""
_GATED = ("llama", "mistral", "qwen", "gemma", "phi3", "olmo", "granite")
"""Beginnings of model types whose feed-forward network has three matrices, whatever the activation is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A decoder-only transformer.

    Attributes:
        name: for tables.
        layers: decoder layers.
        q_heads: query heads.
        kv_heads: KV heads, a divisor of q_heads.
        head_dim: elements of a head's q, k and v.
        hidden: elements of a token between layers.
        intermediate: elements inside the feed-forward network.
        vocabulary: tokens that there are.
        gated: the feed-forward network has three matrices, not two (SwiGLU).
        weight_bits: bits of a weight in the GPU's memory.
        kv_bits: bits of an element of K and V.
    """

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    gated: bool = False
    weight_bits: float = 16
    kv_bits: float = 16

    def __post_init__(self) -> None:
        for field in ("layers", "q_heads", "kv_heads", "head_dim", "hidden", "intermediate", "vocabulary"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{field} of {self.name} must be a positive integer, not {value!r}")
        if self.q_heads % self.kv_heads:
            raise RequestError(f"q_heads of {self.name} must be a multiple of kv_heads, not {self.q_heads} and "
                               f"{self.kv_heads}")
        for field in ("weight_bits", "kv_bits"):
            if not getattr(self, field) > 0:
                raise RequestError(f"{field} of {self.name} must be positive, not {getattr(self, field)!r}")

    @classmethod
    def from_config(cls, config: Any, name: str | None = None, **changes: Any) -> "Transformer":
        """The geometry in a Hugging Face configuration.

        Args:
            config: the contents of config.json, or a configuration of transformers (anything with `to_dict`); of a
                model of text and pictures, its `text_config` counts.
            name: for tables; its `_name_or_path` or `model_type` if None.
            changes: fields that the configuration does not say, such as `weight_bits`.

        Raises:
            RequestError: a field is missing or makes no transformer; or the model has what this one knows nothing of:
                experts, latent vectors, layers that attend a window or nothing.
        """
        if callable(to_dict := getattr(config, "to_dict", None)):
            config = to_dict()
        if not isinstance(config, Mapping):
            raise RequestError(f"config must be a dictionary or a configuration of transformers, not {config!r}")
        if isinstance(inner := config.get("text_config"), Mapping) and "hidden_size" not in config:
            config = {**config, **inner}
        _check_known(config)

        def get(*keys: str, default: Any = None) -> Any:
            for key in keys:
                if config.get(key) is not None:
                    return config[key]
            if default is None:
                raise RequestError(f"the configuration has none of {', '.join(keys)}: is it a decoder's config.json?")
            return default

        hidden, q_heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
        kind = str(get("model_type", default=""))
        fields: dict[str, Any] = {
            "name": name or get("_name_or_path", "model_type", default="model"),
            "layers": get("num_hidden_layers", "n_layer"),
            "q_heads": q_heads,
            "kv_heads": get("num_key_value_heads", "num_kv_heads", default=q_heads),
            "hidden": hidden,
            "intermediate": get("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            "vocabulary": get("vocab_size"),
            "gated": kind.startswith(_GATED) or get(
                "hidden_act", "activation_function", "hidden_activation", default="gelu") in ("silu", "swish"),
            "weight_bits": changes.get("weight_bits") or _weight_bits(config),
        }
        if config.get("head_dim") is not None:
            fields["head_dim"] = config["head_dim"]
        elif isinstance(hidden, int) and isinstance(q_heads, int) and q_heads > 0:
            fields["head_dim"] = hidden // q_heads
        else:
            raise RequestError(f"the configuration's heads must be positive integers, not {q_heads!r} heads of "
                               f"{hidden!r}")
        return cls(**{**fields, **changes})

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights of all matrices, the output projection with them."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> float:
        """Bytes that the weights take in the GPU."""
        return self.weights * self.weight_bits / 8

    @property
    def kv_bytes(self) -> float:
        """Bytes of K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bits / 8

    @property
    def linear_flops(self) -> float:
        """FLOP of a token's matrix products, without attention."""
        return 2.0 * self.weights

    def attention_flops(self, tokens: float) -> float:
        """FLOP of one token's attention over `tokens`, all layers: two products, each a multiplication and a sum."""
        return 4.0 * self.layers * self.q_heads * self.head_dim * tokens


# OPT: arXiv 2205.01068, table 1; the matrices' sizes are those of facebook/opt-*'s config.json.
OPT_13B = Transformer(name="OPT-13B", layers=40, q_heads=40, kv_heads=40, head_dim=128, hidden=5120, intermediate=20480,
                      vocabulary=50272)
OPT_30B = Transformer(name="OPT-30B", layers=48, q_heads=56, kv_heads=56, head_dim=128, hidden=7168, intermediate=28672,
                      vocabulary=50272)
# Llama 2: arXiv 2307.09288, and meta-llama/Llama-2-13b-hf's config.json.
LLAMA2_13B = Transformer(name="Llama-2-13B", layers=40, q_heads=40, kv_heads=40, head_dim=128, hidden=5120,
                         intermediate=13824, vocabulary=32000, gated=True)
# Llama 3: arXiv 2407.21783, table 3. int4 with a scale of 16 bits for each 32 weights is 4.5 bits a weight.
LLAMA3_8B = Transformer(name="Llama-3-8B", layers=32, q_heads=32, kv_heads=8, head_dim=128, hidden=4096,
                        intermediate=14336, vocabulary=128256, gated=True)
LLAMA3_70B_INT4 = Transformer(name="Llama-3-70B int4", layers=80, q_heads=64, kv_heads=8, head_dim=128, hidden=8192,
                              intermediate=28672, vocabulary=128256, gated=True, weight_bits=4.5)
MODELS = {"opt-13b": OPT_13B, "opt-30b": OPT_30B, "llama-2-13b": LLAMA2_13B, "llama-3-8b": LLAMA3_8B,
          "llama-3-70b-int4": LLAMA3_70B_INT4}
"""By the name that `load_model` takes."""


def load_model(name: str) -> Transformer:
    """The named model, or that of a Hugging Face configuration.

    Args:
        name: one of `MODELS`, or the path of a config.json or of the directory that it is in.

    Raises:
        RequestError: there is no such model and no such file, or it is no configuration of a decoder.
    """
    found = MODELS.get(name.lower())
    if found is not None:
        return found
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise RequestError(f"there is no model {name!r}; models are {', '.join(MODELS)}, or the path of a Hugging Face "
                           "config.json")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} must be a Hugging Face config.json: {error}") from error
    if not isinstance(config, Mapping):
        raise RequestError(f"{file} must be a JSON object, not {type(config).__name__}")
    return Transformer.from_config(config, config.get("_name_or_path") or file.resolve().parent.name)


def _check_known(config: Mapping[str, Any]) -> None:
    """Refuse what would be computed wrong without a word."""
    for keys, what in _UNKNOWN:
        if found := [key for key in keys if config.get(key) not in (None, 0, 1)]:
            raise RequestError(f"this model cannot be computed: {what} ({found[0]})")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        raise RequestError(f"this model cannot be computed: layers attend a window of {window} tokens "
                           "(sliding_window); set it to null to let all layers attend everything")


def _weight_bits(config: Mapping[str, Any]) -> float:
    """Bits of a weight: of GPTQ and AWQ with a 16-bit scale and a zero for each group; 16 if nothing is said."""
    packed = config.get("quantization_config")
    if not isinstance(packed, Mapping):
        return 16
    if packed.get("quant_method") == "bitsandbytes" or packed.get("load_in_4bit") or packed.get("load_in_8bit"):
        return 4.5 if packed.get("load_in_4bit") else 8
    if packed.get("quant_method") == "fp8":
        return 8
    bits = packed.get("bits", packed.get("w_bit"))
    if not isinstance(bits, int) or bits < 1:
        raise RequestError(f"quantization_config must say bits, a positive integer, not {bits!r}: pass weight_bits "
                           "in its place, without a quantization_config")
    group = packed.get("group_size", packed.get("q_group_size", -1))
    return bits + ((16 + bits) / group if isinstance(group, int) and group > 0 else 0)
