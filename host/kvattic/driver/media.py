"""`Media`: the drive's flash and DRAM, below the sequences.

It runs flash commands, erases and remaps blocks for the allocator, keeps account of dies that no longer answer, and
hands out device DRAM to writers, which wait here for each other's pages.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Series
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.accounts import Passage
from kvattic.driver.admin import Admin
from kvattic.driver.diagnosis import PAGE_MASK, explain
from kvattic.driver.dispatcher import ADMIN, FLASH, Dispatcher, Steps
from kvattic.driver.futures import Future
from kvattic.driver.jobs import FlashOperation, pack_operations
from kvattic.errors import CapacityError, DeviceStatusError, KvatticError
from kvattic.placement.dram import DomainDram
from kvattic.placement.reservations import region_bits
from kvattic.placement.zones import Remap, ZoneAllocator
from kvattic.spec import layout
from kvattic.spec.commands import Completion, Opcode, Status
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.layout import Block, PagePlace
from kvattic.transport.base import Transport

__all__ = ["Flush", "Media", "PageProgram", "ProgramReport"]

CLEAR_PAGES = 64
"""Pages of device DRAM that are cleared at once."""


class Flush:
    """Stripes on their way to flash; their DRAM comes back when it is done.

    Attributes:
        done: completed at its end.
        blocked_on_dram: it waits for DRAM itself, so that nobody may wait for it.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.done: Future[None] = Future(dispatcher)
        self.blocked_on_dram = False


class PageProgram(NamedTuple):
    """A page to be programmed.

    Members:
        channel: flash channel.
        page: page number there.
        source: page of device DRAM that holds its contents.
    """

    channel: int
    page: int
    source: int


@dataclass(slots=True, eq=False)
class ProgramReport:
    """How programming pages ended.

    Attributes:
        submitted: commands that the device got.
        acknowledged: those that it programmed, successfully or not.
        failed: indices of the pages that are not there.
        dead: those of them whose die does not answer.
        die_error: the error for the first such die.
        error: another error, after which nothing should be programmed any more.
        passages: when the commands were under way.
    """

    submitted: int
    acknowledged: int
    failed: set[int]
    dead: set[int]
    die_error: DeviceStatusError | None = None
    error: BaseException | None = None
    passages: list[Passage] = field(default_factory=list)


