"""What a decode step costs on the golden device, beside the same model's step with transformers' eager attention.

Both are measured in one run, in turn, in processor seconds of one thread.  The models have random weights and the real
shapes; the project's own has its trained ones.  It needs torch and transformers (the extra `transformers`);
``python -m kvattic_sim.reports.benches.decode_ratio [MODEL]`` prints the figures as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError, WrongResultError

__all__ = ["BATCH", "BENCHES", "CONTEXT", "MODELS", "main", "measure"]

CONTEXT = 512
"""Tokens that the steps attend, about: the first measured step has fewer, the last one more."""
BATCH = 16
"""Rows of the larger batch of `golden.batch_ratio`."""
STEPS = 15
"""Steps that are measured, of which the median counts."""
WARM_UP = 3
MODELS = ("lm", "opt125m", "llama1b")


def _build(name: str) -> Any:
    """A model for inference in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    from kvattic_sim.lm import huggingface

    torch.manual_seed(0)
    if name == "lm":
        return huggingface.load()
    if name == "opt125m":   # what transformers' defaults are
        return OPTForCausalLM(OPTConfig(attn_implementation="eager")).eval()
    return LlamaForCausalLM(LlamaConfig(    # Llama-3.2-1B's config.json
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        attn_implementation="eager")).eval()


def _decoder(model: Any, cache: Any, backend: str, rows: int) -> Callable[[], float]:
    """Attend a prompt; a function that decodes a token of each row and returns its processor seconds."""
    import torch

    tokens = torch.randint(2, 250, (rows, CONTEXT - STEPS // 2 - WARM_UP), generator=torch.Generator().manual_seed(0))

    def step(tokens: Any) -> float:
        model.set_attn_implementation(backend)
        begin = time.process_time()
        with torch.no_grad():
            answer = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1)
        spent = time.process_time() - begin
        if not torch.isfinite(answer.logits).all():
            raise WrongResultError("a decode step gave a logit that is not finite")
        return spent

    step(tokens)
    return lambda: step(tokens[:, :1])


def _medians(decoders: Sequence[Callable[[], float]]) -> list[float]:
    """Processor seconds of each decoder's step, in turn."""
    times = [[decode() for decode in decoders] for _ in range(WARM_UP + STEPS)][WARM_UP:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def measure(name: str) -> Figures:
    """The figures of a model, in this process, which should have one thread."""
    import torch
    from transformers import DynamicCache

    import kvattic
    from kvattic.integrations.transformers import NAME, DriveCache, config_for

    torch.set_num_threads(1)
    model = _build(name)
    capacity = 2 * CONTEXT

    def drive(rows: int) -> tuple[Any, DriveCache]:
        device = kvattic.open("model", config_for(model))
        return device, DriveCache(device, model.config, capacity_tokens=capacity)

    device, cache = drive(1)
    with device, cache:
        eager, golden = _medians([_decoder(model, DynamicCache(config=model.config), "eager", 1),
                                  _decoder(model, cache, NAME, 1)])
    figures = {f"golden.decode_ratio.{name}": golden / eager, f"golden.decode_ms.{name}": golden * 1e3}
    if name == "opt125m":
        device, cache = drive(BATCH)
        with device, cache:
            [batch] = _medians([_decoder(model, cache, NAME, BATCH)])
        figures |= {"golden.batch_ratio": batch / golden}
    return figures


def _measure_alone(name: str, lab: Lab) -> Figures:
    """The figures of a model, from a process of its own with one thread."""
    lab.progress(f"golden device, decode step, {name}", 0, None)
    environment = os.environ | {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(f"torch and transformers are not installed ({error}): pip install kvattic[transformers]"
                               ) from None
    del torch, transformers
    command = [sys.executable, "-m", "kvattic_sim.reports.benches.decode_ratio", name]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    figures: Figures = json.loads(output)
    return figures


def _keys(name: str) -> tuple[str, ...]:
    keys = (f"golden.decode_ratio.{name}", f"golden.decode_ms.{name}")
    return (*keys, "golden.batch_ratio") if name == "opt125m" else keys


BENCHES = tuple(Bench(keys=_keys(name), measure=partial(_measure_alone, name)) for name in MODELS)
"""What the bench runner calls."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", nargs="?", choices=MODELS, help="by default all of them, one after the other")
    name = parser.parse_args(arguments).model
    figures: Figures = {}
    for each in MODELS if name is None else (name,):
        figures |= measure(each)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
