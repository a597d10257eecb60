"""How long a decode step takes on each kind of system, part by part.

    step = in_storage(OPT_13B, Load(batch=64), PAPER_MACHINE, drives=2)
    step.seconds, step.tokens_per_second, step.share("kv")

The parts come one after the other, as in the paper's FlexGen-based software, unless `overlapped` says that GPU and
drive work at the same time on two halves of the batch.
"""

from typing import Protocol

from kvattic.errors import CapacityError, RequestError
from kvattic_sim.system.parameters import Gpu, Machine
from kvattic_sim.system.step import Load, Step
from kvattic_sim.system.transformer import Transformer

__all__ = ["DriveModel", "Load", "Step", "cpu_attention", "deepspeed", "direct_host_s", "direct_io", "flexgen",
           "gpu_alone", "gpu_seconds", "heads_of_a_drive", "in_storage", "kvattic_drive", "prefill_seconds",
           "prefill_write_rate", "sparse_cpu", "sparse_dram"]


class DriveModel(Protocol):
    """What a drive takes and holds, for `kvattic_drive`: a model of it, or figures that were measured."""

    def attention_seconds(self, mode: str, *, kv_heads: int, group: int, head_dim: int, tokens: float) -> float:
        """Seconds of attention over `tokens` of each of `kv_heads` of all sequences, `group` query heads on each."""
        ...

    def write_seconds(self, mode: str, *, kv_heads: int, tokens: float) -> float:
        """Seconds of writing `tokens` of each of `kv_heads` of all sequences."""
        ...

    def message_bytes(self, mode: str, group: int, tokens: float) -> float:
        """Bytes that one KV head's attention moves over the drive's link."""
        ...

    def stored_bytes(self, mode: str) -> float:
        """Bytes of flash that a token of a KV head takes."""
        ...

    def tail_bytes(self, mode: str) -> float:
        """Bytes of the drive's DRAM that a KV head takes."""
        ...

    def capacity(self, machine: Machine) -> float:
        """Bytes of flash."""
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