class Media:
    """The drive's flash and DRAM.

    Args:
        transport: the way to the device.
        dispatcher: of the device.
        admin: of the device.
        bad_blocks, spare_blocks, erase_on_free: see `ZoneAllocator`.

    Attributes:
        transport, dispatcher: the same.
        config: of the drive.
        allocator: zones of flash, and what is known of blocks.
        dram: pages of device DRAM.
        written_bytes: bytes that the host put into device DRAM.

    Raises:
        RequestError: a bad block or the number of spare blocks does not exist in this geometry.
    """

    def __init__(self, transport: Transport, dispatcher: Dispatcher, admin: Admin, *, bad_blocks: Iterable[Block],
                 spare_blocks: int | None, erase_on_free: bool) -> None:
        self.transport = transport
        self.dispatcher = dispatcher
        self.config: Config = transport.config
        self.written_bytes = 0
        self._admin = admin
        self._spare_blocks, self._erase_on_free = spare_blocks, erase_on_free
        self._die_error: DeviceStatusError | None = None
        self._flushes: list[Flush] = []
        pages = min(transport.dram_bytes // self.config.page_bytes, 1 << PAGE_NUMBER_BITS)
        self._region_bits = region_bits(pages, self.config)
        self.dram = self._new_dram(pages)
        self.allocator = self._new_allocator(bad_blocks)

    def _new_allocator(self, bad_blocks: Iterable[Block]) -> ZoneAllocator:
        return ZoneAllocator(self.config, erase=self._erase, remap=self._remap, grant=self._admin.grant_zones,
                             bad_blocks=bad_blocks, spare_blocks=self._spare_blocks,
                             erase_on_free=self._erase_on_free)

    def _new_dram(self, pages: int) -> DomainDram:
        return DomainDram(pages, self._region_bits, grant=self._admin.grant_regions, released=self._clear_dram)

    @contextmanager
    def resumed(self, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]],
                used: Collection[int]) -> Iterator[None]:
        """A block in which what a manifest says of the flash is taken over; see `ZoneAllocator.resume`.

        If the block fails, everything is as it was, and nothing has been erased.
        """
        before = self.allocator
        self.allocator = made = ZoneAllocator(
            self.config, erase=self._erase, remap=self._remap, grant=self._admin.grant_zones,
            spare_blocks=self.config.part.blocks - int(header["zones"]), erase_on_free=before.erase_on_free)
        made.resume(header, arrays, used)
        try:
            self._unmap(before)
            made.send_owners()
            self._remap(made.remaps)
            yield
        except BaseException:
            self._unmap(made)
            self.allocator = before
            before.send_owners()
            self._remap(before.remaps)
            raise

    def _unmap(self, allocator: ZoneAllocator) -> None:
        """Bring the device's map to what it is after power-up."""
        self._remap([remap._replace(block=int(layout.page_place(remap.page, self.config).zone))
                     for remap in allocator.remaps])

    def send_owners(self) -> None:
        """Tell the device, which was reset, who owns its zones and regions."""
        self.transport.write_register("REGION_BITS", self._region_bits)
        self.allocator.send_owners()
        self.dram.send_owners()

    @contextmanager
    def power_lost(self) -> Iterator[None]:
        """A block in which the device starts again after a loss of power: nothing that was in DRAM is there.

        If the block fails the DRAM is as it was.
        """
        dram, self.dram = self.dram, self._new_dram(self.dram.pages)
        try:
            yield
            self._remap(self.allocator.remaps)
        except BaseException:
            self.dram = dram
            raise

    # Device DRAM.

    def write_dram(self, address: int, data: bytes) -> None:
        """Put bytes of K, V or sketches into DRAM, and count them."""
        self.written_bytes += len(data)
        self.transport.write_dram(address, data)

    def _clear_dram(self, first: int, pages: int) -> None:
        """Overwrite pages that get another owner with zeros."""
        size = self.config.page_bytes
        for page in range(first, first + pages, CLEAR_PAGES):
            self.transport.write_dram(page * size, bytes(min(CLEAR_PAGES, first + pages - page) * size))

    def allocate_dram(self, pages: int, domain: int, flush: Flush | None = None) -> Steps[int]:
        """Take pages of DRAM; waits while others are about to give some back.

        Args:
            pages: how many.
            domain: their owner.
            flush: the flush that needs them, if it gives others back itself.

        Raises:
            CapacityError: there are none, and none will come back.
        """
        while True:
            try:
                return self.dram.allocate(pages, domain)
            except CapacityError:
                others = [other for other in self._flushes if other is not flush and not other.blocked_on_dram]
                if self.dispatcher.retiring:
                    yield [self.dispatcher.barrier()]
                elif others:
                    if flush is not None:
                        flush.blocked_on_dram = True
                    yield [others[0].done]
                    if flush is not None:
                        flush.blocked_on_dram = False
                else:
                    raise

    def free_dram_later(self, page: int) -> None:
        """Give pages of DRAM back as soon as no command under way may read them."""
        dram = self.dram
        # After a loss of power it is not this DRAM any more.
        self.dispatcher.retire(lambda: dram.free(page) if dram is self.dram else None)

    @property
    def flushing(self) -> bool:
        """Whether any stripes are on their way to flash."""
        return bool(self._flushes)

    @contextmanager
    def flush(self) -> Generator[Flush, None, None]:
        """A block in which stripes are moved to flash; others may wait for its end."""
        flush = Flush(self.dispatcher)
        self._flushes.append(flush)
        try:
            yield flush
        finally:
            self._flushes.remove(flush)
            flush.done.set_result(None)

    # Flash commands.

    def submit(self, operations: Series[FlashOperation]) -> list[Future[Completion]]:
        """Begin flash commands; a future for each, whatever its completion says.

        Raises:
            RequestError: a number does not fit its field of the command.
            DeviceTimeoutError, DeviceStatusError, DeviceLostError: the device must be reset.
        """
        commands = [self.dispatcher.command(_queue_of(operation), line, lambda completion, _: completion)
                    for operation, line in zip(operations, pack_operations(operations), strict=True)]
        self.dispatcher.submit(commands)
        return [command.future for command in commands]

    def operate(self, operations: Series[FlashOperation], *, check: bool = True,
                timeout_s: float | None = None) -> list[Completion]:
        """Run flash commands; see `Device.operate`."""
        waiting = self.submit(operations)
        self.dispatcher.drive_futures(waiting, timeout_s)
        completions = [future.result() for future in waiting]
        if check:
            for operation, completion in zip(operations, completions, strict=True):
                if completion.status is not Status.OK:
                    raise self._failure(operation.opcode.name, completion)
        return completions

    def _operate_alone(self, operations: Series[FlashOperation]) -> list[Completion]:
        """For the allocator, which calls midway: all tasks are paused meanwhile."""
        waiting = self.submit(operations)
        return [self.dispatcher.finish(future) for future in waiting]

    def _round_robin(self, channels: Series[int], pages: Series[int]) -> list[int]:
        """An order in which all channels work at once, and on each two dies take turns with their planes.

        The pages of each block stay in order.  A die is busy for a moment between two planes of one command; the other
        die's turn hides it.
        """
        channel, page = np.array(channels), np.array(pages)
        place = layout.page_place(page, self.config)
        by_channel = np.lexsort((place.die, place.plane, place.die // 2, place.page, place.zone, channel))
        rank = np.arange(len(channel)) - np.searchsorted(channel[by_channel], channel[by_channel])
        order: list[int] = by_channel[np.lexsort((channel[by_channel], rank))].tolist()
        return order

    # Programming.

    def program(self, pages: Series[PageProgram], domain: int) -> Steps[ProgramReport]:
        """Program pages, and tell the allocator of those that failed.

        Args:
            pages: to be programmed, in the order of their page numbers on each channel.
            domain: owner of their places.
        """
        order = self._round_robin([page.channel for page in pages], [page.page for page in pages])
        try:
            waiting = self.submit([FlashOperation(Opcode.PROGRAM, *pages[i], domain) for i in order])
        except KvatticError as refused:
            for i in order:
                self.allocator.abandon(pages[i].channel, pages[i].page)
            return ProgramReport(0, 0, set(order), set(), error=refused)
        yield waiting
        report = ProgramReport(len(waiting), 0, set(), set(), passages=[
            future.passage for future in waiting if future.passage is not None])
        for i, future in zip(order, waiting, strict=True):
            self._note_program(report, i, pages[i], future)
        return report

    def _note_program(self, report: ProgramReport, index: int, page: PageProgram, future: Future[Completion]) -> None:
        """Add the end of one PROGRAM to a report."""
        completion = future.value
        status = None if completion is None else completion.status
        report.acknowledged += status in (Status.OK, Status.PROGRAM_FAILED)
        if status is Status.OK:
            return
        report.failed.add(index)
        if completion is None:
            self.allocator.abandon(page.channel, page.page)
            report.error = report.error or future.exception()
        elif status is Status.PROGRAM_FAILED:
            self.allocator.failed(page.channel, page.page)
        elif status is Status.DIE_TIMEOUT:
            report.dead.add(index)
            error = self._lose_die("PROGRAM", completion)
            report.die_error = report.die_error or error
        else:
            self.allocator.abandon(page.channel, page.page)
            report.error = report.error or self._failure("PROGRAM", completion)

    # Erasing and remapping, for the allocator.

    def _erase(self, places: Series[tuple[int, int]]) -> list[bool]:
        """Erase the blocks that (channel, page) lie in; whether each was."""
        if not places:
            return []
        order = self._round_robin([c for c, _ in places], [p for _, p in places])
        completions = self._operate_alone([FlashOperation(Opcode.ERASE, *places[i], domain=0) for i in order])
        good = [False] * len(places)
        for i, completion in zip(order, completions, strict=True):
            if completion.status is Status.DIE_TIMEOUT:
                self._die_error = self._die_error or self._lose_die("ERASE", completion)
            elif completion.status not in (Status.OK, Status.ERASE_FAILED):
                raise self._failure("ERASE", completion)
            good[i] = completion.status is Status.OK
        return good

    def _remap(self, remaps: Series[Remap]) -> None:
        """Change the device's map."""
        for completion in self._operate_alone([FlashOperation(Opcode.MAP, *remap) for remap in remaps]):
            if completion.status is not Status.OK:
                raise self._failure("MAP", completion)

    def format(self) -> None:
        """Erase all of the flash.

        Raises:
            RequestError: a zone has users.
            DeviceStatusError: a die does not answer.
        """
        self.dispatcher.check()
        self.allocator.distrust()
        self.allocator.clean()
        self.raise_die_error()

    # Bad blocks.

    def scan_marks(self) -> list[Block]:
        """Look for the factory's marks, and use no block that has one; the blocks with a mark.

        Nothing may have been written yet: a mark is gone then.

        Raises:
            DeviceStatusError: a die does not answer.
        """
        found = self._find_marks()
        self.allocator = self._new_allocator({*self.allocator.bad_blocks, *found})
        self.allocator.send_owners()
        self.allocator.send_remaps()
        return sorted(found)

    def find_marks(self) -> set[Block]:
        """Look for the factory's marks, and change nothing; errors are those of `scan_marks`."""
        try:
            return self._find_marks()
        finally:
            self._remap(self.allocator.remaps)

    def _find_marks(self) -> set[Block]:
        """The blocks with a mark; afterwards the device's map is as after power-up."""
        config = self.config
        # Marks are found through the device's map, which must be as after power-up.
        self.operate([FlashOperation(Opcode.MAP, remap.channel, remap.page, layout.page_place(remap.page, config).zone)
                      for remap in self.allocator.remaps])
        blocks = [Block(channel, die, plane, block) for block in range(config.part.blocks) for die in range(config.dies)
                  for plane in range(config.part.planes) for channel in range(config.channels)]
        probes = [(block, PagePlace(block.block, page, block.die, block.plane))
                  for page in config.part.marked_pages for block in blocks]
        completions = self.operate([
            FlashOperation(Opcode.PROBE, block.channel, int(layout.page_number(place, config)))
            for block, place in probes], check=False)
        for completion in completions:
            if completion.status not in (Status.OK, Status.BAD_BLOCK):
                raise self._failure("PROBE", completion)
        return {block for (block, _), completion in zip(probes, completions, strict=True)
                if completion.status is Status.BAD_BLOCK}

    # Failures.

    def _lose_die(self, what: str, completion: Completion) -> DeviceStatusError:
        """Place nothing more on a die that did not answer; the error to raise once everything else is noted."""
        channel, page = completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK
        error = self._failure(what, completion)
        self.allocator.lose_die(channel, int(layout.page_place(page, self.config).die))
        return error

    def raise_die_error(self) -> None:
        """Report a die that did not answer while it was erased.

        Raises:
            DeviceStatusError: there was one since the last call.
        """
        error, self._die_error = self._die_error, None
        if error is not None:
            raise error

    def _failure(self, what: str, completion: Completion) -> DeviceStatusError:
        return DeviceStatusError(f"{what} failed: {explain(completion)}{self._where(completion)}", completion)

    def _where(self, completion: Completion) -> str:
        """The place that a flash command's completion names."""
        if completion.status not in (Status.PROGRAM_FAILED, Status.ERASE_FAILED, Status.BAD_BLOCK, Status.DIE_TIMEOUT):
            return ""
        return ": " + self.describe(completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK)

    def describe(self, channel: int, page: int) -> str:
        """A page of flash, in words."""
        place = layout.page_place(page, self.config)
        block = self.allocator.block(channel, page)
        name = f"channel {channel}, die {place.die}, plane {place.plane}, no block" if block is None else str(block)
        return f"{name} (zone {place.zone}), page {place.page}"


def _queue_of(operation: FlashOperation) -> int:
    """PROGRAM and ERASE have a queue of their own; what only queue 0 may do goes there, and ERASE without an owner."""
    admin = operation.opcode in (Opcode.PROBE, Opcode.MAP) or (
        operation.opcode is Opcode.ERASE and operation.domain == 0)
    return ADMIN if admin else FLASH
