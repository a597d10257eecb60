"""`Device`: a drive over any `Transport`.

`Sequence` writes K and V and plans attention (sequence.py).  The layer below are lists of commands, in batches that fit
the host memory: `Device.run` takes `Job`s and `Device.operate` takes `FlashOperation`s (jobs.py).
"""

import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Series
from itertools import count
from types import TracebackType
from typing import Self

import numpy as np

from kvattic import layout
from kvattic.allocator import Allocation, DramAllocator, Remap, Wear, ZoneAllocator
from kvattic.commands import (
    COMMAND,
    COMPLETION,
    FLASH_COMMAND,
    LINE_BYTES,
    Completion,
    MediaCause,
    Mode,
    Opcode,
    Status,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import PAGE_NUMBER_BITS, Config
from kvattic.errors import (
    CapacityError,
    ConfigMismatchError,
    DeviceBusyError,
    DeviceStatusError,
    DeviceTimeoutError,
    RequestError,
)
from kvattic.jobs import (
    AttendPlan,
    AttendResult,
    Bytes,
    FlashOperation,
    Integers,
    Job,
    JobResult,
    check_positive,
    end_block,
    explain,
    get_field,
    mean_bytes,
    pack_mean,
    pack_query,
    pack_table,
    put_field,
    table_bytes,
    unpack_result,
)
from kvattic.layout import Block, PagePlace
from kvattic.registers import ID_MAGIC, VERSION, Control, StatusBit
from kvattic.sequence import Loss, Sequence
from kvattic.transport import MAX_COMMANDS, Progress, Transport

__all__ = ["AttendPlan", "AttendResult", "Device", "FlashOperation", "Job", "JobResult", "Loss", "Sequence"]

DEFAULT_TIMEOUT_S = 60.0
PAGE_MASK = (1 << PAGE_NUMBER_BITS) - 1


class Device:
    """A device over any transport: hands out its flash and DRAM to sequences and runs their attention.

    Usable as a context manager.

    The library takes the flash for erased, as it comes from the factory; a drive that was used before must be
    `format`ted.  The tables that say where K and V lie are in this object alone.

    Args:
        transport: the way to the device.
        timeout_s: patience with the device, in seconds of wall-clock time.
        bad_blocks: blocks that must not be used, such as an earlier `scan_bad_blocks` found.
        spare_blocks: see `ZoneAllocator`.
        erase_on_free: erase flash as soon as no sequence uses it; otherwise before it is used again.

    Raises:
        ConfigMismatchError: no kvattic device, another major version, or built from another
            configuration.
        DeviceTimeoutError: the device does not become ready.
        RequestError: a bad block is none of the device's.
    """

    def __init__(self, transport: Transport, *, timeout_s: float = DEFAULT_TIMEOUT_S, bad_blocks: Iterable[Block] = (),
                 spare_blocks: int | None = None, erase_on_free: bool = True) -> None:
        self.transport = transport
        self.config: Config = transport.config
        self.timeout_s = timeout_s
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
        self._dram = DramAllocator(min(transport.dram_bytes // self.config.page_bytes, 1 << PAGE_NUMBER_BITS))
        self._allocator = self._new_allocator(bad_blocks)
        self._wait_ready(timeout_s)
        self._allocator.send_remaps()

    def _new_allocator(self, bad_blocks: Iterable[Block]) -> ZoneAllocator:
        return ZoneAllocator(self.config, erase=self._erase, remap=self._remap, bad_blocks=bad_blocks,
                             spare_blocks=self._spare_blocks, erase_on_free=self._erase_on_free)

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

    def close(self) -> None:
        """Free all sequences and refuse all further calls.  Closing twice is no error."""
        try:
            for sequence in list(self._sequences):
                sequence.free()
        finally:
            self._closed = True

    def reset(self) -> None:
        """Abort whatever the device does and wait until it is ready again.  Flash keeps its pages.

        Raises:
            DeviceTimeoutError: the device does not become ready.
        """
        self._check_open()
        self.transport.write_register("CONTROL", Control.RESET)
        self._wait_ready(self.timeout_s)

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
        """Look for the factory's marks in all blocks, and use none that has one.

        A mark is gone once its block was written; so scan a new drive, and keep the list.

        Returns:
            The blocks with a mark.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        self._check_open()
        if self._sequences or self._allocator.pages_programmed:
            raise RequestError("the factory's marks of bad blocks can be read only before anything is written")
        config = self.config
        # Marks are found through the device's map, which must be what it is after power-up.
        self._operate_all([FlashOperation(Opcode.MAP, remap.channel, remap.page,
                                          layout.page_place(remap.page, config).zone)
                           for remap in self._allocator.remaps])
        blocks = [Block(channel, die, plane, block) for block in range(config.part.blocks) for die in range(config.dies)
                  for plane in range(config.part.planes) for channel in range(config.channels)]
        pages = [int(layout.page_number(PagePlace(b.block, 0, b.die, b.plane), config)) for b in blocks]
        completions = self.operate([FlashOperation(Opcode.PROBE, block.channel, page)
                                    for block, page in zip(blocks, pages, strict=True)], check=False)
        for completion in completions:
            if completion.status not in (Status.OK, Status.BAD_BLOCK):
                raise self._failure("PROBE", completion)
        found = [block for block, completion in zip(blocks, completions, strict=True)
                 if completion.status is Status.BAD_BLOCK]
        self._allocator = self._new_allocator({*self.bad_blocks, *found})
        self._allocator.send_remaps()
        return sorted(found)

    def format(self) -> None:
        """Erase all of the flash, because nobody knows what it holds.

        Raises:
            RequestError: a sequence is not freed.
            DeviceStatusError: a die does not answer.
        """
        self._check_open()
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
        self._check_open()
        self._wait_ready(self.timeout_s)
        self._remap(self._allocator.remaps)
        self._dram = DramAllocator(self._dram.pages)
        return [loss for sequence in self._sequences for loss in sequence._lose_tails()]

    def operate(self, operations: Series[FlashOperation], *, check: bool = True,
                timeout_s: float | None = None) -> list[Completion]:
        """Run flash commands, as many behind each doorbell as the host memory and the doorbell take.

        This is the layer below the sequences: what it does to their flash they do not know of.

        Args:
            operations: the commands; those of one channel begin in their order.
            check: raise on the first status other than OK; otherwise the caller looks at the completions.
            timeout_s: patience with each batch; the device's if None.

        Returns:
            The completions, in the order of the operations.

        Raises:
            RequestError: a number does not fit its field of the command.
            DeviceStatusError: an operation ended with a status other than OK, or got no completion at all.
            DeviceBusyError: a batch is still running.
            DeviceTimeoutError: a batch did not end in time.
        """
        self._check_open()
        entries, error = self._operate(operations, self.timeout_s if timeout_s is None else timeout_s)
        if error is not None:
            raise error
        completions = [Completion.unpack(entry.tobytes()) for entry in entries]
        if check:
            for operation, completion in zip(operations, completions, strict=True):
                if completion.status is not Status.OK:
                    raise self._failure(operation.opcode.name, completion)
        return completions

    def _operate_all(self, operations: Series[FlashOperation]) -> None:
        if operations:
            self.operate(operations)

    def _operate(self, operations: Series[FlashOperation], timeout_s: float) -> tuple[Bytes, BaseException | None]:
        """Completion entries, zero where there is none; and what ended it early, if anything."""
        entries = np.zeros((len(operations), LINE_BYTES), np.uint8)
        most = min(MAX_COMMANDS, self.transport.memory_bytes // (2 * LINE_BYTES))
        if most == 0:
            return entries, CapacityError(f"a flash command needs {2 * LINE_BYTES} bytes of host memory, there are "
                                          f"{self.transport.memory_bytes}")
        try:
            for first in range(0, len(operations), most):
                batch = operations[first : first + most]
                try:
                    numbers = np.array(batch, np.int64)
                    fits = not ((numbers < 0) | (numbers >> (8, 8, 32, 32) != 0)).any()
                except OverflowError:
                    fits = False
                if not fits:
                    raise RequestError("a number of a flash operation does not fit its field of the command")
                block = np.zeros((len(batch), LINE_BYTES), np.uint8)
                put_field(block, FLASH_COMMAND["identifier"], np.arange(len(batch)))
                for name, column in zip(FlashOperation._fields, numbers.T, strict=True):
                    put_field(block, FLASH_COMMAND[name], column)
                size = block.size
                self._check_idle(timeout_s)
                try:
                    self._ring(len(batch), block.tobytes() + bytes(size), 2 * size, 2 * size, timeout_s)
                finally:
                    # What was acknowledged before anything went wrong, was.
                    found = np.frombuffer(self.transport.read_memory(size, size), np.uint8).reshape(-1, LINE_BYTES)
                    good = (get_field(found, COMPLETION["done"]) == 1) & (
                        get_field(found, COMPLETION["identifier"]) == np.arange(len(batch)))
                    entries[first : first + len(batch)][good] = found[good]
                if not good.all():
                    missing = int(np.argmin(good))
                    raise DeviceStatusError(
                        f"the device reports the batch done, but flash command {missing} of {len(batch)} has no "
                        f"completion", None)
        except BaseException as error:  # noqa: BLE001, handed to the caller, who must first note what was done
            return entries, error
        return entries, None

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
        operations = [FlashOperation(Opcode.ERASE, *places[i]) for i in order]
        entries, error = self._operate(operations, self.timeout_s)
        if error is not None:
            raise error
        good = [False] * len(places)
        for i, entry in zip(order, entries, strict=True):
            completion = Completion.unpack(entry.tobytes())
            if completion.status is Status.DIE_TIMEOUT:
                self._lose_die("ERASE", completion)
            elif completion.status not in (Status.OK, Status.ERASE_FAILED):
                raise self._failure("ERASE", completion)
            good[i] = completion.status is Status.OK
        return good

    def _remap(self, remaps: Series[Remap]) -> None:
        """For the allocator: change the device's map."""
        self._operate_all([FlashOperation(Opcode.MAP, *remap) for remap in remaps])

    def _lose_die(self, what: str, completion: Completion) -> None:
        channel, page = completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK
        if self._die_error is None:
            self._die_error = self._failure(what, completion)
        self._allocator.lose_die(channel, int(layout.page_place(page, self.config).die))

    def _raise_die_error(self) -> None:
        """Report a die that did not answer, when all is noted that had to be."""
        error, self._die_error = self._die_error, None
        if error is not None:
            raise error

    def _failure(self, what: str, completion: Completion) -> DeviceStatusError:
        return DeviceStatusError(f"{what} failed: {explain(completion)}{self._where(completion)}", completion)

    def _where(self, completion: Completion) -> str:
        """The place that a flash command's completion names."""
        if completion.status in (Status.INVALID_OPCODE, Status.INVALID_FIELD, Status.INVALID_PLACE):
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
                        centroids: int | None = None) -> "Sequence":
        """Reserve zones of flash for a sequence's K and V.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.
            sparse: write K in the channel layout, too, which the modes sparf and fetched read.
            centroids: write mean keys of units of so many tokens, too, which the mode centroid reads: a power of two,
                from a codeword's tokens to a page's (`layout.unit_bits`).

        Raises:
            RequestError: a number is not positive, or centroids out of range.
            ConfigError: sparse or centroids, and the configuration is without sparse attention.
            CapacityError: flash or DRAM have no room, or the device cannot number that many tokens.
        """
        self._check_open()
        for name, value in (("kv_heads", kv_heads), ("capacity_tokens", capacity_tokens), ("layers", layers)):
            check_positive(name, value)
        if not isinstance(sparse, bool):
            raise RequestError(f"sparse must be a bool, not {sparse!r}")
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
        stripes = capacity_tokens // (pages * config.tokens_per_page)
        allocations: list[Allocation] = []
        try:
            for run, runs in _reservations(config, range(first_head, first_head + layers * kv_heads), kv_heads, stripes,
                                           pages, 2 + sparse, centroids):
                allocations.append(self._allocator.create(runs, run))
        except CapacityError as error:
            if allocations:
                self._allocator.release(*allocations)
            raise CapacityError(
                f"a sequence of {layers} layers, {kv_heads} KV heads and {capacity_tokens:,} "
                f"tokens has no room: {error}"
            ) from None
        self._next_head += layers * kv_heads
        sequence = Sequence(self, next(self._numbers), kv_heads, layers, capacity_tokens, first_head, sparse, centroids,
                            allocations)
        self._sequences.append(sequence)
        return sequence

    def _release(self, sequence: "Sequence") -> None:
        self._sequences.remove(sequence)
        self._allocator.release(*sequence._allocations)
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
            timeout_s: patience with each batch; the device's if None.
            progress: called after each batch with (jobs done, jobs in all).

        Raises:
            RequestError: a plan's sequence was freed or belongs to another device.
            DeviceStatusError: a job ended with a status other than OK.
            DeviceBusyError, DeviceTimeoutError, CapacityError: see `run`.
        """
        for plan in plans:
            plan.sequence._check_open()
            if plan.sequence.device is not self:
                raise RequestError("a plan belongs to a sequence of another device")
        results = self.run(
            [job for plan in plans for job in plan.jobs], timeout_s=timeout_s, progress=progress
        )
        finished, first = [], 0
        for plan in plans:
            finished.append(plan.finish(results[first : first + len(plan.jobs)]))
            first += len(plan.jobs)
        return finished

    def run(
        self,
        jobs: Series[Job],
        *,
        check: bool = True,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[JobResult]:
        """Run jobs, as many behind each doorbell as the host memory and the doorbell take.

        Args:
            jobs: the commands, in order.
            check: raise on the first status other than OK; otherwise the caller looks at the
                completions.
            timeout_s: patience with each batch; the device's if None.
            progress: called after each batch with (jobs done, jobs in all).

        Returns:
            The results, in the order of the jobs.

        Raises:
            CapacityError: one job alone does not fit the host memory.
            DeviceStatusError: a job ended with a status other than OK, or got no completion at all.
            DeviceBusyError: a batch is still running.
            DeviceTimeoutError: a batch did not end in time.
        """
        self._check_open()
        patience = self.timeout_s if timeout_s is None else timeout_s
        results: list[JobResult] = []
        for first, last in self._batches(jobs):
            for index, result in enumerate(self._run_batch(jobs[first:last], patience), first):
                if check and result.completion.status is not Status.OK:
                    name = f"job {index} of {len(jobs)}" + (
                        f" ({label})" if (label := jobs[index].label) else ""
                    )
                    raise DeviceStatusError(
                        f"{name} failed: {explain(result.completion)}"
                        f"{self._unreadable(jobs[index], result.completion)}", result.completion)
                results.append(result)
            if progress is not None:
                progress(last, len(jobs))
        return results

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
        if status is Status.UNREADABLE_SKETCH and not dram and job.sketch is not None:
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

    def _job_bytes(self, job: Job) -> int:
        dim = self.config.head_dim
        rows = job.rows * (query_row_bytes(dim) + result_row_bytes(dim))
        return 2 * LINE_BYTES + rows + table_bytes(job) + mean_bytes(job)

    def _batches(self, jobs: Series[Job]) -> Iterator[tuple[int, int]]:
        memory = self.transport.memory_bytes
        first, used = 0, 0
        for index, job in enumerate(jobs):
            size = self._job_bytes(job)
            if size > memory:
                raise CapacityError(
                    f"job {index} of {len(jobs)} needs {size:,} bytes of host memory, there are "
                    f"{memory:,}"
                )
            if used + size > memory or index - first == MAX_COMMANDS:
                yield first, index
                first, used = index, 0
            used += size
        if first < len(jobs):
            yield first, len(jobs)

    def _run_batch(self, jobs: Series[Job], timeout_s: float) -> list[JobResult]:
        transport, dim = self.transport, self.config.head_dim
        # Host memory: commands, completions (zeroed, so that `done` tells which were written),
        # queries, tables, means, results.
        completions_at = len(jobs) * LINE_BYTES
        buffer = 2 * completions_at
        tables_at = buffer + sum(job.rows for job in jobs) * query_row_bytes(dim)
        means_at = tables_at + sum(table_bytes(job) for job in jobs)
        results_at = means_at + sum(mean_bytes(job) for job in jobs)
        commands: list[bytes] = []
        queries: list[bytes] = []
        tables: list[bytes] = []
        means: list[bytes] = []
        query, table, mean, result = buffer, tables_at, means_at, results_at
        for index, job in enumerate(jobs):
            try:
                commands.append(
                    COMMAND.pack(
                        opcode=Opcode.ATTEND,
                        mode=job.mode,
                        identifier=index,
                        rows=job.rows,
                        stripe_pages=job.stripe_pages,
                        stripes=len(job.table),
                        base_token=job.base_token,
                        end_token=job.end_token,
                        tree_token=job.tree_token,
                        scale=job.scale_bits,
                        query=query,
                        result=result,
                        table=table,
                        mean=0 if job.mean is None else mean,
                        channels=job.channels,
                        local=job.local,
                        units=job.units,
                        unit_bits=job.unit_bits,
                    )
                )
            except OverflowError:
                raise RequestError(
                    f"a number of job {index} does not fit its field of the command: {job}"
                ) from None
            queries.append(pack_query(job))
            tables.append(pack_table(job))
            means.append(pack_mean(job))
            query += job.rows * query_row_bytes(dim)
            table += table_bytes(job)
            mean += mean_bytes(job)
            result += job.rows * result_row_bytes(dim)
        image = b"".join((*commands, bytes(completions_at), *queries, *tables, *means))
        self._check_idle(timeout_s)
        self._ring(len(jobs), image, buffer, result, timeout_s)

        entries = transport.read_memory(completions_at, completions_at)
        data = transport.read_memory(results_at, result - results_at)
        after = StatusBit(transport.read_register("STATUS"))
        results: list[JobResult] = []
        at = 0
        for index, job in enumerate(jobs):
            entry = entries[index * LINE_BYTES : (index + 1) * LINE_BYTES]
            fields = COMPLETION.unpack(entry)
            if fields["done"] != 1 or fields["identifier"] != index:
                found = f"identifier {fields['identifier']}" if fields["done"] else "nothing"
                raise DeviceStatusError(
                    f"the device reports the batch done, but command {index} of {len(jobs)} has no "
                    f"completion: {found} is in its place, STATUS is {after!r}",
                    None,
                )
            size = job.rows * result_row_bytes(dim)
            results.append(
                unpack_result(data[at : at + size], job.rows, dim, Completion.unpack(entry))
            )
            at += size
        if after & StatusBit.BUS_ERROR and all(
            r.completion.status is not Status.BUS_ERROR for r in results
        ):
            raise DeviceStatusError(
                "the host memory answered with an error (STATUS.BUS_ERROR): the results "
                "of this batch cannot be trusted",
                None,
            )
        return results


    def _check_idle(self, timeout_s: float) -> None:
        """Whether the device takes a batch; until then the host memory must not be touched."""
        status = self.transport.read_register("STATUS")
        if status & StatusBit.BUSY:
            raise DeviceBusyError(
                "the device is still working on an earlier batch (STATUS.BUSY); wait for it or "
                "call Device.reset()"
            )
        if not status & StatusBit.READY:
            self._wait_ready(timeout_s)

    def _ring(self, commands: int, image: bytes, buffer: int, limit: int, timeout_s: float) -> None:
        """Put commands, room for their completions and the rest into host memory, and have them run."""
        transport = self.transport
        transport.write_memory(0, image)
        transport.write_register(
            "STATUS",
            StatusBit.DONE | StatusBit.DOORBELL_WHILE_BUSY | StatusBit.BUS_ERROR | StatusBit.MEDIA_ERROR,
        )
        transport.write_register("COMMAND_BASE", 0)
        transport.write_register("COMPLETION_BASE", commands * LINE_BYTES)
        transport.write_register("BUFFER_BASE", buffer)
        transport.write_register("BUFFER_LIMIT", limit)
        transport.write_register("DOORBELL", commands)
        if transport.read_register("STATUS") & StatusBit.DOORBELL_WHILE_BUSY:
            transport.write_register("STATUS", StatusBit.DOORBELL_WHILE_BUSY)
            raise DeviceBusyError(
                "the device refused the doorbell (STATUS.DOORBELL_WHILE_BUSY): another batch is "
                "running"
            )
        transport.wait(timeout_s)


def _version(version: int) -> str:
    return f"{version >> 16}.{version & 0xFFFF}"


def _reservations(config: Config, heads: range, kv_heads: int, stripes: int, pages: int, kinds: int,
                  centroids: int | None) -> Iterator[tuple[int, list[int]]]:
    """What a sequence takes of flash at most: (pages of a run, runs on each channel) of each of its allocations.

    Args:
        config: geometry.
        heads: of all layers, numbered over all sequences.
        kv_heads: of a layer.
        stripes: full ones of each head.
        pages: of a run of K.
        kinds: runs of a stripe: K, V, the channel layout.
        centroids: tokens of a unit.
    """
    rounds, rest = divmod(stripes, config.channels)
    # (stripe of a round, layer, head): its channel.
    channels = layout.stripe_channel(np.arange(config.channels)[:, None], np.array(heads), config)
    channels = channels.reshape(config.channels, -1, kv_heads)
    # (stripe of a round, layer, channel): heads that have it there.
    counts = (channels[:, :, :, None] == np.arange(config.channels)).sum(axis=2)

    def total(runs: Integers) -> list[int]:
        each: list[int] = (rounds * runs.sum(axis=(0, 1)) + runs[:rest].sum(axis=(0, 1))).tolist()
        return each

    yield pages, total(kinds * counts)
    if centroids is not None:
        # Heads of a layer share pages when their stripes are full, at the same time; a run is what one stripe takes.
        run = layout.centroid_pages(1, centroids, config)
        yield run, total(layout.centroid_pages(counts, centroids, config) // run)
