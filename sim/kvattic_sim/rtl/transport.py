"""The simulated drive as a `kvattic.transport.base.Transport`: blocking calls from a thread inside of cocotb.

    @cocotb.test()
    async def test(dut):
        async with session(dut, config) as transport:
            await bridge(work)(transport)   # work may use kvattic.driver.device.Device(transport)

`session` is for the module that `kvattic_sim.rtl.testbench` makes; what is written to device DRAM reaches it through a
file in the simulator's working directory.  While a call of the driver waits for the device, Python sleeps until the
interrupt line rises; while Python works, simulated time stands still.
"""

import contextlib
import itertools
import logging
import mmap
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
from cocotb.clock import Clock
from cocotb.task import resume
from cocotb.triggers import FallingEdge, First, RisingEdge, Timer, Trigger
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiSlave, MemoryRegion
from numpy.typing import NDArray

from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.spec.config import Config
from kvattic.spec.registers import REGISTER_MAP, StatusBit
from kvattic.support.files import named
from kvattic.transport.base import find_register
from kvattic_sim.nand.files import read_log, read_pages, write_pages
from kvattic_sim.nand.twin import NandFaults, write_configuration

__all__ = ["AxiStalls", "Fault", "FaultKind", "FlashSettings", "NandSettings", "RtlTransport", "Stall", "session"]

CLOCK_NS = 2
"""Period of `clk` in simulated time; it stands for nothing."""
RESET_CYCLES = 4
SLICE_CYCLES = 100, 20_000
"""Cycles between two looks at the wall clock while waiting for the interrupt: least and most."""
SLICE_S = 0.25
"""What they should take; some simulators run a thousand times slower than others."""
DRAM_LATENCY = 30
"""Cycles from a read of device DRAM to its first beat: about 100 ns, a row miss behind a controller's queue."""
POWER_OFF_CYCLES = 50
"""How long the power is off when it is cut."""
SETTLE_CYCLES = 8
"""Cycles after which what a register access did shows on the interrupt line."""
READY_CYCLES = 128
"""Cycles that pass after a read of STATUS that finds READY low: a poll costs more real time than they do."""

_OUTPUTS = (
    *("flash_served", "flash_violations", "flash_load_errors", "flash_words_moved"),
    *("dram_load_errors", "dram_size"),
)
"""Signals of the test bench whose names begin like those of its inputs."""

