"""Every system beside every other one: the same load on a GPU alone, over DRAM, over files and in drives.

    study = Study(model=OPT_13B, batches=(64,), contexts=(2048,), drives=(1, 4), modes=("dense", "sparf"))
    for row in study.rows():
        print(row.system, row.drives, row.tokens_per_second)

Everything is modelled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from kvattic.errors import KvatticError, RequestError
from kvattic_sim.system import steps
from kvattic_sim.system.drive import MODES, TimedDrive, mode_of
from kvattic_sim.system.parameters import PAPER_MACHINE, Machine
from kvattic_sim.system.step import Load, Step
from kvattic_sim.system.transformer import Transformer

__all__ = ["BASELINES", "HOSTS", "KVATTIC", "Row", "Study", "load_of"]

Work = Callable[[Transformer, Load, Machine], Step]
DriveWork = Callable[[Transformer, Load, Machine, int], Step]

BASELINES: dict[str, Work] = {
    "GPU alone": steps.gpu_alone,
    "DRAM, CPU attention": steps.cpu_attention,
    "DRAM, CPU, SparQ": steps.sparse_cpu,
    "DRAM to GPU, SparQ": steps.sparse_dram,
    "DeepSpeed (DRAM)": steps.deepspeed,
    "FlexGen (SSD)": steps.flexgen,
    "FlexGen, SparQ": lambda model, load, machine: steps.flexgen(model, load, machine, sparse=True),
}
"""Systems whose number of drives is not asked for."""
WITH_DRIVES: dict[str, DriveWork] = {
    "SSD, direct I/O": lambda model, load, machine, drives: steps.direct_io(model, load, machine, drives=drives),
    "paper's drive, dense": lambda model, load, machine, drives: steps.in_storage(model, load, machine, drives=drives),
    "paper's drive, SparF": lambda model, load, machine, drives: steps.in_storage(
        model, load, machine, drives=drives, sparse=True),
}
"""Systems with one or more drives."""
KVATTIC = "kvattic"
"""Name of this project's drive."""
HOSTS = ("direct", "paper")
"""Software in front of this project's drives: commands from a driver in user space; or the paper's, on FlexGen."""


