"""Serving: what sequences write that share their beginning, and a generation that outlives its process."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

import kvattic
from kvattic.driver.device import Device
from kvattic.driver.sequence import Sequence
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.elements import Integers
from kvattic_sim.reports.benches.engine import Bench, UnavailableError, WrongResultError

if TYPE_CHECKING:
    import torch

__all__ = ["BENCHES", "FORK_KEYS", "RESTORE_KEY", "fork_bytes", "restored"]

SEQUENCES, SHARED, OWN, KV_HEADS = 16, 1024, 64, 8
FORK_KEYS = ("serve.fork.bytes_ratio", "serve.fork.bytes_ratio.decoded")


def _written(device: Device) -> int:
    """Bytes that device DRAM and flash took so far: K and V go through both."""
    return device.media.written_bytes + device.statistics().page_programs * device.config.page_bytes


def fork_bytes() -> dict[str, float]:
    """Bytes written for sequences that share their first tokens, over those of as many that do not.

    They go on with a stripe of their own each, at once, or token by token, where the first token of a stripe writes its
    DRAM pages whole.

    Raises:
        WrongResultError: a fork attends something else than the sequence that shares nothing.
    """
    rng = np.random.default_rng(0)
    shared, *own = (rng.standard_normal((2, KV_HEADS, tokens, PAPER.head_dim)).astype(np.float16)
                    for tokens in (SHARED, *[OWN] * SEQUENCES))
    query = shared[0, :, :1]
    figures: dict[str, float] = {}
    for key, step in zip(FORK_KEYS, (OWN, 1), strict=True):
        outcomes: list[tuple[int, list[Any]]] = []
        for forked in (True, False):
            with kvattic.open("model", PAPER) as device:
                before, first = _written(device), device.create_sequence(KV_HEADS, capacity_tokens=SHARED + OWN)
                first.prefill(*shared)
                sequences: list[Sequence] = [first]
                for _ in range(SEQUENCES - 1):
                    if forked:
                        sequences.append(first.fork())
                    else:
                        sequences.append(device.create_sequence(KV_HEADS, capacity_tokens=SHARED + OWN))
                        sequences[-1].prefill(*shared)
                for sequence, kv in zip(sequences, own, strict=True):
                    for token in range(0, OWN, step):
                        sequence.append(*kv[:, :, token : token + step])
                written = _written(device) - before
                outcomes.append((written, [sequence.attend(query).bits for sequence in sequences]))
        (few, forks), (many, copies) = outcomes
        if not np.array_equal(forks, copies):
            raise WrongResultError("a fork attends something else than a sequence that shares nothing")
        figures[key] = few / many
    return figures



RESTORE_KEY = "serve.restore.match"
TARGETS = ("model", "sim:verilator")
PROMPT, SAVED, LOST, NEW = 40, 12, 4, 40
"""Tokens of the prompt; of the answer until it is saved, from then on until the process is killed, and in all."""


def _model() -> Any:
    """A small model with random weights, the same in each process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvattic.integrations.transformers import NAME

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    model.set_attn_implementation(NAME)
    return model


def _prompt() -> "torch.Tensor":
    import torch

    return torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def _generate(model: Any, tokens: Any, cache: Any, new: int) -> Any:
    import torch

    return model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=cache, do_sample=False,
                          max_new_tokens=new)


def _opened(target: str, folder: Path) -> Device:
    """The drive, whose flash is in a file of the folder."""
    return kvattic.open(target, replace(TINY, rows=2), image=folder / "flash")


def _die(target: str, folder: Path) -> None:
    """Save a generation in its middle, go on for some tokens, and be killed."""
    from kvattic.integrations.transformers import DriveCache

    model, device = _model(), _opened(target, folder)
    cache = DriveCache(device, model.config, capacity_tokens=PROMPT + NEW, held_tokens=8)
    text = _generate(model, _prompt(), cache, SAVED)
    cache.save(folder / "saved", note=text.tolist())
    _generate(model, text, cache, LOST)
    os.kill(os.getpid(), signal.SIGKILL)


def _go_on(target: str, folder: Path) -> tuple[Integers, Integers]:
    """(tokens of a generation that was killed and loaded, those of one that was not)."""
    import torch

    from kvattic.integrations.transformers import DriveCache

    model, capacity = _model(), PROMPT + NEW
    command = [sys.executable, "-m", "kvattic_sim.reports.benches.serve", target, str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(
        path or os.getcwd() for path in sys.path)}, check=False)
    if child.returncode != -signal.SIGKILL:
        raise WrongResultError(f"the process to be killed ended with {child.returncode}: {child.stderr[-500:]}")
    with (_opened(target, folder) as device,
          DriveCache.load(device, model.config, folder / "saved", capacity_tokens=capacity, held_tokens=8) as cache):
        text = torch.tensor(cache.note)
        answer = _generate(model, text, cache, NEW - SAVED)
    with kvattic.open(target, replace(TINY, rows=2)) as device, DriveCache(
            device, model.config, capacity_tokens=capacity, held_tokens=8) as cache:
        whole = _generate(model, _prompt(), cache, NEW)
    return answer[0, PROMPT:].numpy(), whole[0, PROMPT:].numpy()


def restored(targets: tuple[str, ...] = TARGETS) -> dict[str, float]:
    """Share of the tokens of a killed and restored generation that are those of an uninterrupted one; least target.

    Raises:
        UnavailableError: torch or transformers are missing.
        WrongResultError: the process was not killed as it should be.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"{error}: pip install 'kvattic[transformers]'") from error
    shares = []
    for target in targets:
        with TemporaryDirectory() as folder:
            answer, whole = _go_on(target, Path(folder))
        shares.append(float((answer == whole).mean()))
    return {RESTORE_KEY: min(shares)}


BENCHES = (Bench(keys=FORK_KEYS, measure=lambda lab: fork_bytes()),
           Bench(keys=(RESTORE_KEY,), measure=lambda lab: restored()))


if __name__ == "__main__":
    _die(sys.argv[1], Path(sys.argv[2]))
