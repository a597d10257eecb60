"""Decode attention of a grouped-query head pair over 1,000 tokens, on the golden device."""

import numpy as np

import kvattic

rng = np.random.default_rng(0)
key, value = rng.standard_normal((2, 2, 1000, 128)).astype(np.float16)  # two KV heads
query = rng.standard_normal((8, 1, 128))  # eight query heads share them, four each

with (
    kvattic.open("model", "gqa") as device,
    device.create_sequence(2, capacity_tokens=4096) as sequence,
):
    sequence.prefill(key, value)
    result = sequence.attend(query)
    print(result.output.shape, result.lse[:, 0].round(3))
