"""Train the small language model whose attention the methods of `methods.py` are compared on; write `model.npz`.

The model is a Llama-architecture decoder over bytes: RMSNorm, rotary positions, SwiGLU, two query heads for each KV
head, no biases, the embedding also the output matrix. Its context is 1,024 bytes; byte 0 parts the files. Most steps
see 256 bytes, the rest the whole context.

The text is Python: the standard library that Debian installs at /usr/lib/python3.11 (PSF licence 2), and the sources of
SymPy, NetworkX and NumPy (each BSD-3-Clause). One file in 24 of the standard library,
chosen by a hash of its path, is held out and never trained on; `heldout.npz` holds windows of them for the evaluation.

torch, not JAX: on the project's machines torch's bfloat16 products use the AMX tiles, some ten times the speed of
float32 in either (1,864 against 163 GFLOP/s on one core), and JAX's bfloat16 does not.

To run it, outside the project's own environment, on one core for an hour:
    python3.11 -m venv /tmp/lmvenv
    /tmp/lmvenv/bin/pip install '.[train]'
    taskset -c 1 /tmp/lmvenv/bin/python sim/kvattic_sim/lm/train.py --minutes 52

The schedule follows the clock, so that a shared machine ends it on time; `--steps` makes a run that can be repeated.
What it wrote as it ran is `train.log` beside this file.

`--draft` trains a smaller one in the same way, `draft.npz`, which drafts for the other one (`kvattic run dovetail`).
"""

import argparse
import hashlib
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# torch: only this script needs it (the extra `train`); the project's own environment has none.
import torch  # type: ignore[import-not-found,unused-ignore]
import torch.nn.functional as F  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray

HERE = Path(__file__).parent
STANDARD_LIBRARY = Path("/usr/lib/python3.11")
PACKAGES = ("sympy", "networkx", "numpy")
SKIPPED = (
    "encodings/cp",
    "encodings/mac",
    "encodings/iso",
    "encodings/koi",
    "unicode",
    "/_sysconfigdata",
    "hypothesis",
)
"""Tables rather than text."""

SHORT, CONTEXT = 256, 1024
SHORT_SHARE = 0.55
"""Share of the run that sees `SHORT` bytes at a time."""
BATCH_BYTES = 4096
PEAK_RATE, LAST_RATE, WARMUP_STEPS = 2e-3, 5e-5, 300
DECAY, CLIP, BETAS = 0.1, 1.0, (0.9, 0.95)
HELD_OUT_ONE_IN = 24
EVALUATION_WINDOWS, WINDOWS_OF_A_FILE = 32, 4
"""Windows of `CONTEXT` + 1 bytes that are stored, and that the log's figures are of; most that one file gives."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model; stored with the weights."""

    layers: int = 5
    width: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 640
    vocabulary: int = 256
    context: int = CONTEXT
    rope_base: int = 10_000


