"""What this project's drive gains in a whole system, modelled: over FlexGen, over direct I/O, over the paper's drive.

OPT-13B, 1,024 tokens of prompt and as many generated.  Both sides of a ratio have the same software in front: against
FlexGen and the paper's drive it is theirs, against direct I/O a driver in user space.  At batch 256 FlexGen stands with
its best batch, 32, as in the paper: more than 64 prompts do not fit its GPU.
"""

from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.system import steps
from kvattic_sim.system.drive import MODES
from kvattic_sim.system.parameters import PAPER_MACHINE
from kvattic_sim.system.step import Load
from kvattic_sim.system.systems import Study
from kvattic_sim.system.transformer import OPT_13B

__all__ = ["BENCHES"]

BATCHES, DRIVES = (64, 256), (1, 4, 20)
FLEXGEN_BATCH = {64: 64, 256: 32}
"""FlexGen's batch beside this one."""
PREFIX = "system.speedup"


def _keys() -> list[tuple[str, int, int, str]]:
    return [(against, batch, drives, mode) for against in ("flexgen", "direct_io", "paper") for batch in BATCHES
            for drives in DRIVES for mode in MODES]


def _key(against: str, batch: int, drives: int, mode: str) -> str:
    return f"{PREFIX}.{against}.b{batch}.d{drives}.{mode}"


def _other(against: str, batch: int, drives: int, mode: str) -> float:
    """Tokens a second of what the drive is compared with: the paper's drive is dense beside dense, else SparF."""
    if against == "flexgen":
        step = steps.flexgen(OPT_13B, Load(batch=FLEXGEN_BATCH[batch]), PAPER_MACHINE)
    elif against == "direct_io":
        step = steps.direct_io(OPT_13B, Load(batch=batch), PAPER_MACHINE, drives=drives)
    else:
        step = steps.in_storage(OPT_13B, Load(batch=batch), PAPER_MACHINE, drives=drives, sparse=mode != "dense")
    return step.tokens_per_second


def speedups(lab: Lab) -> Figures:
    """All ratios; takes seconds."""
    direct, paper = Study(model=OPT_13B), Study(model=OPT_13B, host="paper")
    drive = direct.drive()
    found: Figures = {}
    for against, batch, drives, mode in _keys():
        lab.progress(_key(against, batch, drives, mode), 0, None)
        study = direct if against == "direct_io" else paper
        ours = study.step(Load(batch=batch), drive, mode, drives).tokens_per_second
        found[_key(against, batch, drives, mode)] = ours / _other(against, batch, drives, mode)
    return found


BENCHES = (Bench(keys=tuple(_key(*of) for of in _keys()), measure=speedups),)
