"""The cocotb side of `kvattic_sim.rtl.channels`: starts the clock, fills the dies, waits for the end of the list."""

import pickle
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, First, RisingEdge, Timer

from kvattic.support.files import write_whole
from kvattic_sim.nand.files import read_log, write_pages
from kvattic_sim.rtl.transport import CLOCK_NS, NandSettings

PATIENCE_CYCLES = 20_000_000


@cocotb.test()
async def run(dut: Any) -> None:
    """Run the list that lies in the working directory."""
    config, in_flight, pages, raw, settings = pickle.loads(Path("job.pickle").read_bytes())
    assert isinstance(settings, NandSettings)
    for name in ("configure", "load", "go"):
        getattr(dut, name).value = 0
    dut.in_flight.value = in_flight
    dut.rst.value = 1
    Clock(dut.clk, CLOCK_NS, "ns", impl="gpi").start()

    async def wait(cycles: int) -> None:
        await Timer(cycles * CLOCK_NS, "ns")
        await FallingEdge(dut.clk)

    await wait(4)
    settings.write(config)
    for channel, data in enumerate(raw):
        write_pages(Path(), config, (pages, data), channel=channel)
    dut.configure.value = 1
    dut.load.value = 1
    await wait(4)
    dut.rst.value = 0
    await wait(4)
    dut.go.value = 1
    await First(RisingEdge(dut.done), Timer(PATIENCE_CYCLES * CLOCK_NS, "ns"))
    await FallingEdge(dut.clk)

    def total(name: str) -> int:
        value = int(getattr(dut, name).value)
        return sum(value >> 32 * c & 0xFFFF_FFFF for c in range(config.channels))

    assert int(dut.done.value), f"only {int(dut.codewords.value)} codewords came in {PATIENCE_CYCLES:,} cycles"
    assert total("load_errors") == 0
    write_whole(Path("result.pickle").absolute(), pickle.dumps({
        "cycles": int(dut.cycles.value), "codewords": int(dut.codewords.value), "errors": int(dut.errors.value),
        "sum": int(dut.sum.value), "steady_cycles": int(dut.steady_cycles.value),
        "steady_codewords": int(dut.steady_codewords.value),
        "violations": [line for c in range(config.channels) for line in read_log(Path(), channel=c)]}))
