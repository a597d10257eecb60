"""How long a decode step takes on each kind of system, part by part.

    step = in_storage(OPT_13B, Load(batch=64), PAPER_MACHINE, drives=2)
    step.seconds, step.tokens_per_second, step.share("kv")

The parts come one after the other, as in the paper's FlexGen-based software, unless `overlapped` says that GPU and
drive work at the same time on two halves of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from kvattic.errors import CapacityError, RequestError
from kvattic_sim.system.parameters import Gpu, Machine
from kvattic_sim.system.transformer import Transformer

__all__ = ["DriveModel", "Load", "Step", "cpu_attention", "deepspeed", "direct_io", "flexgen", "gpu_alone",
           "gpu_seconds", "in_storage", "kvattic_drive", "prefill_write_rate", "sparse_dram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is generated.

    Attributes:
        batch: sequences that are decoded together.
        prompt: tokens of each prompt.
        new: tokens generated for each.
    """

    batch: int
    prompt: int = 1024
    new: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError(f"{name} must be an integer of at least {least}, not {value!r}")

    @property
    def tokens(self) -> float:
        """Tokens that a step attends, on average over the generation."""
        return self.prompt + (self.new - 1) / 2

    def kv_bytes(self, model: Transformer) -> float:
        """Bytes of K and V that a dense step reads, on average."""
        return self.batch * self.tokens * model.kv_bytes

    def kv_capacity(self, model: Transformer) -> float:
        """Bytes of K and V at the end of the generation."""
        return self.batch * (self.prompt + self.new) * model.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decode step of a whole batch.

    Attributes:
        load: what is decoded.
        parts: seconds by name; `kv` is access to the KV cache, `gpu` the matrix products.
        overlapped: the GPU works on one half of the batch while the rest is done for the other.
    """

    load: Load
    parts: Mapping[str, float]
    overlapped: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        total = sum(self.parts.values())
        if not self.overlapped:
            return total
        gpu = self.parts.get("gpu", 0.0)
        return max(gpu, total - gpu)

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated a second, all sequences together."""
        return self.load.batch / self.seconds

    def share(self, part: str) -> float:
        """Share of the step that a part takes."""
        return self.parts[part] / self.seconds


class DriveModel(Protocol):
    """What attention takes on a drive, for `kvattic_drive`: a model of it, or figures that were measured."""

    def attention_seconds(self, mode: str, *, kv_heads: int, group: int, head_dim: int, tokens: float) -> float:
        """Seconds of attention over `tokens` of each of `kv_heads`, `group` query heads on each."""
        ...


def gpu_seconds(model: Transformer, batch: int, gpu: Gpu) -> float:
    """Seconds of a step's matrix products: weights are read once, each sequence is multiplied; the longer of the two.

    GPUs that split the layers work one after the other, so their number does not change it.

    Raises:
        CapacityError: the weights do not fit the GPUs.
    """
    _check_weights(model, gpu)
    read = model.weight_bytes / (gpu.bandwidth * gpu.bandwidth_share)
    return max(read, batch * model.linear_flops / (gpu.flops * gpu.flops_share))


def _check_weights(model: Transformer, gpu: Gpu) -> None:
    room = gpu.memory * gpu.count
    if model.weight_bytes > room:
        raise CapacityError(f"the weights of {model.name} take {model.weight_bytes / 1e9:.1f} GB, "
                            f"{gpu.count} x {gpu.name} has {room / 1e9:.0f} GB: "
                            "take more GPUs, or fewer bits a weight")


def _common(model: Transformer, load: Load, machine: Machine) -> dict[str, float]:
    """What every system takes that is not the KV cache."""
    return {"host": load.batch * model.layers * machine.host.sequence_layer_s,
            "gpu": gpu_seconds(model, load.batch, machine.gpu)}


def flexgen(model: Transformer, load: Load, machine: Machine, *, sparse: bool = False) -> Step:
    """FlexGen with its KV cache in files; `sparse`: with SparQ, which reads an eighth of the bytes."""
    cached = load.kv_capacity(model) <= machine.host.memory
    share = machine.drive.sparse_ratio if sparse else 1.0
    read = share * load.kv_bytes(model) / (machine.files.cached_rate if cached else machine.files.rate)
    return Step(load=load, parts={"kv": read, **_common(model, load, machine)})


def deepspeed(model: Transformer, load: Load, machine: Machine) -> Step:
    """DeepSpeed with its KV cache in host DRAM.

    Raises:
        CapacityError: K and V do not fit there.
    """
    _fits_dram(model, load, machine)
    read = load.kv_bytes(model) / machine.host.offload_rate
    return Step(load=load, parts={"kv": read, **_common(model, load, machine)})


def in_storage(model: Transformer, load: Load, machine: Machine, *, drives: int = 1, sparse: bool = False) -> Step:
    """The paper's drives: heads are split over them, what the host does is not."""
    _check_drives(drives)
    drive = machine.drive
    share, work = (drive.sparse_share, drive.sparse_ratio) if sparse else (1.0, 1.0)
    flops = load.batch * model.attention_flops(load.tokens)
    return Step(load=load, parts={
        "kv": share * load.kv_bytes(model) / drive.kv_rate / drives,
        "arithmetic": work * flops / drive.flops / drives,
        **_common(model, load, machine),
    })


