"""A transformer's geometry: what its weights weigh, what a token's K and V take, what a step computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvattic.errors import RequestError

__all__ = ["LLAMA2_13B", "LLAMA3_8B", "LLAMA3_70B_INT4", "OPT_13B", "OPT_30B", "Transformer"]


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
    def from_config(cls, config: Mapping[str, Any], name: str | None = None, **changes: Any) -> "Transformer":
        """The geometry in a Hugging Face configuration.

        Args:
            config: the contents of config.json.
            name: for tables; its `_name_or_path` or `model_type` if None.
            changes: fields that the configuration does not say, such as `weight_bits`.

        Raises:
            RequestError: a field is missing or makes no transformer.
        """
        def get(*keys: str, default: Any = None) -> Any:
            for key in keys:
                if config.get(key) is not None:
                    return config[key]
            if default is None:
                raise RequestError(f"the configuration has none of {', '.join(keys)}: is it a decoder's config.json?")
            return default

        hidden, q_heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
        fields: dict[str, Any] = {
            "name": name or get("_name_or_path", "model_type", default="model"),
            "layers": get("num_hidden_layers", "n_layer"),
            "q_heads": q_heads,
            "kv_heads": get("num_key_value_heads", default=q_heads),
            "head_dim": get("head_dim", default=hidden // q_heads),
            "hidden": hidden,
            "intermediate": get("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            "vocabulary": get("vocab_size"),
            "gated": get("hidden_act", "activation_function", "hidden_activation", default="gelu") == "silu",
        }
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
