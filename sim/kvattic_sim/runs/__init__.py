"""Workloads that `kvattic run` and `kvattic chat` run: attention of known systems, with its KV cache in the drive.

`catalogue` knows them by name, `outcome` is what each of them says.  A module for each; docs/workloads has their pages.
"""
