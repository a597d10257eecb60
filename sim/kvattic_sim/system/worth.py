"""Where a drive is worth it: the best that each kind of system does, by model, context and batch.

Everything is modelled; docs/system.md has the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvattic.errors import CapacityError
from kvattic_sim.system import steps
from kvattic_sim.system.drive import MODES
from kvattic_sim.system.parameters import H100, PAPER_MACHINE, Machine
from kvattic_sim.system.step import Load, Step
from kvattic_sim.system.systems import Study, load_of
from kvattic_sim.system.transformer import LLAMA3_8B, LLAMA3_70B_INT4, OPT_13B, Transformer

__all__ = ["CASES", "EXACT", "LARGE_HOST", "SPARSE", "Worth", "cases", "worth"]

LARGE_HOST = replace(PAPER_MACHINE, host=replace(PAPER_MACHINE.host, memory=1e12))
"""The paper's machine with 1 TB of DRAM."""
FEW, MANY = 4, 20
"""Numbers of drives."""
BATCHES = (16, 64, 256)
CASES: tuple[tuple[Transformer, tuple[int, ...]], ...] = (
    (OPT_13B, (2048,)), (LLAMA3_8B, (8192, 32768, 131072)), (LLAMA3_70B_INT4, (8192, 32768)))
"""Models and the contexts in which they are looked at."""
EXACT = ("A6000 alone", "H100 alone", "1 TB DRAM, CPU", f"{FEW} SSDs, direct I/O", f"{FEW} drives, dense",
         f"{MANY} drives, dense")
"""What attends everything: the names of `Worth.exact`."""
SPARSE = ("1 TB DRAM, SparQ", f"{FEW} drives", f"{MANY} drives")
"""What attends a part: the names of `Worth.sparse`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """One model, context and batch.

    Attributes:
        model: its name.
        context, batch: the load; 1,024 tokens of the context are generated.
        kv_gb: K and V at the end, 10^9 bytes.
        exact, sparse: tokens a second of decoding by name (`EXACT`, `SPARSE`); None where it does not fit.
        modes: the mode of each sparse entry that is this project's drive.
    """

    model: str
    context: int
    batch: int
    kv_gb: float
    exact: dict[str, float | None]
    sparse: dict[str, float | None]
    modes: dict[str, str]

    @staticmethod
    def _best(found: dict[str, float | None]) -> str:
        known = {name: value for name, value in found.items() if value is not None}
        return max(known, key=lambda name: known[name]) if known else "nothing"

    @property
    def best_exact(self) -> str:
        """Name of the fastest that attends everything."""
        return self._best(self.exact)

    @property
    def best_sparse(self) -> str:
        """Name of the fastest that attends a part."""
        return self._best(self.sparse)


def _rate(*tries: Step | None) -> float | None:
    return max((step.tokens_per_second for step in tries if step is not None), default=None)


def _try(work: Callable[[Transformer, Load, Machine], Step], model: Transformer, load: Load,
         machine: Machine) -> Step | None:
    try:
        return work(model, load, machine)
    except CapacityError:
        return None


def worth(study: Study, context: int, batch: int) -> Worth:
    """One case.

    Args:
        study: model and drive; its machine is the one that the drives are in.
        context: tokens of each sequence at the end.
        batch: sequences.
    """
    model, machine, load = study.model, study.machine, load_of(batch, context, study.new)
    drive = study.drive()
    modes: dict[str, str] = {}

    def ours(drives: int, asked: tuple[str, ...]) -> float | None:
        found: dict[str, float] = {}
        for mode in asked:
            try:
                found[mode] = study.step(load, drive, mode, drives).tokens_per_second
            except CapacityError:
                continue
        if not found:
            return None
        best = max(found, key=lambda mode: found[mode])
        if len(asked) > 1:
            modes[f"{drives} drives"] = best
        return found[best]

    larger = replace(machine, gpu=H100)
    exact = (
        _rate(_try(steps.gpu_alone, model, load, machine)), _rate(_try(steps.gpu_alone, model, load, larger)),
        _rate(_try(steps.cpu_attention, model, load, LARGE_HOST)),
        _rate(_try(lambda *of: steps.direct_io(*of, drives=FEW), model, load, machine)),
        ours(FEW, ("dense",)), ours(MANY, ("dense",)))
    thinned = tuple(mode for mode in MODES if mode != "dense")
    sparse = (
        _rate(*(_try(work, model, load, LARGE_HOST) for work in (steps.sparse_cpu, steps.sparse_dram))),
        ours(FEW, thinned), ours(MANY, thinned))
    return Worth(model=model.name, context=context, batch=batch, kv_gb=load.kv_capacity(model) / 1e9,
                 exact=dict(zip(EXACT, exact, strict=True)), sparse=dict(zip(SPARSE, sparse, strict=True)), modes=modes)


def cases() -> Iterator[Worth]:
    """All of `CASES`; takes some minutes."""
    for model, contexts in CASES:
        for context in contexts:
            study = Study(model=model, contexts=(context,), drives=(FEW, MANY))
            for batch in BATCHES:
                yield worth(study, context, batch)
