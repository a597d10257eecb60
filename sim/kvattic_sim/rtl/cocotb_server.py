"""The cocotb side of `kvattic_sim.rtl.server`: the drive's transport answers the requests of another process."""

import mmap
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import cocotb
from cocotb.task import bridge

from kvattic.transport.protocol import Kind, ProtocolError, Role, connect
from kvattic_sim.rtl.flash_file import FlashFile
from kvattic_sim.rtl.server import DIRECTORY, load_request, serve
from kvattic_sim.rtl.transport import FlashSettings, NandSettings, RtlTransport, session

# cocotbext-axi 0.1.28 calls what cocotb 2.1 has renamed, in each transaction.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"cocotbext\.")


@cocotb.test()
async def run(dut: Any) -> None:
    """Serve the host until it closes the connection."""
    directory = Path(os.environ[DIRECTORY])
    request = load_request(directory)
    connection = connect(directory, Role.SIMULATOR)
    message, (file,) = connection.receive_files(1)
    if message.kind is not Kind.MEMORY:
        raise ProtocolError(f"MEMORY comes first, not {message.kind.name}")
    (size,) = message.unpack("<Q")
    memory = mmap.mmap(file, size)
    os.close(file)
    flash = FlashSettings() if request["flash"] == "ideal" else NandSettings(
        bit_error_rate=request["bit_error_rate"], seed=request["seed"])

    image = request["image"] and FlashFile(Path(request["image"]), request["config"])

    def work(transport: RtlTransport) -> None:
        if image and (pages := image.read()) is not None:
            transport.load_flash(pages)
        try:
            connection.send(Kind.READY, payload=struct.pack("<Q", transport.dram_bytes), cycles=transport.cycles)
            serve(connection, transport)
        finally:
            # Also when the host was killed: a drive does not end with it.
            if image:
                image.write(transport.dump_flash())

    async with session(dut, request["config"], flash=flash, memory_bytes=size,
                       timeout_cycles=request["timeout_cycles"], memory=memory) as transport:
        await bridge(work)(transport)
