"""The golden device: registers, host memory and flash in NumPy, bit-exact but without time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic import golden, layout
from kvattic.commands import (
    COMMAND,
    COMPLETION,
    LINE_BYTES,
    ROW,
    TRAILER,
    CompletionFlag,
    Opcode,
    Status,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import ELEMENT_BYTES, Config
from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.registers import REGISTER_MAP, Access, Control, StatusBit
from kvattic.transport import MAX_COMMANDS

__all__ = ["GoldenDevice"]

ERASED = 0xFF
"""What a page reads that was never written: NaN as elements, so that attending it is reported."""


class _RejectedError(Exception):
    """A command that ends with an error; args are (status, where)."""


class GoldenDevice:
    """A `Transport` with the device behind it, in NumPy.

    The doorbell runs the whole batch before it returns.  There are no cycles: the counters, CYCLES
    among them, and the counter fields of the completions stay 0, and CODEWORD_TIMEOUT does not
    occur.

    A command is checked in the order of the numbers of `commands.Status`, but a bus error of its
    line comes first; then come a bus error of the query block, NAN_QUERY, NAN_KEY, NAN_VALUE and a
    bus error of the result.  The first that applies is reported.  `where` is 0 where `Status` does
    not define it.  INVALID_LENGTH also stands for token numbers of more than 24 bits and, where
    tokens_per_page is a power of two, for a base_token that is no multiple of it.  A command that
    does not end OK writes its completion only.

    Args:
        config: geometry.
        memory_bytes: size of the host memory, which begins at address 0.
        pages_per_channel: flash pages of each channel; they take memory when they are written.

    Raises:
        RequestError: a size is not positive.
    """

    def __init__(
        self, config: Config, *, memory_bytes: int = 1 << 24, pages_per_channel: int = 1 << 20
    ) -> None:
        for name, value in (
            ("memory_bytes", memory_bytes),
            ("pages_per_channel", pages_per_channel),
        ):
            if value < 1:
                raise RequestError(f"{name} must be positive, not {value}")
        self.config = config
        self.memory_bytes = memory_bytes
        self.pages_per_channel = pages_per_channel
        self._memory = bytearray(memory_bytes)
        self._pages: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._reset()

    def _reset(self) -> None:
        self._registers = {name: register.reset for name, register in REGISTER_MAP.items()}
        self._registers["CONFIG_HASH"] = self.config.hash
        self._registers["STATUS"] = int(StatusBit.READY)

    # Transport.

    def read_register(self, name: str) -> int:
        """See `Transport`; a write-only register reads 0.

        Raises:
            RequestError: there is no such register.
        """
        return 0 if _register(name).access is Access.WO else self._registers[name]

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`; what is written to a read-only register is lost.

        Raises:
            RequestError: there is no such register, or the value does not fit it.
        """
        register = _register(name)
        if not 0 <= value < 1 << register.width:
            raise RequestError(f"{name} has {register.width} bits: {value:#x} does not fit")
        if name == "CONTROL" and value & Control.RESET:
            self._reset()
        elif name == "DOORBELL":
            self._run(value)
        elif name == "STATUS":
            self._registers[name] &= ~value | StatusBit.BUSY | StatusBit.READY
        elif register.access is Access.RW:
            self._registers[name] = value

    def read_memory(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
        """
        self._check_memory(address, size)
        return bytes(self._memory[address : address + size])

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
        """
        self._check_memory(address, len(data))
        self._memory[address : address + len(data)] = data

    def _check_memory(self, address: int, size: int) -> None:
        if address < 0 or size < 0 or address + size > self.memory_bytes:
            raise RequestError(
                f"host memory is 0 to {self.memory_bytes:#x}: {size} bytes at {address:#x} are "
                f"not in it"
            )

    def write_pages(self, channel: int, first_page: int, images: NDArray[Any]) -> None:
        """See `Transport`.

        Raises:
            RequestError: no such channel or pages, or images of a wrong shape or dtype.
        """
        if not 0 <= channel < self.config.channels:
            raise RequestError(f"channel must be 0 to {self.config.channels - 1}, not {channel}")
        if (
            images.dtype != np.uint8
            or images.ndim != 2
            or images.shape[1] != self.config.page_bytes
        ):
            raise RequestError(
                f"images must be uint8 (pages, {self.config.page_bytes}), not {images.dtype} "
                f"{images.shape}"
            )
        if first_page < 0 or first_page + len(images) > self.pages_per_channel:
            raise RequestError(
                f"pages are 0 to {self.pages_per_channel - 1}: {len(images)} from {first_page} on "
                f"are not"
            )
        for page, image in enumerate(images, first_page):
            self._pages[channel, page] = image.copy()

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.  A batch is over when its doorbell returns, so this never waits.

        Raises:
            DeviceTimeoutError: no batch was run since DONE was cleared.
        """
        if not self._registers["STATUS"] & StatusBit.DONE:
            raise DeviceTimeoutError(
                "no batch is running and STATUS.DONE is not set: ring the doorbell first"
            )

    # The device's side.

    def _run(self, count: int) -> None:
        registers = self._registers
        if not 1 <= count <= MAX_COMMANDS:
            registers["STATUS"] |= StatusBit.DOORBELL_WHILE_BUSY
            return
        registers["STATUS"] &= ~StatusBit.DONE
        registers["COMPLETED"] = 0
        # The device sees whole lines: the low address bits are ignored.
        command, completion = (
            registers[name] // LINE_BYTES * LINE_BYTES
            for name in ("COMMAND_BASE", "COMPLETION_BASE")
        )
        for index in range(count):
            entry = self._serve(command + index * LINE_BYTES)
            self._dma_write(completion + index * LINE_BYTES, entry)
            registers["COMPLETED"] += 1
        registers["STATUS"] |= StatusBit.DONE

    def _serve(self, address: int) -> bytes:
        """Run one command; its completion."""
        identifier, status, where, flags = 0, Status.OK, 0, CompletionFlag(0)
        try:
            line = self._dma_read(address, LINE_BYTES)
            command = COMMAND.unpack(line)
            identifier = command["identifier"]
            self._validate(command, line)
            trace = self._attend(command)
            flags = trace.flags
            _raise_nan((Status.NAN_KEY, trace.nan_key), (Status.NAN_VALUE, trace.nan_value))
            if not self._dma_write(command["result"], self._pack_result(trace)):
                raise _RejectedError(Status.BUS_ERROR, 0)
        except _RejectedError as rejected:
            status, where = rejected.args
        return COMPLETION.pack(
            status=status, identifier=identifier, flags=flags, where=where, done=1
        )

    def _validate(self, command: dict[str, int], line: bytes) -> None:
        config, registers = self.config, self._registers
        if command["opcode"] != Opcode.ATTEND:
            raise _RejectedError(Status.INVALID_OPCODE, command["opcode"])
        if line != COMMAND.pack(
            **{**command, "flags": 0, "reserved0": 0, "reserved1": 0, "reserved2": 0}
        ):
            raise _RejectedError(Status.INVALID_FIELD, 0)
        if command["home"] >= config.channels:
            raise _RejectedError(Status.INVALID_FIELD, 0)
        if not 1 <= command["rows"] <= config.rows:
            raise _RejectedError(Status.INVALID_ROWS, command["rows"])
        tokens = command["end_token"] - command["base_token"]
        stripe = config.tokens_per_page
        # The device checks alignment only where it takes no division.
        unaligned = stripe & (stripe - 1) == 0 and command["base_token"] % stripe != 0
        far = command["end_token"] >= 1 << layout.TOKEN_BITS
        if not 0 < tokens <= config.max_tokens or far or unaligned:
            raise _RejectedError(Status.INVALID_LENGTH, 0)
        for where, name, size in (
            (0, "query", query_row_bytes(config.head_dim)),
            (1, "result", result_row_bytes(config.head_dim)),
        ):
            first = command[name]
            if (
                first % LINE_BYTES
                or first < registers["BUFFER_BASE"]
                or first + command["rows"] * size > registers["BUFFER_LIMIT"]
            ):
                raise _RejectedError(Status.INVALID_ADDRESS, where)
        if not 0x0080_0000 <= command["scale"] < 0x7F80_0000:
            raise _RejectedError(Status.INVALID_SCALE, 0)

    def _attend(self, command: dict[str, int]) -> golden.Trace:
        config, rows = self.config, command["rows"]
        data = self._dma_read(command["query"], rows * query_row_bytes(config.head_dim))
        block = np.frombuffer(data, np.uint8).reshape(rows, -1)
        query = np.ascontiguousarray(
            block[:, ROW.size : ROW.size + config.head_dim * ELEMENT_BYTES]
        ).view("<u2")

        def column(name: str) -> NDArray[np.int64]:
            field = ROW[name]
            return (
                np.ascontiguousarray(block[:, field.offset : field.offset + field.size])
                .view("<u4")[:, 0]
                .astype(np.int64)
            )

        trace = golden.attend(
            query.astype(np.uint16),
            self._tokens(command, "key_page"),
            self._tokens(command, "value_page"),
            element=config.element,
            scale_bits=command["scale"],
            start=column("start_token"),
            end=column("end_token"),
            tree=column("tree"),
            tree_token=command["tree_token"],
            base_token=command["base_token"],
            end_token=command["end_token"],
        )
        _raise_nan((Status.NAN_QUERY, trace.nan_query))
        return trace

    def _tokens(self, command: dict[str, int], page: str) -> NDArray[np.uint16]:
        """K or V from base_token on, in whole stripes."""
        stripes = layout.stripe_count(command["end_token"] - command["base_token"], self.config)
        places = layout.device_place(
            np.arange(stripes), command["home"], command[page], self.config
        )
        images = np.full((stripes, self.config.page_bytes), ERASED, np.uint8)
        for image, channel, number in zip(
            images, places.channel.tolist(), (places.page & 0xFFFF_FFFF).tolist(), strict=True
        ):
            if (written := self._pages.get((channel, number))) is not None:
                image[:] = written
        return layout.unpack_pages(images, self.config)

    def _pack_result(self, trace: golden.Trace) -> bytes:
        rows, dim = trace.output.shape
        block = np.zeros((rows, result_row_bytes(dim)), np.uint8)
        block[:, : dim * 4] = trace.output.astype("<u4").view(np.uint8)
        at = lines(dim * 4) * LINE_BYTES
        for name, values in (("maximum", trace.maximum), ("denominator", trace.denominator)):
            field = TRAILER[name]
            block[:, at + field.offset : at + field.offset + field.size] = values.astype("<i8")[
                :, None
            ].view(np.uint8)
        return block.tobytes()

    def _dma_read(self, address: int, size: int) -> bytes:
        if address + size > self.memory_bytes:
            self._registers["STATUS"] |= StatusBit.BUS_ERROR
            raise _RejectedError(Status.BUS_ERROR, 0)
        return bytes(self._memory[address : address + size])

    def _dma_write(self, address: int, data: bytes) -> bool:
        """Whether the host memory took it."""
        if address + len(data) > self.memory_bytes:
            self._registers["STATUS"] |= StatusBit.BUS_ERROR
            return False
        self._memory[address : address + len(data)] = data
        return True


def _raise_nan(*found: tuple[Status, int | None]) -> None:
    for status, where in found:
        if where is not None:
            raise _RejectedError(status, where)


def _register(name: str) -> Any:
    try:
        return REGISTER_MAP[name]
    except KeyError:
        raise RequestError(
            f"there is no register {name!r}; registers are {', '.join(REGISTER_MAP)}"
        ) from None
