"""The parameters of the system model: each with its unit, its kind and its source.

`PAPER_MACHINE` is the paper's; `dataclasses.replace` makes others of it, and `table` lists all that it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from kvattic.errors import RequestError

__all__ = ["A100", "GPUS", "H100", "PAPER_MACHINE", "Board", "Files", "Gpu", "Host", "Kind", "Machine",
           "StorageDrive", "gpu", "table"]


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


_SHEET = "data sheet"
"""In a source: the data sheet that the object names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or several that take turns; `sheet` is the source of what is published about it."""

    name: str = "A6000"
    sheet: str = "NVIDIA RTX A6000 data sheet"
    bandwidth: float = parameter(768e9, "B/s", Kind.PUBLISHED, _SHEET)
    bandwidth_share: float = parameter(0.8, "", Kind.USUAL, "share of the bandwidth that large kernels reach")
    flops: float = parameter(154.8e12, "FLOP/s", Kind.PUBLISHED, f"{_SHEET}: FP16 tensor cores, dense")
    flops_share: float = parameter(0.5, "", Kind.USUAL, "share of the peak that large matrix products reach")
    memory: float = parameter(48e9, "B", Kind.PUBLISHED, _SHEET)
    link: float = parameter(25e9, "B/s", Kind.USUAL, "PCIe x16, what copies reach: 25 of 32 GB/s (4.0), 50 of "
                            "64 (5.0)")
    power: float = parameter(300.0, "W", Kind.PUBLISHED, _SHEET)
    count: int = parameter(1, "", Kind.PUBLISHED, "GPUs, layers split over them, one after the other")


_FIT_68 = "from 6.85 times FlexGen at batch 64 (paper, figure 14)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """KV in files of a file system, FlexGen's way."""

    rate: float = parameter(0.91e9, "B/s", Kind.FITTED, f"{_FIT_68}; FlexGen's own cost model says 0.473e9")
    cached_rate: float = parameter(1.13e9, "B/s", Kind.FITTED, "from 10.5 times FlexGen's best (paper, figure 15)")
    direct_rate: float = parameter(6.3e9, "B/s", Kind.PUBLISHED, "one PCIe 4.0 drive, O_DIRECT, large reads: 6.1e9 to "
                                   "6.5e9 of 7e9 (Samsung 980 PRO data sheet)")
    direct_write_rate: float = parameter(5.1e9, "B/s", Kind.PUBLISHED, "Samsung 980 PRO 2 TB data sheet, in its SLC "
                                         "cache; slower beyond, which is not modelled")
    capacity: float = parameter(2e12, "B", Kind.PUBLISHED, "paper, section 6.1: Samsung 980 PRO 2 TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host computer."""

    memory: float = parameter(96e9, "B", Kind.PUBLISHED, "paper, section 6.1")
    memory_bandwidth: float = parameter(187.7e9, "B/s", Kind.PUBLISHED, "Xeon 5320: 8 channels of DDR4-2933")
    memory_share: float = parameter(0.75, "", Kind.USUAL, "share of the bandwidth that attention on CPU cores reaches")
    gather_share: float = parameter(0.5, "", Kind.USUAL, "sparse attention on CPU cores, share of what its bytes "
                                    "allow: SparQ's GPU kernels reach 0.47 to 0.65 (arXiv 2312.04985)")
    offload_rate: float = parameter(6.3e9, "B/s", Kind.FITTED, "DeepSpeed's path from DRAM, from +4.6 % (paper, figure "
                                    "14)")
    sequence_layer_s: float = parameter(270e-6, "s", Kind.FITTED, "host and framework for each sequence and layer, "
                                        "from the KV shares 80.7 and 76.4 % (paper, figure 18)")
    command_s: float = parameter(1e-7, "s", Kind.PUBLISHED, "a command of a driver in user space: SPDK, over 10 "
                                 "million I/O a second on one core (spdk.io, 2023-02-01)")
    layer_s: float = parameter(20e-6, "s", Kind.USUAL, "from the GPU to the drives and back, each layer: launching a "
                               "PyTorch kernel takes about 20 us (NVIDIA Nsight Systems guide, V100)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDrive:
    """The paper's computational drive."""

    kv_rate: float = parameter(7.66e9, "B/s", Kind.PUBLISHED, "paper, table III: decode reads")
    sparse_share: float = parameter(0.527, "", Kind.PUBLISHED, "paper, table III: bytes read over those of K and V")
    sparse_ratio: float = parameter(1 / 8, "", Kind.PUBLISHED, "paper, section 6: compression ratio")
    flops: float = parameter(45e9, "FLOP/s", Kind.FITTED, "arithmetic that reads do not hide, from the KV shares 80.7 "
                             "and 76.4 % (paper, figure 18)")
    capacity: float = parameter(2e12, "B", Kind.PUBLISHED, "paper, section 6.1: as large as a Samsung 980 PRO 2 TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What surrounds this project's drive; `kvattic.timing` has its speed (kvattic_sim.system.drive)."""

    cell_capacity: float = parameter(2e12 / 3, "B", Kind.PUBLISHED, "for each bit of a cell: the dies of a 2 TB drive "
                                     "of TLC (paper, section 6.1), a third of it with one bit a cell")
    link: float = parameter(7e9, "B/s", Kind.PUBLISHED, "PCIe 4.0 x4 (paper, section 6.1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU, a host and what holds the KV cache."""

    gpu: Gpu = Gpu()
    host: Host = Host()
    files: Files = Files()
    drive: StorageDrive = StorageDrive()
    board: Board = Board()


A100 = Gpu(name="A100 80 GB", sheet="NVIDIA A100 80 GB SXM data sheet", bandwidth=2.039e12, flops=312e12, memory=80e9,
           power=400.0)
H100 = Gpu(name="H100 SXM", sheet="NVIDIA H100 SXM data sheet", bandwidth=3.35e12, flops=989e12, memory=80e9, link=50e9,
           power=700.0)
"""With PCIe 5.0 x16."""
GPUS = {"a6000": Gpu(), "a100": A100, "h100": H100}
"""By the name that `gpu` takes."""
PAPER_MACHINE = Machine()


def gpu(name: str) -> Gpu:
    """The named GPU.

    Raises:
        RequestError: there is no GPU of that name.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise RequestError(f"there is no GPU {name!r}; GPUs are {', '.join(GPUS)}")
    return found


def table(parameters: Any, path: str = "") -> Iterator[tuple[str, float, str, Kind, str]]:
    """(name, value, unit, kind, source) of each parameter, at any depth."""
    for one in fields(parameters):
        value, name = getattr(parameters, one.name), f"{path}{one.name}"
        if is_dataclass(value):
            yield from table(value, f"{name}.")
        elif one.metadata:
            source = one.metadata["source"].replace(_SHEET, getattr(parameters, "sheet", _SHEET), 1)
            yield name, value, one.metadata["unit"], one.metadata["kind"], source
