"""The charts of `make report`: which figures each of them shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvattic.timing import Estimate
from kvattic_sim.reports import report_charts as charts
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.paper_figures import Figure
from kvattic_sim.reports.report_charts import Bar, Line, Mark, Points, Span, Track, short
from kvattic_sim.system.paper import Comparison
from kvattic_sim.system.systems import KVATTIC, Row

__all__ = ["Chart", "area", "attends", "bus_use", "comparison", "energy", "errors", "latency", "quality", "speed_up",
           "systems"]

Known = Mapping[str, float | bool]

STYLES = {
    "dense": "s0", "sparf": "s1", "fetched": "s2", "centroid": "s3", "SSD, direct I/O": "s4", "FlexGen (SSD)": "s5",
    "FlexGen, SparQ": "s6", "DeepSpeed (DRAM)": "s7", "paper's drive, dense": "s8", "paper's drive, SparF": "s9",
    "kvattic, dense": "s0", "kvattic, sparf": "s1", "kvattic, fetched": "s2", "kvattic, centroid": "s3",
}
"""Class of the colour of a mode or a system, the same in all charts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart, or what is missing for it.

    Attributes:
        title: what it shows.
        how: `measured`, `modelled`, or both in words.
        note: what its reader must know.
        svg: the picture; empty where all is missing.
        legend: colours and names, (class, name).
        missing: keys that it would show and that are not known.
        refused: keys that are known, but not as a positive number.
    """

    title: str
    how: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def _chart(title: str, how: str, note: str, svg: str, wanted: Sequence[str], known: Known,
           legend: Sequence[tuple[str, str]] = ()) -> Chart:
    return Chart(title=title, how=how, note=note, svg=svg, legend=tuple(legend) if svg else (),
                 missing=tuple(key for key in wanted if key not in known),
                 refused=tuple(key for key in wanted if key in known and key not in _drawable(known)))


def _drawable(known: Known) -> dict[str, float | bool]:
    """Figures that any axis can show: positive and finite."""
    return {key: value for key, value in known.items() if 0 < value < math.inf}


def _limit(key: str) -> float | None:
    """The number that a figure should reach; None: there is none."""
    bar = BARS[key]
    return next((limit for limit in bar.limits if not isinstance(limit, str)), None) if bar else None


def _bars(title: str, how: str, note: str, wanted: Sequence[tuple[str, str, str]], known: Known, *,
          percent: bool = False, reference: tuple[float, str] | None = None) -> Chart:
    """A chart of bars from (key, name, style)."""
    drawn = _drawable(known)

    def text(value: float, mark: float | None) -> str:
        shown = f"{value:.1%}" if percent else short(value)
        return shown if mark is None else f"{shown} (bar {f'{mark:.0%}' if percent else short(mark)})"

    items = [Bar(name, float(drawn[key]), text(float(drawn[key]), mark := _limit(key)), style, mark)
             for key, name, style in wanted if key in drawn]
    return _chart(title, how, note, charts.bars(items, title, reference=reference) if items else "",
                  [key for key, *_ in wanted], known)


def speed_up(known: Known) -> Chart:
    """Speed-up over dense attention by mode and selection."""
    key = "sparse.speedup"
    return _bars("Speed-up over dense attention, by mode", "measured",
                 "OPT-13B's 40 heads x 4,096 tokens on the RTL; the paper's whole gain at 1/8 of the bytes is 2.08. "
                 "Separate: command pins of their own (JESD230G).",
                 ((f"{key}.random", "SparF, random selection", "s1"),
                  (f"{key}.random.separate_command_bus", "SparF, random selection, separate", "s1"),
                  ("sparse.fetched.speedup.random", "fetched, random selection", "s2"),
                  (f"{key}.clustered", "SparF, runs of 8 tokens", "s1"),
                  (f"{key}.clustered.separate_command_bus", "SparF, runs of 8 tokens, separate", "s1"),
                  ("sparse.fetched.speedup.clustered", "fetched, runs of 8 tokens", "s2"),
                  ("sparse.centroid.speedup", "centroids of 64 tokens", "s3")),
                 known, reference=(2.08, "the paper: 2.08"))


def bus_use(known: Known) -> Chart:
    """Share of the flash buses' time in which data move, by load."""
    dense = "flash.dense.bus_utilization"
    return _bars("Use of the flash buses", "measured",
                 "Share of the time in which the buses move data, on the RTL: dense attention, other loads, writing.",
                 ((dense, "dense, pSLC 25 us, 40 heads x 2,048 tokens", "s0"),
                  (f"{dense}.tlc", "dense, TLC 60 us", "s0"),
                  (f"{dense}.lowlatency", "dense, low latency 4 us", "s0"),
                  ("flash.random_page.bus_utilization", "random pages, 1,024 in flight", "s4"),
                  ("flash.column.read_efficiency", "one codeword in 16", "s4"),
                  ("flash.column.read_efficiency.separate_command_bus", "one codeword in 16, separate", "s4"),
                  ("flash.write.utilization", "prefill, K twice and V once", "s9")), known, percent=True)


