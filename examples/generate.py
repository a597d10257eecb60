"""A Hugging Face model generates text with its KV cache in the drive (needs the extra `transformers`).

The model is tiny and has random weights, so nothing is downloaded; any Llama, OPT, Qwen or Mistral model will do.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic.integrations.transformers import DriveCache, config_for

model = LlamaForCausalLM(LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None, pad_token_id=0, attn_implementation="kvattic"))
prompt = torch.tensor([list(b"The attic of a house is where")])

with kvattic.open("model", config_for(model)) as device, DriveCache(device, model.config) as cache:
    answer = model.generate(prompt, cache=cache, max_new_tokens=32, do_sample=False)
    print(answer.shape, "tokens in the drive:", cache.sequences[0].length())
    print(cache.report())
