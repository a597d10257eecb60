"""`dovetail`: speculative decoding, whose target verifies drafts in one pass over K and V in the drive.

Dovetail (arXiv 2412.18934) lets a draft model on the GPU propose tokens and the target on the CPU verify them.  Here
the target's attention is in the drive: the drafted tokens are query rows of the same jobs, which read K and V once.
How many drafts are accepted is measured with the project's language model and a smaller one (`drafts`); what a pass
costs is found on a slice and modelled for Llama 2 13B with TinyLlama as its draft.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvattic
from kvattic import AttendResult
from kvattic.spec.config import GQA, Config
from kvattic.spec.elements import Booleans, from_bits
from kvattic.timing import Layer, estimate
from kvattic.timing.cost import Cost
from kvattic_sim import oracle
from kvattic_sim.runs.drafts import TREE, Tree, ancestors, assisted, chain, overlap, ranks, yield_of
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import Attending, modelled_run, options_of, run_of, stall_shares
from kvattic_sim.system.drive import TimedDrive
from kvattic_sim.system.parameters import PAPER_MACHINE
from kvattic_sim.system.steps import direct_host_s, gpu_seconds, kvattic_drive
from kvattic_sim.system.systems import load_of
from kvattic_sim.system.transformer import LLAMA2_13B, Transformer
from kvattic_sim.workloads import Attention, topical

__all__ = ["CHAINS", "DRAFT", "TARGET", "Verified", "layer_run", "run", "step_parts", "verify"]

CONFIG = GQA
TARGET = LLAMA2_13B
# TinyLlama: arXiv 2401.02385, table 1, and TinyLlama/TinyLlama-1.1B-Chat-v1.0's config.json; Llama 2's vocabulary.
DRAFT = Transformer(name="TinyLlama-1.1B", layers=22, q_heads=32, kv_heads=4, head_dim=64, hidden=2048,
                    intermediate=5632, vocabulary=32000, gated=True)
CONTEXT, NEW = 4096, 1024
CHAINS = (4, 5, 6, 7, 8)
SHOWN = 7
"""Drafts of the slice: eight rows with the token before them, as many as `gqa` has."""
SLICE_HEADS, SLICE_TOKENS = 4, 301
ONE_BY_ONE, ONE_PASS = "one by one", "one pass"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verified:
    """A draft that one pass verifies, and a pass for each row.

    Attributes:
        together: of the one pass, uint32, (heads, rows, head_dim).
        single: of the others.
        error: the worst head's relative RMS against float64, of the one pass.
        costs: by `ONE_BY_ONE` and `ONE_PASS`.
        stalls: of the lanes, likewise; empty where they are not known.
    """

    together: NDArray[np.uint32]
    single: NDArray[np.uint32]
    error: float
    costs: dict[str, Cost]
    stalls: dict[str, dict[str, float]]

    @property
    def equal(self) -> bool:
        """Whether one pass has the bits of a pass for each row."""
        return bool(np.array_equal(self.together, self.single))


def verify(config: Config, tree: Tree, *, heads: int, tokens: int, target: str = "model",
           progress: Callable[[str], None] = lambda line: None) -> Verified:
    """Attend a draft's rows in one pass, and one by one.

    Args:
        config: of the drive.
        tree: what is drafted; its rows are the last tokens, behind the one before them.
        heads: KV heads, each with one query head.
        tokens: of each, drafts included.
        target: of `kvattic.open`.
        progress: told what is being done.
    """
    mask = ancestors(tree)
    rows = len(mask)
    attention = topical(config, kv_heads=heads, tokens=tokens)
    query = np.concatenate([topical(config, kv_heads=heads, tokens=tokens, seed=1 + row).query
                            for row in range(rows)], axis=1)
    progress(f"opening {target}")
    with (kvattic.open(target, config, **options_of(target, progress)) as device,
          device.create_sequence(heads, capacity_tokens=tokens) as sequence):
        progress("writing")
        sequence.prefill(attention.key[:, :-rows], attention.value[:, :-rows])
        sequence.append(attention.key[:, -rows:], attention.value[:, -rows:])
        attend = Attending(device, target)
        progress("attending: one pass")
        together = attend(sequence, query, tree=mask)
        progress("attending: one by one")
        single = [attend(sequence, query[:, row : row + 1], tree=mask[row : row + 1]) for row in range(rows)]
    used = attend.used
    costs = [result.cost for result in single]
    stalls = {ONE_PASS: stall_shares(config, used[:1]), ONE_BY_ONE: stall_shares(config, used[1:])} if used else {}
    return Verified(together=together.bits, single=np.concatenate([result.bits for result in single], axis=1),
                    error=_error(config, together, attention, query, mask), stalls=stalls,
                    costs={ONE_PASS: together.cost, ONE_BY_ONE: sum(costs[1:], costs[0])})


def _error(config: Config, result: AttendResult, attention: Attention, asked: NDArray[np.uint16],
           mask: Booleans) -> float:
    """Relative RMS of the worst head against float64 attention, row by row."""
    key, value, query = (from_bits(bits, config.element).astype(np.float64)
                         for bits in (attention.key, attention.value, asked))
    rows, tokens = len(mask), key.shape[1]
    seen = np.concatenate([np.ones((rows, tokens - rows), np.bool_), mask], axis=1)
    scale = config.head_dim**-0.5
    worst = 0.0
    for head in range(len(key)):
        exact = [oracle.attention(query[head, row][None], key[head][seen[row]], value[head][seen[row]], scale)[0]
                 for row in range(rows)]
        worst = max(worst, oracle.relative_rms(result.output[head], np.stack(exact)))
    return worst


def step_parts(rows: int, batch: int, drafted: int, accepted: float) -> dict[str, float]:
    """Seconds of a pass of the target with all that belongs to it; modelled.

    Args:
        rows: that the target verifies: drafts and the token before them; 1 without drafts.
        batch: sequences.
        drafted: passes of the draft before it: tokens of a chain, levels of a tree.
        accepted: tokens that stay, which are written to flash.
    """
    machine, load, drive = PAPER_MACHINE, load_of(batch, CONTEXT, NEW), TimedDrive(CONFIG)
    gpu = machine.gpu
    host = direct_host_s(TARGET, load, machine)
    parts = dict(kvattic_drive(TARGET, load, machine, drive, mode="dense", host_s=host).parts)
    parts["kv"] = TARGET.layers * drive.attention_seconds(
        "dense", kv_heads=batch * TARGET.kv_heads, group=rows, head_dim=TARGET.head_dim, tokens=load.tokens)
    parts["append"] *= accepted
    parts["gpu"] = gpu_seconds(TARGET, batch * rows, gpu)
    if drafted:
        # The draft's own K and V are in the GPU.
        own = load.kv_bytes(DRAFT) / (gpu.bandwidth * gpu.bandwidth_share)
        parts["draft"] = drafted * (gpu_seconds(DRAFT, batch, gpu) + own)
    return parts


def layer_run(rows: int, what: str) -> Run:
    """A layer of one sequence of the target, for so many rows; modelled."""
    passes = -(-rows // CONFIG.rows)
    jobs = [job for number in range(passes) for job in Layer(CONFIG, TARGET.kv_heads, CONTEXT).attend(
        rows=min(CONFIG.rows, rows - number * CONFIG.rows))]
    return modelled_run(what, estimate(CONFIG, jobs))


def _slice_run(found: Verified, what: str, how: How, way: str) -> Run:
    return run_of(f"slice, {what}: {way}", how, CONFIG, found.costs[way], stalls=found.stalls.get(way))


def _speedups(accepted: NDArray[np.int64]) -> dict[str, float]:
    """Tokens a pass, and how much faster attention and the whole are, for each way of drafting."""
    alone = {rows: layer_run(rows, "").cycles for rows in {1, len(TREE) + 1, *(n + 1 for n in CHAINS)}}
    before = {batch: sum(step_parts(1, batch, 0, 1.0).values()) for batch in (1, 64)}   # seconds, without drafts
    figures: dict[str, float] = {}
    ways = {**{f"chain_{n}": (chain(n), n) for n in CHAINS},
            f"tree_{len(TREE)}": (TREE, max(map(len, TREE)))}
    for name, (tree, levels) in ways.items():
        rows, tokens = len(tree) + 1, yield_of(accepted, tree)
        figures[f"measured_tokens_per_pass_{name}"] = tokens
        figures[f"modelled_speedup_of_attention_{name}"] = tokens * alone[1] / alone[rows]
        for batch in before:
            after = sum(step_parts(rows, batch, levels, tokens).values())
            figures[f"modelled_speedup_of_the_whole_{name}_batch_{batch}"] = tokens * before[batch] / after
    return figures


def run(request: Request) -> Outcome:
    """Verify drafts on a slice, measure how many are accepted, and model what that gains.

    Args:
        request: what is asked for.

    Raises:
        ModuleNotFoundError: torch or transformers are not installed.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    how = How.MODELLED if request.target == "model" else How.MEASURED
    shapes = {f"a chain of {SHOWN}": chain(SHOWN), f"a tree of {len(TREE)}": TREE}
    runs, errors, exact = [], [], True
    for what, tree in shapes.items():
        common: dict[str, Any] = {"heads": SLICE_HEADS, "tokens": SLICE_TOKENS}
        found = verify(CONFIG, tree, **common, target=request.target, progress=request.progress)
        exact = exact and found.equal
        if how is How.MEASURED:
            exact = exact and np.array_equal(found.together, verify(CONFIG, tree, **common).together)
        errors.append(found.error)
        runs += [_slice_run(found, what, how, way) for way in (ONE_BY_ONE, ONE_PASS)]
    request.progress("measuring how many drafts are accepted")
    accepted = ranks()
    with_drive = assisted(SHOWN, progress=request.progress)
    request.progress("modelling the whole")
    runs += [layer_run(1, "a layer, one sequence: one row"),
             layer_run(SHOWN + 1, f"a layer, one sequence: {SHOWN} drafts and the token before them"),
             layer_run(CHAINS[-1] + 1, f"a layer, one sequence: {CHAINS[-1]} drafts and the token before them")]
    figures = {"unequal_tokens_with_drafts": with_drive.unequal,
               "measured_tokens_per_pass_in_the_drive": with_drive.tokens / max(with_drive.passes, 1),
               "measured_overlap_with_sampling": overlap(), **_speedups(accepted)}
    return Outcome(
        name="dovetail", target=request.target,
        geometry={"target": TARGET.name, "layers": TARGET.layers, "KV heads": TARGET.kv_heads,
                  "head_dim": TARGET.head_dim, "context, tokens": CONTEXT, "draft": DRAFT.name,
                  "query rows of a job": CONFIG.rows, "drive": "gqa"},
        source="target: arXiv 2307.09288; draft: arXiv 2401.02385, table 1; method: arXiv 2412.18934",
        slice=f"{SLICE_HEADS} heads x {SLICE_TOKENS} tokens, {SHOWN + 1} rows as a chain and as a tree, synthetic",
        reference="float64 attention of each row; greedy tokens of eager attention without drafts",
        error=max(*errors, with_drive.unequal), bit_exact=None if exact and how is How.MODELLED else exact,
        runs=tuple(runs), figures=figures,
        notes=("tokens a pass are those of the project's byte-level models (3.5 and 0.38 million parameters), greedy, "
               "on held-out Python: another pair accepts more or less, and all speed-ups go with it",
               "the draft runs on the GPU, level by level; nothing overlaps"))
