"""A model of whole systems that decode with their KV cache in a drive, in files, in DRAM or in a GPU.

Everything here is modelled, nothing measured; `paper` holds it to the figures of InstInfer's evaluation.
"""
