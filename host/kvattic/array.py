"""`DriveArray`: several drives as one; `ArraySequence`: K and V that are dealt over them, by heads or by tokens.

All drives work at the same time: what they have to do is submitted to each before any of them is waited for.
docs/host.md says which split is good for what.
"""

from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Series
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import Lock, RLock
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.driver.accounts import PARTS
from kvattic.driver.checks import check_integer, check_positive
from kvattic.driver.device import Device
from kvattic.driver.futures import Future, wait
from kvattic.driver.jobs import Job
from kvattic.driver.planning import AttendKeywords, AttendOptions
from kvattic.driver.results import AttendPlan, AttendResult, JobResult, Part
from kvattic.driver.scales import slice_heads
from kvattic.driver.sequence import Sequence
from kvattic.errors import CapacityError, ConfigMismatchError, DeviceTimeoutError, KvatticError, RequestError
from kvattic.spec import layout
from kvattic.spec.blocks import Masks
from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import PAPER, Config
from kvattic.spec.elements import Bits, Integers, as_array
from kvattic.support.closing import Closing
from kvattic.support.renamed import old_selection_keywords
from kvattic.targets import open as open_device
from kvattic.timing.cost import Cost, beside

__all__ = ["ArrayFuture", "ArrayPlan", "ArraySequence", "DriveArray", "open_array"]

P = ParamSpec("P")
T = TypeVar("T")

SPLITS = ("heads", "context")


