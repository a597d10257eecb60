"""The golden device's flash commands: PROGRAM, ERASE, PROBE and MAP."""

from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue
from kvattic.golden.registers import Registers
from kvattic.golden.rejected import RejectedError
from kvattic.golden.storage import Storage
from kvattic.spec import layout
from kvattic.spec.commands import FlashCommand, Opcode, Status
from kvattic.spec.config import Config
from kvattic.spec.elements import Bytes
from kvattic.timing.record import Recorder

__all__ = ["Operations"]

_COUNTERS = {Opcode.PROGRAM: "PAGE_PROGRAMS", Opcode.ERASE: "BLOCK_ERASES", Opcode.PROBE: "PAGE_READS"}


class Operations:
    """Runs flash commands.

    Args:
        config: geometry.
        registers: of the device.
        storage: flash and device DRAM.
        owners: of both.
        recorder: notes what is written.
    """

    def __init__(self, config: Config, registers: Registers, storage: Storage, owners: Owners,
                 recorder: Recorder) -> None:
        self._config = config
        self._registers = registers
        self._storage = storage
        self._owners = owners
        self._recorder = recorder

    def run(self, command: FlashCommand, queue: Queue) -> None:
        """Run one command.

        Raises:
            RejectedError: it does not end OK.
            PowerCutError: the supply failed meanwhile.
        """
        opcode, flash = Opcode(command.opcode), self._storage.flash
        self._check(command, queue)
        if opcode is Opcode.MAP:
            flash.remap(command.channel, layout.page_place(command.page, self._config), command.argument)
            return
        image = None
        if opcode is Opcode.PROGRAM:
            image = self._dram_page(command.argument)
            self._registers.count("FLASH_WORDS", self._config.codewords_per_page * self._config.raw_codeword_words)
        self._registers.count("FLASH_WORDS")    # the status, or the mark of PROBE
        self._registers.count(_COUNTERS[opcode])
        if opcode is not Opcode.PROBE:
            self._recorder.operation(command.channel, command.page, program=opcode is Opcode.PROGRAM)
        flash.operate(opcode, command.channel, command.page, image)

    def _check(self, command: FlashCommand, queue: Queue) -> None:
        opcode, domain, flash = Opcode(command.opcode), command.domain, self._storage.flash
        owned = opcode is Opcode.PROGRAM or (opcode is Opcode.ERASE and queue.number != 0)
        if (command.argument and opcode in (Opcode.ERASE, Opcode.PROBE)) or (domain and not owned):
            raise RejectedError(Status.INVALID_FIELD)
        if not flash.is_place(command.channel, command.page):
            raise RejectedError(Status.INVALID_PLACE)
        if opcode is Opcode.MAP and command.argument >= self._config.part.blocks:
            raise RejectedError(Status.INVALID_PLACE)
        if not owned:
            return
        self._owners.check_permitted(domain, queue.number)
        if not self._owners.owns_pages(domain, command.page, 1):
            raise RejectedError(Status.NOT_OWNED, 0)
        if opcode is Opcode.PROGRAM and not self._owners.owns_dram(
                domain, command.argument, 1, self._registers.region_bits):
            raise RejectedError(Status.NOT_OWNED, 1)

    def _dram_page(self, page: int) -> Bytes | None:
        """What PROGRAM writes, uint8, (page_bytes,); None: the page is not wholly inside the device DRAM."""
        image, inside = self._storage.dram_page(page)
        return image.reshape(-1) if inside == len(image) else None
