"""`Device`: a drive over any `Transport`.

`Sequence` writes K and V and plans attention (sequence.py).  The layer below are commands: `Device.run` takes `Job`s
and `Device.operate` takes `FlashOperation`s (jobs.py); `Device.submit` and `submit_operations` do not wait for them.
The `Dispatcher` tracks what is under way, and where it lies in host memory (dispatcher.py); `Media` keeps the flash and
the drive's DRAM (media.py).
"""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeVar

from numpy.typing import ArrayLike, NDArray

from kvattic.driver import futures
from kvattic.driver.accounts import Tally, job_account, read_account
from kvattic.driver.admin import Admin
from kvattic.driver.checks import check_integer, check_positive
from kvattic.driver.diagnosis import job_failure
from kvattic.driver.dispatcher import ATTEND, Command, Dispatcher, Steps
from kvattic.driver.futures import Future
from kvattic.driver.jobs import (
    MAX_SINKS,
    FlashOperation,
    Job,
    ReadJob,
    check_blocks,
    fill_command,
    fill_read,
    job_bytes,
    pack_command,
    pack_read,
    read_bytes,
)
from kvattic.driver.manifest import read_manifest
from kvattic.driver.media import Media
from kvattic.driver.results import AttendPlan, AttendResult, JobResult, ReadResult
from kvattic.driver.saving import Saver, states_of
from kvattic.driver.scales import check_scales
from kvattic.driver.sequence import Loss, Sequence
from kvattic.driver.shape import SequenceShape
from kvattic.errors import (
    CapacityError,
    ConfigMismatchError,
    DeviceTimeoutError,
    ForkedError,
    KvatticError,
    RequestError,
)
from kvattic.placement.domains import COMMON_DOMAIN
from kvattic.placement.reservations import reservations
from kvattic.placement.zones import Allocation, Wear
from kvattic.spec import layout
from kvattic.spec.blocks import unpack_tokens
from kvattic.spec.codes import check_codes
from kvattic.spec.commands import DOMAINS, Completion, Status, result_row_bytes
from kvattic.spec.config import Config
from kvattic.spec.layout import Block
from kvattic.spec.registers import ID_MAGIC, VERSION, StatusBit
from kvattic.support.closing import Closing
from kvattic.timing.cost import Cost
from kvattic.timing.record import KeepsRecords
from kvattic.transport.base import Progress, Transport

__all__ = ["Attached", "AttendPlan", "AttendResult", "Device", "FlashOperation", "Job", "JobResult", "Loss", "Sequence"]

R = TypeVar("R", JobResult, ReadResult)

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_ENTRIES = 1024
"""Entries of a ring: programs keep all dies busy and as many pages waiting, 64 on each of eight channels."""


class Attached(NamedTuple):
    """What `Device.attach` found in a manifest.

    Members:
        sequences: in the order in which they were saved.
        note: what was saved beside them.
    """

    sequences: list[Sequence]
    note: Any


