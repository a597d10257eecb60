"""`Device`: a drive over any `Transport`.

`Sequence` writes K and V and plans attention (sequence.py).  The layer below are commands: `Device.run` takes `Job`s
and `Device.operate` takes `FlashOperation`s (jobs.py); `Device.submit` and `submit_operations` do not wait for them.
What is under way, and where it lies in host memory, the `Dispatcher` knows (dispatcher.py).
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Series
from contextlib import suppress
from itertools import count
from threading import RLock
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from kvattic.driver import futures
from kvattic.driver.admin import Admin
from kvattic.driver.dispatcher import ADMIN, ATTEND, FLASH, Command, Dispatcher, Steps
from kvattic.driver.futures import Future
from kvattic.driver.jobs import (
    MAX_SINKS,
    AttendPlan,
    AttendResult,
    FlashOperation,
    Job,
    JobResult,
    check_blocks,
    check_integer,
    check_positive,
    end_block,
    explain,
    fill_command,
    job_bytes,
    pack_command,
    pack_operations,
    unpack_result,
)
from kvattic.driver.sequence import Loss, Sequence
from kvattic.driver.writer import Flush
from kvattic.errors import (
    CapacityError,
    ConfigMismatchError,
    DeviceStatusError,
    DeviceTimeoutError,
    ForkedError,
    KvatticError,
    RequestError,
)
from kvattic.placement.allocator import COMMON_DOMAIN, Allocation, DomainDram, Remap, Wear, ZoneAllocator
from kvattic.placement.reservations import region_bits, reservations
from kvattic.spec import layout
from kvattic.spec.commands import DOMAINS, Completion, MediaCause, Mode, Opcode, Status, result_row_bytes
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.layout import Block, PagePlace
from kvattic.spec.registers import ID_MAGIC, VERSION, StatusBit
from kvattic.transport.base import Progress, Transport

__all__ = ["AttendPlan", "AttendResult", "Device", "FlashOperation", "Job", "JobResult", "Loss", "Sequence"]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_ENTRIES = 1024
"""Of the rings: programs keep all dies busy and as many pages waiting, 64 on each of eight channels."""
CLEAR_PAGES = 64
"""Of device DRAM, at once."""
PAGE_MASK = (1 << PAGE_NUMBER_BITS) - 1


class Device:
    """A device over any transport: hands out its flash and DRAM to sequences and runs their attention.

    Usable as a context manager.  Its methods, and those of its sequences and futures, may be called from any thread;
    they hold one lock, but for moments between two waits for the device.

    The library takes the flash for erased, as it comes from the factory; a drive that was used before must be
    `format`ted.  The tables that say where K and V lie are in this object alone.

    After a DeviceTimeoutError or a completion that makes no sense, nobody knows what the device does: all that is under
    way fails, and so does every call until `reset` (or `recover`).

    Args:
        transport: the way to the device.
        timeout_s: patience with the device: how long it may send no completion, in seconds of wall-clock time.
        bad_blocks: blocks that must not be used, such as an earlier `scan_bad_blocks` found.
        spare_blocks: see `ZoneAllocator`.
        erase_on_free: erase flash as soon as no sequence uses it; otherwise before it is used again.
        entries: of the rings of the queues, a power of two, less if the host memory is small: at most entries - 1
            commands are under way in each.
        owns_transport: `close` closes the transport, too.

    Raises:
        ConfigMismatchError: no kvattic device, another major version, or built from another
            configuration.
        DeviceTimeoutError: the device does not become ready, or does not answer.
        RequestError: a bad block is none of the device's, or entries is no legal number.
        CapacityError: the host memory is too small for the rings.
    """

    def __init__(self, transport: Transport, *, timeout_s: float = DEFAULT_TIMEOUT_S, bad_blocks: Iterable[Block] = (),
                 spare_blocks: int | None = None, erase_on_free: bool = True, entries: int = DEFAULT_ENTRIES,
                 owns_transport: bool = False) -> None:
        self.transport = transport
        self.config: Config = transport.config
        self._owns_transport = owns_transport
        self._closed = False
        self._sequences: list[Sequence] = []
        self._next_head = 0
        if (magic := transport.read_register("ID")) != ID_MAGIC:
            raise ConfigMismatchError(
                f"this is no kvattic device: ID is {magic:#010x}, not {ID_MAGIC:#010x}"
            )
        if (version := transport.read_register("VERSION")) >> 16 != VERSION >> 16:
            raise ConfigMismatchError(
                f"the device has version {_version(version)}, this library needs {VERSION >> 16}.x"
            )
        if (found := transport.read_register("CONFIG_HASH")) != self.config.hash:
            raise ConfigMismatchError(
                f"the device was built from another configuration: CONFIG_HASH is {found:#010x}, "
                f"this library's is {self.config.hash:#010x} for {self.config.to_json()}"
            )
        self._numbers = count()
        self._spare_blocks, self._erase_on_free = spare_blocks, erase_on_free
        self._die_error: DeviceStatusError | None = None
        self._flushes: list[Flush] = []
        self._dispatcher = Dispatcher(transport, timeout_s=timeout_s, entries=entries)
        self._admin = Admin(self._dispatcher)
        pages = min(transport.dram_bytes // self.config.page_bytes, 1 << PAGE_NUMBER_BITS)
        self._region_bits = region_bits(pages, self.config)
        self._dram = self._new_dram(pages)
        self._allocator = self._new_allocator(bad_blocks)
        self._restart()
        if (identity := self.identify()) != self.config:
            raise ConfigMismatchError(
                f"the device was built from another configuration: it is {identity.to_json()}, this library's is "
                f"{self.config.to_json()}")
        self._allocator.send_remaps()

    def _new_allocator(self, bad_blocks: Iterable[Block]) -> ZoneAllocator:
        return ZoneAllocator(self.config, erase=self._erase, remap=self._remap, grant=self._admin.grant_zones,
                             bad_blocks=bad_blocks, spare_blocks=self._spare_blocks,
                             erase_on_free=self._erase_on_free)

    def _new_dram(self, pages: int) -> DomainDram:
        return DomainDram(pages, self._region_bits, grant=self._admin.grant_regions, released=self._clear_dram)

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_block(self.close, error)

    @property
    def timeout_s(self) -> float:
        """Patience with the device."""
        return self._dispatcher.timeout_s

    @property
    def lock(self) -> RLock:
        """Held by whoever uses the device."""
        return self._dispatcher.lock

    def close(self) -> None:
        """Free all sequences and refuse all further calls.  Closing twice is no error.

        Waits for what is under way.

        Raises:
            DeviceStatusError: a die does not answer; the device is closed nevertheless.
        """
        with self.lock:
            if self._closed:
                return
            errors: list[KvatticError] = []
            try:
                for sequence in list(self._sequences):
                    try:
                        sequence.free()
                    except KvatticError as error:
                        errors.append(error)
                with suppress(KvatticError):
                    self._dispatcher.drive(lambda: not self._dispatcher.working)
            finally:
                self._closed = True
                self._dispatcher.abandon(RequestError("the device was closed before this was done"))
                if self._owns_transport:
                    self.transport.close()
            # What a forked child cannot free is its parent's.
            if errors and not isinstance(errors[0], ForkedError):
                raise errors[0]

    def reset(self) -> None:
        """Abort whatever the device does and wait until it is ready again.  Flash and DRAM keep what they hold.

        Futures of what was under way fail.

        Raises:
            DeviceTimeoutError: the device does not become ready.
        """
        with self.lock:
            self._check_open()
            self._restart()

    def _restart(self) -> None:
        """Reset, queues, owners."""
        self._dispatcher.reset(lambda: self._wait_ready(self.timeout_s))
        self.transport.write_register("REGION_BITS", self._region_bits)
        self._allocator.send_owners()
        self._dram.send_owners()
        for domain in sorted({COMMON_DOMAIN, *(sequence.domain for sequence in self._sequences)}):
            self._admin.permit(domain, True)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.transport.read_register("STATUS") & StatusBit.READY:
            if time.monotonic() > deadline:
                raise DeviceTimeoutError(
                    f"the device was not ready within {timeout_s:g} s (STATUS.READY is low)"
                )

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the device was closed; open it again")

    # Waiting.

    def poll(self) -> int:
        """Take the completions that are there, and go on with what waits for them; waits for nothing itself.

        Returns:
            How many there were.

        Raises:
            DeviceStatusError, DeviceLostError: the device does not work.
        """
        with self.lock:
            self._check_open()
            return self._dispatcher.poll()

    def wait(self, waiting: Iterable[Future[Any]], timeout_s: float | None = None) -> None:
        """Wait until futures of this device are done, be it with errors.

        Args:
            waiting: for what to wait.
            timeout_s: patience with all of it, in seconds of wall-clock time; the device's if None.

        Raises:
            RequestError: something is no future of this device.
            DeviceTimeoutError: one was not done in time.
        """
        waiting = list(waiting)
        for future in waiting:
            if not isinstance(future, Future) or future._driver is not self._dispatcher:
                raise RequestError(f"this is no future of this device: {future!r}")
        futures.wait(waiting, timeout_s)

    @property
    def in_flight(self) -> int:
        """Commands that the device has and did not complete, as far as the host knows."""
        return self._dispatcher.in_flight

    # What the device says of itself.

    def identify(self) -> Config:
        """The configuration that the device was built from.

        Raises:
            ConfigMismatchError: it makes no sense to this library.
            DeviceStatusError: the device reports an error.
        """
        self._check_open()
        return self._admin.identify()

    def counters(self) -> dict[str, int]:
        """The counters (`registers.COUNTERS`) by their names, read by a command among the others.

        They count from power-up or the last `reset` on, and reading does not change them: what something took is the
        difference of before and after.  `Sequence.counters` has what was done for one sequence.

        Raises:
            DeviceStatusError: the device reports an error.
        """
        self._check_open()
        return self._admin.counters()

    # Device DRAM and its owners.

    def _clear_dram(self, first: int, pages: int) -> None:
        """For the allocator of DRAM: these pages get another owner."""
        size = self.config.page_bytes
        for page in range(first, first + pages, CLEAR_PAGES):
            self.transport.write_dram(page * size, bytes(min(CLEAR_PAGES, first + pages - page) * size))

    def _free_dram(self, page: int) -> None:
        """Give pages of DRAM back as soon as no command under way may read them."""
        dram = self._dram
        # After a loss of power nothing of before is there to be given back.
        self._dispatcher.retire(lambda: dram.free(page) if dram is self._dram else None)

    def _new_domain(self) -> int:
        used = {sequence.domain for sequence in self._sequences}
        for domain in range(COMMON_DOMAIN + 1, DOMAINS):
            if domain not in used:
                return domain
        raise CapacityError(f"all {DOMAINS - COMMON_DOMAIN - 1} domains of isolated sequences are in use; free one")

    # Flash.

    @property
    def free_zones(self) -> int:
        """Zones of flash that no sequence uses."""
        return self._allocator.free_zones

    @property
    def free_dram_pages(self) -> int:
        """Pages of device DRAM that are free."""
        return self._dram.free_pages

    @property
    def bad_blocks(self) -> list[Block]:
        """Blocks that are not used: the factory's that are known, and those that failed."""
        return self._allocator.bad_blocks

    @property
    def wear(self) -> Wear:
        """How often the blocks were erased."""
        return self._allocator.wear

    @property
    def write_amplification(self) -> float:
        """Pages programmed for each page of K, V and sketches that was written; NaN if there was none."""
        return self._allocator.write_amplification

    def scan_bad_blocks(self) -> list[Block]:
        """Look for the factory's marks in all blocks, where their part has them, and use none that has one.

        A mark is gone once its block was written; so scan a new drive, and keep the list.

        Returns:
            The blocks with a mark.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self._check_unwritten()
            found = self._find_marks()
            self._allocator = self._new_allocator({*self.bad_blocks, *found})
            self._allocator.send_owners()
            self._allocator.send_remaps()
            return sorted(found)

    def find_marks(self) -> set[Block]:
        """Look for the factory's marks as `scan_bad_blocks` does, and change nothing.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self._check_unwritten()
            try:
                return self._find_marks()
            finally:
                self._remap(self._allocator.remaps)

    def _check_unwritten(self) -> None:
        self._check_open()
        if self._sequences or self._allocator.pages_programmed:
            raise RequestError("the factory's marks of bad blocks can be read only before anything is written")

    def _find_marks(self) -> set[Block]:
        """The blocks with a mark; the device's map is then what it is after power-up."""
        config = self.config
        # Marks are found through the device's map, which must be what it is after power-up.
        self.operate([FlashOperation(Opcode.MAP, remap.channel, remap.page, layout.page_place(remap.page, config).zone)
                      for remap in self._allocator.remaps])
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

    def format(self) -> None:
        """Erase all of the flash, because nobody knows what it holds.

        Raises:
            RequestError: a sequence is not freed.
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self._check_open()
            self._dispatcher.check()
            self._allocator.distrust()
            self._allocator.clean()
            self._raise_die_error()

    def recover(self) -> list[Loss]:
        """Go on after the drive has lost its power: what was in flash is there, what was in its DRAM is not.

        Tokens that were not `Sequence.flushed` are removed from their sequences.

        Returns:
            What was lost, for each layer that lost something.

        Raises:
            DeviceTimeoutError: the device does not become ready.
            DeviceStatusError: the device reports an error.
        """
        with self.lock:
            self._check_open()
            dram, self._dram = self._dram, self._new_dram(self._dram.pages)
            try:
                self._restart()
                self._remap(self._allocator.remaps)
            except BaseException:
                self._dram = dram
                raise
            return [loss for sequence in self._sequences for loss in sequence._lose_tails()]

    def operate(self, operations: Series[FlashOperation], *, check: bool = True,
                timeout_s: float | None = None) -> list[Completion]:
        """Run flash commands, as many at a time as the queue takes.

        This is the layer below the sequences: what it does to their flash they do not know of.

        Args:
            operations: the commands; those of one channel begin in their order, if they are of one queue (PROGRAM and
                ERASE; or PROBE, MAP and ERASE of domain 0).
            check: raise on the first status other than OK; otherwise the caller looks at the completions.
            timeout_s: how long the device may send no completion; its own patience if None.

        Returns:
            The completions, in the order of the operations.

        Raises:
            RequestError: a number does not fit its field of the command.
            DeviceStatusError: an operation ended with a status other than OK.
            DeviceTimeoutError: the device did not answer.
        """
        waiting = self.submit_operations(operations)
        self._drive(waiting, timeout_s)
        completions = [future.result() for future in waiting]
        if check:
            for operation, completion in zip(operations, completions, strict=True):
                if completion.status is not Status.OK:
                    raise self._failure(operation.opcode.name, completion)
        return completions

    def submit_operations(self, operations: Series[FlashOperation]) -> list[Future[Completion]]:
        """Begin flash commands; arguments and errors are those of `operate`.

        Returns:
            A future for each, whatever its completion says.
        """
        with self.lock:
            self._check_open()
            commands = [self._dispatcher.command(_queue_of(operation), line, lambda completion, _: completion)
                        for operation, line in zip(operations, pack_operations(operations), strict=True)]
            self._dispatcher.submit(commands)
            return [command.future for command in commands]

    def _drive(self, waiting: Series[Future[Any]], patience_s: float | None = None,
               progress: Progress | None = None) -> None:
        """Wait for futures; `progress` hears how many of the first ones are done."""
        ready = futures.all_done(waiting, progress)
        try:
            self._dispatcher.drive(ready, patience_s=patience_s)
        except KvatticError:
            # If it was the device, they all know.
            if not ready():
                raise

    def _operate_alone(self, operations: Series[FlashOperation]) -> list[Completion]:
        """For the allocator, which is in the middle of something: no task goes on meanwhile."""
        waiting = self.submit_operations(operations)
        return [self._dispatcher.finish(future) for future in waiting]

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

    def _erase(self, places: Series[tuple[int, int]]) -> list[bool]:
        """For the allocator: erase blocks; which could be."""
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
        """For the allocator: change the device's map."""
        for completion in self._operate_alone([FlashOperation(Opcode.MAP, *remap) for remap in remaps]):
            if completion.status is not Status.OK:
                raise self._failure("MAP", completion)

    def _lose_die(self, what: str, completion: Completion) -> DeviceStatusError:
        """A die did not answer: nothing more is placed there; the error to report, when all is noted that had to be."""
        channel, page = completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK
        error = self._failure(what, completion)
        self._allocator.lose_die(channel, int(layout.page_place(page, self.config).die))
        return error

    def _raise_die_error(self) -> None:
        """Report a die that did not answer while it was erased."""
        error, self._die_error = self._die_error, None
        if error is not None:
            raise error

    def _failure(self, what: str, completion: Completion) -> DeviceStatusError:
        return DeviceStatusError(f"{what} failed: {explain(completion)}{self._where(completion)}", completion)

    def _where(self, completion: Completion) -> str:
        """The place that a flash command's completion names."""
        if completion.status not in (Status.PROGRAM_FAILED, Status.ERASE_FAILED, Status.BAD_BLOCK, Status.DIE_TIMEOUT):
            return ""
        return ": " + self._describe(completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK)

    def _describe(self, channel: int, page: int) -> str:
        """A page of flash, in words."""
        place = layout.page_place(page, self.config)
        block = self._allocator.block(channel, page)
        name = f"channel {channel}, die {place.die}, plane {place.plane}, no block" if block is None else str(block)
        return f"{name} (zone {place.zone}), page {place.page}"

    # Sequences.

    def create_sequence(self, kv_heads: int, *, capacity_tokens: int, layers: int = 1, sparse: bool = False,
                        centroids: int | None = None, sinks: int = 0, window: int | None = None,
                        isolated: bool = False) -> "Sequence":
        """Reserve zones of flash for a sequence's K and V.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.
            sparse: write K in the feature layout, too, which the modes sparf and fetched read.
            centroids: write mean keys of units of so many tokens, too, which the mode centroid reads: a power of two,
                from a codeword's tokens to a page's (`layout.unit_bits`).
            sinks: the first tokens, on which language models lean whatever they say (attention sinks): sparse modes
                attend them always, and mean keys leave them out.
            window: the longest sliding window that sparf and fetched will be asked for: the host keeps V of so many of
                the newest tokens, to know the mean of V over a window.  A longer one is right, too, but slow: what is
                missing is read back from the device token by token.
            isolated: the sequence has a domain of its own: the device refuses commands of all others that name its
                flash or DRAM.  Zones of flash are then not shared with other sequences.

        Raises:
            RequestError: a number is not positive, or centroids out of range.
            ConfigError: sparse or centroids, and the configuration is without sparse attention.
            CapacityError: flash or DRAM have no room, the device cannot number that many tokens, or no domain is left.
        """
        with self.lock:
            self._check_open()
            return self._create_sequence(kv_heads, capacity_tokens, layers, sparse, centroids, sinks, window, isolated)

    def _create_sequence(self, kv_heads: int, capacity_tokens: int, layers: int, sparse: bool, centroids: int | None,
                         sinks: int, window: int | None, isolated: bool) -> "Sequence":
        for name, value in (("kv_heads", kv_heads), ("capacity_tokens", capacity_tokens), ("layers", layers)):
            check_positive(name, value)
        for name, flag in (("sparse", sparse), ("isolated", isolated)):
            if not isinstance(flag, bool):
                raise RequestError(f"{name} must be a bool, not {flag!r}")
        check_integer("sinks", sinks, 0, MAX_SINKS)
        if window is not None:
            check_positive("window", window)
        limit = (1 << layout.TOKEN_BITS) - 1
        if capacity_tokens > limit:
            raise CapacityError(
                f"capacity_tokens must be at most {limit:,}, not {capacity_tokens:,}: the device "
                f"numbers tokens with {layout.TOKEN_BITS} bits"
            )
        config = self.config
        pages = layout.stripe_pages(config, sparse=sparse or centroids is not None)
        if centroids is not None:
            try:
                layout.unit_bits(centroids, config)
            except RequestError as error:
                raise RequestError(f"centroids: {error}") from None
        if 2 * pages * kv_heads > self._dram.pages:
            raise CapacityError(f"a stripe of {kv_heads} KV heads takes {2 * pages * kv_heads} pages of device DRAM, "
                                f"which has {self._dram.pages}")
        # Heads are numbered over all sequences, so that one-head sequences, too, start on
        # different channels.
        first_head = self._next_head
        domain = self._new_domain() if isolated else COMMON_DOMAIN
        stripes = capacity_tokens // (pages * config.tokens_per_page)
        allocations: list[Allocation] = []
        try:
            for run, runs in reservations(config, range(first_head, first_head + layers * kv_heads), kv_heads, stripes,
                                           pages, 2 + sparse, centroids):
                allocations.append(self._allocator.create(runs, run, domain=domain))
        except CapacityError as error:
            if allocations:
                self._allocator.release(*allocations)
            raise CapacityError(
                f"a sequence of {layers} layers, {kv_heads} KV heads and {capacity_tokens:,} "
                f"tokens has no room: {error}"
            ) from None
        if isolated:
            try:
                self._admin.permit(domain, True)
            except KvatticError:
                self._allocator.release(*allocations)
                raise
        self._next_head += layers * kv_heads
        sequence = Sequence(self, next(self._numbers), kv_heads, layers, capacity_tokens, first_head, sparse, centroids,
                            int(sinks), window, domain, allocations)
        self._sequences.append(sequence)
        return sequence

    def _release(self, sequence: "Sequence") -> None:
        self._sequences.remove(sequence)
        self._allocator.release(*sequence._allocations)
        if sequence.domain != COMMON_DOMAIN:
            self._admin.permit(sequence.domain, False)
        self._raise_die_error()

    # Attention.

    def attend_many(
        self,
        plans: Series[AttendPlan],
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[AttendResult]:
        """Run several plans, of any sequences of this device, as one stream of jobs.

        Args:
            plans: from `Sequence.plan`.
            timeout_s: how long the device may send no completion; its own patience if None.
            progress: called now and then with (jobs done, jobs in all).

        Raises:
            RequestError: a plan's sequence was freed or belongs to another device.
            DeviceStatusError: a job ended with a status other than OK.
            DeviceTimeoutError, CapacityError: see `run`.
        """
        with self.lock:
            self._check_plans(plans)
            jobs = [job for plan in plans for job in plan.jobs]
            waiting = self.submit(jobs, check=False)
        results = self._results(jobs, waiting, timeout_s=timeout_s, progress=progress)
        finished, first = [], 0
        for plan in plans:
            finished.append(plan.finish(results[first : first + len(plan.jobs)]))
            first += len(plan.jobs)
        return finished

    def attend_async(self, plan: AttendPlan) -> Future[AttendResult]:
        """Begin a plan of a sequence of this device; errors as of `attend_many`, those of jobs are the future's."""
        with self.lock:
            self._check_plans([plan])
            return self._dispatcher.start(self._attend(plan, self.submit(plan.jobs, check=False)))

    def _attend(self, plan: AttendPlan, waiting: list[Future[JobResult]]) -> Steps[AttendResult]:
        yield waiting
        results = [future.result() for future in waiting]
        for index, result in enumerate(results):
            if result.completion.status is not Status.OK:
                raise self._job_failure(index, len(results), plan.jobs[index], result.completion)
        return plan.finish(results)

    def _check_plans(self, plans: Series[AttendPlan]) -> None:
        for plan in plans:
            plan.sequence._check_open()
            if plan.sequence.device is not self:
                raise RequestError("a plan belongs to a sequence of another device")

    def run(
        self,
        jobs: Series[Job],
        *,
        check: bool = True,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[JobResult]:
        """Run jobs, as many at a time as the queue and the host memory take.

        Args:
            jobs: the commands, in order.
            check: raise on the first status other than OK; otherwise the caller looks at the
                completions.
            timeout_s: how long the device may send no completion; its own patience if None.
            progress: called now and then with (jobs done, jobs in all).

        Returns:
            The results, in the order of the jobs.

        Raises:
            CapacityError: one job alone does not fit the host memory.
            RequestError: a number of a job does not fit the command.
            DeviceStatusError: a job ended with a status other than OK, or the device sends completions that make no
                sense.
            DeviceTimeoutError: the device did not answer.
        """
        return self._results(jobs, self.submit(jobs, check=False), check=check, timeout_s=timeout_s, progress=progress)

    def _results(self, jobs: Series[Job], waiting: Series[Future[JobResult]], *, check: bool = True,
                 timeout_s: float | None = None, progress: Progress | None = None) -> list[JobResult]:
        """Wait for submitted jobs; see `run`."""
        self._drive(waiting, timeout_s, progress)
        results = [future.result() for future in waiting]
        if check:
            for index, result in enumerate(results):
                if result.completion.status is not Status.OK:
                    raise self._job_failure(index, len(jobs), jobs[index], result.completion)
        return results

    def submit(self, jobs: Series[Job], *, check: bool = True) -> list[Future[JobResult]]:
        """Begin jobs; what finds no room yet waits on the host.

        Args:
            jobs: the commands, in order.
            check: a status other than OK is the future's error, DeviceStatusError; otherwise the caller looks at the
                completion.

        Returns:
            A future for each.

        Raises:
            CapacityError, RequestError: see `run`; then none was submitted.
            DeviceTimeoutError, DeviceStatusError, DeviceLostError: the device must be reset.
        """
        with self.lock:
            self._check_open()
            commands = [self._job_command(index, jobs, check) for index in range(len(jobs))]
            self._dispatcher.submit(commands)
            return [command.future for command in commands]

    def _job_command(self, index: int, jobs: Series[Job], check: bool) -> Command[JobResult]:
        job, total, dim = jobs[index], len(jobs), self.config.head_dim
        size, most = job_bytes(job, dim), self._dispatcher.arena_bytes
        if size > most:
            raise CapacityError(f"job {index} of {total} needs {size:,} bytes of host memory, there are {most:,}")
        try:
            line = pack_command(job)
        except OverflowError:
            raise RequestError(f"a number of job {index} does not fit its field of the command: {job}") from None
        check_blocks(job)
        result = job.rows * result_row_bytes(dim)

        def finish(completion: Completion, data: bytes) -> JobResult:
            if check and completion.status is not Status.OK:
                raise self._job_failure(index, total, job, completion)
            return unpack_result(data or bytes(result), job.rows, dim, completion)

        return self._dispatcher.command(ATTEND, line, finish, size,
                                        lambda line, address: fill_command(job, dim, line, address),
                                        (size - result, result))

    def _job_failure(self, index: int, total: int, job: Job, completion: Completion) -> DeviceStatusError:
        name = f"job {index} of {total}" + (f" ({job.label})" if job.label else "")
        return DeviceStatusError(f"{name} failed: {explain(completion)}{self._unreadable(job, completion)}", completion)

    def _unreadable(self, job: Job, completion: Completion) -> str:
        """Where the codeword lies that could not be read, and why."""
        status, config = completion.status, self.config
        if status not in (Status.UNREADABLE_KEY, Status.UNREADABLE_VALUE, Status.UNREADABLE_SKETCH):
            return ""
        stripe, token = divmod(completion.where - job.base_token, job.stripe_pages * config.tokens_per_page)
        if not 0 <= stripe < len(job.table):
            return ""
        entry = layout.unpack_entries(job.table[stripe : stripe + 1])
        channel, dram = int(entry.channel[0]), bool(entry.dram[0])
        first = int((entry.value_page if status is Status.UNREADABLE_VALUE else entry.key_page)[0])
        codeword = token // config.tokens_per_codeword
        read = self.transport.read_register
        media, cause = read("MEDIA_ERROR"), read("MEDIA_CAUSE")
        if status is Status.UNREADABLE_SKETCH and not dram and stripe < job.whole and job.sketch is not None:
            sketch = layout.unpack_sketches(job.sketch[stripe : stripe + 1])
            first = int(sketch.page[0])
            if job.mode is Mode.CENTROID:
                codeword = int(sketch.codeword[0]) + (codeword >> job.unit_bits) // config.tokens_per_codeword
            else:
                # The completion names the stripe only; of the first of the batch the register knows the rest.
                page = (media & PAGE_MASK) - first
                here = media >> PAGE_NUMBER_BITS == channel and 0 <= page < job.stripe_pages
                codeword = page * config.codewords_per_page + (cause & 0xFFFF) if here else 0
        page, codeword = divmod(codeword, config.codewords_per_page)
        number = first + page
        if dram:
            return f": device DRAM, page {number}, codeword {codeword}"
        if (media, cause & 0xFFFF) == (channel << PAGE_NUMBER_BITS | number, codeword):
            why = MediaCause(cause >> 16).name
        else:
            where = f"page number {media & PAGE_MASK} of channel {media >> PAGE_NUMBER_BITS}"
            why = f"not the first of the batch, which is {where}"
        return f": {self._describe(channel, number)}, codeword {codeword} ({why})"


def _version(version: int) -> str:
    return f"{version >> 16}.{version & 0xFFFF}"


def _queue_of(operation: FlashOperation) -> int:
    """PROGRAM and ERASE have a queue of their own; what is for queue 0 alone goes there, and ERASE of no owner."""
    admin = operation.opcode in (Opcode.PROBE, Opcode.MAP) or (
        operation.opcode is Opcode.ERASE and operation.domain == 0)
    return ADMIN if admin else FLASH