Result = TypeVar("Result")
NandPages: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""Raw pages of a channel: their indices, and their bytes, a row each."""


class Stall(StrEnum):
    """When a side of a stream or bus channel does not take part."""

    NONE = "none"
    PATTERN = "1110"
    """Three cycles of four."""
    RANDOM = "random"


class FaultKind(StrEnum):
    """What a flash twin does wrong."""

    DROP = "drop"
    """The codeword never comes."""
    DUPLICATE = "duplicate"
    """It comes twice, the second time at least `Fault.value` cycles after the first."""
    CORRUPT = "corrupt"
    """Bits `Fault.value` of its tag are flipped."""
    DELAY = "delay"
    """It comes `Fault.value` cycles later."""


FAULT_NUMBERS = {FaultKind.DROP: 1, FaultKind.DUPLICATE: 2, FaultKind.CORRUPT: 3, FaultKind.DELAY: 4}
"""What flash_channel.sv calls them; 0: no fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One codeword that goes wrong.

    Attributes:
        kind: how.
        number: which codeword of its channel: 1 is the first that is served after the settings took effect.
        channel: which channel.
        value: see `FaultKind`.
    """

    kind: FaultKind
    number: int = 1
    channel: int = 0
    value: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashSettings:
    """How the ideal flash twins behave, all of them alike.

    Attributes:
        latency: cycles from a request until its codeword may be sent.
        jitter: random cycles added to it, at most.
        shuffle: send the codewords that may go in random order instead of the oldest first.
        gap: cycles in which no beat is offered.
        request_stall: cycles in which no request is taken.
        stall_probability: of `Stall.RANDOM`, in 1/256 for each cycle.
        seed: of everything random; the channels differ nevertheless.
        fault: what goes wrong, if anything.
    """

    latency: int = 100
    jitter: int = 0
    shuffle: bool = False
    gap: Stall = Stall.NONE
    request_stall: Stall = Stall.NONE
    stall_probability: int = 128
    seed: int = 1
    fault: Fault | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NandSettings:
    """How the dies behave.

    Attributes:
        bit_error_rate: raw bit errors of each read, over bits read, on all channels without faults of their own.
        faults: what goes wrong on a channel, by channel.
        seed: of everything random; the channels differ nevertheless.
        trace: keep a timeline of every die in nand<channel>.trace.
    """

    bit_error_rate: float = 0.0
    faults: Mapping[int, NandFaults] = field(default_factory=dict)
    seed: int = 1
    trace: bool = False

    def write(self, config: Config) -> None:
        """Leave them in the working directory, for the models to read."""
        for channel in range(config.channels):
            faults = self.faults.get(channel, NandFaults(bit_error_rate=self.bit_error_rate))
            write_configuration(
                Path(f"nand{channel}.cfg"), config, faults=faults, seed=self.seed + channel, trace=self.trace)


@dataclass(frozen=True, kw_only=True, slots=True)
class AxiStalls:
    """When Python's side of each AXI channel pauses.

    Attributes:
        host_aw, host_w, host_b, host_ar, host_r: channels of the AXI4-Lite register bus.
        memory_aw, memory_w, memory_b, memory_ar, memory_r: channels of the AXI4 memory bus.
        seed: of everything random.
    """

    host_aw: Stall = Stall.NONE
    host_w: Stall = Stall.NONE
    host_b: Stall = Stall.NONE
    host_ar: Stall = Stall.NONE
    host_r: Stall = Stall.NONE
    memory_aw: Stall = Stall.NONE
    memory_w: Stall = Stall.NONE
    memory_b: Stall = Stall.NONE
    memory_ar: Stall = Stall.NONE
    memory_r: Stall = Stall.NONE
    seed: int = 1

    @classmethod
    def everywhere(cls, stall: Stall, *, seed: int = 1) -> Self:
        """The same stall on all ten channels."""
        names = [field.name for field in fields(cls) if field.name != "seed"]
        return cls(**dict.fromkeys(names, stall), seed=seed)


def _pauses(stall: Stall, seed: str) -> Iterable[bool] | None:
    if stall is Stall.NONE:
        return None
    if stall is Stall.PATTERN:
        # One cycle more from time to time, or a bus whose transactions take four would always meet the same phase.
        return itertools.cycle((True, True, True, False) * 5 + (True,))
    generator = random.Random(seed)
    return (generator.random() < 0.5 for _ in itertools.count())


class _Dram:
    """Device DRAM as Python sees it: the device only reads it, so a copy here is always true.

    What was written since the last `flush` is remembered as ranges of whole words.
    """

    def __init__(self, size: int, word_bytes: int) -> None:
        self.word_bytes = word_bytes
        self.contents = bytearray(size)
        self._dirty: list[tuple[int, int]] = []

    def write(self, address: int, data: bytes) -> None:
        self.contents[address : address + len(data)] = data
        first, end = address // self.word_bytes, -(-(address + len(data)) // self.word_bytes)
        if self._dirty and self._dirty[-1][1] == first:
            first = self._dirty.pop()[0]
        self._dirty.append((first, end))

    def flush(self, path: Path) -> bool:
        """Write the changes to a file for axi_memory.sv; whether there were any."""
        if not self._dirty:
            return False
        words = np.frombuffer(self.contents, np.uint8).reshape(-1, self.word_bytes)
        with named(path), path.open("wb") as file:
            for first, end in self._dirty:
                file.write(np.array((first, end - first), ">u4").tobytes())
                file.write(np.ascontiguousarray(words[first:end, ::-1]).data)
        self._dirty = []
        return True


class RtlTransport:
    """One simulated drive; every call blocks its thread until it is done (see `kvattic.transport.base.Transport`).

    Made by `session`.  The calls are for the thread of a `cocotb.task.bridge`.

    Attributes:
        config: geometry.
        memory_bytes: host memory, from address 0 on; outside of it the bus answers SLVERR.
        dram_bytes: size of device DRAM.
        timeout_cycles: `wait` gives up after this many cycles; None: never.
        heartbeat: if set, called from time to time while `wait` waits, with the cycles since the start.
        on_batch: if set, called when a busy period has ended (STATUS.BUSY is low) and its counters can be read: by
            `wait` after the interrupt, before the next submission, and by `settle`.

    Args:
        dut: the test bench.
        config: what it was built for.
        memory_bytes: size of the host memory.
        timeout_cycles: see above.
        memory: what host memory is kept in, of that size; its own by default.
    """

    def __init__(self, dut: Any, config: Config, *, memory_bytes: int, timeout_cycles: int | None,
                 memory: mmap.mmap | None = None) -> None:
        self.config = config
        self.memory_bytes = memory_bytes
        self.timeout_cycles = timeout_cycles
        self.heartbeat: Callable[[int], None] | None = None
        self.on_batch: Callable[[], None] | None = None
        self.dram_bytes = 0
        self._dut = dut
        self._memory = MemoryRegion(memory_bytes, mem=memory)
        logging.getLogger(f"cocotb.{dut._name}").setLevel(logging.WARNING)
        self._host = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "host"), dut.host_clk, dut.rst)
        self._slave = AxiSlave(
            AxiBus.from_prefix(dut, "memory"), dut.memory_clk, dut.rst, target=self._memory
        )
        self._dram = _Dram(0, config.dram_beat_bytes)
        self._nand: NandSettings | None = None
        self._rung = False
        self._lost_power = False    # and has not been set up again
        self._slice = SLICE_CYCLES[0]
        self._power_off: int | None = None
        self._toggles: dict[str, int] = {}

    # The simulation's side.

    async def start(self) -> None:
        """Reset the drive and wait until it is ready."""
        dut = self._dut
        for handle in dut:
            if handle._name.startswith(("flash_", "dram_")) and handle._name not in _OUTPUTS:
                handle.value = 0
        dut.host_active.value = 0
        dut.rst.value = 1
        Clock(dut.clk, CLOCK_NS, "ns", impl="gpi").start()
        await self._cycles(RESET_CYCLES)
        dut.rst.value = 0
        await self._cycles(1)
        self.dram_bytes = int(dut.dram_size.value)
        self._dram = _Dram(self.dram_bytes, self.config.dram_beat_bytes)
        dut.dram_latency.value = DRAM_LATENCY
        while not await self._read("STATUS") & StatusBit.READY:
            pass

    async def _cycles(self, count: int) -> None:
        """Let time pass, and end where `clk` falls."""
        if count > 1:
            await Timer((count - 1) * CLOCK_NS, "ns")
        await FallingEdge(self._dut.clk)

    async def _read(self, name: str) -> int:
        register = REGISTER_MAP[name]
        self._dut.host_active.value = 1
        value = 0
        for offset in range(0, register.width // 8, 4):
            answer = await self._host.read(register.address + offset, 4)
            if answer.resp:
                raise RuntimeError(f"reading {name} was answered with {answer.resp!r}")
            value |= int.from_bytes(answer.data, "little") << 8 * offset
        self._dut.host_active.value = 0
        if name == "STATUS" and not value & StatusBit.READY:
            await self._cycles(READY_CYCLES)
        return value

    async def _write(self, name: str, value: int) -> None:
        register = REGISTER_MAP[name]
        if name.startswith("SUBMISSION_TAIL_"):
            await self._load_dram()
            self._rung = True
        elif name in ("CONTROL", "ADMIN_ENTRIES"):
            self._lost_power = False
        self._dut.host_active.value = 1
        data = value.to_bytes(register.width // 8, "little")
        for offset in range(0, len(data), 4):
            answer = await self._host.write(register.address + offset, data[offset : offset + 4])
            if answer.resp:
                raise RuntimeError(f"writing {name} was answered with {answer.resp!r}")
        self._dut.host_active.value = 0

    async def _toggle(self, name: str) -> None:
        """Change an input that acts when it changes, and let it act."""
        self._toggles[name] = value = self._toggles.get(name, 0) ^ 1
        await self._cycles(1)
        getattr(self._dut, name).value = value
        await self._cycles(2)

    async def _load_dram(self) -> None:
        """Hand all that was written to device DRAM since the last time to the model."""
        path = Path("dram.bin")
        if self._dram.flush(path):
            await self._toggle("dram_load")
            if int(self._dut.dram_load_errors.value):
                raise RuntimeError(f"device DRAM could not read {path}")
            path.unlink()

    async def _wait(self, timeout_s: float) -> None:
        dut = self._dut
        # The line may show what an access of a moment ago has changed.  Time must pass in any case: a caller that goes
        # on waiting would meet a line that stays up for ever.
        await self._cycles(SETTLE_CYCLES)
        if self._lost_power:
            raise DeviceTimeoutError("the simulated drive lost its power")
        begin, begin_cycle = time.monotonic(), int(dut.cycles.value)
        raised, limit = RisingEdge(dut.irq), self.timeout_cycles
        cycles = 0
        while not int(dut.irq.value):
            step = self._slice if limit is None else min(self._slice, max(limit - cycles, 1))
            if self._power_off is not None:
                if int(dut.cycles.value) >= self._power_off:
                    await self._lose_power()
                    raise DeviceTimeoutError("the simulated drive lost its power")
                step = min(step, self._power_off - int(dut.cycles.value))
            slice_begin = time.monotonic()
            await First(raised, Timer(step * CLOCK_NS, "ns"))
            self._adapt(time.monotonic() - slice_begin)
            if self.heartbeat is not None:
                self.heartbeat(int(dut.cycles.value))
            if int(dut.irq.value):
                break
            passed, cycles = time.monotonic() - begin, int(dut.cycles.value) - begin_cycle
            if passed > timeout_s or (limit is not None and cycles >= limit):
                raise DeviceTimeoutError(
                    f"the simulated drive raised no interrupt in {cycles:,} cycles "
                    f"({passed:.1f} s of real time; the limits are {limit} cycles and "
                    f"{timeout_s:g} s)" + ("" if self._nand else f"; the twins served {self.served} codewords")
                )
        self._check_nand()

    def _adapt(self, took_s: float) -> None:
        """Choose the next slice after one that took so long."""
        least, most = SLICE_CYCLES
        if took_s < SLICE_S / 2:
            self._slice = min(self._slice * 2, most)
        elif took_s > SLICE_S * 2:
            self._slice = max(self._slice // 2, least)

    async def _lose_power(self) -> None:
        """The RTL starts anew, device DRAM is empty; the dies lose their power by themselves (see `cut_power`)."""
        self._power_off, self._lost_power = None, True
        self._dram.write(0, bytes(self.dram_bytes))
        self._dut.rst.value = 1
        await self._cycles(POWER_OFF_CYCLES + RESET_CYCLES)
        self._dut.rst.value = 0
        await self._cycles(1)
        while not await self._read("STATUS") & StatusBit.READY:
            pass

    def _counts(self, name: str) -> list[int]:
        """A 32-bit output of each channel's twin."""
        value = int(getattr(self._dut, f"flash_{name}").value)
        return [value >> 32 * channel & 0xFFFF_FFFF for channel in range(self.config.channels)]

    def _check_nand(self) -> None:
        """A violation of the part's rules is a defect of the controllers, whatever the results."""
        if self._nand is not None and any(self._counts("violations")):
            said = [line for c in range(self.config.channels) for line in read_log(Path(), channel=c)]
            raise RuntimeError("the NAND models saw violations:\n" + "\n".join(said[:20]))
        if self._nand is not None and any(self._counts("load_errors")):
            frames = int(self._dut.frames_per_channel.value)
            raise RuntimeError(f"the NAND models lost pages: each channel keeps {frames}; build with more frames")

    async def _set_flash(self, settings: "FlashSettings | NandSettings") -> None:
        if isinstance(settings, NandSettings):
            await self._set_nand(settings)
            return
        values = {
            "latency": settings.latency,
            "jitter": settings.jitter,
            "shuffle": int(settings.shuffle),
            "seed": settings.seed,
        }
        for name, stall in (("gap", settings.gap), ("request_stall", settings.request_stall)):
            values[name] = settings.stall_probability if stall is Stall.RANDOM else 0
            values[f"{name}_pattern"] = 0b0111 if stall is Stall.PATTERN else 0
        fault = settings.fault
        values["fault"] = 0 if fault is None else FAULT_NUMBERS[fault.kind] << 3 * fault.channel
        values["fault_number"] = 0 if fault is None else fault.number
        values["fault_value"] = 0 if fault is None else fault.value
        await self._cycles(1)
        for name, value in values.items():
            getattr(self._dut, f"flash_{name}").value = value
        await self._toggle("flash_configure")

    async def _set_nand(self, settings: "NandSettings") -> None:
        self._nand = settings
        settings.write(self.config)
        await self._toggle("flash_configure")

    async def _load_flash(self, pages: Sequence[NandPages]) -> None:
        """Let the dies hold raw pages, as if they had been programmed."""
        for channel, found in enumerate(pages):
            write_pages(Path(), self.config, found, channel=channel)
        await self._toggle("flash_load")
        self._check_nand()

    async def _dump_flash(self) -> list[NandPages]:
        """The raw pages that the dies hold, of each channel."""
        await self._toggle("flash_dump")
        found = []
        for channel in range(self.config.channels):
            pages = read_pages(Path(), self.config, channel=channel)
            data = np.frombuffer(b"".join(pages.values()), np.uint8).reshape(len(pages), self.config.part.raw_bytes)
            found.append((np.fromiter(pages, np.int64, len(pages)), data))
        return found

    async def _set_stalls(self, stalls: AxiStalls) -> None:
        sides = {
            "host_aw": self._host.write_if.aw_channel,
            "host_w": self._host.write_if.w_channel,
            "host_b": self._host.write_if.b_channel,
            "host_ar": self._host.read_if.ar_channel,
            "host_r": self._host.read_if.r_channel,
            "memory_aw": self._slave.write_if.aw_channel,
            "memory_w": self._slave.write_if.w_channel,
            "memory_b": self._slave.write_if.b_channel,
            "memory_ar": self._slave.read_if.ar_channel,
            "memory_r": self._slave.read_if.r_channel,
        }
        for name, side in sides.items():
            side.set_pause_generator(_pauses(getattr(stalls, name), f"{name} {stalls.seed}"))
            side.pause = False

    def _block(self, work: Callable[..., Coroutine[Trigger, None, Result]], *arguments: Any) -> Result:
        return resume(work)(*arguments)

    # The driver's side: Transport.

    def read_register(self, name: str) -> int:
        """See `Transport`.

        Raises:
            RequestError: there is no such register.
        """
        find_register(name)
        return self._block(self._read, name)

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`.

        Raises:
            RequestError: there is no such register, or the value does not fit it.
        """
        find_register(name, value)
        if name.startswith("SUBMISSION_TAIL"):
            self.settle()
        self._block(self._write, name, int(value))

    def read_memory(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
        """
        self._check_memory(address, size)
        return bytes(self._memory.mem[address : address + size])

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
        """
        self._check_memory(address, len(data))
        self._memory.mem[address : address + len(data)] = data

    def _check_memory(self, address: int, size: int) -> None:
        if address < 0 or size < 0 or address + size > self.memory_bytes:
            raise RequestError(
                f"host memory is 0 to {self.memory_bytes:#x}: {size} bytes at {address:#x} are not in it"
            )

    def write_dram(self, address: int, data: bytes) -> None:
        """See `Transport`.  The model gets it before the next SUBMISSION_TAIL doorbell.

        Raises:
            RequestError: outside of device DRAM.
        """
        self._check_dram(address, len(data))
        self._dram.write(address, data)

    def read_dram(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of device DRAM.
        """
        self._check_dram(address, size)
        return bytes(self._dram.contents[address : address + size])

    def _check_dram(self, address: int, size: int) -> None:
        if address < 0 or size < 0 or address + size > self.dram_bytes:
            raise RequestError(
                f"device DRAM is 0 to {self.dram_bytes:#x}: {size} bytes at {address:#x} are not in it"
            )

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.

        Raises:
            DeviceTimeoutError: the line was not raised in that time, or in `timeout_cycles`.
        """
        self._block(self._wait, timeout_s)
        self.settle()

    def settle(self) -> None:
        """Call `on_batch` if a busy period has ended that it has not heard of."""
        if self.on_batch is not None and self._rung and not self.read_register("STATUS") & StatusBit.BUSY:
            self._rung = False
            self.on_batch()

    def close(self) -> None:
        """See `Transport`.  The simulation goes on: it is `session` that ends it."""

    # The driver's side: what only a simulation can do.

    @property
    def cycles(self) -> int:
        """Cycles of `clk` since the start."""
        return int(self._dut.cycles.value)

    @property
    def served(self) -> list[int]:
        """Codewords that each ideal twin began to send since the settings took effect."""
        return self._counts("served")

    def run_cycles(self, count: int) -> None:
        """Let at least `cycles` cycles pass."""
        self._block(self._cycles, count)

    def set_flash(self, settings: "FlashSettings | NandSettings") -> None:
        """Change the behaviour of what stands behind the channels; ideal twins count their codewords from 1 again."""
        self._block(self._set_flash, settings)

    def load_flash(self, pages: Sequence[NandPages]) -> None:
        """Let the dies hold raw pages, as if they had been programmed: indices and bytes of each channel."""
        self._block(self._load_flash, pages)

    def dump_flash(self) -> list[NandPages]:
        """The raw pages that the dies hold: of each channel, indices (`NandPart.page_index`) and bytes, a row each."""
        return self._block(self._dump_flash)

    def cut_power(self, after: int) -> None:
        """Let the whole drive lose its power for a moment, in the `after`th cycle from now on.

        What runs then gets no further completions and `wait` raises DeviceTimeoutError; the drive is ready
        again afterwards, its DRAM empty, its registers reset.
        """
        cut = NandFaults(power_cuts=((after, POWER_OFF_CYCLES),))
        self.set_flash(NandSettings(faults=dict.fromkeys(range(self.config.channels), cut)))
        self._power_off = self.cycles + after

    def set_stalls(self, stalls: AxiStalls) -> None:
        """Change the stalls of the AXI channels."""
        self._block(self._set_stalls, stalls)


@contextlib.asynccontextmanager
async def session(
    dut: Any,
    config: Config,
    *,
    flash: FlashSettings | NandSettings | None = None,
    stalls: AxiStalls | None = None,
    memory_bytes: int = 1 << 24,
    timeout_cycles: int | None = None,
    memory: mmap.mmap | None = None,
) -> AsyncIterator[RtlTransport]:
    """A drive after reset, ready for `kvattic.driver.device.Device`.

    Args:
        dut: the test bench of `kvattic_sim.rtl.testbench`.
        config: what it was built for.
        flash: how the dies, or the ideal twins, behave; it must fit the test bench.
        stalls: when the AXI channels pause.
        memory_bytes: size of the host memory.
        timeout_cycles: patience of `RtlTransport.wait`, besides the driver's own.
        memory: see `RtlTransport`.
    """
    for leftover in (*Path().glob("nand*.*"), *Path().glob("dram.bin")):
        leftover.unlink()
    transport = RtlTransport(dut, config, memory_bytes=memory_bytes, timeout_cycles=timeout_cycles, memory=memory)
    await transport.start()
    await transport._set_flash(flash or NandSettings())
    await transport._set_stalls(stalls or AxiStalls())
    yield transport