class Device(Closing):
    """A device over any transport: hands out its flash and DRAM to sequences and runs their attention.

    Usable as a context manager.  Its methods, and those of its sequences and futures, may be called from any thread;
    they hold one lock, except for moments between two waits for the device.

    The library assumes that the flash is erased, as it comes from the factory; a drive that was used before must be
    `format`ted, unless what it holds was saved (`save`) and is to be used again (`attach`).  Only this object has the
    tables that say where K and V lie.

    After a DeviceTimeoutError or an invalid completion the state of the device is unknown: everything under way fails,
    and so does every call until `reset` (or `recover`).

    Args:
        transport: the way to the device.
        timeout_s: seconds of wall-clock time that the device may send no completion.
        bad_blocks: blocks that must not be used, such as an earlier `scan_bad_blocks` found.
        spare_blocks: see `ZoneAllocator`.
        erase_on_free: erase flash as soon as no sequence uses it; otherwise before it is used again.
        entries: entries of each ring, a power of two; fewer if the host memory is small.  At most entries - 1 commands
            are under way in each queue.
        owns_transport: `close` also closes the transport.

    Attributes:
        transport: the way to the device.
        config: of the device.
        dispatcher: the queues and the commands under way; for this library.
        media: the flash and the DRAM below the sequences; for this library.

    Raises:
        ConfigMismatchError: it is not a kvattic device, has another major version, or was built from another
            configuration.
        DeviceTimeoutError: the device does not become ready, or does not answer.
        RequestError: a bad block does not exist, or entries is not a power of two in range.
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
                f"this is not a kvattic device: ID is {magic:#010x}, not {ID_MAGIC:#010x}"
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
        self._next_number = 0
        self.dispatcher = Dispatcher(transport, timeout_s=timeout_s, entries=entries)
        self._admin = Admin(self.dispatcher)
        self.media = Media(transport, self.dispatcher, self._admin, bad_blocks=bad_blocks, spare_blocks=spare_blocks,
                           erase_on_free=erase_on_free)
        self._saver = Saver(self.media)
        self._restart()
        if (identity := self.identify()) != self.config:
            raise ConfigMismatchError(
                f"the device was built from another configuration: it is {identity.to_json()}, this library's is "
                f"{self.config.to_json()}")
        self.media.allocator.send_remaps()

    # Life.

    def _end_block(self) -> None:
        self.close()

    @property
    def timeout_s(self) -> float:
        """Seconds that the device may send no completion."""
        return self.dispatcher.timeout_s

    @property
    def lock(self) -> RLock:
        """Held while the device is used."""
        return self.dispatcher.lock

    def close(self) -> None:
        """Free all sequences and refuse all further calls.  Closing twice is allowed.

        Waits for what is under way.

        Raises:
            DeviceStatusError: a die does not answer; the device is closed all the same.
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
                    self.dispatcher.drive(lambda: not self.dispatcher.working)
            finally:
                self._closed = True
                self.dispatcher.abandon(RequestError("the device was closed before this was done"))
                if self._owns_transport:
                    self.transport.close()
            # What a forked child cannot free belongs to its parent.
            if errors and not isinstance(errors[0], ForkedError):
                raise errors[0]

    def reset(self) -> None:
        """Abort everything under way and wait until the device is ready again.  Flash and DRAM keep their contents.

        Futures of what was under way fail.

        Raises:
            DeviceTimeoutError: the device does not become ready.
        """
        with self.lock:
            self.check_open()
            self._restart()

    def _restart(self) -> None:
        """Reset the device, and set up its queues and owners."""
        self._tally = Tally(self.config)
        self.media.written_bytes = 0
        self.dispatcher.reset(lambda: self._wait_ready(self.timeout_s))
        self.media.send_owners()
        for domain in sorted({COMMON_DOMAIN, *(sequence.domain for sequence in self._sequences)}):
            self._admin.permit(domain, True)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.transport.read_register("STATUS") & StatusBit.READY:
            if time.monotonic() > deadline:
                raise DeviceTimeoutError(
                    f"the device was not ready within {timeout_s:g} s (STATUS.READY is low)"
                )

    def check_open(self) -> None:
        """Refuse to go on if the device was closed.

        Raises:
            RequestError: it was.
        """
        if self._closed:
            raise RequestError("the device was closed; open it again")

    # Waiting.

    def poll(self) -> int:
        """Take the completions that have come, and go on with what waits for them; does not wait itself.

        Returns:
            How many there were.

        Raises:
            DeviceStatusError, DeviceLostError: the device does not work.
        """
        with self.lock:
            self.check_open()
            return self.dispatcher.poll()

    def wait(self, waiting: Iterable[Future[Any]], timeout_s: float | None = None) -> None:
        """Wait until futures of this device are done, or have failed.

        Args:
            waiting: the futures.
            timeout_s: seconds of wall-clock time for all of them; the device's timeout if None.

        Raises:
            RequestError: an item is not a future of this device.
            DeviceTimeoutError: one was not done in time.
        """
        waiting = list(waiting)
        for future in waiting:
            if not isinstance(future, Future) or future.driver is not self.dispatcher:
                raise RequestError(f"this is not a future of this device: {future!r}")
        futures.wait(waiting, timeout_s)

    @property
    def in_flight(self) -> int:
        """Commands that were submitted and have not completed, as far as the host knows."""
        return self.dispatcher.in_flight

    # Identity and counters.

    def identify(self) -> Config:
        """The configuration that the device was built from.

        Raises:
            ConfigMismatchError: the reply cannot be parsed.
            DeviceStatusError: the device reports an error.
        """
        self.check_open()
        return self._admin.identify()

    def counters(self) -> dict[str, int]:
        """The counters (`registers.COUNTERS`) by name, read by a command in the same queue as the jobs.

        They count from power-up or the last `reset` on, and reading does not change them: to measure something, take
        the difference.  `Sequence.counters` counts what was done for one sequence.

        Raises:
            DeviceStatusError: the device reports an error.
        """
        self.check_open()
        return self._admin.counters()

    def statistics(self) -> Cost:
        """What the drive has done and how long it worked, since it was opened or last `reset`; for all sequences.

        To know what something took, subtract two of them.  Operations of flash and, on hardware, cycles are the drive's
        counters, erases and bad-block scans included.  The golden device's cycles are modelled, of large loads from a
        sample; there, commands that were not set off by the same doorbell come one after the other.  Bytes by kind are
        those of the jobs that have completed.

        Raises:
            DeviceStatusError: the device reports an error.
        """
        with self.lock:
            counters, written = self.counters(), self.media.written_bytes
            keeps = isinstance(self.transport, KeepsRecords)
            cycles = self.transport.modelled_cycles() if isinstance(self.transport, KeepsRecords) else None
            if not keeps:
                cycles = counters["CYCLES"] or None
            counted = self._tally.counted
            return replace(counted, written_bytes=written, link_bytes=counted.link_bytes + written,
                           page_reads=counters["PAGE_READS"], page_programs=counters["PAGE_PROGRAMS"],
                           block_erases=counters["BLOCK_ERASES"], cycles=cycles, modelled=keeps)

    # Domains.

    def _new_domain(self) -> int:
        used = {sequence.domain for sequence in self._sequences} | self.media.allocator.domains
        for domain in range(COMMON_DOMAIN + 1, DOMAINS):
            if domain not in used:
                return domain
        raise CapacityError(f"all {DOMAINS - COMMON_DOMAIN - 1} domains of isolated sequences are in use; free one")

    # Flash.

    @property
    def free_zones(self) -> int:
        """Zones of flash that no sequence uses."""
        return self.media.allocator.free_zones

    @property
    def free_dram_pages(self) -> int:
        """Pages of device DRAM that are free."""
        return self.media.dram.free_pages

    @property
    def bad_blocks(self) -> list[Block]:
        """Blocks that are not used: the factory's that are known, and those that failed."""
        return self.media.allocator.bad_blocks

    @property
    def wear(self) -> Wear:
        """How often the blocks were erased."""
        return self.media.allocator.wear

    @property
    def write_amplification(self) -> float:
        """Pages programmed for each page of K, V and sketches that was written; NaN if there was none."""
        return self.media.allocator.write_amplification

    def scan_bad_blocks(self) -> list[Block]:
        """Find the blocks that the factory marked as bad, and use none of them.

        A mark is lost once its block is written; so scan a new drive, and keep the list.

        Returns:
            The blocks with a mark.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self._check_unwritten()
            return self.media.scan_marks()

    def find_marks(self) -> set[Block]:
        """Find the blocks that the factory marked as bad, without changing anything.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self._check_unwritten()
            return self.media.find_marks()

    def _check_unwritten(self) -> None:
        self.check_open()
        if self._sequences or self.media.allocator.pages_programmed or self._saver.used:
            raise RequestError("the factory's marks of bad blocks can be read only before anything is written")

    def format(self) -> None:
        """Erase all of the flash, for a drive that was used before.

        Raises:
            RequestError: a sequence is not freed, or a manifest keeps zones (`discard_saved`).
            DeviceStatusError: a die does not answer.
        """
        with self.lock:
            self.check_open()
            self.media.format()

    def recover(self) -> list[Loss]:
        """Go on after the drive has lost its power: flash has kept its contents, its DRAM has not.

        Tokens that were not `Sequence.flushed` are removed from their sequences.

        Returns:
            What was lost, for each layer that lost something.

        Raises:
            DeviceTimeoutError: the device does not become ready.
            DeviceStatusError: the device reports an error.
        """
        with self.lock:
            self.check_open()
            with self.media.power_lost():
                self._restart()
            return [loss for sequence in self._sequences for loss in sequence.lose_tails()]

    def operate(self, operations: Series[FlashOperation], *, check: bool = True,
                timeout_s: float | None = None) -> list[Completion]:
        """Run flash commands, as many at a time as the queue takes.

        This is the layer below the sequences: they do not learn what it does to their flash.

        Args:
            operations: the commands; those of one channel begin in their order, if they are of one queue (PROGRAM and
                ERASE; or PROBE, MAP and ERASE of domain 0).
            check: raise on the first status other than OK; otherwise the caller checks the completions.
            timeout_s: seconds that the device may send no completion; its own timeout if None.

        Returns:
            The completions, in the order of the operations.

        Raises:
            RequestError: a number does not fit its field of the command.
            DeviceStatusError: an operation ended with a status other than OK.
            DeviceTimeoutError: the device did not answer.
        """
        with self.lock:
            self.check_open()
        return self.media.operate(operations, check=check, timeout_s=timeout_s)

    def submit_operations(self, operations: Series[FlashOperation]) -> list[Future[Completion]]:
        """Begin flash commands; arguments and errors are those of `operate`.

        Returns:
            A future for each, whatever its completion says.
        """
        with self.lock:
            self.check_open()
            return self.media.submit(operations)

    # Sequences.

    def create_sequence(self, kv_heads: int, *, capacity_tokens: int, layers: int = 1, sparse: bool = False,
                        centroids: int | None = None, codes: bool = False, sinks: int = 0,
                        window: int | None = None, isolated: bool = False, key_scale: ArrayLike | None = None,
                        value_scale: ArrayLike | None = None) -> "Sequence":
        """Reserve zones of flash for a sequence's K and V.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.
            sparse: also write K in the feature layout, which the modes sparf and fetched read.
            centroids: also write mean keys, which the mode centroid reads, each of this number of tokens: a power of
                two, from a codeword's tokens to a page's (`layout.unit_bits`).
            codes: also write codes of K, which the mode codes reads.
            sinks: the number of first tokens that sparse modes always attend, and that mean keys and the levels of
                codes leave out: language models give them much weight whatever they are (attention sinks).  With codes
                at most half a stripe's tokens.
            window: the longest sliding window that sparf, fetched and codes will be asked for: the host keeps V of this
                number of newest tokens, to know the mean of V over a window.  A longer window works, too, but is slow:
                missing values are read back from the device token by token.
            isolated: give the sequence a domain of its own: the device refuses commands of all others that name its
                flash or DRAM.  It then shares no zone of flash with other sequences.
            key_scale: what a stored 1.0 of K stands for: a number, or an array that broadcasts to (layers, kv_heads);
                1 if None.  K is divided by it before it is rounded to what the drive stores (`Config.kv`); it is for
                8-bit formats, whose range is small.
            value_scale: likewise of V.

        Raises:
            RequestError: a number is not positive, centroids out of range, or a scale that is zero, negative, infinite
                or NaN.
            ConfigError: sparse or centroids, and the configuration is without sparse attention; or codes, and it is
                without codes.
            CapacityError: flash or DRAM have no room, the device cannot number that many tokens, or no domain is left.
        """
        with self.lock:
            self.check_open()
            shape = self._shape(kv_heads, capacity_tokens, layers, sparse, centroids, codes, sinks, window, isolated,
                                key_scale, value_scale)
            allocations = self._reserve(shape)
            if isolated:
                try:
                    self._admin.permit(shape.domain, True)
                except KvatticError:
                    self.media.allocator.release(*allocations)
                    raise
            self._next_head += layers * kv_heads
            return self._add(shape, allocations)

    def add_fork(self, shape: SequenceShape, capacity_tokens: int, shared: Series[int],
                 zones: Series[Iterable[int]]) -> "Sequence":
        """For `Sequence.fork`: a sequence without tokens, that may read what another one has in flash.

        Args:
            shape: of the other one.
            capacity_tokens: tokens that each layer can hold.
            shared: stripes of each layer for which it needs no flash.
            zones: where these lie, for each allocation.

        Raises:
            CapacityError: flash has no room.
        """
        with self.lock:
            # Its heads keep their numbers, so that its stripes go on round the channels.
            shape = replace(shape, number=self._next_number, capacity_tokens=capacity_tokens, turn=self._next_number)
            allocations = self._reserve(shape, shared)
            for allocation, used in zip(allocations, zones, strict=True):
                self.media.allocator.share(allocation, used)
            return self._add(shape, allocations)

    def _add(self, shape: SequenceShape, allocations: Series[Allocation]) -> "Sequence":
        self._next_number += 1
        sequence = Sequence(self, shape, allocations)
        self._sequences.append(sequence)
        return sequence

    def _shape(self, kv_heads: int, capacity_tokens: int, layers: int, sparse: bool, centroids: int | None,
               codes: bool, sinks: int, window: int | None, isolated: bool, key_scale: ArrayLike | None,
               value_scale: ArrayLike | None) -> SequenceShape:
        """The shape of a new sequence, from checked arguments."""
        for name, value in (("kv_heads", kv_heads), ("capacity_tokens", capacity_tokens), ("layers", layers)):
            check_positive(name, value)
        for name, flag in (("sparse", sparse), ("codes", codes), ("isolated", isolated)):
            if not isinstance(flag, bool):
                raise RequestError(f"{name} must be a bool, not {flag!r}")
        if codes:
            check_codes(self.config)
        check_integer("sinks", sinks, 0, self.config.codes_sinks_max if codes else MAX_SINKS)
        if window is not None:
            check_positive("window", window)
        limit = (1 << layout.TOKEN_BITS) - 1
        if capacity_tokens > limit:
            raise CapacityError(f"capacity_tokens must be at most {limit:,}, not {capacity_tokens:,}: the device "
                                f"numbers tokens with {layout.TOKEN_BITS} bits")
        layout.stripe_pages(self.config, sparse=sparse or centroids is not None)
        if centroids is not None:
            try:
                layout.unit_bits(centroids, self.config)
            except RequestError as error:
                raise RequestError(f"centroids: {error}") from None
        # Heads are numbered over all sequences, so that one-head sequences, too, start on different channels.
        shape = SequenceShape(
            config=self.config, number=self._next_number, kv_heads=kv_heads, layers=layers,
            capacity_tokens=capacity_tokens, first_head=self._next_head, sparse=sparse, centroids=centroids,
            codes=codes, sinks=int(sinks), window=window,
            key_scale=check_scales("key_scale", key_scale, layers, kv_heads),
            value_scale=check_scales("value_scale", value_scale, layers, kv_heads),
            domain=self._new_domain() if isolated else COMMON_DOMAIN)
        if shape.stripe_dram_pages > self.media.dram.pages:
            raise CapacityError(f"a stripe of {kv_heads} KV heads takes {shape.stripe_dram_pages} pages of device "
                                f"DRAM, which has {self.media.dram.pages}")
        return shape

    def _reserve(self, shape: SequenceShape, shared: Series[int] = ()) -> list[Allocation]:
        """Flash for a sequence, but for the first stripes of each layer that are shared with another one."""
        allocator, allocations = self.media.allocator, list[Allocation]()
        heads = range(shape.first_head, shape.first_head + shape.layers * shape.kv_heads)
        try:
            for run, runs in reservations(self.config, heads, shape.kv_heads,
                                          shape.capacity_tokens // shape.stripe_tokens, shape.pages, 2 + shape.sparse,
                                          [shape.packed_codewords(kind) for kind in shape.packed_kinds], shared):
                allocations.append(allocator.create(runs, run, domain=shape.domain))
        except CapacityError as error:
            if allocations:
                allocator.release(*allocations)
            raise CapacityError(f"a sequence of {shape.layers} layers, {shape.kv_heads} KV heads and "
                                f"{shape.capacity_tokens:,} tokens has no room: {error}") from None
        return allocations

    def release(self, sequence: "Sequence", allocations: Series[Allocation]) -> None:
        """For `Sequence.free`: give its flash and its domain back.

        Raises:
            DeviceStatusError: a die does not answer; all is given back nevertheless.
        """
        self._sequences.remove(sequence)
        self.media.allocator.release(*allocations)
        forks = any(other.domain == sequence.domain for other in self._sequences)
        if sequence.domain != COMMON_DOMAIN and not forks:
            self._admin.permit(sequence.domain, False)
        self.media.raise_die_error()

    # Outliving the process.

    def save(self, path: Path | str, sequences: Series["Sequence"] | None = None, *, note: Any = None) -> None:
        """Write a manifest: where sequences lie in flash, and what of them is in device DRAM, itself.

        When this returns, they outlive this process and the drive's power: `attach` brings them back as they are now,
        whatever is appended or freed afterwards, for the zones that a manifest names are not erased until another one
        has taken its place at the same path, or `discard_saved`.  Waits for everything that is under way.

        Args:
            path: the file; one that is there is replaced, as a whole.
            sequences: of this device; all if None.
            note: anything that can be JSON, for `attach`.

        Raises:
            RequestError: a sequence was freed or belongs to another device.
            OSError: the file cannot be written; an earlier one is still there and still true.
            DeviceStatusError, DeviceTimeoutError: the device does not work.
        """
        with self.lock:
            self.check_open()
            chosen = list(self._sequences if sequences is None else sequences)
            for sequence in chosen:
                if sequence.device is not self:
                    raise RequestError("a sequence to be saved belongs to another device")
                sequence.settle()
            self._saver.save(Path(path).absolute(), chosen, self._next_head, note)

    def attach(self, path: Path | str, *, capacity_tokens: int | None = None) -> "Attached":
        """Go on with sequences that were saved, on the same drive, opened anew: nothing may have been written yet.

        Their zones take nothing more until they are erased, for the process may have written on after it saved them;
        all other flash is erased before it is used.  A little of each zone is read to see whether it is still there.

        Args:
            path: what `save` wrote; the file goes on to keep its zones.
            capacity_tokens: tokens that each layer of each sequence can hold; as many as it was created for if None.

        Raises:
            RequestError: something was written or attached already.
            ManifestError: the file is damaged, or is not true: it is of another drive, or out of date.
            ConfigMismatchError: the file is of a drive with another configuration.
            CapacityError: flash or DRAM have no room for what the sequences can hold.
            OSError: the file cannot be read.
            DeviceStatusError, DeviceTimeoutError: the device does not work.
        """
        with self.lock:
            self.check_open()
            if self._sequences or self.media.allocator.pages_programmed or self._saver.used:
                raise RequestError("a manifest can be attached only before anything is written: open the device anew")
            where = Path(path).absolute()
            manifest = read_manifest(where, self.config)
            header, arrays, made = manifest.header, manifest.arrays, list[Sequence]()
            used = {zone for entry in header["sequences"] for each in entry["zones"] for zone in each}
            flash = {name: arrays[f"flash.{name}"] for name in ("map", "erases")}
            try:
                with self.media.resumed(header["flash"], flash, used):
                    for number, entry in enumerate(header["sequences"]):
                        self._attach_one(entry, states_of(manifest, number, entry["layers"]), capacity_tokens)
                        made = list(self._sequences)
                    self._saver.check(where, manifest, made)
            except BaseException:
                for sequence in list(self._sequences):
                    self._sequences.remove(sequence)
                    with suppress(KvatticError):
                        sequence.abandon()
                        if sequence.isolated:
                            self._admin.permit(sequence.domain, False)
                raise
            self._next_head = header["next_head"]
            self._saver.keep(where, made)
            return Attached(made, header["note"])

    def _attach_one(self, entry: dict[str, Any], states: Series[Mapping[str, NDArray[Any]]],
                    capacity_tokens: int | None) -> None:
        """Make a sequence of what a manifest says of it."""
        fields = {name: value for name, value in entry.items() if name not in ("zones", "held_tokens")}
        for name in ("key_scale", "value_scale"):   # not there if they are 1
            if name in fields:
                fields[name] = check_scales(name, fields[name], fields["layers"], fields["kv_heads"])
        if capacity_tokens is not None:
            least = max([1, *(int(state["length"]) for state in states)])
            check_integer("capacity_tokens", capacity_tokens, least, (1 << layout.TOKEN_BITS) - 1)
            fields["capacity_tokens"] = int(capacity_tokens)
        shape = SequenceShape(config=self.config, number=self._next_number, **fields)
        if shape.domain != COMMON_DOMAIN:
            self._admin.permit(shape.domain, True)
        shared = [min([*state["staged"].tolist(), int(state["length"]) // shape.stripe_tokens]) for state in states]
        allocations = self._reserve(shape, shared)
        for allocation, zones in zip(allocations, entry["zones"], strict=True):
            self.media.allocator.share(allocation, zones)
        sequence = self._add(shape, allocations)
        sequence.held_tokens = entry["held_tokens"]
        sequence.resume(states)

    def discard_saved(self, path: Path | str) -> None:
        """Remove a manifest; flash that only it kept is erased.

        Raises:
            OSError: it cannot be removed.
        """
        with self.lock:
            self.check_open()
            self._saver.discard(Path(path).absolute())
            self.media.raise_die_error()

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
            timeout_s: seconds that the device may send no completion; its own timeout if None.
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
        results = self.collect(jobs, waiting, timeout_s=timeout_s, progress=progress)
        finished, first = [], 0
        for plan in plans:
            finished.append(plan.finish(results[first : first + len(plan.jobs)]))
            first += len(plan.jobs)
        return finished

    def attend_async(self, plan: AttendPlan) -> Future[AttendResult]:
        """Begin a plan of a sequence of this device; errors as of `attend_many`, those of jobs are the future's."""
        with self.lock:
            self._check_plans([plan])
            return self.dispatcher.start(self._attend(plan, self.submit(plan.jobs, check=False)))

    def _attend(self, plan: AttendPlan, waiting: list[Future[JobResult]]) -> Steps[AttendResult]:
        yield waiting
        results = [future.result() for future in waiting]
        for index, result in enumerate(results):
            if result.completion.status is not Status.OK:
                raise job_failure(index, len(results), plan.jobs[index], result.completion, self.media)
        return plan.finish(results)

    def _check_plans(self, plans: Series[AttendPlan]) -> None:
        for plan in plans:
            plan.sequence.check_open()
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
            timeout_s: seconds that the device may send no completion; its own timeout if None.
            progress: called now and then with (jobs done, jobs in all).

        Returns:
            The results, in the order of the jobs.

        Raises:
            CapacityError: one job alone does not fit the host memory.
            RequestError: a number of a job does not fit the command.
            DeviceStatusError: a job ended with a status other than OK, or the device sends invalid completions.
            DeviceTimeoutError: the device did not answer.
        """
        return self.collect(jobs, self.submit(jobs, check=False), check=check, timeout_s=timeout_s, progress=progress)

    def read(self, jobs: Series[ReadJob], *, check: bool = True) -> list[ReadResult]:
        """Run READs, as many at a time as the queue and the host memory take.

        Args:
            jobs: the commands, in order.
            check: raise on the first status other than OK; otherwise the caller looks at the completions.

        Returns:
            The results, in the order of the jobs.

        Raises:
            CapacityError, RequestError, DeviceStatusError, DeviceTimeoutError: see `run`.
        """
        return self.collect(jobs, self.submit_reads(jobs), check=check)

    def submit_reads(self, jobs: Series[ReadJob]) -> list[Future[ReadResult]]:
        """Begin READs; those that find no room yet wait on the host.

        Returns:
            A future for each, whatever its completion says.

        Raises:
            CapacityError, RequestError, DeviceTimeoutError, DeviceStatusError, DeviceLostError: see `submit`.
        """
        with self.lock:
            self.check_open()
            commands = [self._read_command(index, jobs) for index in range(len(jobs))]
            self.dispatcher.submit(commands)
            return [command.future for command in commands]

    def collect(self, jobs: Series[Job | ReadJob], waiting: Series[Future[R]], *, check: bool = True,
                timeout_s: float | None = None, progress: Progress | None = None) -> list[R]:
        """Wait for submitted jobs, or READs; arguments and errors are those of `run`."""
        self.dispatcher.drive_futures(waiting, timeout_s, progress)
        results = [future.result() for future in waiting]
        if check:
            for index, result in enumerate(results):
                if result.completion.status is not Status.OK:
                    raise job_failure(index, len(jobs), jobs[index], result.completion, self.media)
        return results

    def submit(self, jobs: Series[Job], *, check: bool = True) -> list[Future[JobResult]]:
        """Begin jobs; those that find no room yet wait on the host.

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
            self.check_open()
            commands = [self._job_command(index, jobs, check) for index in range(len(jobs))]
            self.dispatcher.submit(commands)
            return [command.future for command in commands]

    def _job_command(self, index: int, jobs: Series[Job], check: bool) -> Command[JobResult]:
        job, total, dim = jobs[index], len(jobs), self.config.head_dim
        size, most = job_bytes(job, dim), self.dispatcher.arena_bytes
        if size > most:
            raise CapacityError(f"job {index} of {total} needs {size:,} bytes of host memory, there are {most:,}")
        try:
            line = pack_command(job)
        except OverflowError:
            raise RequestError(f"a number of job {index} does not fit its field of the command: {job}") from None
        check_blocks(job)
        rows = job.rows
        result, future, table = rows * result_row_bytes(dim), _future(self.dispatcher), job.table

        def fill(line: bytearray, address: int) -> bytes:
            nonlocal table
            table = job.table.copy()
            return fill_command(job, dim, line, address)

        # The command is not named in here: it would hold itself, and wait for the garbage collector.
        def finish(completion: Completion, data: bytes) -> JobResult:
            account = None
            if (passage := future.passage) is not None and completion.status is Status.OK:
                account = job_account(self.config, job, passage, table, size)
                self._tally.count_jobs((account,))
            if check and completion.status is not Status.OK:
                raise job_failure(index, total, job, completion, self.media)
            return JobResult(data or bytes(result), rows, dim, completion, account)

        return Command(ATTEND, bytearray(line), finish, future, size, fill, (size - result, result))

    def _read_command(self, index: int, jobs: Series[ReadJob]) -> Command[ReadResult]:
        job, config = jobs[index], self.config
        table_size, size = read_bytes(job, config)
        try:
            line = pack_read(job, config)
        except OverflowError:
            raise RequestError(f"a number of job {index} does not fit its field of the command: {job}") from None
        future: Future[ReadResult] = Future(self.dispatcher)
        table = job.table

        def fill(line: bytearray, address: int) -> bytes:
            nonlocal table
            table = job.page_table(config.tokens_per_page)
            return fill_read(job, config, line, address)

        def finish(completion: Completion, data: bytes) -> ReadResult:
            if (passage := future.passage) is not None and completion.status is Status.OK:
                self._tally.count_jobs((read_account(config, job, passage, table, table_size + size),))
            return ReadResult(*unpack_tokens(data, config), completion)

        return Command(ATTEND, bytearray(line), finish, future, table_size + size, fill, (table_size, size))


def _future(dispatcher: Dispatcher) -> Future[JobResult]:
    return Future(dispatcher)


def _version(version: int) -> str:
    return f"{version >> 16}.{version & 0xFFFF}"