def kvattic_drive(model: Transformer, load: Load, machine: Machine, drive: DriveModel, *, mode: str, drives: int = 1,
                  host_s: float | None = None, overlapped: bool = False) -> Step:
    """This project's drives in the same place.

    Args:
        model: what is decoded with.
        load: what is decoded.
        machine: GPU and host.
        drive: how long attention takes.
        mode: `dense`, `sparf`, `fetched` or `centroid`.
        drives: the KV heads are split over them; the fullest one counts.
        host_s: seconds of host and framework for each sequence and layer; the paper's if None.
        overlapped: GPU and drives work at the same time.
    """
    _check_drives(drives)
    heads = -(-model.kv_heads // drives)
    # Beyond a head for each drive, sequences are what is split.
    split = max(1.0, drives / model.kv_heads)
    layer = drive.attention_seconds(mode, kv_heads=heads, group=model.q_heads // model.kv_heads,
                                    head_dim=model.head_dim, tokens=load.tokens)
    common = _common(model, load, machine)
    if host_s is not None:
        common["host"] = load.batch * model.layers * host_s
    return Step(load=load, parts={"kv": load.batch * model.layers * layer / split, **common}, overlapped=overlapped)


def direct_io(model: Transformer, load: Load, machine: Machine, *, drives: int = 1) -> Step:
    """K and V streamed to the GPU by direct I/O, read ahead of the layer that needs them."""
    _check_drives(drives)
    rate = min(drives * machine.files.direct_rate, machine.gpu.link)
    parts = {"kv": load.kv_bytes(model) / rate, "gpu": gpu_seconds(model, load.batch, machine.gpu)}
    return Step(load=load, parts=parts, overlapped=True)


def cpu_attention(model: Transformer, load: Load, machine: Machine) -> Step:
    """Attention on CPU cores over host DRAM, at the memory's bandwidth.

    Raises:
        CapacityError: K and V do not fit there.
    """
    _fits_dram(model, load, machine)
    rate = machine.host.memory_bandwidth * machine.host.memory_share
    parts = {"kv": load.kv_bytes(model) / rate, "gpu": gpu_seconds(model, load.batch, machine.gpu)}
    return Step(load=load, parts=parts, overlapped=True)


def sparse_dram(model: Transformer, load: Load, machine: Machine) -> Step:
    """SparQ on the GPU over K and V in host DRAM: an eighth of the bytes cross the link.

    Raises:
        CapacityError: K, once more for its features, and V do not fit there.
    """
    _fits_dram(model, load, machine, copies=1.5)
    read = machine.drive.sparse_ratio * load.kv_bytes(model) / machine.gpu.link
    return Step(load=load, parts={"kv": read, "gpu": gpu_seconds(model, load.batch, machine.gpu)}, overlapped=True)


def gpu_alone(model: Transformer, load: Load, machine: Machine) -> Step:
    """K and V in the GPU's memory, in waves of as many sequences as fit; the step of one wave.

    Raises:
        CapacityError: not even one sequence fits.
    """
    gpu = machine.gpu
    _check_weights(model, gpu)
    room = gpu.memory * gpu.count - model.weight_bytes
    one = load.kv_capacity(model) / load.batch
    batch = min(load.batch, int(room / one))
    if batch < 1:
        raise CapacityError(f"K and V of one sequence of {load.prompt + load.new} tokens take {one / 1e9:.1f} GB, "
                            f"beside the weights of {model.name} {gpu.count} x {gpu.name} has {room / 1e9:.1f} GB")
    wave = Load(batch=batch, prompt=load.prompt, new=load.new)
    return Step(load=wave, parts={"kv": wave.kv_bytes(model) / (gpu.bandwidth * gpu.bandwidth_share),
                                  "gpu": gpu_seconds(model, batch, gpu)})


def prefill_write_rate(model: Transformer, load: Load, machine: Machine) -> tuple[float, float]:
    """What prefill writes for each layer, layer by layer: (bytes, bytes a second at which the GPU makes them)."""
    made = load.batch * load.prompt * model.kv_bytes / model.layers
    flops = load.batch * load.prompt * 2.0 * model.layer_weights
    return made, made / (flops / (machine.gpu.flops * machine.gpu.flops_share))


def _check_drives(drives: int) -> None:
    if not isinstance(drives, int) or isinstance(drives, bool) or drives < 1:
        raise RequestError(f"drives must be a positive integer, not {drives!r}")


def _fits_dram(model: Transformer, load: Load, machine: Machine, copies: float = 1.0) -> None:
    size = copies * load.kv_capacity(model)
    if size > machine.host.memory:
        raise CapacityError(f"K and V of {load.batch} sequences of {load.prompt + load.new} tokens of {model.name} "
                            f"take {size / 1e9:.0f} GB, the host has {machine.host.memory / 1e9:.0f} GB")
