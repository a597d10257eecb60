"""What runs on a device: the same functions for the golden device and, inside the simulator process, for the RTL."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvattic import AttendResult, Config, Device
from kvattic.elements import to_bits
from kvattic_sim.data import load_minilm
from kvattic_sim.jobs import report

STALLS = ("starved", "barrier", "weights", "scores", "idle")
"""Why a lane had no beat in a cycle (registers and completions of these names)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The counters of one batch.

    Attributes:
        cycles: from the doorbell to the last completion.
        first_beat, last_beat: cycles of the first and the last beat.
        beats: lane cycles that carried data.
        stalls: lane cycles without data, by reason (`STALLS`); with beats they add up to channels * cycles.
        seconds: time of the attend, on the machine that ran it.
    """

    cycles: int
    first_beat: int
    last_beat: int
    beats: int
    stalls: dict[str, int]
    seconds: float

    @classmethod
    def read(cls, device: Device, seconds: float) -> "Usage":
        """The counters of the device's last batch."""
        register = device.transport.read_register
        return cls(cycles=register("CYCLES"), first_beat=register("FIRST_BEAT"), last_beat=register("LAST_BEAT"),
                   beats=register("BEATS"), stalls={name: register(name.upper()) for name in STALLS}, seconds=seconds)

    @property
    def window(self) -> int:
        """Cycles from the first beat to the last one."""
        return self.last_beat - self.first_beat + 1

    def bus_use(self, channels: int) -> float:
        """Share of all lane beat slots between the first and the last beat that carried data."""
        return self.beats / (channels * self.window)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Inputs of one attention over several heads: K and V (kv_heads, tokens, head_dim), q (q_heads, queries, head_dim).

    uint16 bit patterns of the storage format.
    """

    query: NDArray[np.uint16]
    key: NDArray[np.uint16]
    value: NDArray[np.uint16]


def minilm(layer: int) -> Attention:
    """Every head of one MiniLM layer on real text; all positions are queries."""
    data = load_minilm()
    index = data.layers.index(layer)
    return Attention(query=data.q[index].view(np.uint16), key=data.k[index].view(np.uint16),
                     value=data.v[index].view(np.uint16))


def decode(config: Config, *, kv_heads: int, tokens: int, group: int = 1, seed: int = 0) -> Attention:
    """One decode step's geometry with normal random numbers: one query for each of `group` heads on each KV head."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.uint16]:
        return to_bits(rng.standard_normal(shape, np.float32), config.element)

    return Attention(query=normal(kv_heads * group, 1, config.head_dim), key=normal(kv_heads, tokens, config.head_dim),
                     value=normal(kv_heads, tokens, config.head_dim))


def attend(device: Device, attention: Attention, heads_per_batch: int, label: str) -> tuple[AttendResult, list[Usage]]:
    """Prefill, attend, free.

    Args:
        device: where.
        attention: the inputs.
        heads_per_batch: KV heads whose jobs go behind one doorbell.
        label: for the lines of progress.

    Returns:
        The result, and each batch's usage.
    """
    kv_heads, tokens, _ = attention.key.shape
    with device.create_sequence(kv_heads, capacity_tokens=tokens) as sequence:
        sequence.prefill(attention.key, attention.value)
        plan = sequence.plan(attention.query)
        batch = len(plan.jobs) // kv_heads * heads_per_batch
        results, usage = [], []
        for first in range(0, len(plan.jobs), batch):
            report(f"{label}|{first}|{len(plan.jobs)}")
            begin = time.perf_counter()
            results += device.run(plan.jobs[first : first + batch])
            usage.append(Usage.read(device, time.perf_counter() - begin))
        report(f"{label}|{len(plan.jobs)}|{len(plan.jobs)}")
        return plan.finish(results), usage
