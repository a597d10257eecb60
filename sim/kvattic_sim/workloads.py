"""What runs on a device: the same functions for the golden device and, inside the simulator process, for the RTL."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvattic import AttendResult, Config, Device, Mode, Sequence
from kvattic.spec.elements import to_bits
from kvattic.spec.layout import kv_bits
from kvattic.spec.registers import StatusBit
from kvattic_sim.data import load_minilm
from kvattic_sim.rtl.jobs import report
from kvattic_sim.rtl.transport import RtlTransport

STALLS = ("starved", "barrier", "weights", "scores", "idle")
"""Why a lane had no beat in a cycle (registers and completions of these names)."""
FLASH = ("flash_words", "flash_commands", "die_busy", "codewords", "corrected", "bit_errors", "retries", "unreadable",
         "page_reads", "page_programs", "block_erases")
"""What the flash channels counted (registers of these names)."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the counters counted in one busy period, or in several.

    Attributes:
        cycles: while the drive had work.
        window: cycles from the first to the last beat of a lane.
        beats: lane cycles that carried data.
        stalls: lane cycles without data, by reason (`STALLS`); with beats they add up to lanes * cycles.
        flash: what the flash channels counted (`FLASH`).
        seconds: time that it took on the machine that ran it.
    """

    cycles: int
    window: int
    beats: int
    stalls: dict[str, int]
    flash: dict[str, int]
    seconds: float

    @classmethod
    def sum(cls, parts: Iterable["Usage"]) -> "Usage":
        """Their sum."""
        parts = list(parts)
        return cls(cycles=sum(u.cycles for u in parts), window=sum(u.window for u in parts),
                   beats=sum(u.beats for u in parts), stalls={n: sum(u.stalls[n] for u in parts) for n in STALLS},
                   flash={n: sum(u.flash[n] for u in parts) for n in FLASH}, seconds=sum(u.seconds for u in parts))

    def lane_use(self, lanes: int) -> float:
        """Share of all lane beat slots between the first and the last beat that carried data."""
        return self.beats / (lanes * self.window) if self.window else 0.0

    def bus_use(self, config: Config) -> float:
        """Share of the time in which the flash buses moved data, parity included, over all cycles."""
        return self._bus(config, self.cycles)

    def bus_use_in_window(self, config: Config) -> float:
        """The same between the first and the last beat of a lane."""
        return self._bus(config, self.window)

    def _bus(self, config: Config, cycles: int) -> float:
        moved = self.flash["flash_words"] * config.word_bytes
        return moved * config.clock_mhz / (config.channels * cycles * config.part.bus_mts) if cycles else 0.0

    def die_use(self, config: Config) -> float:
        """Share of the time in which the dies' arrays were busy."""
        return self.flash["die_busy"] / (config.channels * config.dies * self.cycles) if self.cycles else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Inputs of one attention over several heads: K and V (kv_heads, tokens, head_dim), q (q_heads, queries, head_dim).

    uint16 bit patterns of `Config.element`; those of K and V are numbers that the drive stores.
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

    def normal(heads: int, count: int) -> NDArray[np.float32]:
        return rng.standard_normal((heads, count, config.head_dim), np.float32)

    return Attention(query=to_bits(normal(kv_heads * group, 1), config.element),
                     key=kv_bits(normal(kv_heads, tokens), config), value=kv_bits(normal(kv_heads, tokens), config))


