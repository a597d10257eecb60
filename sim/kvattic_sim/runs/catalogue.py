"""The workloads of `kvattic run`, by name."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from kvattic.errors import RequestError
from kvattic_sim.runs.outcome import Outcome, Request

__all__ = ["TARGETS", "WORKLOADS", "Workload", "find", "run"]

TARGETS = ("model", "sim:verilator")
"""Where slices can run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A workload that can be run.

    Attributes:
        name: for the command line.
        summary: what it is.
        module: of `kvattic_sim.runs`; imported when it runs, for some need torch.
        function: in it, of a `Request`.
        targets: where its slice can run.
        drives: whether it runs on several drives.
        exports: whether it has something to write to a file.
        formats: whether K and V can be in several formats.
        needs: packages that are imported late, for the command line to look for at once.
    """

    name: str
    summary: str
    module: str
    function: str
    targets: tuple[str, ...] = TARGETS
    drives: bool = False
    exports: bool = False
    formats: bool = False
    needs: tuple[str, ...] = ()


WORKLOADS = {one.name: one for one in (
    Workload(name="opt-13b", summary="decoding with OPT-13B, the paper's model", module="decode", function="run_opt",
             drives=True),
    Workload(name="llama2-13b", summary="decoding with Llama 2 13B", module="decode", function="run_llama2",
             drives=True),
    Workload(name="llama3-8b", summary="decoding with Llama 3 8B, whose KV heads have four query heads each",
             module="decode", function="run_llama3", drives=True),
    Workload(name="agd", summary="guidance: two passes, a pair as rows of one job, one adapted pass", module="agd",
             function="run"),
    Workload(name="dovetail", summary="speculative decoding: a pass over K and V verifies a draft, as chain or tree",
             module="dovetail", function="run"),
    Workload(name="z-image", summary="a single-stream diffusion transformer of diffusers", module="z_image",
             function="run"),
    Workload(name="koala", summary="a U-Net of diffusers: text written once, self-attention in each step",
             module="koala", function="run", exports=True),
    Workload(name="slm-intent", summary="a small model, fine-tuned and quantised, behind a prompt that is written once",
             module="slm_intent", function="run", formats=True, needs=("gguf", "accelerate")),
)}
"""By name."""


def find(name: str) -> Workload:
    """The named workload.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in WORKLOADS:
        raise RequestError(f"there is no workload {name!r}; workloads are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def run(name: str, request: Request) -> Outcome:
    """Run a workload.

    Args:
        name: of it.
        request: what is asked for.

    Raises:
        RequestError: there is no such workload, or it has no such target or number of drives, or nothing to write to
            a file, or the file's folder is not there, or K and V have one format.
        ModuleNotFoundError: it needs an extra that is not installed.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    workload = find(name)
    if request.target not in workload.targets:
        raise RequestError(f"workload {name} has no target {request.target!r}; its targets are "
                           f"{', '.join(workload.targets)}")
    if request.drives != 1 and not workload.drives:
        raise RequestError(f"workload {name} runs on one drive, not on {request.drives}; --drives is for "
                           f"{', '.join(one.name for one in WORKLOADS.values() if one.drives)}")
    if request.kv is not None and not workload.formats:
        raise RequestError(f"workload {name} has K and V in the format of its drive; --kv is for "
                           f"{', '.join(one.name for one in WORKLOADS.values() if one.formats)}")
    if request.output is not None:
        if not workload.exports:
            raise RequestError(f"workload {name} has nothing to write to {request.output}; --output is for "
                               f"{', '.join(one.name for one in WORKLOADS.values() if one.exports)}")
        if not request.output.resolve().parent.is_dir():
            raise RequestError(f"the folder of {request.output} must exist")
    module = importlib.import_module(f"kvattic_sim.runs.{workload.module}")
    return cast(Callable[[Request], Outcome], getattr(module, workload.function))(request)
