"""Decoding with published models: `opt-13b`, `llama2-13b`, `llama3-8b`.

A slice of a layer runs bit by bit (`slices`); a layer of one sequence and a step of a whole batch are modelled, by
`kvattic.timing` and `kvattic_sim.system`.
"""

from dataclasses import dataclass, replace

from kvattic.errors import RequestError
from kvattic.spec.config import GQA, PAPER, Config
from kvattic.timing import Layer, estimate
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import modelled_run, run_slice
from kvattic_sim.system.drive import TimedDrive
from kvattic_sim.system.parameters import PAPER_MACHINE
from kvattic_sim.system.steps import direct_host_s, heads_of_a_drive, kvattic_drive
from kvattic_sim.system.systems import load_of
from kvattic_sim.system.transformer import LLAMA2_13B, LLAMA3_8B, OPT_13B, Transformer
from kvattic_sim.workloads import topical

__all__ = ["LLAMA2", "LLAMA3", "OPT", "Decode", "layer_run", "run", "run_llama2", "run_llama3", "run_opt",
           "step_run"]

SLICE_HEADS, SLICE_TOKENS = 4, 301
"""KV heads, at least; tokens: four pages of `paper` and a tail in the drive's DRAM."""
MOST_SIMULATED = 4
"""Drives of which each is a simulator's process."""
BATCH, NEW = 64, 1024
PARTS = {"kv": "attention in the drives", "append": "writing K and V", "gpu": "the GPU's matrix products",
         "host": "host and commands"}
"""Parts of a step of the system model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A model that decodes.

    Attributes:
        name: of the workload.
        model: its geometry.
        source: where that is from.
        context: tokens of a sequence at the end.
    """

    name: str
    model: Transformer
    source: str
    context: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.model.q_heads // self.model.kv_heads

    @property
    def config(self) -> Config:
        """The preset that suits it: one query row, or eight that share K and V."""
        return PAPER if self.group == 1 else GQA


OPT = Decode(name="opt-13b", model=OPT_13B, context=2048,
             source="arXiv 2205.01068, table 1, and facebook/opt-13b's config.json")
LLAMA2 = Decode(name="llama2-13b", model=LLAMA2_13B, context=4096,
                source="arXiv 2307.09288, and meta-llama/Llama-2-13b-hf's config.json")
LLAMA3 = Decode(name="llama3-8b", model=LLAMA3_8B, context=8192, source="arXiv 2407.21783, table 3")


def run(workload: Decode, request: Request) -> Outcome:
    """Run a slice, and model the whole.

    Args:
        workload: which.
        request: target, drives.

    Raises:
        RequestError: there are no such drives.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    model, config, drives = workload.model, workload.config, request.drives
    if not 1 <= drives <= model.kv_heads:
        raise RequestError(f"--drives of {workload.name} must be 1 to {model.kv_heads}, its KV heads, which are dealt "
                           f"over them, not {drives}")
    if request.target != "model" and drives > MOST_SIMULATED:
        raise RequestError(f"--drives must be at most {MOST_SIMULATED} with --target {request.target}, where each is a "
                           f"process of its own, not {drives}; --target model has room for {model.kv_heads}")
    heads = max(SLICE_HEADS, drives)
    what = f"slice: {heads} KV heads x {SLICE_TOKENS} tokens"
    attention = topical(config, kv_heads=heads, tokens=SLICE_TOKENS, group=workload.group)
    found = run_slice(config, attention, what, target=request.target, drives=drives, progress=request.progress)
    request.progress("modelling a layer")
    runs = (found.run, layer_run(workload, drives))
    request.progress("modelling a step of the whole batch")
    step, parts = step_run(workload, drives)
    return Outcome(
        name=workload.name, target=request.target, drives=drives,
        geometry={"layers": model.layers, "query heads": model.q_heads, "KV heads": model.kv_heads,
                  "head_dim": model.head_dim, "context, tokens": workload.context, "batch": BATCH, "drives": drives,
                  "drive": "paper" if config is PAPER else "gqa"},
        source=workload.source,
        slice=f"{heads} KV heads x {SLICE_TOKENS} tokens, {heads * workload.group} query rows, synthetic (topical)",
        reference="float64 attention over the same fp16 K, V and queries", error=found.error,
        bit_exact=found.bit_exact, runs=(*runs, step),
        figures={"modelled_tokens_per_second": BATCH / step.seconds,
                 **{f"modelled_step_share_{name}": share for name, share in parts.items()}},
        notes=("weights are not there: K, V and queries of the slice are synthetic, and the geometry is the model's",))


def layer_run(workload: Decode, drives: int) -> Run:
    """One layer of one sequence; modelled."""
    model, config = workload.model, workload.config
    heads = heads_of_a_drive(1, model.kv_heads, drives)
    found = estimate(config, Layer(config, heads, workload.context).attend(rows=workload.group))
    one = modelled_run(f"a layer: {model.kv_heads} KV heads x {workload.context:,} tokens, one sequence", found)
    return replace(one, bytes=round(one.bytes * model.kv_heads / heads))


def step_run(workload: Decode, drives: int) -> tuple[Run, dict[str, float]]:
    """A step of the whole batch, all layers, with GPU and host; and the shares of its parts.  Modelled.

    Args:
        workload: which.
        drives: of the system.
    """
    model, machine = workload.model, PAPER_MACHINE
    load = load_of(BATCH, workload.context, NEW)
    drive = TimedDrive(workload.config)
    step = kvattic_drive(model, load, machine, drive, mode="dense", drives=drives,
                         host_s=direct_host_s(model, load, machine))
    parts = {name: step.share(name) for name in step.parts}
    worst = max(parts, key=lambda name: parts[name])
    cycles = round(step.parts["kv"] * workload.config.clock_mhz * 1e6)
    return Run(what=f"a step: {model.layers} layers, batch {BATCH}, {load.tokens:,.0f} tokens each on average",
               how=How.MODELLED, cycles=cycles, bytes=round(load.kv_bytes(model)), seconds=step.seconds,
               limit=f"{PARTS[worst]}, {parts[worst]:.1%} of the step"), parts


def run_opt(request: Request) -> Outcome:
    """`run` of OPT-13B."""
    return run(OPT, request)


def run_llama2(request: Request) -> Outcome:
    """`run` of Llama 2 13B."""
    return run(LLAMA2, request)


def run_llama3(request: Request) -> Outcome:
    """`run` of Llama 3 8B."""
    return run(LLAMA3, request)
