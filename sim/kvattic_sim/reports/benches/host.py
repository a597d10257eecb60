"""What the host costs: commands that come late, drafts that share a pass, several drives at once.

All behind NAND timing, and every result compared with the golden device or with one drive's, bit for bit.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

import kvattic
from kvattic import GQA, PAPER, AttendResult, Config, Device
from kvattic.array import ArraySequence, DriveArray, open_array
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError, WrongResultError
from kvattic_sim.rtl.jobs import report, run_in_simulation
from kvattic_sim.rtl.transport import RtlTransport
from kvattic_sim.workloads import Attention, Meter, Usage, decode, measured

__all__ = ["BENCHES", "Commands", "Drafts"]

DRAM_BYTES = 1 << 27
HEADS = 40
"""KV heads of OPT-13B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """A decode step of which the host keeps a given number of commands with the drive.

    Attributes:
        batch: sequences; each KV head of each is a command.
        tokens: of each.
        in_flight: commands that the drive has.
        host_us: from an interrupt until the host has taken the completions and rung for the next commands; a Linux host
            with an NVMe drive needs 3 to 6 us from interrupt to submission.
    """

    batch: int = 4
    tokens: int = 1024
    in_flight: int = 64
    host_us: float = 5.0


DECODE = Commands()
SHORT = Commands(tokens=64)


def keep_busy(device: Device, load: Commands) -> tuple[list[NDArray[np.uint32]], Usage, float]:
    """Write, and then attend with as many commands in flight as the load has; runs inside of the simulator.

    Returns:
        The outputs' bits of each sequence, the usage, the commands that were in flight on average.
    """
    transport, config = device.transport, device.config
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    plans = []
    # The sequences of a batch as the layers of one: where they lie makes no difference.
    sequence = device.create_sequence(HEADS, capacity_tokens=load.tokens, layers=load.batch)
    for layer in range(load.batch):
        attention = decode(config, kv_heads=HEADS, tokens=load.tokens, group=config.rows, seed=layer)
        sequence.prefill(attention.key, attention.value, layer=layer)
        plans.append(sequence.plan(attention.query, layer=layer))
    jobs = iter([job for plan in plans for job in plan.jobs])
    latency = round(load.host_us * config.clock_mhz)
    meter = Meter(device)
    waiting = deque(device.submit(list(islice(jobs, load.in_flight))))
    results = []
    begin = last = transport.cycles
    area = 0
    while waiting:
        transport.wait(1e9)
        transport.run_cycles(latency)
        area += len(waiting) * (transport.cycles - last)
        last = transport.cycles
        device.poll()
        while waiting and waiting[0].done():
            results.append(waiting.popleft().result())
        waiting.extend(device.submit(list(islice(jobs, load.in_flight - len(waiting)))))
    usage = meter.read()
    found = []
    for number, plan in enumerate(plans):
        first = number * len(plan.jobs)
        found.append(plan.finish(results[first : first + len(plan.jobs)]).bits)
    return found, usage, area / (last - begin)