def latency(known: Known) -> Chart:
    """Quantiles of a command's latency, alone and in flight."""
    drawn = _drawable(known)
    quantiles = (("p50", "p50", "s0"), ("p99", "p99", "s2"), ("p999", "p99.9", "s9"))
    radii = (6.5, 4.5, 2.5)
    ways = (("", "", "dense, 64 in flight"), ("doorbell.", "", "dense, 64 in flight, from the doorbell"),
            ("alone.", "", "dense, alone"), ("", ".sparf", "SparF, 64 in flight"),
            ("doorbell.", ".sparf", "SparF, 64 in flight, from the doorbell"), ("alone.", ".sparf", "SparF, alone"))
    rows, wanted = [], []
    for kind, suffix, name in ways:
        keys = [f"latency.{kind}{quantile}_us{suffix}" for quantile, _, _ in quantiles]
        wanted += keys
        marks = tuple(Mark(float(drawn[key]), style, what, radius)
                      for key, (_, what, style), radius in zip(keys, quantiles, radii, strict=True) if key in drawn)
        if marks:
            rows.append(Points(name, marks, f"{short(marks[0].value)} us" if keys[0] in drawn else "", True))
    note = ("From a command's fetch, or its doorbell, to its completion; a decode step of OPT-13B, 1,024 tokens. The "
            "number is the median.")
    return _chart("Latency of a command", "modelled", note,
                  charts.points(rows, "Latency of a command", unit="microseconds") if rows else "", wanted, known,
                  [(style, what) for _, what, style in quantiles])


def energy(known: Known) -> Chart:
    """Energy of a token by mode, with its range."""
    drawn = _drawable(known)
    rows, wanted = [], []
    for mode, name in (("dense", "dense"), ("sparf", "SparF"), ("fetched", "fetched"), ("centroid", "centroids")):
        keys = [f"energy.token_mj.{mode}{bound}" for bound in (".low", "", ".high")]
        wanted += keys
        marks = tuple(Mark(float(drawn[key]), STYLES[mode], what, 6.0 if what == "typical" else 3.5)
                      for key, what in zip(keys, ("low", "typical", "high"), strict=True) if key in drawn)
        if marks:
            rows.append(Points(name, marks, " / ".join(short(mark.value) for mark in marks) + " mJ", True))
    note = ("The drive's part of a token of OPT-13B, batch 64, 2,048 tokens: low, typical, high, all of its constants "
            "at that bound. docs/cost.md has the source of each constant.")
    return _chart("Energy of a token, by mode", "modelled", note,
                  charts.points(rows, "Energy of a token", unit="millijoules") if rows else "", wanted, known)


