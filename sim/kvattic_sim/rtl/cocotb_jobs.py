"""The cocotb side of `kvattic_sim.rtl.jobs`: runs the request that lies in the working directory."""

import pickle
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import cocotb
from cocotb.task import bridge

from kvattic.driver.device import Device
from kvattic.support.files import write_whole
from kvattic_sim.rtl import jobs
from kvattic_sim.rtl.jobs import OUTCOME, REQUEST, Outcome, Request, resolve
from kvattic_sim.rtl.transport import RtlTransport, session

# cocotbext-axi 0.1.28 calls what cocotb 2.1 has renamed, in each transaction.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"cocotbext\.")


@cocotb.test()
async def run(dut: Any) -> None:
    """Call the function with a device, and leave the outcome in a file."""
    jobs.in_simulation = True
    request: Request = pickle.loads(Path(REQUEST).read_bytes())
    begin = time.monotonic()

    def work(transport: RtlTransport) -> Any:
        nonlocal begin
        function = resolve(request)
        begin = time.monotonic()
        # Not closed: that would free all sequences, and erasing costs simulated time and shows nothing.
        return function(Device(transport, timeout_s=request.timeout_s), **request.arguments)

    cycles = 0
    try:
        async with session(
            dut,
            request.config,
            flash=request.flash,
            stalls=request.stalls,
            memory_bytes=request.memory_bytes,
            timeout_cycles=request.timeout_cycles,
        ) as transport:
            result = await bridge(work)(transport)
            cycles = transport.cycles
        outcome = Outcome(result=result, cycles=cycles, seconds=time.monotonic() - begin)
        data = pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - whatever it is belongs to the caller
        message = traceback.format_exc()
        try:
            data = pickle.dumps(Outcome(error=error, message=message))
            pickle.loads(data)
        except Exception:  # noqa: BLE001 - an exception that does not pickle travels as text
            data = pickle.dumps(Outcome(message=message))
    write_whole(Path(OUTCOME).absolute(), data)
