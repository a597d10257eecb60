"""One layer of a `DriveCache`: takes K and V, writes them and attends them."""

from collections.abc import Callable
from copy import deepcopy
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, TypeVar
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvattic.driver.results import AttendResult
from kvattic.driver.sequence import Sequence
from kvattic.errors import RangeError, RequestError
from kvattic.integrations.local import attend_locally
from kvattic.integrations.masks import Flags, Rows, attended_tokens
from kvattic.integrations.storage import round_to_kv, round_to_storage, some_tokens, stand_for, to_drive
from kvattic.spec.commands import Kind, Mode

if TYPE_CHECKING:
    from kvattic.integrations.cache import DriveCache

__all__ = ["MARK", "CrossLayer", "DriveLayer", "HybridLayer", "last_layer", "not_traced"]

E = TypeVar("E", bound=BaseException)
P = ParamSpec("P")
T = TypeVar("T")

MARK = "_kvattic_layer"
"""The attribute of K by which the backend finds the layer that returned them."""

_last = local()
"""In `layer`, a weak reference to the `DriveLayer` that took K and V last, of each thread."""


def not_traced(function: Callable[P, T]) -> Callable[P, T]:
    """Exclude a function from torch.compile, which then calls it as it is, between two graphs."""
    called: Callable[P, T] = torch.compiler.disable(function)
    return called


def last_layer() -> "DriveLayer | None":
    """The layer that took K and V last in this thread, if it is still there."""
    layer: DriveLayer | None = getattr(_last, "layer", lambda: None)()
    return layer


class _Call(NamedTuple):
    """What a model gives its attention besides K and V; see `DriveLayer.attend`."""

    module: Any
    query: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    sinks: torch.Tensor | None
    is_causal: bool | None


