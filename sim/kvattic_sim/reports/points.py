"""What is found at one point of a study: on the RTL or from the timing model."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic import AttendResult, Config, Device, RequestError, timing
from kvattic import Sequence as KvSequence
from kvattic.driver.results import AttendPlan
from kvattic.golden.device import GoldenDevice
from kvattic_sim.data import load_minilm
from kvattic_sim.reports.in_flight import latencies, quantiles
from kvattic_sim.reports.noted import Choice, NotedOperations, burst_of, note_job, run_noted, timing_job
from kvattic_sim.reports.study import FIGURES, Figures, Point
from kvattic_sim.rtl.jobs import report, run_on_model
from kvattic_sim.rtl.transport import NandSettings, RtlTransport
from kvattic_sim.workloads import Attention, ModeSettings, Usage, clustered, decode, measured, minilm, topical

__all__ = ["Follow", "Load", "Outcome", "inputs", "load_of", "measure", "workload"]

Follow: TypeAlias = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and of how much, if that is known."""

RUN = 8
"""Tokens of a run of like keys of clustered data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one drive is given to do.

    Attributes:
        lengths: tokens of each sequence.
        heads: KV heads of a layer that are dealt over the drives.
        drives: this one has each so-manieth head, from the first one on.
        layers: of each sequence.
        options: which tokens are attended.
        data, seed: see `study.Point`.
    """

    lengths: tuple[int, ...]
    heads: int
    drives: int
    layers: int
    options: ModeSettings
    data: str
    seed: int

    @property
    def own_heads(self) -> int:
        """KV heads of a layer that this drive has."""
        return -(-self.heads // self.drives)


def load_of(point: Point, repeat: int = 0) -> Load:
    """What the drive with the most heads is given to do at a point.

    Raises:
        RequestError: there are more drives than heads.
    """
    if point.drives > point.heads:
        raise RequestError(f"drives must be at most the {point.heads} heads, which are dealt over them, not "
                           f"{point.drives}")
    return Load(lengths=tuple(point.lengths), heads=point.heads, drives=point.drives, layers=point.layers,
                options=point.options, data=point.data, seed=point.seed + repeat)


def inputs(config: Config, load: Load, layer: int, sequence: int) -> Attention:
    """K, V and queries of a layer of a sequence, those heads that the drive has.

    Raises:
        RequestError: the data do not exist in that shape.
    """
    shape: dict[str, int] = {"kv_heads": load.heads, "tokens": load.lengths[sequence], "group": config.rows}
    # Of the first layer of the first sequence it is the seed itself.
    seed = load.seed + 1_000_003 * (layer * len(load.lengths) + sequence)
    match load.data:
        case "topical":
            found = topical(config, **shape, seed=seed)
        case "random":
            found = decode(config, **shape, seed=seed)
        case "clustered":
            found = clustered(config, **shape, run=RUN, seed=seed)
        case _:
            found = _minilm(config, **shape, number=load.seed + layer * len(load.lengths) + sequence)
    if load.drives == 1:
        return found
    query = found.query.reshape(load.heads, config.rows, 1, -1)[:: load.drives]
    return Attention(query=query.reshape(-1, 1, query.shape[-1]), key=found.key[:: load.drives],
                     value=found.value[:: load.drives])


def _minilm(config: Config, *, kv_heads: int, tokens: int, group: int, number: int) -> Attention:
    """MiniLM's attention on real text: the last positions of the text ask, one for each row."""
    layers = load_minilm().layers
    layer = minilm(layers[number % len(layers)])
    most_heads, most_tokens, dim = layer.key.shape
    if config.head_dim != dim or config.element != "fp16":
        raise RequestError(f"data minilm have head_dim {dim} and elements fp16, not {config.head_dim} and "
                           f"{config.element}")
    if config.kv != "element":
        raise RequestError(f"data minilm are stored as they are, with kv element, not {config.kv}")
    if kv_heads > most_heads or not group <= tokens <= most_tokens:
        raise RequestError(f"data minilm have {most_heads} heads and {most_tokens} tokens, not {kv_heads} and {tokens}")
    query = layer.query[:kv_heads, tokens - group : tokens].reshape(kv_heads * group, 1, dim)
    return Attention(query=query, key=layer.key[:kv_heads, :tokens], value=layer.value[:kv_heads, :tokens])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """What a drive made of a load.

    Attributes:
        results: of each layer, of each sequence.
        written: usage of writing K and V.
        used: usage of the attention of all layers.
    """

    results: list[list[AttendResult]]
    written: Usage
    used: Usage

    @property
    def latencies(self) -> list[int]:
        """Cycles of each command, from its fetch to its completion."""
        answers = (result for of_layer in self.results for result in of_layer)
        return [times.completed - times.fetched for answer in answers for times in answer.times or ()]


def _create(device: Device, load: Load) -> list[KvSequence]:
    """The sequences of a load."""
    wanted = load.options.sequence_arguments(device.config)
    return [device.create_sequence(load.own_heads, capacity_tokens=tokens, layers=load.layers, **wanted)
            for tokens in load.lengths]


def _prefill(sequences: Sequence[KvSequence], load: Load) -> None:
    """Write K and V of all layers."""
    for number, sequence in enumerate(sequences):
        for layer in range(load.layers):
            data = inputs(sequence.device.config, load, layer, number)
            sequence.prefill(data.key, data.value, layer=layer)


def _plans(sequences: Sequence[KvSequence], load: Load, layer: int) -> list[AttendPlan]:
    """What a layer attends: all heads of all sequences."""
    config = sequences[0].device.config
    return [sequence.plan(inputs(config, load, layer, number).query, layer=layer,
                          **load.options.attend_arguments(config, load.lengths[number]))
            for number, sequence in enumerate(sequences)]


def workload(device: Device, load: Load) -> Outcome:
    """Write K and V, and attend once in each layer; this is the part that runs inside of the simulator."""
    transport = device.transport
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    sequences = _create(device, load)
    report("step|writing")
    _, written = measured(device, lambda: _prefill(sequences, load))
    report("step|attending")
    results, used = [], []
    for layer in range(load.layers):
        plans = _plans(sequences, load, layer)
        found, usage = measured(device, lambda plans=plans: device.attend_many(plans))  # type: ignore[misc]
        results.append(found)
        used.append(usage)
    return Outcome(results=results, written=written, used=Usage.sum(used))


def measure(point: Point, follow: Follow = lambda what, done, total: None) -> Figures:
    """Build, run and check a point on the RTL; or model it, if the point says so.

    Args:
        point: what to run.
        follow: told how far it is, in cycles of the RTL.

    Raises:
        ConfigError: the configuration is invalid.
        KvatticError: it cannot serve the workload.
        SimulatorError, SimulationFailed, JobError: see `kvattic_sim.rtl.jobs`.
    """
    one = _model_once if point.modelled else _measure_once
    return _together([one(point, load_of(point, number), follow) for number in range(point.repeat)])


# The RTL.


def _measure_once(point: Point, load: Load, follow: Follow) -> Figures:
    # Only the process that builds and checks needs this.
    from kvattic_sim.compare import equal_bits
    from kvattic_sim.rtl.testbench import build_testbench

    config = point.config
    follow("building", 0, None)
    built = build_testbench(config, point.simulator)
    step = "starting"

    def heed(line: str) -> None:
        nonlocal step
        kind, _, rest = line.partition("|")
        step = rest if kind == "step" else step
        follow(step, int(rest) if kind == "cycles" else 0, None)

    outcome: Outcome = run_on_model(
        built, config, workload, {"load": load}, flash=NandSettings(bit_error_rate=point.bit_error_rate),
        progress=heed).result
    used = outcome.used
    slots = config.lanes * used.cycles or 1
    figures: Figures = {
        **_sizes(config, load, outcome.written.cycles, used.cycles),
        **_percentiles([cycles / config.clock_mhz for cycles in outcome.latencies]),
        "bus_use": used.bus_use(config),
        "lane_use": used.lane_use(config.lanes),
        "die_use": used.die_use(config),
        **{name: used.stalls[name] / slots for name in ("starved", "barrier", "idle")},
        "flash_bytes": used.flash["flash_words"] * config.word_bytes,
        **{name: used.flash[name] for name in ("page_reads", "corrected", "bit_errors", "retries")},
    }
    if point.check:
        follow("checking", 0, None)
        figures["rel_rms"] = _error(config, load, outcome.results)
        figures["equal_bits"] = all(
            bool(equal_bits(inputs(config, load, layer, number), result, config, load.options).all())
            for layer, results in enumerate(outcome.results) for number, result in enumerate(results))
    figures["seconds"] = used.seconds
    return figures


# The timing model.


def _model_once(point: Point, load: Load, follow: Follow) -> Figures:
    from kvattic_sim.rtl.testbench import DRAM_BYTES

    config, begin = point.config, time.perf_counter()
    # As much DRAM as the simulated drive has: it decides how much is programmed at once.
    golden = GoldenDevice(config, dram_bytes=DRAM_BYTES[point.simulator])
    needs_data = point.check or point.mode != "dense"
    with Device(golden) as device:
        sequences = _create(device, load)
        operations = NotedOperations()
        operations.watch(device)
        follow("writing on the golden device", 0, None)
        _prefill(sequences, load)
        written = sum(timing.estimate(config, (), burst_of(burst)).cycles for burst in operations.take())
        found, results = [], []
        for layer in range(load.layers):
            plans = _plans(sequences, load, layer)
            jobs = [job for plan in plans for job in plan.jobs]
            choices = [Choice()] * len(jobs)
            if needs_data:
                follow("attending on the golden device", 0, None)
                answers, choices = run_noted(device, jobs)
                results.append([plan.finish([answers.pop(0) for _ in plan.jobs]) for plan in plans])
            follow("modelling", 0, None)
            found.append(timing.estimate(config, [timing_job(config, note_job(config, job), choice)
                                                  for job, choice in zip(jobs, choices, strict=True)]))
        figures = _modelled_figures(config, load, written, found)
        if point.check:
            follow("checking", 0, None)
            figures["rel_rms"] = _error(config, load, results)
    figures["seconds"] = time.perf_counter() - begin
    return figures


def _modelled_figures(config: Config, load: Load, written: int, found: Sequence[timing.Estimate]) -> Figures:
    cycles = sum(one.cycles for one in found)
    moved = sum(one.flash_bytes for one in found) / config.part.bus_mts * config.clock_mhz
    return {
        **_sizes(config, load, written, cycles),
        **_percentiles([latency for one in found for latency in latencies(one)]),
        "bus_use": moved / (config.channels * cycles),
        "die_use": sum(one.die_busy for one in found) / (config.channels * config.dies * cycles),
        "flash_bytes": sum(one.flash_bytes for one in found),
        "page_reads": sum(one.page_reads for one in found),
    }


# Both.


def _sizes(config: Config, load: Load, written: int, cycles: int) -> Figures:
    return {
        "write_cycles": written, "cycles": cycles, "milliseconds": cycles / config.clock_mhz / 1e3,
        "kv_bytes": 2 * load.heads * load.layers * sum(load.lengths) * config.token_bytes,
    }


def _percentiles(microseconds: Sequence[float]) -> Figures:
    return {f"{name}_us": value for name, value in quantiles(microseconds).items()}


def _error(config: Config, load: Load, results: Sequence[Sequence[AttendResult]]) -> float:
    """Relative RMS of all heads against float64 attention."""
    from kvattic_sim.compare import oracle_errors

    errors: list[NDArray[np.float64]] = [
        oracle_errors(inputs(config, load, layer, number), result, config)[:, 0]
        for layer, of_layer in enumerate(results) for number, result in enumerate(of_layer)]
    return float(np.square(np.concatenate(errors)).mean() ** 0.5)


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom (any table of it); 1.96 for more."""


def _together(repeats: Sequence[Figures]) -> Figures:
    """Means of figures, and half the width of each mean's 95 % confidence interval; one run's as they are."""
    if len(repeats) == 1:
        return {name: repeats[0][name] for name in FIGURES if name in repeats[0]}
    factor = (STUDENT[len(repeats) - 2] if len(repeats) <= len(STUDENT) + 1 else 1.96) / math.sqrt(len(repeats))
    figures: Figures = {}
    intervals: Figures = {}
    for name in FIGURES:
        values: list[Any] = [one[name] for one in repeats if name in one]
        if len(values) < len(repeats):
            continue
        if name == "equal_bits":
            figures[name] = all(values)
        elif name == "seconds":
            figures[name] = sum(values)
        else:
            mean = float(np.mean(values))
            figures[name] = round(mean) if all(isinstance(value, int) for value in values) else mean
            intervals[f"{name}_ci"] = float(np.std(values, ddof=1)) * factor
    return figures | intervals
