"""Simulates one decode step on the whole drive, and says how much processor time its cycles took.

`benches/models.py` runs this file in processes of their own, also with the packages of an earlier commit, so it uses
only names that both have:

    python speed_probe.py OUTCOME       # pickled: {"cycles", "cpu_s", "result"}; the model is built if it is not there
"""

import importlib
import pickle
import resource
import sys
from pathlib import Path
from typing import Any

KV_HEADS, TOKENS, ATTENDS = 8, 512, 3


def work(device: Any) -> dict[str, Any]:
    """Write K and V of a sequence and attend to it; runs in the simulator's process."""
    import cocotb

    from kvattic_sim.workloads import decode

    def used() -> tuple[int, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cycles: Any = cocotb.top.cycles  # type: ignore[attr-defined]
        return int(cycles.value), usage.ru_utime + usage.ru_stime

    attention = decode(device.config, kv_heads=KV_HEADS, tokens=TOKENS, group=device.config.rows)
    sequence = device.create_sequence(KV_HEADS, capacity_tokens=TOKENS)
    cycles, seconds = used()
    sequence.prefill(attention.key, attention.value)
    for _ in range(ATTENDS):
        result = sequence.attend(attention.query)
    end, end_s = used()
    return {"cycles": end - cycles, "cpu_s": end_s - seconds, "result": result}


def _module(*names: str) -> Any:
    """The first module of these names that there is."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(names[-1])


def main(outcome: Path) -> None:
    """Build, run, and write down what came of it."""
    from kvattic import PAPER

    bench = _module("kvattic_sim.rtl.testbench", "kvattic_sim.testbench")
    jobs = _module("kvattic_sim.rtl.jobs", "kvattic_sim.jobs")
    model = bench.build_testbench(PAPER, "verilator")
    run = jobs.run_on_model(model, PAPER, f"{Path(__file__).resolve()}:work")
    # The reader may have other classes than this version, so it unpacks the result only if it wants it.
    outcome.write_bytes(pickle.dumps(run.result | {"result": pickle.dumps(run.result["result"])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