DRAFT = Shape(layers=2, width=128, query_heads=2, kv_heads=1, hidden=320)
"""A ninth of the parameters: what proposes tokens for the other one to verify (`kvattic run dovetail`)."""


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape, (inputs, outputs), of each weight, as `model.npz` holds them."""
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    result: dict[str, tuple[int, ...]] = {"embedding": (shape.vocabulary, shape.width), "norm": (shape.width,)}
    for layer in range(shape.layers):
        result |= {
            f"{layer}.attention_norm": (shape.width,),
            f"{layer}.query": (shape.width, queries),
            f"{layer}.key": (shape.width, keys),
            f"{layer}.value": (shape.width, keys),
            f"{layer}.output": (queries, shape.width),
            f"{layer}.mlp_norm": (shape.width,),
            f"{layer}.gate": (shape.width, shape.hidden),
            f"{layer}.up": (shape.width, shape.hidden),
            f"{layer}.down": (shape.hidden, shape.width),
        }
    return result


class Decoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    """The model in torch; `model.py` is the same in NumPy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weights = torch.nn.ParameterDict()
        for name, size in weight_shapes(shape).items():
            if len(size) == 1:
                value = torch.ones(size)
            else:
                spread = 0.02 if name == "embedding" else size[0] ** -0.5
                if name.endswith(("output", "down")):
                    spread /= math.sqrt(2 * shape.layers)
                value = torch.randn(size) * spread
            self.weights[name.replace(".", "_")] = torch.nn.Parameter(value)
        angle = torch.arange(shape.context)[:, None] * shape.rope_base ** (
            -torch.arange(0, shape.head_dim, 2) / shape.head_dim
        )
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=1))
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=1))

    def forward(self, tokens: Any) -> Any:
        """Logits, (batch, length, vocabulary), of tokens, (batch, length)."""
        shape, weights = self.shape, self.weights
        batch, length = tokens.shape

        def norm(x: Any, name: str) -> Any:
            return F.rms_norm(x, (shape.width,), weights[name], 1e-5)

        def linear(x: Any, name: str) -> Any:
            return x @ weights[name].to(x.dtype)

        def split(x: Any, heads: int) -> Any:
            return x.view(batch, length, heads, shape.head_dim).transpose(1, 2)

        def rotate(x: Any) -> Any:
            half = shape.head_dim // 2
            return x * self.cos[:length] + torch.cat([x[..., half:], x[..., :half]], dim=-1) * self.sin[:length]

        group = shape.query_heads // shape.kv_heads
        x = weights["embedding"][tokens]
        for layer in range(shape.layers):
            inner = norm(x, f"{layer}_attention_norm").bfloat16()
            q = rotate(split(linear(inner, f"{layer}_query"), shape.query_heads)).bfloat16()
            k = rotate(split(linear(inner, f"{layer}_key"), shape.kv_heads)).bfloat16()
            v = split(linear(inner, f"{layer}_value"), shape.kv_heads)
            k, v = (
                y[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, shape.query_heads, length, shape.head_dim)
                for y in (k, v)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(batch, length, -1), f"{layer}_output").float()
            inner = norm(x, f"{layer}_mlp_norm").bfloat16()
            inner = F.silu(linear(inner, f"{layer}_gate")) * linear(inner, f"{layer}_up")
            x = x + linear(inner, f"{layer}_down").float()
        return (norm(x, "norm").bfloat16() @ weights["embedding"].bfloat16().T).float()


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library is kept for evaluation; name is its path from the library's root."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def sources(root: Path) -> Iterator[tuple[str, Bytes]]:
    """(path from root, text) of each Python file below root that is text: no byte 0, some length, no table."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "packages/" in name or any(skipped in f"/{name}" for skipped in SKIPPED):
            continue
        text = path.read_bytes()
        if len(text) >= 512 and 0 not in text:
            yield name, np.frombuffer(text, np.uint8)


def joined(texts: list[Bytes]) -> Bytes:
    """Texts one after the other, byte 0 before each."""
    zero = np.zeros(1, np.uint8)
    return np.concatenate([part for text in texts for part in (zero, text)])


def held_out_windows(texts: dict[str, Bytes]) -> tuple[Bytes, list[str]]:
    """`EVALUATION_WINDOWS` windows of CONTEXT + 1 bytes of the held-out files, and where each is from."""
    rng = np.random.default_rng(4)
    places = []
    for name, text in texts.items():
        starts = rng.permutation(range(0, len(text) - CONTEXT, CONTEXT))
        places += [(name, int(start)) for start in starts[:WINDOWS_OF_A_FILE]]
    chosen = [places[i] for i in sorted(rng.permutation(len(places))[:EVALUATION_WINDOWS])]
    windows = np.stack([texts[name][start : start + CONTEXT + 1] for name, start in chosen])
    return windows, [f"{name}:{start}" for name, start in chosen]


def package_root(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} must be installed: see this script's docstring")
    return Path(spec.origin).parent


def learning_rate(step: int, progress: float) -> float:
    """Warm-up over steps, then a cosine over progress, from 0 to 1."""
    cosine = LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def bits_per_byte(model: Any, windows: Bytes, length: int) -> tuple[float, float]:
    """Mean bits for each byte of the windows, and of their last half alone, read `length` bytes at a time."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    inputs = tokens[:, :CONTEXT].reshape(-1, length)
    targets = tokens[:, 1:].reshape(-1)
    with torch.no_grad():
        losses = []
        for part in inputs.split(BATCH_BYTES // length):
            losses.append(model(part).reshape(-1, model.shape.vocabulary))
        loss = F.cross_entropy(torch.cat(losses), targets, reduction="none") / math.log(2)
    by_position = loss.reshape(-1, CONTEXT)
    return float(by_position.mean()), float(by_position[:, CONTEXT // 2 :].mean())


def save(model: Any, path: Path) -> None:
    """Write the weights, float16, and the shape."""
    arrays = {
        name: model.weights[name.replace(".", "_")].detach().numpy().astype(np.float16)
        for name in weight_shapes(model.shape)
    }
    shape = {f"shape.{name}": np.array(value, np.int32) for name, value in asdict(model.shape).items()}
    np.savez_compressed(path, **arrays, **shape)  # type: ignore[arg-type,unused-ignore]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="how long to train; the schedule follows the clock")
    budget.add_argument("--steps", type=int, help="how many steps to train")
    parser.add_argument("--draft", action="store_true", help="train the smaller model: draft.npz, draft.log")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the files (default: %(default)s)")
    parser.add_argument("--report", type=int, default=250, help="steps between reports and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    shape, weights = (DRAFT, "draft.npz") if args.draft else (Shape(), "model.npz")
    log = (args.output / ("draft.log" if args.draft else "train.log")).open("w", encoding="utf-8")

    def say(line: str) -> None:
        print(line, file=log, flush=True)
        print(line, flush=True)

    say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {args.threads} thread(s)")
    held_out: dict[str, Bytes] = {}
    standard: list[Bytes] = []
    for name, text in sources(STANDARD_LIBRARY):
        if is_held_out(name):
            held_out[name] = text
        else:
            standard.append(text)
    corpora = [joined(standard)]
    say(f"{STANDARD_LIBRARY}: {len(standard)} files, {len(corpora[0]):,} bytes")
    say(f"held out: {len(held_out)} files, {sum(map(len, held_out.values())):,} bytes: {' '.join(held_out)}")
    others: list[Bytes] = []
    for package in PACKAGES:
        texts = [text for _, text in sources(package_root(package))]
        others += texts
        say(f"{package}: {len(texts)} files, {sum(map(len, texts)):,} bytes")
    corpora.append(joined(others))
    windows, origins = held_out_windows(held_out)
    licence = (
        "Windows of files of the Python 3.11 standard library, as Debian 12 installs it. Copyright (c) 2001-2023 "
        "Python Software Foundation; All Rights Reserved. Distributed under the PSF License Agreement, version 2: "
        "https://docs.python.org/3.11/license.html"
    )
    if not args.draft:
        np.savez_compressed(
            args.output / "heldout.npz", windows=windows, origins=np.array(origins), licence=np.array(licence)
        )

    model = Decoder(shape)
    say(f"{shape}, {sum(p.numel() for p in model.parameters()):,} parameters")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=BETAS, fused=True
    )
    compiled = torch.compile(model, dynamic=False)

    begin, step, total = time.monotonic(), 0, 0.0
    while True:
        elapsed = (time.monotonic() - begin) / 60
        progress = step / args.steps if args.steps else elapsed / args.minutes
        if step % args.report == 0 or progress >= 1:
            bits, late = bits_per_byte(compiled, windows, SHORT if progress < SHORT_SHARE else CONTEXT)
            say(
                f"{elapsed:6.2f} min, step {step:6}, {step * BATCH_BYTES / 1e6:7.2f} MB, rate "
                f"{learning_rate(step, progress):.2e}: training {total / max(1, (step - 1) % args.report + 1):.4f}, "
                f"held out {bits:.4f} bits per byte, {late:.4f} from {CONTEXT // 2}"
            )
            total = 0.0
            save(model, args.output / weights)
        if progress >= 1:
            break
        length = SHORT if progress < SHORT_SHARE else CONTEXT
        corpus = corpora[step % 2]  # half of the steps see the standard library
        starts = rng.integers(0, len(corpus) - length - 1, BATCH_BYTES // length)
        batch = torch.from_numpy(np.stack([corpus[s : s + length + 1] for s in starts]).astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        logits = compiled(batch[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item() / math.log(2)
        step += 1
    log.close()


if __name__ == "__main__":
    main()