class ArrayFuture(Generic[T]):
    """The answer of several drives; the same calls as `Future`.

    It is done when all drives are done or have failed.  The first error is then the answer, and names its drive; what
    the others report is in its notes.
    """

    def __init__(self, parts: Iterable[tuple[int, Future[Any]]], join: Callable[[list[Any]], T]) -> None:
        self._parts = list(parts)
        self._join = join
        self._lock = Lock()
        self._joined: list[T] = []

    @property
    def futures(self) -> list[Future[Any]]:
        """The futures of the drives, for `kvattic.wait`."""
        return [future for _, future in self._parts]

    def done(self) -> bool:
        """Whether all drives are done; takes completions without waiting for them."""
        done = [future.done() for _, future in self._parts]     # every drive is asked
        return all(done)

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """What went wrong, None if nothing did; waits as `result` does.

        Raises:
            DeviceTimeoutError: the answer did not come in time.
        """
        _settle(self.futures, timeout_s)
        found = [_named(error, drive) for drive, future in self._parts if (error := future.exception())]
        if not found:
            return None
        for other in found[1:]:
            if str(other) not in (str(found[0]), *getattr(found[0], "__notes__", ())):
                found[0].add_note(str(other))
        return found[0]

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the answer and return it.

        Args:
            timeout_s: seconds of wall-clock time to wait; the future can be waited for again afterwards.  If None, as
                long as the drives answer anything within their own timeouts.

        Raises:
            DeviceTimeoutError: the answer did not come in time.
            BaseException: what went wrong.
        """
        if error := self.exception(timeout_s):
            raise error
        with self._lock:
            if not self._joined:
                self._joined.append(self._join([future.result() for _, future in self._parts]))
            return self._joined[0]

    def add_done_callback(self, callback: "Callable[[ArrayFuture[T]], object]") -> None:
        """Call `callback` with the future when it is done; see `Future.add_done_callback`."""
        missing, lock = len(self._parts), Lock()

        def one_less(_: Future[Any]) -> None:
            nonlocal missing
            with lock:
                missing -= 1
                last = missing == 0
            if last:
                callback(self)

        if not self._parts:
            callback(self)
        for _, future in self._parts:
            future.add_done_callback(one_less)

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        for _, future in self._parts:
            with suppress(Exception):   # `result` reports it
                await future
        return self.result()


class _Share(NamedTuple):
    """A drive's share of a sequence.

    Members:
        drive: its number.
        sequence: on it.
        heads: KV heads of the whole that it has.
    """

    drive: int
    sequence: Sequence
    heads: slice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayPlan:
    """The jobs of one attention call, not yet run; made by `ArraySequence.plan`, run by `DriveArray.attend_many`.

    Attributes:
        sequence: whose tokens are attended.
        jobs: (drive, command) of all.
        join: makes the answer of the jobs' results.
    """

    sequence: "ArraySequence"
    jobs: list[tuple[int, Job]]
    join: Callable[[list[JobResult]], AttendResult]

    def finish(self, results: list[JobResult]) -> AttendResult:
        """Put the jobs' results together.

        Args:
            results: of `jobs`, in their order.
        """
        return self.join(results)


class ArraySequence(Closing):
    """K and V of one sequence on several drives; made by `DriveArray.create_sequence`.

    Usable as a context manager, which frees it at the end.  The calls are those of `Sequence`.

    Split by `heads`, each drive has some KV heads, whole: everything that one drive can do goes, with the same bits.

    Split by `context`, the stripes of tokens go round the drives, beginning with another one for each layer and
    sequence.  Each drive attends its own tokens, with the masks of the whole; the parts are merged as a single drive's
    are when a job's tokens do not fit its score buffers (`kvattic.merge`): the formula is exact, each part is rounded
    to fp32 once, and weights are rounded relative to a part's own maximum.  So an output differs by at most 1.5e-6 of
    the largest |v| from one drive's, and typically by 1e-7 of itself; it has its bits if one drive has all tokens
    that are attended.  Parts are merged in the order of their tokens, never of the answers.  The sparse modes choose
    from all tokens, which no drive has: they need the split by heads.

    If a write fails on some of the drives only, they hold different numbers of tokens: then every use of that layer but
    `free` raises a RequestError that says so.

    Attributes:
        device: the array.
        number: of the sequence, counted over the array's life.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
        split: heads or context.
        stripe_tokens: tokens of a stripe.
    """

    def __init__(self, array: "DriveArray", number: int, kv_heads: int, layers: int, capacity_tokens: int, split: str,
                 shares: Series[_Share], first: int | None = None) -> None:
        self.device = array
        self.number = number
        self.kv_heads = kv_heads
        self.layers = layers
        self.capacity_tokens = capacity_tokens
        self.split = split
        self.stripe_tokens = shares[0].sequence.stripe_tokens
        self._shares = {share.drive: share for share in shares}
        self._first = number if first is None else first    # decides which drive has a layer's first stripe
        self._freed = False

    # Life.

    def _end_block(self) -> None:
        self.free()

    def free(self) -> None:
        """Give flash and DRAM back, on all drives.  Freeing twice is allowed, any other use afterwards is an error.

        Raises:
            KvatticError: the first error of a drive; all that can be freed is free all the same.
        """
        if not self._freed:
            self.forget()
            self.device.forget(self)
            _all_of((share.drive, share.sequence.free) for share in self._shares.values())

    def forget(self) -> None:
        """For `DriveArray.close`: count as freed, because the devices free their parts."""
        self._freed = True

    def check_open(self) -> None:
        """Refuse to go on if the sequence was freed.

        Raises:
            RequestError: it was.
        """
        if self._freed:
            raise RequestError("the sequence was freed; create another one")

    def fork(self, length: int | None = None, *, capacity_tokens: int | None = None) -> "ArraySequence":
        """Another sequence that begins with this one's tokens; see `Sequence.fork`.

        Args:
            length: how many of the first tokens it gets; all of each layer if None.
            capacity_tokens: tokens that each of its layers can hold; as many as this one's if None.

        Raises:
            RequestError: see `Sequence.fork` and `length`; it names the drive.
            CapacityError: a drive has no room.
        """
        present = [self.length(layer) for layer in range(self.layers)]
        capacity = self.capacity_tokens if capacity_tokens is None else capacity_tokens
        least = max(*present, 1) if length is None else 1
        check_integer("capacity_tokens", capacity, least, (1 << layout.TOKEN_BITS) - 1)
        if length is not None:
            check_integer("length", length, 0, min(*present, capacity))
        rooms = {drive: room for drive, _, room in self.device.rooms(self.split, self.kv_heads, capacity, self.layers,
                                                                     self._first)}
        made: list[_Share] = []
        try:
            for share in self._shares.values():
                drive = share.drive
                tokens = [one if length is None else length for one in present]
                if self.split == "context":
                    tokens = [int(self._count((drive - self._first - layer) % self.device.drives, one))
                              for layer, one in enumerate(tokens)]
                room = capacity if self.split == "heads" else max(rooms.get(drive, 1), 1)
                made.append(share._replace(sequence=_on(drive, share.sequence.fork, tokens, capacity_tokens=room)))
            missing = [drive for drive in rooms if drive not in self._shares] if self.split == "context" else []
            if missing:
                raise RequestError(f"capacity_tokens must be at most {self.capacity_tokens}, not {capacity}: this "
                                   f"sequence has no share of drives {', '.join(map(str, missing))}")
        except BaseException:
            for share in made:
                with suppress(KvatticError):
                    share.sequence.free()
            raise
        return self.device.adopt(lambda number: ArraySequence(
            self.device, number, self.kv_heads, self.layers, int(capacity), self.split, made, self._first))

    # Tokens.

    def length(self, layer: int = 0) -> int:
        """Tokens that a layer holds.

        Raises:
            RequestError: there is no such layer, the sequence was freed, or a write failed on some drives only.
        """
        self.check_open()
        lengths = {drive: _on(drive, share.sequence.length, layer) for drive, share in self._shares.items()}
        if self.split == "heads":
            total, good = min(lengths.values()), len(set(lengths.values())) == 1
        else:
            total = sum(lengths.values())
            good = all(lengths.get(self._drive(layer, rank), 0) == self._count(rank, total)
                       for rank in range(self.device.drives))
        if not good:
            each = ", ".join(f"drive {drive}: {tokens}" for drive, tokens in sorted(lengths.items()))
            raise RequestError(f"the drives hold tokens of layer {layer} that do not fit together ({each}), because a "
                               "write failed on some of them, or one lost its power; free the sequence")
        return total

    def flushed(self, layer: int = 0) -> int:
        """The first tokens of a layer that are all in flash, programmed and acknowledged.

        Raises:
            RequestError: see `length`.
        """
        total = self.length(layer)
        flushed = {drive: share.sequence.flushed(layer) for drive, share in self._shares.items()}
        if self.split == "heads":
            return min(flushed.values())
        # The first token that its drive has not: none before it is missing anywhere.
        ranks = range(self.device.drives)
        missing = [self._token(rank, flushed[drive]) for rank in ranks
                   if (drive := self._drive(layer, rank)) in flushed
                   and flushed[drive] < self._count(rank, total)]
        return min(missing, default=total)

    def mean_value(self, layer: int = 0) -> NDArray[np.float32]:
        """Mean of the stored V over all tokens of a layer; see `Sequence.mean_value`.

        Raises:
            RequestError: see there; and the sequence is split by context.
        """
        self.check_open()
        if self.split != "heads":
            raise RequestError("the mean of V is kept with K in the feature layout or codes only (split='heads', with "
                               "sparse=True or codes=True)")
        return np.concatenate([_on(share.drive, share.sequence.mean_value, layer) for share in self._shares.values()])

    def statistics(self) -> Cost:
        """What the drives have done for this sequence so far; see `Sequence.statistics`, and `beside` for the time."""
        return beside(share.sequence.statistics() for share in self._shares.values())

    def statistics_by_part(self) -> dict[str, Cost]:
        """The same by part; see `Sequence.statistics_by_part`."""
        each = [share.sequence.statistics_by_part() for share in self._shares.values()]
        return {part: beside(parts[part] for parts in each) for part in PARTS}

    # Split by context: the drive of rank r of a layer has the stripes r, r + drives, r + 2 * drives, ...

    def _drive(self, layer: int, rank: int) -> int:
        """The drive of a rank: each layer and sequence begins with another one, so that all have as much to write."""
        return (rank + self._first + layer) % self.device.drives

    def _count(self, rank: Any, tokens: Any) -> Any:
        """How many of the first `tokens` tokens a rank has: the number there of its first token after these."""
        stripes, inside = np.divmod(tokens, self.stripe_tokens)
        drives = self.device.drives
        return ((stripes - rank + drives - 1) // drives * self.stripe_tokens
                + np.where(stripes % drives == rank, inside, 0))

    def _token(self, rank: int, local: int) -> int:
        """The token with a number on its drive."""
        stripe, inside = divmod(local, self.stripe_tokens)
        return (stripe * self.device.drives + rank) * self.stripe_tokens + inside

    # Writing.

    def prefill(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> None:
        """Write the first tokens of a layer; see `Sequence.prefill`."""
        self.prefill_async(key, value, layer=layer).result()

    def prefill_async(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> ArrayFuture[None]:
        """The same, without waiting for the end."""
        if length := self.length(layer):
            raise RequestError(f"layer {layer} has {length} tokens already: prefill is for the first, use append")
        return self.append_async(key, value, layer=layer)

    def append(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> None:
        """Write the next tokens of a layer; see `Sequence.append`."""
        self.append_async(key, value, layer=layer).result()

    def append_async(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> ArrayFuture[None]:
        """The same, without waiting for the end.

        Args:
            key: (kv_heads, n, head_dim), float16, float32 or float64, rounded to the storage format, or uint16 bit
                patterns.
            value: the same.
            layer: which layer.

        Raises:
            RequestError: an array has a wrong shape, dtype or number in it, or see `length`.
            CapacityError: more tokens than capacity_tokens.

        Whatever a drive reports is the future's error.
        """
        length = self.length(layer)
        keys, values = self._tokens("key", Kind.KEY, layer, key), self._tokens("value", Kind.VALUE, layer, value)
        if keys.shape != values.shape:
            raise RequestError(f"key and value must have the same shape, not {keys.shape} and {values.shape}")
        total = keys.shape[1]
        if length + total > self.capacity_tokens:
            raise CapacityError(
                f"the sequence has room for {self.capacity_tokens} tokens; layer {layer} holds {length}, {total} more "
                "do not fit")
        parts: list[tuple[int, Future[None]]] = []
        for share, heads, tokens in self._pieces(layer, length, total):
            # A drive that refuses at once is one that fails: the others go on all the same.
            parts.append((share.drive, _begin(share.sequence, keys[heads, tokens], values[heads, tokens], layer)))
        return ArrayFuture(parts, lambda _: None)

    def _pieces(self, layer: int, length: int, total: int) -> Iterable[tuple[_Share, slice, slice | Integers]]:
        """Where each of `total` new tokens goes: (share, heads, tokens)."""
        if self.split == "heads":
            for share in self._shares.values():
                yield share, share.heads, slice(None)
            return
        new = np.arange(total)
        ranks = (length + new) // self.stripe_tokens % self.device.drives
        for rank in range(self.device.drives):
            if (mine := new[ranks == rank]).size:
                yield self._shares[self._drive(layer, rank)], slice(None), mine

    def scales(self, kind: Kind, layer: int = 0) -> NDArray[np.float32] | None:
        """What a stored 1.0 stands for; see `Sequence.scales`."""
        shares = list(self._shares.values())
        found = [share.sequence.scales(kind, layer) for share in shares]
        if self.split == "context" or len(found) == 1:
            return found[0]
        if all(scale is None for scale in found):
            return None
        return np.concatenate([np.ones(share.sequence.kv_heads, np.float32) if scale is None else scale
                               for share, scale in zip(shares, found, strict=True)])

    def _tokens(self, name: str, kind: Kind, layer: int, values: ArrayLike) -> Bits:
        array, dim = as_array(values), self.device.config.head_dim
        if array.ndim != 3 or array.shape[0] != self.kv_heads or array.shape[2] != dim or array.shape[1] == 0:
            raise RequestError(f"{name} must be (kv_heads, tokens, head_dim) = ({self.kv_heads}, at least 1, {dim}), "
                               f"not {array.shape}")
        scale = self.scales(kind, layer)
        return layout.kv_bits(values, self.device.config, name, None if scale is None else scale[:, None, None])

    # Attention.

    @old_selection_keywords
    def attend(self, query: ArrayLike, *, layer: int = 0, timeout_s: float | None = None,
               **options: Unpack[AttendKeywords]) -> AttendResult:
        """Attention of queries over a layer's tokens; see `Sequence.attend`.

        Args:
            query: (q_heads, n_queries, head_dim).
            layer: which layer.
            timeout_s: seconds that all of it may take.
            options: see `AttendOptions`.
        """
        return self.attend_async(query, layer=layer, **options).result(timeout_s)

    @old_selection_keywords
    def attend_async(self, query: ArrayLike, *, layer: int = 0,
                     **options: Unpack[AttendKeywords]) -> ArrayFuture[AttendResult]:
        """The same, without waiting for the end."""
        plan = self.plan(query, layer=layer, **options)
        return ArrayFuture(self.device.submit([plan]), plan.finish)

    @old_selection_keywords
    def plan(self, query: ArrayLike, *, layer: int = 0, **options: Unpack[AttendKeywords]) -> ArrayPlan:
        """The jobs of an `attend` call, for `DriveArray.attend_many`; arguments and errors are those of `Sequence`.

        Raises:
            RequestError: see there; and a sparse mode of a sequence that is split by context.
        """
        length, asked = self.length(layer), AttendOptions(**options)
        if self.split == "heads":
            return self._head_plan(query, layer, asked)
        if asked.mode is not Mode.DENSE:
            raise RequestError(f"mode {asked.mode_name} chooses from all tokens, "
                               "which no drive of a sequence that is split by context has; create it with "
                               "split='heads', or attend densely")
        if length == 0:
            raise RequestError(f"layer {layer} has no tokens: prefill it before attending")
        return self._context_plan(query, layer, length, asked)

    def _head_plan(self, query: ArrayLike, layer: int, options: AttendOptions) -> ArrayPlan:
        array = as_array(query)
        if array.ndim != 3 or 0 in array.shape:
            raise RequestError(f"query must be (q_heads, n_queries, head_dim) = (at least {self.kv_heads}, at least 1, "
                               f"{self.device.config.head_dim}), not {array.shape}")
        if array.shape[0] % self.kv_heads:
            raise RequestError(f"q_heads must be a multiple of the sequence's {self.kv_heads} KV heads, not "
                               f"{array.shape[0]}")
        group = array.shape[0] // self.kv_heads
        plans = [(share.drive, share.sequence.plan_with(
            array[share.heads.start * group : share.heads.stop * group], options, layer=layer))
            for share in self._shares.values()]

        def finish(results: list[JobResult]) -> AttendResult:
            waiting = iter(results)
            each = [plan.finish([next(waiting) for _ in plan.jobs]) for _, plan in plans]
            return AttendResult(
                output=np.concatenate([one.output for one in each]),
                maximum=np.concatenate([one.maximum for one in each]),
                denominator=np.concatenate([one.denominator for one in each]),
                completions=[completion for one in each for completion in one.completions],
                accounts=tuple(account for one in each for account in one.accounts))

        return ArrayPlan(sequence=self, jobs=[(drive, job) for drive, plan in plans for job in plan.jobs],
                         join=finish)

    def _context_plan(self, query: ArrayLike, layer: int, length: int, options: AttendOptions) -> ArrayPlan:
        ranks = [(rank, self._shares[self._drive(layer, rank)]) for rank in range(self.device.drives)
                 if self._count(rank, length)]
        # The rows of each job, and whatever can be wrong with them.
        first = ranks[0][1].sequence
        pattern = first.plan_with(query, AttendOptions(scale=options.scale), layer=layer)
        q_heads, n_queries, _ = pattern.shape
        whole = options.masks(length, n_queries)
        mapped = [(share, self._map(rank, whole, length)) for rank, share in ranks]
        group = q_heads // self.kv_heads
        jobs: list[tuple[int, Job]] = []
        parts: list[Part] = []
        for part in pattern.parts:
            like = pattern.jobs[part.jobs.start]
            before = len(jobs)
            rows = [(share, local.of_rows(group).cut(part.rows)) for share, local in mapped]
            # Drives without any token of these rows have nothing to do; one must say so where none has any.
            busy = [one for one in rows if (one[1].end > one[1].start).any()] or rows[:1]
            for share, local in busy:
                jobs += [(share.drive, job) for job in share.sequence.dense_jobs(
                    layer, part.kv_head, like.query, like.scale_bits, local)]
            parts.append(Part(part.kv_head, part.rows, range(before, len(jobs))))
        merged = AttendPlan(sequence=first, shape=pattern.shape, jobs=[job for _, job in jobs], parts=parts,
                            value_scale=pattern.value_scale)
        return ArrayPlan(sequence=self, jobs=jobs, join=merged.finish)

    def _map(self, rank: int, masks: Masks, length: int) -> Masks:
        """The masks in a drive's own numbers of tokens.

        Its tokens are in the order of the whole, so a range of those is a range of its own; of the draft tree, it has
        some of the tokens, whose bits close up.
        """
        tree_token = int(self._count(rank, masks.tree_token))
        tree = np.zeros_like(masks.tree)
        for token in range(masks.tree_token, length):
            if token // self.stripe_tokens % self.device.drives == rank:
                bit = masks.tree >> (token - masks.tree_token) & 1
                tree |= bit << (int(self._count(rank, token)) - tree_token)
        return Masks(self._count(rank, masks.start), self._count(rank, masks.end), tree, tree_token)


class DriveArray(Closing):
    """Several drives of the same configuration.

    Usable as a context manager, which closes them.

    Args:
        devices: the drives, numbered in this order.

    Attributes:
        devices: the same.
        config: of each of them.

    Raises:
        RequestError: there are no devices, or one is there twice.
        ConfigMismatchError: they differ.
    """

    def __init__(self, devices: Iterable[Device]) -> None:
        self.devices = list(devices)
        if not self.devices:
            raise RequestError("an array needs at least one device")
        if len({id(device) for device in self.devices}) < len(self.devices):
            raise RequestError("the same device is in the array twice")
        self.config: Config = self.devices[0].config
        for drive, device in enumerate(self.devices):
            if device.config != self.config:
                raise ConfigMismatchError(f"drive {drive} has another configuration than drive 0: "
                                          f"{device.config.to_json()}, not {self.config.to_json()}")
        self._sequences: set[ArraySequence] = set()
        self._numbers = count()
        self._heads = 0

    @property
    def drives(self) -> int:
        """The number of drives."""
        return len(self.devices)

    # Life.

    def _end_block(self) -> None:
        self.close()

    def close(self) -> None:
        """Free all sequences and close all devices.  Closing twice is allowed.

        Raises:
            KvatticError: the first error of a drive; the others are closed all the same.
        """
        for sequence in self._sequences:
            sequence.forget()
        self._sequences.clear()
        _all_of((drive, device.close) for drive, device in enumerate(self.devices))

    def forget(self, sequence: ArraySequence) -> None:
        """For `ArraySequence.free`: the sequence is not the array's any more."""
        self._sequences.discard(sequence)

    def poll(self) -> int:
        """Take the completions that have come, of all drives, without waiting.

        Returns:
            How many there were.

        Raises:
            DeviceLostError: a drive is gone.
        """
        return sum(_on(drive, device.poll) for drive, device in enumerate(self.devices))

    def statistics(self) -> Cost:
        """What all drives have done so far; see `Device.statistics`, and `beside` for the time.

        Raises:
            DeviceStatusError: a drive reports an error.
        """
        return beside(_on(drive, device.statistics) for drive, device in enumerate(self.devices))

    # Sequences.

    def create_sequence(self, kv_heads: int, *, capacity_tokens: int, layers: int = 1, split: str = "heads",
                        **options: Any) -> ArraySequence:
        """Reserve room for a sequence on the drives.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.
            split: heads: each drive has as many KV heads as the others, or one more, and if there are fewer heads than
                drives, some have none.  context: the stripes of tokens go round the drives.
            options: see `Device.create_sequence`.

        Raises:
            RequestError: the split does not exist, a number is not positive, or context with what the sparse modes
            read. CapacityError: a drive has no room.
        """
        for name, value in (("kv_heads", kv_heads), ("capacity_tokens", capacity_tokens), ("layers", layers)):
            check_positive(name, value)
        if split not in SPLITS:
            raise RequestError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if split == "context" and (options.get("sparse") or options.get("codes")
                                   or options.get("centroids") is not None):
            raise RequestError("sparse, centroids and codes are for modes that choose from all tokens, which no drive "
                               "has if the sequence is split by context; use split='heads'")
        number = next(self._numbers)
        shares: list[_Share] = []
        try:
            for drive, heads, capacity in self.rooms(split, kv_heads, capacity_tokens, layers, number):
                scales = {name: slice_heads(name, options.get(name), layers, kv_heads, heads)
                          for name in ("key_scale", "value_scale")}
                sequence = _on(drive, self.devices[drive].create_sequence, heads.stop - heads.start,
                               capacity_tokens=capacity, layers=layers, **options | scales)
                shares.append(_Share(drive, sequence, heads))
        except BaseException:
            for share in shares:
                with suppress(KvatticError):
                    share.sequence.free()
            raise
        if split == "heads":
            self._heads += kv_heads
        made = ArraySequence(self, number, kv_heads, layers, capacity_tokens, split, shares)
        self._sequences.add(made)
        return made

    def adopt(self, make: Callable[[int], ArraySequence]) -> ArraySequence:
        """For `ArraySequence.fork`: add the sequence that is made for a number."""
        made = make(next(self._numbers))
        self._sequences.add(made)
        return made

    def rooms(self, split: str, kv_heads: int, capacity: int, layers: int,
              number: int) -> Iterable[tuple[int, slice, int]]:
        """(drive, KV heads, capacity) of each drive's part of a sequence.

        Args:
            split: heads or context.
            kv_heads: of a layer.
            capacity: tokens that each layer can hold.
            layers: how many.
            number: decides which drive has a layer's first stripe.
        """
        if split == "heads":
            even, more = divmod(kv_heads, self.drives)
            first = 0
            for place in range(self.drives):
                if heads := even + (place < more):
                    # The drives that got one more are others each time.
                    yield (self._heads + place) % self.drives, slice(first, first + heads), capacity
                    first += heads
            return
        # A stripe's tokens are what any drive says that they are.
        tokens = layout.stripe_pages(self.config, sparse=False) * self.config.tokens_per_page
        stripes, inside = divmod(capacity, tokens)
        for drive in range(self.drives):
            ranks = {(drive - number - layer) % self.drives for layer in range(layers)}
            most = max((stripes - rank + self.drives - 1) // self.drives * tokens
                       + (inside if stripes % self.drives == rank else 0) for rank in ranks)
            if most:
                yield drive, slice(0, kv_heads), most

    # Attention.

    def attend_many(self, plans: Series[ArrayPlan], *, timeout_s: float | None = None) -> list[AttendResult]:
        """Run several plans, of any sequences of this array, as one stream of jobs for each drive.

        Args:
            plans: from `ArraySequence.plan`.
            timeout_s: seconds that all of it may take.

        Raises:
            RequestError: a plan's sequence was freed or belongs to another array.
            DeviceStatusError: a job ended with a status other than OK.
            DeviceTimeoutError, CapacityError: see `Device.submit`.
        """
        return self.attend_many_async(plans).result(timeout_s)

    def attend_many_async(self, plans: Series[ArrayPlan]) -> ArrayFuture[list[AttendResult]]:
        """The same, without waiting for the end."""
        plans = list(plans)

        def finish(results: list[JobResult]) -> list[AttendResult]:
            waiting = iter(results)
            return [plan.finish([next(waiting) for _ in plan.jobs]) for plan in plans]

        return ArrayFuture(self.submit(plans), finish)

    def submit(self, plans: Series[ArrayPlan]) -> list[tuple[int, Future[JobResult]]]:
        """Begin the jobs of several plans; (drive, future) of each job.

        Raises:
            RequestError: a plan's sequence was freed or belongs to another array.
        """
        for plan in plans:
            plan.sequence.check_open()
            if plan.sequence.device is not self:
                raise RequestError("a plan belongs to a sequence of another array")
        jobs = [one for plan in plans for one in plan.jobs]
        futures: list[Future[JobResult] | None] = [None] * len(jobs)
        for drive, device in enumerate(self.devices):
            mine = [i for i, (where, _) in enumerate(jobs) if where == drive]
            if mine:
                submitted = _on(drive, device.submit, [jobs[i][1] for i in mine])
                for i, future in zip(mine, submitted, strict=True):
                    futures[i] = future
        return [(drive, future) for (drive, _), future in zip(jobs, futures, strict=True) if future is not None]


