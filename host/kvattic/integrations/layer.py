"""One layer of a `DriveCache`: takes K and V, writes them and attends them."""

from collections.abc import Callable
from threading import local
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar
from weakref import ref

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvattic.driver.results import AttendResult
from kvattic.driver.sequence import Sequence
from kvattic.errors import RangeError, RequestError
from kvattic.integrations.masks import Flags
from kvattic.integrations.storage import round_to_storage, to_drive
from kvattic.spec.commands import Mode

if TYPE_CHECKING:
    from kvattic.integrations.cache import DriveCache

__all__ = ["MARK", "DriveLayer", "last_layer", "not_traced"]

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


class DriveLayer(CacheLayerMixin):
    """One layer of a `DriveCache`: as transformers see it.

    A position is a column of the batch; padding takes positions, but is not stored.

    Attributes:
        number: of the layer.
        batch_size: rows of the batch; there is no such attribute before the first ones came.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # of the mask: the drive holds all tokens, whatever the window

    def __init__(self, cache: "DriveCache", number: int) -> None:
        super().__init__()
        self.number = number
        self._cache = cache
        self._kept: list[Flags] = []
        self._given: torch.Tensor | None = None
        self._writes: list[Any] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take zones of flash for the rows of this batch."""
        del value_states
        rows, heads = key_states.shape[:2]
        self._cache.start(rows, heads)
        self.batch_size = rows
        self._kept = [np.zeros(0, np.bool_)] * rows
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
        cache = self._cache
        cache.check_step(self, key_states.shape[2])
        most = cache.device.config.head_dim
        for name, states in (("K", key_states), ("V", value_states)):
            if states.shape[-1] > most:
                raise RequestError(f"layer {self.number}: {name} has {states.shape[-1]} elements a head, the drive's "
                                   f"head_dim is {most}; it must be as large or larger: open it with config_for(model)")
        if key_states.shape[:3] != value_states.shape[:3]:
            raise RequestError(f"layer {self.number}: K and V must have the same heads and tokens, not "
                               f"{tuple(key_states.shape)} and {tuple(value_states.shape)}: a model that stores "
                               "something else in their place is not supported")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise RequestError(f"this DriveCache holds a batch of {self.batch_size}, not of {len(key_states)}; "
                               "reset() it, or use another one")
        if key_states.shape[1] != (heads := cache.sequences[0].kv_heads):
            raise RequestError(f"layer {self.number} has {key_states.shape[1]} KV heads, the layers before it {heads}: "
                               "a model whose layers differ in that is not supported")
        element = cache.device.config.element
        keys, values = (round_to_storage(states, element) for states in (key_states, value_states))
        setattr(keys, MARK, self)
        self._given = keys
        _last.layer = ref(self)
        return keys, values

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """Store the K and V that `update` returned, and attend them and all earlier ones.

        Args:
            module: the model's attention layer.
            query: (rows, q_heads, positions, head_dim).
            key: what `update` returned.
            value: likewise.
            mask: see `read_mask`.
            scaling: of the scores; None: head_dim**-0.5.

        Returns:
            (rows, positions, q_heads, elements of a head of V).

        Raises:
            RequestError: a mask or a number that the drive cannot take.
            RangeError: a result beyond what the drive computes exactly; it names the layer and the row of the batch.
        """
        given = self._given
        if given is None or given is not key:
            raise RequestError(f"layer {self.number}: K are not those that the DriveCache returned last")
        try:
            return self._attend(module, query, key, value, mask, scaling)
        except BaseException as error:
            self._cache.fail(error)
            raise

    def _attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        cache, past, config = self._cache, self._length, self._cache.device.config
        rows = cache.rows(mask, self._kept, key.shape[2])
        cache.check_rows(rows)
        # Errors of those that are done are raised by the next call of their sequence.
        self._writes = [write for write in self._writes if not write.done()]
        if past == 0:
            cache.write_next(self)
        for row, sequence in enumerate(cache.sequences):
            if len(new := rows.new[row]):
                keys, values = (to_drive(states[row], config.head_dim)[:, new] for states in (key, value))
                self._writes.append(sequence.append_async(keys, values, layer=self.number))
        self._kept, self._given = rows.kept, None
        query = round_to_storage(query, config.element)
        if past == 0:
            # All K and V are at hand: the model attends them and goes on to the next layer while the drive writes.
            local: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=0.0,
                                                         scaling=scaling)[0]
            cache.device.poll()
            if self.number == 0:
                cache.meter.prompt_tokens += sum(map(len, rows.new))
            return local
        # The tokens are in device DRAM and can be attended while full stripes move to flash.  A sparse mode attends all
        # that is in DRAM, which must not depend on how far that is.
        if cache.mode is not Mode.DENSE:
            self.wait()
        busy = [row for row, new in enumerate(rows.new) if len(new)]
        plans: list[Any] = [
            cache.plan_row(cache.sequences[row], self.number, to_drive(query[row], config.head_dim)[:, rows.new[row]],
                        rows.start[row], rows.end[row],
                        query.shape[-1]**-0.5 if scaling is None else float(scaling)) for row in busy]
        width = value.shape[-1]
        output = np.zeros((len(query), query.shape[2], query.shape[1], width), np.float32)
        results = self._run(plans, busy)
        cache.meter.count(plans, results, sum(map(len, rows.new)), new_step=self.number == 0)
        for row, result in zip(busy, results, strict=True):
            output[row, rows.new[row]] = result.output[..., :width].swapaxes(0, 1)
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
        self._given = None

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
        if left < self._length:
            kept = [row[:left] for row in self._kept]
            self._check_crop([int(row.sum()) for row in kept])
            for sequence, row in zip(self._cache.sequences, kept, strict=True):
                assert isinstance(sequence, Sequence)
                sequence.truncate(int(row.sum()), layer=self.number)
            self._kept = kept

    def _check_crop(self, left: list[int]) -> None:
        """Before anything is removed of any row: whether all that is to go can."""
        for row, (sequence, tokens) in enumerate(zip(self._cache.sequences, left, strict=True)):
            if not isinstance(sequence, Sequence):
                raise RequestError("tokens can be removed from a single drive only, not from several")
            length, flushed = sequence.length(self.number), sequence.flushed(self.number)
            if tokens < min(length, flushed):
                raise RequestError(
                    f"layer {self.number}, row {row} of the batch: {length - tokens} tokens were to be removed, but "
                    f"only the newest {length - flushed} can be: others are in flash, where nothing can be removed; "
                    f"make a DriveCache with more held_tokens than {sequence.held_tokens}, leave a multiple of "
                    f"{sequence.stripe_tokens} tokens, or copy the DriveCache (copy.deepcopy) before they come")

    def reset(self) -> None:
        """See `DriveCache.reset`, which is of all layers."""
        self._kept, self._given, self._writes, self.is_initialized = [], None, [], False
        self.__dict__.pop("batch_size", None)

    def fork(self, cache: "DriveCache") -> "DriveLayer":
        """The same layer of a cache whose rows are forks of this one's."""
        made = DriveLayer(cache, self.number)
        made.resume(self._kept)
        return made

    def resume(self, kept: list[Flags]) -> None:
        """Go on with rows that hold tokens already.

        Args:
            kept: of each row: which positions are tokens, not padding.
        """
        self._kept = list(kept)
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