def errors(known: Known) -> Chart:
    """Relative RMS errors beside those of float32 and fp16."""
    drawn = _drawable(known)
    kinds = (("rel_rms", "kvattic", "s0"), ("float32", "float32 NumPy", "s5"), ("fp16", "fp16 weights, output", "s9"))
    sets = (("minilm", "MiniLM, real text"), ("fa3_2k", "FlashAttention-3's distribution, 2,048 tokens"),
            ("fa3_32k", "the same, 32,768 tokens"))
    rows, wanted = [], []
    limit = _limit("accuracy.rel_rms.minilm")
    for data, name in sets:
        keys = [f"accuracy.{kind}.{data}" for kind, _, _ in kinds]
        wanted += keys
        marks = tuple(Mark(float(drawn[key]), style, what)
                      for key, (_, what, style) in zip(keys, kinds, strict=True) if key in drawn)
        if marks:
            rows.append(Points(name, marks, short(marks[0].value) if keys[0] in drawn else ""))
    return _chart("Error against float64", "measured",
                  "Relative RMS error on the golden device, whose bits are the RTL's; the number is kvattic's.",
                  charts.points(rows, "Error against float64", unit="relative RMS error",
                                reference=None if limit is None else (limit, f"bar: {short(limit)}")) if rows else "",
                  wanted, known,
                  [(style, what) for _, what, style in kinds])


def quality(known: Known) -> Chart:
    """Bits per byte of a language model over the bytes that attention reads."""
    drawn = _drawable(known)
    modes = (("sparf", "SparF", "s1"), ("fetched", "fetched", "s2"), ("centroid", "centroids", "s3"),
             ("quest", "Quest", "s4"), ("h2o", "H2O", "s5"), ("local", "newest tokens", "s6"),
             ("sinks", "sinks and newest", "s7"))
    ratios = ((1, "1"), (2, "1_2"), (4, "1_4"), (8, "1_8"), (16, "1_16"))
    found, wanted = [], []
    for mode, name, style in modes:
        keys = [f"lm.bits_per_byte.{mode}.{ratio}" for _, ratio in ratios]
        wanted += keys
        at = tuple((float(part), float(drawn[key]))
                   for key, (part, _) in zip(keys, ratios, strict=True) if key in drawn)
        if len(at) > 1:
            found.append(Line(name, at, style, mode in ("sparf", "fetched", "centroid")))
    svg = charts.lines(found, "Quality of a language model", x_name="1 / share of the bytes",
                       y_name="bits per byte") if found else ""
    return _chart("Quality of a language model", "measured",
                  "The project's own small model on held-out text; lower is better. docs/quality.md explains it.", svg,
                  wanted, known, [(line.style, line.name) for line in found])


PAPER_AREA = {"lut_packed": 105_030, "ff": 211_170, "dsp": 768, "bram36": 120}
"""Attention kernel and argtopk of the paper's table II."""


def area(known: Known) -> Chart:
    """What the engine takes, as a share of what the paper's takes."""
    drawn = _drawable(known)
    names = {"lut_packed": "LUT sites, packed (estimated)", "ff": "flip-flops", "dsp": "DSP", "bram36": "block RAM"}
    wanted = [f"synth.engine.{name}" for name in PAPER_AREA]
    items = [Bar(names[name], float(drawn[key]) / paper, f"{short(float(drawn[key]))} of {paper:,}", "s0")
             for key, (name, paper) in zip(wanted, PAPER_AREA.items(), strict=True) if key in drawn]
    return _chart("Area beside the paper's", "synthesised",
                  "The engine of the preset paper for Xilinx 7-series as Yosys counts it, over the paper's attention "
                  "kernel and argtopk on a Zynq-7045 (its table II).",
                  charts.bars(items, "Area beside the paper's", reference=(1.0, "the paper's")) if items else "",
                  wanted, known)