def open_array(targets: Iterable[str], config: Config | str = PAPER, **options: Any) -> DriveArray:
    """Open several devices as an array.

    Args:
        targets: for each drive, what `kvattic.open` takes.
        config: a configuration, or the name of a preset.
        options: see `kvattic.open`.

    Raises:
        RequestError: no target is given, or one does not exist.
        ConfigError: the preset does not exist.
    """
    devices: list[Device] = []
    try:
        for drive, target in enumerate(targets):
            devices.append(_on(drive, open_device, target, config, **options))
        return DriveArray(devices)
    except BaseException:
        for device in devices:
            with suppress(KvatticError):
                device.close()
        raise


# Helpers.


def _named(error: BaseException, drive: int) -> BaseException:
    """The same error, with the drive in its message."""
    if not isinstance(error, KvatticError):
        return error
    named = type(error).__new__(type(error))
    named.args = (f"drive {drive}: {error}", *error.args[1:])
    named.__dict__.update({name: value for name, value in error.__dict__.items() if name != "__notes__"})
    named.__cause__ = error
    return named


def _on(drive: int, action: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
    """Call `action`; its error names the drive."""
    try:
        return action(*arguments, **options)
    except KvatticError as error:
        raise _named(error, drive) from error


def _all_of(actions: Iterable[tuple[int, Callable[[], None]]]) -> None:
    """Call all actions, then raise the first error."""
    first: BaseException | None = None
    for drive, action in actions:
        try:
            _on(drive, action)
        except KvatticError as error:
            first = first or error
    if first is not None:
        raise first


def _begin(sequence: Sequence, key: Bits, value: Bits, layer: int) -> Future[None]:
    """Append; an error that is raised at once becomes the future's."""
    try:
        return sequence.append_async(key, value, layer=layer)
    except KvatticError as error:
        failed: Future[None] = Future(_NoDriver())
        failed.set_exception(error)
        return failed


class _NoDriver:
    """The `futures.Driver` of a future that is done from the start."""

    def __init__(self) -> None:
        self.lock = RLock()

    def drive(self, until: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Return: nothing is under way."""

    def advance(self, until: Callable[[], bool], slice_s: float) -> None:
        """Return: nothing is under way."""

    def defer(self, action: Callable[[], object]) -> None:
        """Call `action` at once."""
        action()

    def poll(self) -> int:
        """Return 0: there are no completions."""
        return 0


def _settle(futures: Iterable[Future[Any]], timeout_s: float | None) -> None:
    """Wait until all futures are done, on all drives at once; their errors stay in them.

    Raises:
        DeviceTimeoutError: they were not done in time.
    """
    try:
        wait(futures, timeout_s)
    except DeviceTimeoutError:
        raise DeviceTimeoutError(f"the drives were not done within {timeout_s:g} s") from None
