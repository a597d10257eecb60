"""A timeline of every channel and die during a short decode step: `make trace`, `kvattic trace`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvattic import Config
from kvattic_sim.nand import timeline
from kvattic_sim.rtl.jobs import run_on_model
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.rtl.transport import NandSettings
from kvattic_sim.simulators.build import Simulator
from kvattic_sim.workloads import DENSE, ModeSettings, attend, decode

__all__ = ["PATH", "Trace", "trace"]

PATH = Path("build") / "trace.json"
HEADS, TOKENS = 4, 2048


@dataclass(frozen=True, slots=True)
class Trace:
    """What was written.

    Attributes:
        events: how many there are.
        path: Perfetto's JSON.
        picture: PNG of the attention.
    """

    events: int
    path: Path
    picture: Path


def trace(config: Config, simulator: Simulator, options: ModeSettings = DENSE, *, path: Path = PATH,
          progress: Callable[[str], None] = lambda line: None) -> Trace:
    """Simulate a decode step of 4 heads and 2,048 tokens, and write what each channel and die did when.

    Args:
        config: what to simulate.
        simulator: what runs it.
        options: which tokens are attended.
        path: JSON to write; the picture stands beside it.
        progress: told what is being done.

    Raises:
        SimulatorError, SimulationFailed, JobError: see `kvattic_sim.rtl.jobs`.
    """
    progress("building the drive")
    model = build_testbench(config, simulator)
    progress("running a decode step")
    attention = decode(config, kv_heads=HEADS, tokens=TOKENS, group=config.rows)
    arguments = {"attention": attention, "heads_per_batch": HEADS, "label": "trace", "options": options}
    run = run_on_model(model, config, attend, arguments, flash=NandSettings(bit_error_rate=1e-5, trace=True))
    progress("drawing")
    events = timeline.read(run.run_dir, config)
    timeline.write_perfetto(events, config, path)
    # The picture shows the attention: from the first page read of the array on.
    first = next(event.start for event in events if event.kind is timeline.Kind.READ)
    last = max(event.end for event in events if event.kind is timeline.Kind.DATA_OUT)
    picture = path.with_suffix(".png")
    title = (f"{HEADS} heads x {TOKENS:,} tokens, {options.mode}, {config.channels} channels x {config.dies} dies, "
             f"{config.part.name}")
    timeline.draw(events, config, picture, first=first, last=last, title=title)
    return Trace(len(events), path, picture)