def clustered(config: Config, *, kv_heads: int, tokens: int, run: int, group: int = 1, seed: int = 0) -> Attention:
    """`decode`, but important tokens come in runs: keys of a run of tokens are alike (correlation 0.99)."""
    rng = np.random.default_rng(seed)
    plain = decode(config, kv_heads=kv_heads, tokens=tokens, group=group, seed=seed + 1)
    base = np.repeat(rng.standard_normal((kv_heads, -(-tokens // run), config.head_dim), np.float32), run, axis=1)
    own = rng.standard_normal((kv_heads, tokens, config.head_dim), np.float32)
    return replace(plain, key=kv_bits(np.sqrt(0.99) * base[:, :tokens] + 0.1 * own, config))


NATS = 9.0
"""Of `topical`: by options much the scores of the topic that is asked for stand out."""
TOPICS = 16
"""Of `topical`: a topic is a sixteenth of the tokens, as many as the sparse modes attend by default
(`ModeSettings.top_units`)."""


def topical(config: Config, *, kv_heads: int, tokens: int, group: int = 1, seed: int = 0) -> Attention:
    """`decode` with the structure that sparse attention lives on, and that normal random numbers lack.

    Few tokens have nearly all of the weight, they stand in runs, and some features of q and K are much larger than
    others.  The tokens come in runs of one topic, of 16 or more tokens, whose keys and values are alike; each KV head's
    queries ask for one topic.  The first token is a sink: every query attends to it, and its V is small.

    It was not fitted to any model, and the size of its topics (`TOPICS`) suits the modes' defaults: it shows whether a
    mode finds what stands out, not what the mode costs a model.
    """
    rng = np.random.default_rng(seed)
    dim, run = config.head_dim, max(16, tokens // (2 * TOPICS))
    runs = -(-tokens // run)
    scale = np.exp(0.5 * rng.standard_normal((kv_heads, 1, dim)))
    scale /= np.sqrt(np.square(scale).mean(axis=2, keepdims=True))
    centres, meanings = rng.standard_normal((2, kv_heads, min(TOPICS, runs), dim))
    topics = np.stack([rng.permutation(np.arange(runs) % centres.shape[1]) for _ in range(kv_heads)])
    topic = np.repeat(topics, run, axis=1)[:, :tokens]
    heads = np.arange(kv_heads)

    def around(centre: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
        near: NDArray[np.float64] = np.sqrt(1 - spread**2) * centre + spread * rng.standard_normal(centre.shape)
        return near

    key = around(centres[heads[:, None], topic], 0.4)
    value = around(meanings[heads[:, None], topic], 0.7)
    asked = centres[heads, rng.integers(centres.shape[1], size=kv_heads)]
    # The topic's tokens score `NATS` above the others, whose own spread is about one.
    query = around(np.repeat(asked[:, None], group, axis=1), 0.3) * (NATS / np.sqrt(dim))
    key[:, 0] = asked
    value[:, 0] *= 0.1
    return Attention(query=to_bits((query * scale).reshape(kv_heads * group, 1, dim), config.element),
                     key=kv_bits(key * scale, config), value=kv_bits(value, config))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeSettings:
    """A mode and its settings: arguments of `Sequence.attend`, with defaults that depend on the configuration.

    Attributes:
        mode: a name of `kvattic.Mode` in small letters.
        features: r of SparF; None: an eighth of head_dim.
        top_units: k of SparF, or units; None: as many as hold a sixteenth of the tokens (an eighth for centroids).
        local_tokens: newest tokens that are attended in any case.
        unit_tokens: tokens of a unit; None: a codeword's (16 for centroids, if the configuration allows it).
    """

    mode: str = "dense"
    features: int | None = None
    top_units: int | None = None
    local_tokens: int = 0
    unit_tokens: int | None = None

    def sequence_arguments(self, config: Config) -> dict[str, Any]:
        """Arguments of `Device.create_sequence`."""
        if self.mode == "centroid":
            return {"centroids": self._unit(config)}
        if self.mode == "codes":
            return {"codes": True}
        return {"sparse": True} if self.mode != "dense" else {}

    def attend_arguments(self, config: Config, tokens: int) -> dict[str, Any]:
        """Arguments of `Sequence.attend` and `Sequence.plan` for a sequence of `tokens` tokens."""
        if self.mode == "dense":
            return {}
        mode = Mode[self.mode.upper()]
        unit = 1 if mode.by_token else self._unit(config)
        share = 8 if self.mode == "centroid" else 16
        arguments: dict[str, Any] = {
            "mode": self.mode, "top_units": self.top_units or max(1, tokens // share // unit),
            "local_tokens": self.local_tokens}
        if mode.featured:
            arguments["features"] = self.features or config.head_dim // 8
        if not mode.by_token:
            arguments["unit_tokens"] = unit
        return arguments

    def _unit(self, config: Config) -> int:
        least = config.tokens_per_codeword
        most = least << config.unit_bits_max
        return self.unit_tokens or (min(max(16, least), most) if self.mode == "centroid" else least)


DENSE = ModeSettings()


class Meter:
    """Tells what the counters of a device counted from one look at them to the next.

    Each look waits until the drive is idle: it may hear of its last completion after the host took that.
    """

    def __init__(self, device: Device) -> None:
        self._register = device.transport.read_register
        self._before = self._look()

    def _look(self) -> dict[str, int]:
        while self._register("STATUS") & StatusBit.BUSY:
            pass
        return {name: self._register(name.upper()) for name in ("cycles", "beats", *STALLS, *FLASH)}

    def read(self) -> Usage:
        """What was counted since the last look, in one busy period, without the seconds."""
        now = self._look()
        grown = {name: value - self._before[name] for name, value in now.items()}
        self._before = now
        window = self._register("LAST_BEAT") - self._register("FIRST_BEAT") + 1 if grown["beats"] else 0
        return Usage(cycles=grown["cycles"], beats=grown["beats"], window=window, seconds=0.0,
                     stalls={name: grown[name] for name in STALLS}, flash={name: grown[name] for name in FLASH})


def measured(device: Device, work: Callable[[], Result]) -> tuple[Result, Usage]:
    """Do some work on a device, and add up what it counted in all its busy periods."""
    parts: list[Usage] = []
    transport = device.transport if isinstance(device.transport, RtlTransport) else None
    begin = time.perf_counter()
    if transport is not None:
        transport.on_batch = lambda: None
        transport.settle()    # what ended before
        meter = Meter(device)
        transport.on_batch = lambda: parts.append(meter.read())
    try:
        result = work()
        if transport is not None:
            # The last completion may be taken before the drive hears that it is written.
            while transport.read_register("STATUS") & StatusBit.BUSY:
                pass
            transport.settle()
    finally:
        if transport is not None:
            transport.on_batch = None
    return result, replace(Usage.sum(parts), seconds=time.perf_counter() - begin)


def attend(
    device: Device, attention: Attention, heads_per_batch: int, label: str, options: ModeSettings = DENSE
) -> tuple[AttendResult, Usage, list[Usage]]:
    """Prefill and attend; K and V stay: erasing them would cost simulated time and show nothing.

    Args:
        device: where.
        attention: the inputs.
        heads_per_batch: KV heads whose jobs are submitted at once.
        label: for the lines of progress.
        options: which tokens.

    Returns:
        The result, the usage of writing K and V, and that of each batch of attention.
    """
    kv_heads, tokens, _ = attention.key.shape
    sequence = device.create_sequence(kv_heads, capacity_tokens=tokens, **options.sequence_arguments(device.config))
    _, written = measured(device, lambda: sequence.prefill(attention.key, attention.value))
    plan = sequence.plan(attention.query, **options.attend_arguments(device.config, tokens))
    batch = len(plan.jobs) // kv_heads * heads_per_batch
    results, usage = [], []
    for first in range(0, len(plan.jobs), batch):
        report(f"{label}|{first}|{len(plan.jobs)}")
        found, used = measured(device, partial(device.run, plan.jobs[first : first + batch]))
        results += found
        usage.append(used)
    report(f"{label}|{len(plan.jobs)}|{len(plan.jobs)}")
    return plan.finish(results), written, usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Queries, and which tokens they attend.

    Attributes:
        query: uint16, (q_heads, positions, head_dim).
        options: which tokens.
    """

    query: NDArray[np.uint16]
    options: ModeSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """Inputs of a sequence's life: its prefill, the tokens appended one by one, and the sequence that follows it.

    Attributes:
        first: prefill and query.
        tokens: key and value of each appended token, and the query that follows it.
        second: prefill and query of the next sequence in the same flash.
        options: which tokens are attended.
        questions: what is asked of the first sequence besides, before tokens are appended.
    """

    first: Attention
    tokens: list[Attention]
    second: Attention
    options: ModeSettings = DENSE
    questions: tuple[Question, ...] = ()

    @property
    def steps(self) -> int:
        """Steps that `live` makes of it."""
        return 5 + len(self.questions) + len(self.tokens)

    def attended(self) -> list[tuple[Attention, ModeSettings]]:
        """What each step with a result attends, in order: its query, and K and V of the sequence by then."""
        first = self.first
        found = [(first, self.options), *((replace(first, query=q.query), q.options) for q in self.questions)]
        key, value = first.key, first.value
        for token in self.tokens:
            key, value = np.concatenate([key, token.key], axis=1), np.concatenate([value, token.value], axis=1)
            found.append((Attention(query=token.query, key=key, value=value), self.options))
        return [*found, (self.second, self.options)]

    def sequence_arguments(self, config: Config) -> dict[str, Any]:
        """Arguments of `Device.create_sequence` that serve all questions."""
        needs = self.options.sequence_arguments(config)
        for question in self.questions:
            needs |= question.options.sequence_arguments(config)
        return needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of it.

    Attributes:
        name: what was done.
        usage: what it took.
        result: what was attended, if anything.
    """

    name: str
    usage: Usage
    result: AttendResult | None = None


def random_life(config: Config, *, kv_heads: int, tokens: int, group: int, appended: int,
                options: ModeSettings = DENSE) -> Life:
    """A decode's geometry with normal random numbers.

    Args:
        config: what attends.
        kv_heads: KV heads.
        tokens: of the prefill.
        group: query heads of each KV head.
        appended: tokens that are appended, one at a time.
        options: which tokens are attended.
    """
    return Life(
        options=options,
        first=decode(config, kv_heads=kv_heads, tokens=tokens, group=group),
        tokens=[decode(config, kv_heads=kv_heads, tokens=1, group=group, seed=10 + i) for i in range(appended)],
        second=decode(config, kv_heads=kv_heads, tokens=tokens // 4, group=group, seed=1))


def minilm_life(*, heads: int, positions: int, sparse_positions: int, appended: int, second_tokens: int,
                sparse: ModeSettings | None) -> Life:
    """A life of real numbers: a MiniLM layer on real text, its last tokens one at a time, then another layer.

    Args:
        heads: of the layer's 12, the first ones.
        positions: of the text that ask, evenly spread, dense.
        sparse_positions: likewise, sparse.
        appended: last tokens of the text, which are appended after the prefill.
        second_tokens: tokens of the next sequence.
        sparse: which tokens the sparse ones attend; None: nothing is attended so.
    """
    data = load_minilm()
    layer, other = (cut(minilm(layer), heads=heads) for layer in data.layers[:2])
    tokens = layer.key.shape[1] - appended

    def spread(count: int) -> NDArray[np.uint16]:
        return layer.query[:, np.linspace(0, tokens - 1, count).astype(int)]

    return Life(
        first=Attention(query=spread(positions), key=layer.key[:, :tokens], value=layer.value[:, :tokens]),
        questions=() if sparse is None else (Question(query=spread(sparse_positions), options=sparse),),
        tokens=[Attention(query=layer.query[:, [at]], key=layer.key[:, [at]], value=layer.value[:, [at]])
                for at in range(tokens, tokens + appended)],
        second=Attention(query=other.query[:, [second_tokens - 1]], key=other.key[:, :second_tokens],
                         value=other.value[:, :second_tokens]))


def cut(attention: Attention, *, heads: int, positions: int | None = None) -> Attention:
    """The first heads of an attention without groups, and the first positions of its queries."""
    return Attention(query=attention.query[:heads, :positions], key=attention.key[:heads],
                     value=attention.value[:heads])


def decode_token(sequence: Sequence, token: Attention, options: ModeSettings = DENSE) -> AttendResult:
    """Append a token and attend."""
    sequence.append(token.key, token.value)
    return sequence.attend(token.query, **options.attend_arguments(sequence.device.config, sequence.length()))


def live(device: Device, life: Life) -> list[Step]:
    """Prefill, attend, append and attend, free, and the same flash for another sequence.

    It reports each step as ``step|number|steps|name``, and on the RTL ``cycles|number`` now and then.
    """
    steps: list[Step] = []
    if isinstance(device.transport, RtlTransport):
        device.transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")

    def step(name: str, work: Callable[[], AttendResult | None]) -> None:
        report(f"step|{len(steps) + 1}|{life.steps}|{name}")
        result, usage = measured(device, work)
        steps.append(Step(name=name, usage=usage, result=result))

    config, options = device.config, life.options
    kv_heads, tokens, _ = life.first.key.shape
    needs = life.sequence_arguments(config)
    first = device.create_sequence(kv_heads, capacity_tokens=tokens + len(life.tokens), **needs)
    step("prefill", lambda: first.prefill(life.first.key, life.first.value))
    step(_attend_name(options), lambda: first.attend(life.first.query, **options.attend_arguments(config, tokens)))
    for question in life.questions:
        arguments = question.options.attend_arguments(config, tokens)
        step(_attend_name(question.options), partial(first.attend, question.query, **arguments))
    for number, token in enumerate(life.tokens, 1):
        step(f"token {tokens + number:,}", partial(decode_token, first, token, options))
    step("free", first.free)
    tokens = life.second.key.shape[1]
    second = device.create_sequence(kv_heads, capacity_tokens=tokens, **options.sequence_arguments(config))
    step("prefill another", lambda: second.prefill(life.second.key, life.second.value))
    step(_attend_name(options), lambda: second.attend(life.second.query, **options.attend_arguments(config, tokens)))
    return steps


def _attend_name(options: ModeSettings) -> str:
    return "attend" if options.mode == "dense" else f"attend, {options.mode}"
