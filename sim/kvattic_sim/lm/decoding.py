"""SmolLM2-135M-Instruct with any method of attention in its decode steps: a forward pass in torch, attention in NumPy.

The prompt is prefilled densely. The tokens after it are decode steps: in every layer each of them attends all tokens up
to its own by the method, with a selection of its own. Steps do not look at each other but through K and V of the layer,
so that many of them run at once when their tokens are known beforehand; the result is that of one after another.

Queries, keys and values are rounded to fp16, as the drive gets them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvattic_sim.lm.methods import Method

__all__ = ["Decoder", "Prefix", "load", "one_thread"]

PART = 512
"""Tokens of a prompt that are attended at once."""

Tokens: TypeAlias = "NDArray[np.integer[Any]] | Sequence[int]"


class Prefix:
    """What was prefilled: K and V of every layer, rounded to fp16, with room for more.

    Attributes:
        tokens: how many.
        key: float32, (layers, KV heads, tokens + room, head_dim), rotary positions applied.
        value: of the same type and shape.
        query: float32, (layers, query heads, tokens, head_dim); None unless they are kept.
    """

    def __init__(self, layers: int, heads: int, query_heads: int, room: int, head_dim: int, queries: bool) -> None:
        self.tokens = 0
        self.key = torch.zeros(layers, heads, room, head_dim)
        self.value = torch.zeros(layers, heads, room, head_dim)
        self.query = torch.zeros(layers, query_heads, room, head_dim) if queries else None

    def take(self, other: "Prefix", tokens: int) -> None:
        """Become a copy of another one's first tokens.

        Args:
            other: of the same model.
            tokens: how many.

        Raises:
            ValueError: the other one has fewer, or there is no room for them.
        """
        most = min(other.tokens, self.key.shape[2])
        if not 0 <= tokens <= most:
            raise ValueError(f"tokens must be from 0 to {most}, not {tokens}")
        self.tokens = tokens
        self.key[:, :, :tokens], self.value[:, :, :tokens] = other.key[:, :, :tokens], other.value[:, :, :tokens]
        if self.query is not None and other.query is not None:
            self.query[:, :, :tokens] = other.query[:, :, :tokens]


class Decoder:
    """A model of the Llama architecture, in float32.

    Args:
        model: transformers' `LlamaForCausalLM`, or one that has its modules' names.

    Attributes:
        head_dim: features of a head.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        self._model = model.eval()
        self._heads: int = config.num_key_value_heads
        self._query_heads: int = config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers: int = config.num_hidden_layers

    def prefix(self, room: int, queries: bool = False) -> Prefix:
        """An empty one.

        Args:
            room: for so many tokens.
            queries: whether they are kept, too.
        """
        return Prefix(self._layers, self._heads, self._query_heads, room, self.head_dim, queries)

    def prefill(self, prefix: Prefix, tokens: Tokens) -> None:
        """Put tokens behind a prefix, densely; in place."""
        with torch.inference_mode():
            self._forward(prefix, tokens, None)
        prefix.tokens += len(tokens)

    def decode(self, prefix: Prefix, tokens: Tokens, method: Method) -> NDArray[np.float32]:
        """Logits of the next token after each of some, which are decode steps behind a prefix.

        The prefix keeps its tokens; what is behind them is overwritten.

        Args:
            prefix: with room for the tokens, and with queries if the method looks at them.
            tokens: one after another.
            method: of all layers.

        Returns:
            float32, (tokens, vocabulary).

        Raises:
            ValueError: there is no room.
        """
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._model.lm_head(self._forward(prefix, tokens, method))[0].numpy()
        return logits

    def _forward(self, prefix: Prefix, tokens: Tokens, method: Method | None) -> torch.Tensor:
        numbers = torch.as_tensor(np.asarray(tokens, np.int64))[None]
        begin, end = prefix.tokens, prefix.tokens + numbers.shape[1]
        if end > prefix.key.shape[2]:
            raise ValueError(f"the prefix must have room for {end} tokens, not {prefix.key.shape[2]}")
        core = self._model.model
        hidden = core.embed_tokens(numbers)
        turn = core.rotary_emb(hidden, torch.arange(begin, end)[None])
        for at, layer in enumerate(core.layers):
            inside = layer.input_layernorm(hidden)
            query, key, value = (
                part(inside).view(1, end - begin, -1, self.head_dim).transpose(1, 2)
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
            query, key = apply_rotary_pos_emb(query, key, *turn)
            query, key, value = (x[0].half().float() for x in (query, key, value))
            prefix.key[at, :, begin:end], prefix.value[at, :, begin:end] = key, value
            if prefix.query is not None:
                prefix.query[at, :, begin:end] = query
            output = self._dense(prefix, at, query, begin) if method is None else self._by(
                prefix, at, query, begin, method)
            hidden = hidden + layer.self_attn.o_proj(output.reshape(1, end - begin, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return core.norm(hidden) if method is not None else hidden

    def _dense(self, prefix: Prefix, layer: int, query: torch.Tensor, begin: int) -> torch.Tensor:
        """(tokens, query heads, head_dim)."""
        end = begin + query.shape[1]
        key, value = prefix.key[layer, :, :end], prefix.value[layer, :, :end]
        # In parts, so that what a part cannot see is not computed; a mask is cheap for what is left.
        parts = []
        for first in range(0, query.shape[1], PART):
            last = min(first + PART, query.shape[1])
            seen = torch.arange(begin + last)[None] <= torch.arange(begin + first, begin + last)[:, None]
            parts.append(torch.nn.functional.scaled_dot_product_attention(
                query[None, :, first:last], key[None, :, : begin + last], value[None, :, : begin + last],
                attn_mask=seen, enable_gqa=True)[0])
        return torch.cat(parts, dim=1).transpose(0, 1)

    def _by(self, prefix: Prefix, layer: int, query: torch.Tensor, begin: int, method: Method) -> torch.Tensor:
        """(tokens, query heads, head_dim)."""
        end = begin + query.shape[1]
        rows = self._query_heads // self._heads
        outputs = []
        for head in range(self._heads):
            part = slice(head * rows, (head + 1) * rows)
            # Only a method that looks at the prompt's queries needs them.
            asked = np.zeros((end, rows, self.head_dim), np.float32)
            if prefix.query is not None:
                asked[:begin] = prefix.query[layer, part, :begin].numpy().transpose(1, 0, 2)
            asked[begin:] = query[part].numpy().transpose(1, 0, 2)
            key, value = (x[layer, head, :end].numpy() for x in (prefix.key, prefix.value))
            outputs.append(torch.from_numpy(np.ascontiguousarray(method.decode(asked, key, value, begin).output)))
        return torch.cat(outputs, dim=1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load() -> tuple[Decoder, Any]:
    """The model and its tokenizer.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    from kvattic_sim.lm import smollm2

    tokenizer, model = smollm2.load()
    return Decoder(model), tokenizer