def _two_halves(model: Transformer, batch: int, gpu: Gpu) -> float:
    """Seconds of a step's matrix products for one half of the batch after the other: weights are read twice."""
    return gpu_seconds(model, batch // 2, gpu) + gpu_seconds(model, batch - batch // 2, gpu)


def _best_order(load: Load, model: Transformer, machine: Machine, kv: float, prefill: float) -> Step:
    """A step whose `kv` needs the layer's queries: in turn, or with the GPU on the other half; what is faster."""
    turn = Step(load=load, parts={"kv": kv, "gpu": gpu_seconds(model, load.batch, machine.gpu)}, prefill=prefill)
    if load.batch == 1:
        return turn
    halves = Step(load=load, parts={"kv": kv, "gpu": _two_halves(model, load.batch, machine.gpu)}, overlapped=True,
                  prefill=prefill)
    return min(turn, halves, key=lambda step: step.seconds)


def _common(model: Transformer, load: Load, machine: Machine) -> dict[str, float]:
    """What every system takes that is not the KV cache."""
    return {"host": load.batch * model.layers * machine.host.sequence_layer_s,
            "gpu": gpu_seconds(model, load.batch, machine.gpu)}


def prefill_seconds(model: Transformer, load: Load, machine: Machine, write: float = 0.0) -> float:
    """Seconds of all prompts: a layer's K and V are written while the GPU computes the next one.

    Args:
        model: what computes them.
        load: how many prompts, and how long.
        machine: its GPU.
        write: seconds of writing all layers.
    """
    gpu = machine.gpu
    _check_weights(model, gpu)
    # Causal attention: each token attends half of the prompt on average.
    flops = load.batch * load.prompt * (model.linear_flops + model.attention_flops(load.prompt / 2))
    compute = max(model.weight_bytes / (gpu.bandwidth * gpu.bandwidth_share), flops / (gpu.flops * gpu.flops_share))
    return max(compute, write) + min(compute, write) / model.layers


def _prompt_bytes(model: Transformer, load: Load) -> float:
    return load.batch * load.prompt * model.kv_bytes


def flexgen(model: Transformer, load: Load, machine: Machine, *, sparse: bool = False) -> Step:
    """FlexGen with its KV cache in files; `sparse`: with SparQ, which reads an eighth of the bytes.

    Raises:
        CapacityError: K and V do not fit one drive; with SparQ, K twice.
    """
    size = load.kv_capacity(model) * (1.5 if sparse else 1.0)
    _fits_flash(model, load, size, machine.files.capacity, 1)
    cached = load.kv_capacity(model) <= machine.host.memory
    share = machine.drive.sparse_ratio if sparse else 1.0
    rate = machine.files.cached_rate if cached else machine.files.rate
    return Step(load=load, parts={"kv": share * load.kv_bytes(model) / rate, **_common(model, load, machine)},
                prefill=prefill_seconds(model, load, machine, _prompt_bytes(model, load) / rate), flash=size)


def deepspeed(model: Transformer, load: Load, machine: Machine) -> Step:
    """DeepSpeed with its KV cache in host DRAM.

    Raises:
        CapacityError: K and V do not fit there.
    """
    _fits_dram(model, load, machine)
    rate = machine.host.offload_rate
    return Step(load=load, parts={"kv": load.kv_bytes(model) / rate, **_common(model, load, machine)},
                prefill=prefill_seconds(model, load, machine, _prompt_bytes(model, load) / rate))


def in_storage(model: Transformer, load: Load, machine: Machine, *, drives: int = 1, sparse: bool = False) -> Step:
    """The paper's drives: heads are split over them, what the host does is not.

    Raises:
        CapacityError: K and V do not fit the drives; sparse, K twice.
        RequestError: query heads share K and V, which the paper does not have.
    """
    _check_drives(drives)
    if model.kv_heads != model.q_heads:
        raise RequestError(f"the paper's drive has K and V for each query head; {model.name} has {model.kv_heads} KV "
                           f"heads for {model.q_heads} query heads")
    drive = machine.drive
    size = load.kv_capacity(model) * (1.5 if sparse else 1.0) / drives
    _fits_flash(model, load, size, drive.capacity, drives)
    share, work = (drive.sparse_share, drive.sparse_ratio) if sparse else (1.0, 1.0)
    flops = load.batch * model.attention_flops(load.tokens)
    return Step(load=load, parts={
        "kv": share * load.kv_bytes(model) / drive.kv_rate / drives,
        "arithmetic": work * flops / drive.flops / drives,
        **_common(model, load, machine),
    }, prefill=prefill_seconds(model, load, machine), flash=size)


def heads_of_a_drive(batch: int, kv_heads: int, drives: int) -> int:
    """KV heads of all sequences on the fullest drive, in the best split.

    Sequences are dealt over groups of drives, and each sequence's heads over the drives of its group.
    """
    _check_drives(drives)
    return min(-(-batch // groups) * -(-kv_heads // (drives // groups)) for groups in range(1, drives + 1))


def direct_host_s(model: Transformer, load: Load, machine: Machine) -> float:
    """Seconds of a host without a framework for each sequence and layer: its commands, and the way of a layer."""
    return model.kv_heads * machine.host.command_s + machine.host.layer_s / load.batch


def kvattic_drive(model: Transformer, load: Load, machine: Machine, drive: DriveModel, *, mode: str, drives: int = 1,
                  host_s: float | None = None, overlapped: bool = False) -> Step:
    """This project's drives in the same place.

    Tokens of a step go to flash in whole stripes; their share of that comes on top of each step, as nothing is known of
    how reads and writes share the dies.

    Args:
        model: what is decoded with.
        load: what is decoded.
        machine: GPU and host.
        drive: how long attention takes.
        mode: `dense`, `sparf`, `fetched` or `centroid`.
        drives: sequences and KV heads are split over them (`heads_of_a_drive`); the fullest one counts.
        host_s: seconds of host and framework for each sequence and layer; the paper's if None.
        overlapped: GPU and drives work at the same time, on two halves of the batch.

    Raises:
        CapacityError: K, V and their sketches do not fit the drives.
        RequestError: K and V of this model are no 16 bits wide, or one sequence has no other half.
    """
    heads = heads_of_a_drive(load.batch, model.kv_heads, drives)
    group = model.q_heads // model.kv_heads
    if model.kv_bits != 16:
        raise RequestError(f"kv_bits of {model.name} must be 16, which is how the drive keeps K and V, not "
                           f"{model.kv_bits}")
    if overlapped and load.batch < 2:
        raise RequestError("GPU and drive overlap on two halves of a batch, so batch must be at least 2, not 1")
    layers, tokens = model.layers, load.tokens
    of_token = heads * layers * drive.stored_bytes(mode)
    size = of_token * (load.prompt + load.new)
    _fits_flash(model, load, size, drive.capacity(machine), drives)
    attention = drive.attention_seconds(mode, kv_heads=heads, group=group, head_dim=model.head_dim, tokens=tokens)
    message = drive.message_bytes(mode, group, tokens)
    link = max(heads * message / machine.board.link, load.batch * model.kv_heads * message / machine.gpu.link)
    write = layers * drive.write_seconds(mode, kv_heads=heads, tokens=load.prompt)
    write = max(write, of_token * load.prompt / machine.board.link, _prompt_bytes(model, load) / machine.gpu.link)
    common = _common(model, load, machine)
    if overlapped:
        common["gpu"] = _two_halves(model, load.batch, machine.gpu)
    if host_s is not None:
        common["host"] = load.batch * layers * host_s
    return Step(load=load, parts={
        "kv": layers * max(attention, link), "append": layers * drive.write_seconds(mode, kv_heads=heads, tokens=1.0),
        **common,
    }, overlapped=overlapped, prefill=prefill_seconds(model, load, machine, write), flash=size,
        dram=heads * layers * drive.tail_bytes(mode))


def direct_io(model: Transformer, load: Load, machine: Machine, *, drives: int = 1) -> Step:
    """K and V streamed to the GPU by direct I/O, read ahead of the layer that needs them.

    Raises:
        CapacityError: K and V do not fit the drives.
    """
    _check_drives(drives)
    files, link = machine.files, machine.gpu.link
    size = load.kv_capacity(model) / drives
    _fits_flash(model, load, size, files.capacity, drives)
    write = _prompt_bytes(model, load) / min(drives * files.direct_write_rate, link)
    parts = {"kv": load.kv_bytes(model) / min(drives * files.direct_rate, link),
             "gpu": gpu_seconds(model, load.batch, machine.gpu)}
    return Step(load=load, parts=parts, overlapped=True, prefill=prefill_seconds(model, load, machine, write),
                flash=size)


def cpu_attention(model: Transformer, load: Load, machine: Machine) -> Step:
    """Attention on CPU cores over host DRAM, at the memory's bandwidth.

    Raises:
        CapacityError: K and V do not fit there.
    """
    _fits_dram(model, load, machine)
    rate = machine.host.memory_bandwidth * machine.host.memory_share
    return _best_order(load, model, machine, load.kv_bytes(model) / rate, _to_dram(model, load, machine))


def sparse_cpu(model: Transformer, load: Load, machine: Machine) -> Step:
    """SparQ on CPU cores over host DRAM.

    Raises:
        CapacityError: K, once more for its features, and V do not fit there.
    """
    _fits_dram(model, load, machine, copies=1.5)
    host = machine.host
    rate = host.memory_bandwidth * host.memory_share * host.gather_share / machine.drive.sparse_ratio
    return _best_order(load, model, machine, load.kv_bytes(model) / rate, _to_dram(model, load, machine))


def sparse_dram(model: Transformer, load: Load, machine: Machine) -> Step:
    """SparQ on the GPU over K and V in host DRAM: an eighth of the bytes cross the link.

    Raises:
        CapacityError: K, once more for its features, and V do not fit there.
    """
    _fits_dram(model, load, machine, copies=1.5)
    read = machine.drive.sparse_ratio * load.kv_bytes(model) / machine.gpu.link
    return _best_order(load, model, machine, read, _to_dram(model, load, machine))


def _to_dram(model: Transformer, load: Load, machine: Machine) -> float:
    return prefill_seconds(model, load, machine, _prompt_bytes(model, load) / machine.gpu.link)


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
                                  "gpu": gpu_seconds(model, batch, gpu)}, prefill=prefill_seconds(model, wave, machine))


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


def _fits_flash(model: Transformer, load: Load, size: float, room: float, drives: int) -> None:
    """Check what the fullest drive has to hold."""
    if size > room:
        raise CapacityError(f"K and V of {load.batch} sequences of {load.prompt + load.new} tokens of {model.name} "
                            f"take {size / 1e9:.0f} GB of a drive, which has {room / 1e9:.0f} GB: with {drives} drive"
                            f"{'s' * (drives > 1)}, take more of them, or a smaller batch")