def _commands(load: Commands, name: str, *keys: str) -> Bench:
    def run(lab: Lab) -> Figures:
        lab.progress(f"host, {name}: building", 0, None)
        bits, usage, in_flight = run_in_simulation(
            PAPER, keep_busy, {"load": load}, simulator=lab.simulator, dram_bytes=DRAM_BYTES, frames=1 << 11,
            progress=_follow(lab, f"host, {name}")).result
        for number, found in enumerate(bits):
            expected = _golden(PAPER, decode(PAPER, kv_heads=HEADS, tokens=load.tokens, group=PAPER.rows, seed=number))
            if not np.array_equal(found, expected.bits):
                raise WrongResultError(f"{name}: sequence {number} differs from the golden device")
        slots = PAPER.lanes * usage.cycles
        if usage.beats + sum(usage.stalls.values()) != slots:
            raise WrongResultError(f"{name}: beats and stalls do not add up to lanes * cycles = {slots:,}")
        seconds = usage.cycles / PAPER.clock_mhz / 1e6
        values = (usage.stalls["idle"] / slots, HEADS * load.batch / seconds, in_flight)
        return dict(zip(keys, values, strict=True))

    return Bench(keys=keys, measure=run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafts:
    """Drafts that one pass verifies, or a pass for each.

    Attributes:
        heads: KV heads.
        tokens: of each, drafts included.
        drafts: query rows, as many as the configuration has.
    """

    heads: int = 16
    tokens: int = 1024
    drafts: int = GQA.rows


def verify(device: Device, load: Drafts) -> tuple[list[NDArray[np.uint32]], list[Usage]]:
    """Verify the drafts in one pass, then one by one; runs inside of the simulator.

    Returns:
        Bits of both, (heads, drafts, head_dim), and their usage.
    """
    transport, config = device.transport, device.config
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    attention, query = _drafts(config, load)
    sequence = device.create_sequence(load.heads, capacity_tokens=load.tokens)
    sequence.prefill(attention.key, attention.value)
    together, once = measured(device, lambda: sequence.attend(query, causal=True))
    # The draft tree's bits say which tokens a single row attends: as if the later drafts were not there yet.
    rows = [sequence.plan(query[:, i : i + 1], tree=np.arange(load.drafts)[None] <= i) for i in range(load.drafts)]
    single, each = measured(device, lambda: device.attend_many(rows))
    return [together.bits, np.concatenate([result.bits for result in single], axis=1)], [once, each]


def _drafts(config: Config, load: Drafts) -> tuple[Attention, NDArray[np.uint16]]:
    attention = decode(config, kv_heads=load.heads, tokens=load.tokens)
    queries = [decode(config, kv_heads=load.heads, tokens=1, seed=1 + i).query for i in range(load.drafts)]
    return attention, np.concatenate(queries, axis=1)


def drafts(lab: Lab) -> Figures:
    """Cycles of one pass over those of a pass for each draft, all of which are submitted at once."""
    load = Drafts()
    lab.progress("host, drafts: building", 0, None)
    (together, single), (once, each) = run_in_simulation(
        GQA, verify, {"load": load}, simulator=lab.simulator, dram_bytes=DRAM_BYTES,
        progress=_follow(lab, "host, drafts")).result
    attention, query = _drafts(GQA, load)
    with kvattic.open("model", GQA) as device:
        sequence = device.create_sequence(load.heads, capacity_tokens=load.tokens)
        sequence.prefill(attention.key, attention.value)
        expected = sequence.attend(query, causal=True).bits
    for name, found in (("one pass", together), ("single rows", single)):
        if not np.array_equal(found, expected):
            raise WrongResultError(f"drafts, {name}: differs from the golden device")
    return {"host.spec.cycles_ratio": once.cycles / each.cycles, "host.spec.cycles": float(once.cycles)}


BATCH, SHORT_TOKENS = 16, 256
DRIVES = 4


def scaling(lab: Lab) -> Figures:
    """Cycles of a batch on one drive over those of the slowest of four, which have its heads between them."""
    cycles, bits = {}, {}
    for number in (1, DRIVES):
        lab.progress(f"host, {number} drives", 0, None)
        with open_array([f"sim:{lab.simulator}"] * number, PAPER, dram_bytes=DRAM_BYTES, frames=1 << 11) as array:
            cycles[number], bits[number] = _batch(array, lab)
    if not all(np.array_equal(one, four) for one, four in zip(bits[1], bits[DRIVES], strict=True)):
        raise WrongResultError(f"{DRIVES} drives give other bits than one")
    attention = decode(PAPER, kv_heads=HEADS, tokens=SHORT_TOKENS)
    if not np.array_equal(bits[1][0], _golden(PAPER, attention).bits):
        raise WrongResultError("one drive gives other bits than the golden device")
    slowest = max(cycles[DRIVES])
    return {"host.multi.scaling": cycles[1][0] / slowest, "host.multi.cycles": float(slowest)}


def _batch(array: DriveArray, lab: Lab) -> tuple[list[int], list[NDArray[np.uint32]]]:
    """Cycles of each drive for one decode step of the batch, and the outputs' bits."""
    sequences: list[tuple[ArraySequence, NDArray[np.uint16]]] = []
    for number in range(BATCH):
        lab.progress(f"host, {len(array.devices)} drives: writing sequence {number} of {BATCH}", 0, None)
        attention = decode(PAPER, kv_heads=HEADS, tokens=SHORT_TOKENS, seed=number)
        sequence = array.create_sequence(HEADS, capacity_tokens=SHORT_TOKENS)
        sequence.prefill(attention.key, attention.value)
        sequences.append((sequence, attention.query))
    lab.progress(f"host, {len(array.devices)} drives: attending", 0, None)
    meters = [Meter(device) for device in array.devices]
    results = array.attend_many([sequence.plan(query) for sequence, query in sequences])
    beats = 2 * BATCH * HEADS * SHORT_TOKENS * PAPER.beats_per_token // len(array.devices)
    cycles = []
    for meter in meters:
        usage = meter.read()
        if usage.beats != beats:
            raise WrongResultError(f"a drive counts {usage.beats:,} beats, not {beats:,}")
        cycles.append(usage.cycles)
    return cycles, [result.bits for result in results]


def generate(lab: Lab) -> Figures:
    """Share of tokens that transformers' models generate alike, with K and V in the drive and in float32."""
    lab.progress("host, transformers", 0, None)
    try:
        from kvattic_sim.reports.benches.generate import match
    except ImportError as error:
        raise UnavailableError(f"torch and transformers are not installed ({error}): pip install kvattic[transformers]"
                               ) from None
    found = match()
    return {"host.generate.match": min(found.values())} | {
        f"host.generate.match.{name}": found[name] for name in ARCHITECTURES}


ARCHITECTURES = ("llama", "opt", "qwen2", "qwen3", "mistral", "lm")


def _golden(config: Config, attention: Attention) -> AttendResult:
    heads, tokens, _ = attention.key.shape
    with kvattic.open("model", config) as device:
        sequence = device.create_sequence(heads, capacity_tokens=tokens)
        sequence.prefill(attention.key, attention.value)
        return sequence.attend(attention.query)


def _follow(lab: Lab, what: str) -> Callable[[str], None]:
    def follow(line: str) -> None:
        kind, _, rest = line.partition("|")
        if kind == "cycles":
            lab.progress(what, int(rest), None)

    return follow


BENCHES = (
    Bench(keys=("host.generate.match", *(f"host.generate.match.{name}" for name in ARCHITECTURES)), measure=generate),
    _commands(SHORT, "64 tokens a head", "host.commands_per_second_ratio.short", "host.commands_per_second.short",
              "host.in_flight.short"),
    _commands(DECODE, "decode step", "host.commands_per_second_ratio", "host.commands_per_second", "host.in_flight"),
    Bench(keys=("host.spec.cycles_ratio", "host.spec.cycles"), measure=drafts),
    Bench(keys=("host.multi.scaling", "host.multi.cycles"), measure=scaling),
)
"""What the bench runner calls, short ones first."""
