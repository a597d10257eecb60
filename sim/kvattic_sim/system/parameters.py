"""The parameters of the system model: each with its unit, its kind and its source.

`PAPER_MACHINE` is the paper's; `dataclasses.replace` makes others of it, and `table` lists all that it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

__all__ = ["H100", "PAPER_MACHINE", "Files", "Gpu", "Host", "Kind", "Machine", "StorageDrive",
           "table"]


class Kind(StrEnum):
    """Where a parameter's value is from."""

    PUBLISHED = "published"
    """A data sheet or a paper says it."""
    USUAL = "usual"
    """A customary efficiency, not of this machine."""
    FITTED = "fitted"
    """Solved from a figure of the paper; that figure is then no prediction."""


def parameter(value: float, unit: str, kind: Kind, source: str) -> Any:
    """A field with a default value that says what it is."""
    return field(default=value, metadata={"unit": unit, "kind": kind, "source": source})


_A6000 = "NVIDIA RTX A6000 data sheet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or several that take turns."""

    name: str = "A6000"
    bandwidth: float = parameter(768e9, "B/s", Kind.PUBLISHED, _A6000)
    bandwidth_share: float = parameter(0.8, "", Kind.USUAL, "share of the bandwidth that large kernels reach")
    flops: float = parameter(154.8e12, "FLOP/s", Kind.PUBLISHED, f"{_A6000}: FP16 tensor cores, dense")
    flops_share: float = parameter(0.5, "", Kind.USUAL, "share of the peak that large matrix products reach")
    memory: float = parameter(48e9, "B", Kind.PUBLISHED, _A6000)
    link: float = parameter(25e9, "B/s", Kind.USUAL, "PCIe 4.0 x16, 32 GB/s raw, what copies reach")
    power: float = parameter(300.0, "W", Kind.PUBLISHED, _A6000)
    count: int = parameter(1, "", Kind.PUBLISHED, "GPUs, layers split over them, one after the other")


_FIT_68 = "from 6.85 times FlexGen at batch 64 (paper, figure 14)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """KV in files of a file system, FlexGen's way."""

    rate: float = parameter(0.91e9, "B/s", Kind.FITTED, f"{_FIT_68}; FlexGen's own cost model says 0.473e9")
    cached_rate: float = parameter(1.13e9, "B/s", Kind.FITTED, "from 10.5 times FlexGen's best (paper, figure 15)")
    direct_rate: float = parameter(6.3e9, "B/s", Kind.PUBLISHED, "one PCIe 4.0 drive, O_DIRECT, large reads: 6.1e9 to "
                                   "6.5e9 of 7e9 (Samsung 980 PRO data sheet)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host computer."""

    memory: float = parameter(96e9, "B", Kind.PUBLISHED, "paper, section 6.1")
    memory_bandwidth: float = parameter(187.7e9, "B/s", Kind.PUBLISHED, "Xeon 5320: 8 channels of DDR4-2933")
    memory_share: float = parameter(0.75, "", Kind.USUAL, "share of the bandwidth that attention on CPU cores reaches")
    offload_rate: float = parameter(6.3e9, "B/s", Kind.FITTED, "DeepSpeed's path from DRAM, from +4.6 % (paper, figure "
                                    "14)")
    sequence_layer_s: float = parameter(270e-6, "s", Kind.FITTED, "host and framework for each sequence and layer, "
                                        "from the KV shares 80.7 and 76.4 % (paper, figure 18)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDrive:
    """The paper's computational drive."""

    kv_rate: float = parameter(7.66e9, "B/s", Kind.PUBLISHED, "paper, table III: decode reads")
    sparse_share: float = parameter(0.527, "", Kind.PUBLISHED, "paper, table III: bytes read over those of K and V")
    sparse_ratio: float = parameter(1 / 8, "", Kind.PUBLISHED, "paper, section 6: compression ratio")
    flops: float = parameter(45e9, "FLOP/s", Kind.FITTED, "arithmetic that reads do not hide, from the KV shares 80.7 "
                             "and 76.4 % (paper, figure 18)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU, a host and what holds the KV cache."""

    gpu: Gpu = Gpu()
    host: Host = Host()
    files: Files = Files()
    drive: StorageDrive = StorageDrive()


H100 = Gpu(name="H100 SXM", bandwidth=3.35e12, flops=989e12, memory=80e9, link=50e9, power=700.0)
"""NVIDIA H100 data sheet; PCIe 5.0 x16."""
PAPER_MACHINE = Machine()


def table(parameters: Any, path: str = "") -> Iterator[tuple[str, float, str, Kind, str]]:
    """(name, value, unit, kind, source) of each parameter, at any depth."""
    for one in fields(parameters):
        value, name = getattr(parameters, one.name), f"{path}{one.name}"
        if is_dataclass(value):
            yield from table(value, f"{name}.")
        elif one.metadata:
            yield name, value, one.metadata["unit"], one.metadata["kind"], one.metadata["source"]