class DriveLayer(CacheLayerMixin):
    """One layer of a `DriveCache`: as transformers see it.

    A position is a column of the batch; padding takes positions, but is not stored.

    Args:
        cache: which it is part of.
        number: of the model's layer.
        slot: of the layer among those of the cache's sequences.
        window: the newest positions that transformers' own cache keeps of such a layer, one of them new; None: all.

    Attributes:
        number, slot, window: the same.
        batch_size: rows of the batch; there is no such attribute before the first ones came.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # of the mask: the drive holds all tokens, whatever the window

    def __init__(self, cache: "DriveCache", number: int, slot: int, *, window: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.slot = slot
        self.window = window
        self._cache = cache
        self._before: list[Flags] = []
        self._kept: list[Flags] = []
        self._given: torch.Tensor | None = None
        self._stored: list[torch.Tensor] = []   # K and V that were given, as the drive will have them
        self._values: Callable[[], torch.Tensor | None] = lambda: None
        self._attended: Callable[[], torch.Tensor | None] = lambda: None
        self._writes: list[Any] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take zones of flash for the rows of this batch."""
        rows, heads = key_states.shape[:2]
        self._cache.start(rows, heads, key_states.shape[2])
        self.batch_size = rows
        self._kept = [np.zeros(0, np.bool_)] * rows
        # Empty, for models that look whether there are any (Mllama).
        self.keys, self.values = key_states.new_zeros(0), value_states.new_zeros(0)
        self.is_initialized = True

    @not_traced
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take K and V of new positions, which the attention backend will then store.

        Returns:
            These K and V only, as the drive will hold them.

        Raises:
            RequestError: the drive cannot hold such K and V, the batch changed, the last K and V were not attended by
                the backend, or an earlier step failed.
        """
        self._cache.check_step(self, key_states.shape[2])
        self._check_states(key_states, value_states)
        if not self.is_initialized:
            DriveLayer.lazy_initialization(self, key_states, value_states)
        if len(key_states) != self.batch_size:
            raise RequestError(f"this DriveCache holds a batch of {self.batch_size}, not of {len(key_states)}; "
                               "reset() it, or use another one")
        if key_states.shape[1] != (heads := self._cache.sequences[0].kv_heads):
            raise RequestError(f"layer {self.number} has {key_states.shape[1]} KV heads, the layers before it {heads}: "
                               "a model whose layers differ in that is not supported")
        scales = self._scales
        stored = [round_to_kv(states, self._cache.device.config, scale)
                  for states, scale in zip((key_states, value_states), scales, strict=True)]
        keys, values = (stand_for(states, scale, given.dtype) for states, scale, given in zip(
            stored, scales, (key_states, value_states), strict=True))
        setattr(keys, MARK, self)
        self._given, self._values, self._stored = keys, ref(values), stored
        _last.layer = ref(self)
        return keys, values

    @property
    def _scales(self) -> list[torch.Tensor | None]:
        """What a stored 1.0 of K, and of V, stands for: float32, (kv_heads,), or None."""
        found = [self._cache.sequences[0].scales(kind, self.slot) for kind in (Kind.KEY, Kind.VALUE)]
        return [None if scale is None else torch.from_numpy(scale) for scale in found]

    def _check_states(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Check that new K and V fit the drive."""
        if latent := self._cache.latent_width(keys):
            raise RequestError(f"layer {self.number}: the model stores one compressed vector a token in the cache "
                               f"(latent attention, kv_lora_rank {latent}), not K and V; the drive attends K and V of "
                               "each head")
        most = self._cache.device.config.head_dim
        for name, states in (("K", keys), ("V", values)):
            if states.shape[-1] > most:
                raise RequestError(f"layer {self.number}: {name} has {states.shape[-1]} elements a head, the drive's "
                                   f"head_dim is {most}; it must be as large or larger: open it with config_for(model)")
        if keys.shape[:3] != values.shape[:3]:
            raise RequestError(f"layer {self.number}: K and V must have the same heads and tokens, not "
                               f"{tuple(keys.shape)} and {tuple(values.shape)}: a model that stores "
                               "something else in their place is not supported")

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, scaling: float | None, *, sinks: torch.Tensor | None = None,
               is_causal: bool | None = None) -> torch.Tensor:
        """Store the K and V that `update` returned, and attend them and all earlier ones.

        Layers that share K and V call it again with those that another one has stored.

        Args:
            module: the model's attention layer.
            query: (rows, q_heads, positions, head_dim).
            key: what `update` returned.
            value: likewise.
            mask: see `masks.read_mask`.
            scaling: of the scores; None: head_dim**-0.5.
            sinks: (q_heads,), learned: what each head adds to its softmax as a score whose V is zero.
            is_causal: whether no mask means causal; None: what the module says.

        Returns:
            (rows, positions, q_heads, elements of a head of V).

        Raises:
            RequestError: a mask or a number that the drive cannot take.
            RangeError: a result beyond what the drive computes exactly; it names the layer and the row of the batch.
        """
        if key is not self._given and key is not self._attended():
            raise RequestError(f"layer {self.number}: K are not those that the DriveCache returned last")
        if sinks is not None and self._cache.mode.blended:
            raise self.fail(RequestError(
                f"layer {self.number}: the model has learned sinks (s_aux), which need the weights of all tokens; "
                f"mode {self._cache.mode.name.lower()} blends in the mean of V without them: use mode='dense' or "
                "'centroid'"))
        if not self._are_values(value):
            raise self.fail(RequestError(
                f"layer {self.number}: the model changes V after the DriveCache returned them, before it attends them: "
                "such models are not supported"))
        call = _Call(module, query, mask, scaling, sinks, is_causal)
        try:
            return self._attend(call, key, value)
        except BaseException as error:
            self._cache.fail(error)
            raise

    def _are_values(self, value: torch.Tensor) -> bool:
        """Whether V are those that `update` returned, or these with zeros behind them."""
        values = self._values()
        if value is values:
            return True
        if values is None or value.shape[:3] != values.shape[:3] or value.shape[3] < (width := values.shape[3]):
            return False
        return torch.equal(value[..., :width], values) and not value[..., width:].any()

    def _attend(self, call: _Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write what is new, then attend where all K and V are at hand: in the model or in the drive."""
        cache, new = self._cache, key is self._given
        if new:
            self._before = self._kept
        causal = getattr(call.module, "is_causal", True) if call.is_causal is None else call.is_causal
        if call.mask is None and not causal and key.shape[2] > 1:
            raise RequestError(f"layer {self.number}: the model gives no attention mask and does not say that it is "
                               "causal (is_causal), so which tokens are to be attended is not known")
        rows = cache.rows(call.mask, self._before, key.shape[2])
        cache.check_rows(rows)
        if new:
            self._write(rows, key, value)
        if not len(self._before[0]):
            # All K and V are at hand: the model attends them and goes on to the next layer while the drive writes.
            query = round_to_storage(call.query, cache.device.config.element)
            local = attend_locally(call.module, query, key, value, call.mask, scaling=call.scaling,
                                   sinks=call.sinks, is_causal=call.is_causal)
            cache.device.poll()
            if self.slot == 0 and new:
                cache.meter.prompt_tokens += sum(map(len, rows.new))
            return local
        return self._attend_in_drive(call, self._in_window(rows), value.shape[-1], new_step=self.slot == 0 and new)

    def _in_window(self, rows: Rows) -> Rows:
        """A step that attends nothing before the window, which some models' masks do not say (Moshi)."""
        gone = 0 if self.window is None else len(self._before[0]) - self.window + 1
        if gone <= 0:
            return rows
        first = [int(kept[:gone].sum()) for kept in rows.kept]
        return rows._replace(start=[
            np.full(len(new), least) if start is None else np.maximum(start, least)
            for new, start, least in zip(rows.new, rows.start, first, strict=True)])

    def _write(self, rows: Rows, key: torch.Tensor, value: torch.Tensor) -> None:
        """Begin to write the new K and V."""
        cache, config = self._cache, self._cache.device.config
        # Errors of those that are done are raised by the next call of their sequence.
        self._writes = [write for write in self._writes if not write.done()]
        if not len(self._before[0]):
            cache.write_next(self)
        if self.slot == 0:
            cache.make_room(max(int(kept.sum()) for kept in rows.kept))
        keys, values = (to_drive(states, config.head_dim, config.element) for states in self._stored)
        for row, sequence in enumerate(cache.sequences):
            if len(new := rows.new[row]):
                self._writes.append(sequence.append_async(some_tokens(keys[row], new), some_tokens(values[row], new),
                                                          layer=self.slot))
        self._kept, self._given, self._stored, self._attended = rows.kept, None, [], ref(key)

    def _attend_in_drive(self, call: _Call, rows: Rows, width: int, *, new_step: bool) -> torch.Tensor:
        """Attention of the new tokens over all that the drive holds.

        Args:
            call: what the model gives.
            rows: what the mask says.
            width: elements of a head of V.
            new_step: whether it is the first layer of a step, for the report.
        """
        cache, config, query = self._cache, self._cache.device.config, call.query
        # The tokens are in device DRAM and can be attended while full stripes move to flash.  A sparse mode attends all
        # that is in DRAM, which must not depend on how far that is.
        if cache.mode is not Mode.DENSE:
            self.wait()
        busy = [row for row, new in enumerate(rows.new) if len(new)]
        scale = query.shape[-1]**-0.5 if call.scaling is None else float(call.scaling)
        queries = to_drive(query, config.head_dim, config.element)
        plans: list[Any] = [
            cache.plan_row(cache.sequences[row], self.slot, some_tokens(queries[row], rows.new[row]),
                           rows.start[row], rows.end[row], scale) for row in busy]
        output = np.zeros((len(query), query.shape[2], query.shape[1], width), np.float32)
        results = self._run(plans, busy)
        cache.meter.count(plans, results, sum(map(len, rows.new)), new_step=new_step)
        for row, result in zip(busy, results, strict=True):
            found = result.output[..., :width]
            if call.sinks is not None:
                found = found * _without_sinks(result, call.sinks)
            output[row, rows.new[row]] = found.swapaxes(0, 1)
        return torch.from_numpy(output).to(query.device, query.dtype)

    def _run(self, plans: list[Any], rows: list[int]) -> list[AttendResult]:
        """Attend all rows at once; results out of range are errors that name theirs."""
        device = self._cache.device
        try:
            return device.attend_many(plans)
        except RangeError as error:
            for row, plan in zip(rows, plans, strict=True):
                try:
                    device.attend_many([plan])  # alone, to know which of them it was
                except RangeError as alone:
                    raise RangeError(f"layer {self.number}, row {row} of the batch: {alone}") from error
            raise

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CapacityError, DeviceStatusError: see `Sequence.append`.
        """
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    @property
    def unattended(self) -> bool:
        """Whether K and V that `update` returned have not come to `attend` yet."""
        return self._given is not None

    def drop(self) -> None:
        """Forget K and V that `update` returned."""
        self._given, self._stored = None, []

    def fail(self, error: E) -> E:
        """See `DriveCache.fail`."""
        return self._cache.fail(error)

    @property
    def _length(self) -> int:
        return len(self._kept[0]) if self._kept else 0

    @not_traced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that a mask must have for so many new ones, and the first one's number, 0."""
        return self._length + query_length, 0

    @not_traced
    def get_seq_length(self) -> int:
        """Positions so far."""
        return self._length

    def get_max_length(self) -> int:
        """Tokens that each row can hold."""
        return self._cache.capacity_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions.

        Args:
            tokens_to_remove: minus their number, as transformers want it.

        Raises:
            RequestError: a positive number, or some of these tokens are in flash.
        """
        if tokens_to_remove > 0:
            raise RequestError(f"crop takes minus the number of positions to remove, not {tokens_to_remove}")
        left = max(self._length + tokens_to_remove, 0)
        self._cache.forget_masks()
        self.wait()
        self._attended = lambda: None
        if left < self._length:
            kept = [row[:left] for row in self._kept]
            self._check_crop([int(row.sum()) for row in kept])
            for sequence, row in zip(self._cache.sequences, kept, strict=True):
                assert isinstance(sequence, Sequence)
                sequence.truncate(int(row.sum()), layer=self.slot)
            self._kept = kept

    def _check_crop(self, left: list[int]) -> None:
        """Before anything is removed of any row: whether all that is to go can."""
        for row, (sequence, tokens) in enumerate(zip(self._cache.sequences, left, strict=True)):
            if not isinstance(sequence, Sequence):
                raise RequestError("tokens can be removed from a single drive only, not from several")
            length, flushed = sequence.length(self.slot), sequence.flushed(self.slot)
            if tokens < min(length, flushed):
                raise RequestError(
                    f"layer {self.number}, row {row} of the batch: {length - tokens} tokens were to be removed, but "
                    f"only the newest {length - flushed} can be: others are in flash, where nothing can be removed; "
                    f"make a DriveCache with more held_tokens than {sequence.held_tokens}, leave a multiple of "
                    f"{sequence.stripe_tokens} tokens, or copy the DriveCache (copy.deepcopy) before they come")

    def reset(self) -> None:
        """See `DriveCache.reset`, which is of all layers."""
        self._before, self._kept, self._given, self._writes, self.is_initialized = [], [], None, [], False
        self._stored = []
        self._attended = lambda: None
        self.__dict__.pop("batch_size", None)

    def fork(self, cache: "DriveCache") -> "DriveLayer":
        """The same layer of a cache whose rows are forks of this one's."""
        made = type(self)(cache, self.number, self.slot, window=self.window)
        made.keys, made.values = self.keys, self.values
        made.resume(self._kept)
        return made

    def resume(self, kept: list[Flags]) -> None:
        """Go on with rows that hold tokens already.

        Args:
            kept: of each row: which positions are tokens, not padding.
        """
        self._kept = list(kept)
        self._attended = lambda: None
        if kept:
            self.batch_size = len(kept)
            self.is_initialized = True

    @property
    def kept(self) -> list[Flags]:
        """Of each row: which positions are tokens, not padding."""
        return list(self._kept)

    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        """Refused: the rows of all layers are chosen together, see `DriveCache.reorder_cache`."""
        raise RequestError("the rows of a DriveCache are chosen for all layers together: call the DriveCache")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused, see `reorder_cache`."""
        self.reorder_cache(repeats)

    def batch_select_indices(self, indices: Any) -> NoReturn:
        """Refused, see `reorder_cache`."""
        self.reorder_cache(indices)

    def offload(self) -> None:
        """Do nothing: K and V are not in this machine."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""


class HybridLayer(LinearAttentionLayer, DriveLayer):
    """A layer with attention, in the drive, and the state of a linear one, in this machine."""

    is_compileable = False
    is_croppable = False

    def __init__(self, cache: "DriveCache", number: int, slot: int, number_of_states: int = 1, *,
                 window: int | None = None) -> None:
        DriveLayer.__init__(self, cache, number, slot, window=window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for K and V, which are given by position, or for a state, which is given by name."""
        (DriveLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def fork(self, cache: "DriveCache") -> "HybridLayer":
        """See `DriveLayer.fork`; the state is copied."""
        made = HybridLayer(cache, self.number, self.slot, self.number_of_states, window=self.window)
        state = set(vars(LinearAttentionLayer(self.number_of_states)))
        for name in state:
            setattr(made, name, deepcopy(getattr(self, name)))
        made.resume(self._kept)
        return made

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the state of a linear layer cannot go back.

        Raises:
            RequestError: always, but for no tokens.
        """
        if tokens_to_remove:
            raise RequestError(f"layer {self.number} has the state of a linear layer too, from which tokens cannot be "
                               "removed")

    def reset(self) -> None:
        """Forget both."""
        DriveLayer.reset(self)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def offload(self) -> None:
        """Do nothing: K and V are not in this machine, and the state is small."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""


class CrossLayer(DriveLayer):
    """One layer of cross-attention: K and V of the encoder's tokens, written once and attended at each step."""

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, scaling: float | None, *, sinks: torch.Tensor | None = None,
               is_causal: bool | None = None) -> torch.Tensor:
        """Attend all tokens of the encoder; the first time they are at hand, and stored.

        Args:
            module: the model's attention layer.
            query: (rows, q_heads, positions, head_dim).
            key: what `update` returned, or `keys`.
            value: likewise.
            mask: see `masks.attended_tokens`.
            scaling: of the scores; None: head_dim**-0.5.
            sinks: see `DriveLayer.attend`.
            is_causal: does not matter.

        Returns:
            (rows, positions, q_heads, elements of a head of V).

        Raises:
            RequestError: the mask lets the queries attend different tokens, or others than are stored.
            RangeError: see `DriveLayer.attend`.
        """
        call = _Call(module, query, mask, scaling, sinks, False)
        try:
            return self._attend(call, key, value)
        except BaseException as error:
            self._cache.fail(error)
            raise

    def _attend(self, call: _Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache, rows, tokens = self._cache, len(key), key.shape[2]
        kept = attended_tokens(call.mask, rows, tokens)
        every = np.arange(call.query.shape[2])
        if key is self._given:
            self._before = self._kept
            stored = [np.flatnonzero(row) for row in kept]
            self._write(Rows(stored, kept, [None] * rows, [None] * rows), key, value)
            self._stand_in(key, value)
            if self.slot == 0:
                cache.meter.prompt_tokens += sum(map(len, stored))
            query = round_to_storage(call.query, cache.device.config.element)
            found = attend_locally(call.module, query, key, value, call.mask, scaling=call.scaling,
                                   sinks=call.sinks, is_causal=False)
            cache.device.poll()
            return found
        if key is not self.keys:
            raise RequestError(f"layer {self.number}: K are not those that the DriveCache returned last")
        for row, (now, before) in enumerate(zip(kept, self._kept, strict=True)):
            if not np.array_equal(now, before):
                raise RequestError(f"row {row} of the batch: the mask of the encoder's tokens is another one than in "
                                   "the first step, when they were stored")
        ends = [np.full(len(every), row.sum()) if row.any() else None for row in kept]
        new = [every if row.any() else every[:0] for row in kept]
        return self._attend_in_drive(call, Rows(new, kept, [None] * rows, ends), value.shape[-1],
                                     new_step=self.slot == 0)

    def _stand_in(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what the model gets as K and V in later steps: as large as these, but nothing is in it."""
        rows = len(self._kept)
        self.keys, self.values = (states.new_zeros(1).expand(rows, *states.shape[1:]) for states in (key, value))
        setattr(self.keys, MARK, self)

    def resume(self, kept: list[Flags]) -> None:
        """See `DriveLayer.resume`."""
        super().resume(kept)
        if self.keys is not None:
            self._stand_in(self.keys, self.values)

    def reset(self) -> None:
        """See `DriveCache.reset`."""
        super().reset()
        self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: the encoder's tokens stay, whatever is removed of the decoder's."""


def _without_sinks(result: AttendResult, sinks: torch.Tensor) -> NDArray[np.float32]:
    """The share of the tokens in a softmax over them and learned sinks: float32, (q_heads, n_queries, 1)."""
    own: NDArray[np.float64] = sinks.detach().to("cpu", torch.float64).numpy().reshape(-1, 1)
    with np.errstate(over="ignore"):    # nothing is attended: a share of zero
        share = 1 / (1 + np.exp(own - result.lse))
    return share.astype(np.float32)[..., None]
