"""A small language model, and what sparse attention does to it.

`model.npz` holds a byte-level Llama-architecture decoder of 3.5 million parameters, which `train.py` trained;
`draft.npz` a smaller one, trained likewise, that drafts for it (`kvattic_sim.runs.drafts`);
`intents.npz` low-rank adapters of SmolLM2, which `train_intents.py` trained (`kvattic_sim.runs.slm_intent`);
`heldout.npz` text that it has not seen. `model.py` runs it in NumPy, `methods.py` has the ways of attention that are
compared, each with the bytes that it would move from flash, and `evaluate.py` makes the table and the plot of
docs/quality.md.
"""