def comparison(found: Sequence[Comparison]) -> Chart:
    """The model's figures over the paper's."""
    def style(one: Comparison) -> str:
        return "s5" if one.claim.fitted else "s2" if one.claim.reason else "s0"

    rows = [Points(one.claim.what, (Mark(one.ours / one.claim.value, style(one), "model over paper"),),
                   f"{short(one.ours)} ({one.deviation:+.1%})") for one in found]
    ratios = [row.marks[0].value for row in rows]
    return Chart(title="The paper's figures: model over paper", how="modelled", note="The number is the model's.",
                 svg=charts.points(rows, "Model over paper", logarithmic=False, reference=(1.0, "the paper's"),
                                   limits=(min(0.6, *ratios), max(1.4, *ratios))),
                 legend=(("s0", "predicted"), ("s2", "a reason is given"), ("s5", "fitted")))


PARTS = (("kv_ms", "K and V", "s0"), ("arithmetic_ms", "arithmetic", "s2"), ("append_ms", "writing", "s9"),
         ("host_ms", "host", "s3"), ("gpu_ms", "GPU", "s5"))


def systems(figure: Figure, rows: Sequence[Row]) -> Chart:
    """A figure of the paper with this drive among its systems."""
    number = figure.name.removeprefix("figure").replace("_", " and ")
    title = f"As the paper's figure {number}: {rows[0].model}, {figure.title}"
    good = [row for row in rows if not row.error]
    if not figure.x:
        shown = [row for row in good if not row.overlapped]
        bars = [(f"{row.name} x {row.drives}" if row.drives else row.name, f"{short(row.step_ms / 1e3)} s",
                 [getattr(row, part) / row.step_ms for part, _, _ in PARTS]) for row in shown]
        return Chart(title=title, how="modelled", note="Shares of a decode step, and its seconds.",
                     svg=charts.stacks(bars, [style for *_, style in PARTS], [name for _, name, _ in PARTS], title),
                     legend=tuple((style, name) for _, name, style in PARTS))
    everywhere = sorted({getattr(row, figure.x) for row in good} - {0})
    found = []
    for name in dict.fromkeys(row.name for row in good):
        at = sorted((getattr(row, figure.x), row.tokens_per_second) for row in good if row.name == name)
        level = figure.x == "drives" and at[0][0] == 0
        if level:
            at = [(x, at[0][1]) for x in everywhere]
        found.append(Line(name, tuple(at), STYLES.get(name, "s5"), name.startswith(KVATTIC), level))
    svg = charts.lines(found, title, x_name=figure.x, y_name="tokens/s")
    return Chart(title=title, how="modelled", note="Tokens a second of decoding; host software of the paper.", svg=svg,
                 legend=tuple((line.style, line.name) for line in found))


def attends(found: Mapping[str, Estimate]) -> list[Chart]:
    """When the commands of a small attend are fetched, read and completed, a chart for each mode on one axis."""
    end = max(one.seconds for one in found.values()) * 1e6
    made = []
    for name, one in found.items():
        unit = 1 / one.config.clock_mhz
        tracks = []
        for number, job in enumerate(one.jobs):
            times = [time * unit for time in (0, job.fetched, job.first_beat, job.last_beat, job.completed)]
            spans = zip(times[1:], times[2:], (("s5", True, "waits"), ("s0", False, "codewords come"),
                                               ("s3", True, "sums are finished")), strict=False)
            tracks.append(Track(f"head {number}", tuple(Span(a, b, *kind) for a, b, kind in spans)))
        made.append(Chart(
            title=f"{name}: {len(one.jobs)} heads, {1e6 * one.seconds:.0f} us", how="modelled",
            note=f"Buses move data {one.bus_use_in_window:.0%} of the time from the first to the last beat; "
                 f"{one.page_reads:,} pages are read.",
            svg=charts.timeline(tracks, end, "microseconds", f"Timeline of a {name} attend"),
            legend=(("s5", "fetched, waits"), ("s0", "its codewords come"), ("s3", "to its completion"))))
    return made