def load_of(batch: int, context: int, new: int) -> Load:
    """A load by its last length.

    Args:
        batch: sequences.
        context: tokens of each at the end.
        new: tokens of these that are generated.

    Raises:
        RequestError: one of them is no positive integer, or no prompt is left.
    """
    for name, value in (("context", context), ("new", new)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RequestError(f"{name} must be a positive integer, not {value!r}")
    if new >= context:
        raise RequestError(f"new must be less than context, so that a prompt is left, not {new} of {context}")
    return Load(batch=batch, prompt=context - new, new=new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A system under a load; modelled.

    Attributes:
        model: name of the transformer.
        gpu: of the GPU, with its number where there are several.
        system: what it is.
        mode: of this project's drive, otherwise empty.
        drives: 0 where there are none.
        batch, context, new: the load.
        together: sequences that are decoded at once; fewer than `batch` where a GPU works in waves.
        overlapped: GPU and the rest work at the same time.
        tokens_per_second: of decoding, all sequences.
        with_prefill: the same, prompts included.
        step_ms: milliseconds of a step.
        kv_ms, arithmetic_ms, append_ms, host_ms, gpu_ms: its parts.
        prefill_s: seconds of the prompts.
        flash_gb, dram_gb: what each drive must hold, in flash and in its own DRAM; 10^9 bytes.
        kind: that all of this is modelled.
        error: why there is nothing, or empty.
    """

    model: str
    gpu: str
    system: str
    mode: str = ""
    drives: int = 0
    batch: int
    context: int
    new: int
    together: int = 0
    overlapped: bool = False
    tokens_per_second: float = 0.0
    with_prefill: float = 0.0
    step_ms: float = 0.0
    kv_ms: float = 0.0
    arithmetic_ms: float = 0.0
    append_ms: float = 0.0
    host_ms: float = 0.0
    gpu_ms: float = 0.0
    prefill_s: float = 0.0
    flash_gb: float = 0.0
    dram_gb: float = 0.0
    kind: str = "modelled"
    error: str = ""

    @property
    def name(self) -> str:
        """System and mode."""
        return f"{self.system}, {self.mode}" if self.mode else self.system


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Loads and what is asked about them.

    Attributes:
        model: what is decoded with.
        batches: sequences that are decoded together.
        contexts: tokens of each sequence at the end.
        new: of these, generated.
        drives: numbers of drives.
        modes: of this project's drive.
        machine: GPU, host, and what the drives are made of.
        host: one of `HOSTS`, in front of this project's drives.
        overlapped: this project's drives and the GPU work at the same time, on two halves of the batch.
        part: of this project's drive: a NAND part's name.
        unit_tokens: of CENTROID.

    Raises:
        RequestError: one of them is unknown, or no positive integer.
    """

    model: Transformer
    batches: tuple[int, ...] = (64,)
    contexts: tuple[int, ...] = (2048,)
    new: int = 1024
    drives: tuple[int, ...] = (1, 4, 20)
    modes: tuple[str, ...] = MODES
    machine: Machine = PAPER_MACHINE
    host: str = "direct"
    overlapped: bool = False
    part: str = "pslc"
    unit_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("batches", "contexts", "drives", "modes"):
            if not getattr(self, name):
                raise RequestError(f"{name} must have at least one value")
        for batch in self.batches:
            for context in self.contexts:
                load_of(batch, context, self.new)
        for drives in self.drives:
            if not isinstance(drives, int) or isinstance(drives, bool) or drives < 1:
                raise RequestError(f"drives must be a positive integer, not {drives!r}")
        for mode in self.modes:
            mode_of(mode)
        if self.host not in HOSTS:
            raise RequestError(f"there is no host {self.host!r}; hosts are {', '.join(HOSTS)}")
        if self.machine.gpu.count < 1:
            raise RequestError(f"GPUs must be at least 1, not {self.machine.gpu.count}")

    def drive(self) -> TimedDrive:
        """The drive that suits the model and its longest context."""
        return TimedDrive.for_model(self.model, tokens=max(self.contexts), part=self.part,
                                    unit_tokens=self.unit_tokens)

    def rows(self, *, baselines: bool = True) -> Iterator[Row]:
        """A row for each load and system; what does not fit is a row with its error.

        Args:
            baselines: also all systems but this project's drive.

        Raises:
            CapacityError: the weights do not fit the GPUs.
        """
        steps.gpu_seconds(self.model, 1, self.machine.gpu)
        drive = self.drive()
        for context in self.contexts:
            for batch in self.batches:
                load = load_of(batch, context, self.new)
                if baselines:
                    for name, work in BASELINES.items():
                        yield self._row(load, name, partial(work, self.model, load, self.machine))
                    for name, with_drives in WITH_DRIVES.items():
                        for drives in self.drives:
                            yield self._row(load, name, partial(with_drives, self.model, load, self.machine, drives),
                                            drives=drives)
                for mode in self.modes:
                    for drives in self.drives:
                        yield self._row(load, KVATTIC, partial(self.step, load, drive, mode, drives), mode=mode,
                                        drives=drives)

    def step(self, load: Load, drive: TimedDrive, mode: str, drives: int) -> Step:
        """A step of this project's drives.

        Raises:
            CapacityError: something does not fit.
            RequestError: the drive has no such mode for such a model.
        """
        host = steps.direct_host_s(self.model, load, self.machine) if self.host == "direct" else None
        return steps.kvattic_drive(self.model, load, self.machine, drive, mode=mode, drives=drives, host_s=host,
                                   overlapped=self.overlapped)

    def _row(self, load: Load, system: str, work: Callable[[], Step], *, mode: str = "", drives: int = 0) -> Row:
        gpu = self.machine.gpu
        row = Row(model=self.model.name, gpu=f"{gpu.count} x {gpu.name}" if gpu.count > 1 else gpu.name, system=system,
                  mode=mode, drives=drives, batch=load.batch, context=load.prompt + load.new, new=load.new)
        try:
            step = work()
        except KvatticError as error:
            return replace(row, error=str(error))

        def part(name: str) -> float:
            return 1e3 * step.parts.get(name, 0.0)

        return replace(
            row, together=step.load.batch, overlapped=step.overlapped, tokens_per_second=step.tokens_per_second,
            with_prefill=step.tokens_per_second_with_prefill, step_ms=1e3 * step.seconds, kv_ms=part("kv"),
            arithmetic_ms=part("arithmetic"), append_ms=part("append"), host_ms=part("host"), gpu_ms=part("gpu"),
            prefill_s=step.prefill, flash_gb=step.flash / 1e9, dram_gb=step.dram / 1e9)
