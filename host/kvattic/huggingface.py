"""Hugging Face transformers with K and V in the drive: `DriveCache` and the attention backend `kvattic`.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvattic")
    with kvattic.open("model", config_for(model)) as device, DriveCache(device, model.config) as cache:
        model.generate(**inputs, past_key_values=cache)

Importing this module registers the backend; it needs torch and transformers (the extra `transformers`).  What is
computed where: docs/transformers.md.
"""

from collections import deque
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvattic.array import ArrayPlan, ArraySequence, DriveArray
from kvattic.commands import Mode
from kvattic.config import HEAD_DIMS, MAX_ROWS, PAPER, Config, preset
from kvattic.driver import Device
from kvattic.errors import ConfigError, KvatticError, RequestError
from kvattic.formats import Element
from kvattic.jobs import AttendPlan, end_block
from kvattic.layout import unit_bits
from kvattic.sequence import Sequence

__all__ = ["NAME", "DriveCache", "DriveLayer", "config_for", "round_to_storage"]

NAME = "kvattic"
"""What `attn_implementation` is set to."""

LAYERS_IN_FLIGHT = 2
"""Layers of a prompt that are written while the next one is computed, at most."""

Flags = NDArray[np.bool_]

_STORAGE = {Element.FP16: torch.float16, Element.BF16: torch.bfloat16}
_MARK = "_kvattic_layer"
_CHANGES = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments of an attention function that change its result in ways that the drive does not know."""


def config_for(model: Any, base: Config | str = PAPER, *, queries: int = 1, **changes: Any) -> Config:
    """A drive's configuration that a model's attention fits.

    The head dimension is the smallest of the drive's that holds the model's, the query rows those of a KV head (16 at
    most), the storage format bf16 for a model in bfloat16 and else fp16; the sparse modes are left out where the head
    dimension forbids them.

    Args:
        model: a transformers model, or its configuration.
        base: everything else: a configuration, or the name of a preset.
        queries: tokens whose query rows share a pass over K and V; with a draft model, one more than it drafts at once.
        changes: fields of `Config`, which come last.

    Raises:
        ConfigError: no drive has such heads, or a field is not supported.
    """
    text = getattr(model, "config", model).get_text_config(decoder=True)
    heads, dim, kv_heads = _heads(text)
    fitting = [size for size in HEAD_DIMS if size >= dim]
    if not fitting:
        raise ConfigError(f"the model's head_dim is {dim}, the drive's is at most {HEAD_DIMS[-1]}")
    dtype = getattr(model, "dtype", None) or getattr(text, "dtype", None)
    wanted = {"head_dim": fitting[0], "rows": min(heads // kv_heads * queries, MAX_ROWS),
              "element": Element.BF16 if dtype == torch.bfloat16 else Element.FP16} | changes
    base = preset(base) if isinstance(base, str) else base
    try:
        return replace(base, **wanted)
    except ConfigError:
        if "sparse" in changes or not base.sparse:
            raise
        return replace(base, **wanted, sparse=False)


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, their dimension, KV heads."""
    heads = int(config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(dim), int(getattr(config, "num_key_value_heads", None) or heads)


def round_to_storage(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Numbers as the drive holds them, in their own type: rounded once to nearest, ties to even."""
    return values.to(_STORAGE[element]).to(values.dtype)


def _array(values: torch.Tensor, dim: int) -> NDArray[np.float32]:
    """(heads, tokens, head_dim) for the drive, whose head_dim may be larger: the rest is zero."""
    array: NDArray[np.float32] = values.detach().to("cpu", torch.float32).numpy()
    missing = dim - array.shape[-1]
    return np.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array


class _Rows(NamedTuple):
    """What a mask says of a batch's rows.

    Members:
        new: int, (tokens,), of each row: which of the new positions are tokens, not padding.
        window: of each row: tokens that each query attends, its own the last; None: all.
        kept: bool, (positions,), of each row: which positions are tokens, the new ones included.
    """

    new: list[NDArray[np.intp]]
    window: list[int | None]
    kept: list[Flags]


def _read_mask(mask: torch.Tensor | None, before: list[Flags], count: int) -> _Rows:
    """Tokens and windows of a batch's rows.

    Args:
        mask: (rows, 1, count, positions), bool, or floats that are 0 where it attends; None: causal, all are tokens.
        before: of each row, which earlier positions are tokens.
        count: new positions.

    Raises:
        RequestError: the mask is none of causal attention over a window.
    """
    past = len(before[0])
    if mask is None:
        every = np.arange(count)
        return _Rows([every] * len(before), [None] * len(before),
                     [np.concatenate([kept, np.ones(count, np.bool_)]) for kept in before])
    if mask.shape[1] != 1 or tuple(mask.shape[2:]) != (count, past + count) or mask.shape[0] not in (1, len(before)):
        raise RequestError(f"the attention mask must be of shape ({len(before)}, 1, {count}, {past + count}), the same "
                           f"for all heads, not {tuple(mask.shape)}")
    flags = (mask if mask.dtype == torch.bool else mask == 0).detach().to("cpu")[:, 0]
    rows = _Rows([], [], [])
    for row, kept in enumerate(before):
        flag: Flags = flags[row if len(flags) > 1 else 0].numpy()
        # A token attends itself, padding is attended by nobody.
        own = np.diagonal(flag, past).copy()
        new, kept = np.flatnonzero(own), np.concatenate([kept, own])
        rows.new.append(new)
        rows.kept.append(kept)
        # The first tokens are attended by the model itself, with any mask.
        rows.window.append(_window(flag[new][:, kept], row) if past else None)
    return rows


def _window(attended: Flags, row: int) -> int | None:
    """The window of queries that are a sequence's last tokens: bool, (queries, tokens)."""
    queries, tokens = attended.shape
    end = np.arange(tokens - queries, tokens) + 1
    size = attended.sum(axis=1)
    place = np.arange(tokens)
    within = (place < end[:, None]) & (place >= (end - size)[:, None])
    window: int | None = None
    good = bool((attended == within).all())
    cut = size < end
    if good and cut.any():
        window = int(size[cut][0])
        good = bool((size == np.minimum(end, window)).all())
    if not good:
        raise RequestError(f"row {row} of the batch: the drive attends causally, all tokens or a window of the last "
                           "ones; this attention mask asks for something else")
    return window


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
        rows, heads, _, dim = key_states.shape
        self._cache._start(rows, heads, dim)
        self.batch_size = rows
        self._kept = [np.zeros(0, np.bool_)] * rows
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take K and V of new positions, which the attention backend will then store.

        Returns:
            These K and V only, as the drive will hold them.

        Raises:
            RequestError: another attention backend is at work, or the batch changed.
        """
        if self._given is not None:
            raise RequestError(f"layer {self.number}: the earlier K and V of this DriveCache went to another attention "
                               f"backend; use it with attn_implementation={NAME!r}, and reset() it after an error")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise RequestError(f"this DriveCache holds a batch of {self.batch_size}, not of {len(key_states)}; "
                               "reset() it, or use another one")
        element = self._cache.device.config.element
        keys, values = (round_to_storage(states, element) for states in (key_states, value_states))
        setattr(keys, _MARK, self)
        self._given = keys
        return keys, values

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """Store the K and V that `update` returned, and attend them and all earlier ones.

        Args:
            module: the model's attention layer.
            query: (rows, q_heads, positions, head_dim).
            key: what `update` returned.
            value: likewise.
            mask: see `_read_mask`.
            scaling: of the scores; None: head_dim**-0.5.

        Returns:
            (rows, positions, q_heads, head_dim).

        Raises:
            RequestError: a mask or a number that the drive cannot take.
        """
        given = self._given
        if given is None or given is not key:
            raise RequestError(f"layer {self.number}: K are not those that the DriveCache returned last")
        cache, past, config = self._cache, self.get_seq_length(), self._cache.device.config
        dim = query.shape[-1]
        rows = cache._rows(mask, self._kept, key.shape[2])
        # Errors of those that are done are raised by the next call of their sequence.
        self._writes = [write for write in self._writes if not write.done()]
        if past == 0:
            cache._write_next(self)
        for row, sequence in enumerate(cache.sequences):
            if len(new := rows.new[row]):
                keys, values = (_array(states[row], config.head_dim)[:, new] for states in (key, value))
                self._writes.append(sequence.append_async(keys, values, layer=self.number))
        self._kept, self._given = rows.kept, None
        query = round_to_storage(query, config.element)
        if past == 0:
            # All K and V are at hand: the model attends them and goes on to the next layer while the drive writes.
            local: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=0.0,
                                                         scaling=scaling)[0]
            cache.device.poll()
            return local
        # The tokens are in device DRAM and can be attended while full stripes move to flash.  A sparse mode attends all
        # that is in DRAM, which must not depend on how far that is.
        if cache._mode is not Mode.DENSE:
            self.wait()
        plans: list[Any] = []
        busy = [row for row, new in enumerate(rows.new) if len(new)]
        for row in busy:
            queries = _array(query[row], config.head_dim)[:, rows.new[row]]
            plans.append(cache._plan(cache.sequences[row], self.number, queries, rows.window[row],
                                     dim**-0.5 if scaling is None else float(scaling)))
        output = np.zeros((len(query), query.shape[2], query.shape[1], dim), np.float32)
        for row, result in zip(busy, cache.device.attend_many(plans), strict=True):
            output[row, rows.new[row]] = result.output[..., :dim].swapaxes(0, 1)
        return torch.from_numpy(output).to(query.device, query.dtype)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CapacityError, DeviceStatusError: see `Sequence.append`.
        """
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that a mask must have for so many new ones, and the first one's number, 0."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Positions so far."""
        return len(self._kept[0]) if self._kept else 0

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
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        self._cache._read.clear()
        self.wait()
        if left < self.get_seq_length():
            kept = [row[:left] for row in self._kept]
            for sequence, row in zip(self._cache.sequences, kept, strict=True):
                if not isinstance(sequence, Sequence):
                    raise RequestError("tokens can be removed from a single drive only, not from several")
                sequence.truncate(int(row.sum()), layer=self.number)
            self._kept = kept

    def reset(self) -> None:
        """See `DriveCache.reset`, which is of all layers."""
        self._kept, self._given, self._writes, self.is_initialized = [], None, [], False
        self.__dict__.pop("batch_size", None)

    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        """Refused: rows of the batch are sequences in flash, which are not copied."""
        raise RequestError("K and V in the drive cannot be copied from one row of the batch to another: no beam search")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused, see `reorder_cache`."""
        self.reorder_cache(repeats)

    def batch_select_indices(self, indices: Any) -> NoReturn:
        """Refused, see `reorder_cache`."""
        self.reorder_cache(indices)

    def offload(self) -> None:
        """Nothing: K and V are not in this machine."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""


class DriveCache(Cache):
    """K and V of a batch in the drive: what `past_key_values` is given, with attn_implementation="kvattic".

    Usable as a context manager, which gives the flash back at the end; so does `Device.close`.  Each row of the batch
    is a `Sequence` of its own, made when the first tokens come.

    Args:
        device: the drive, or several as one; its head_dim must be the model's or larger (`config_for`).
        config: the model's configuration.
        capacity_tokens: tokens that each row can hold, prompt and answer; the model's most positions if None.
        held_tokens: with a draft model: the newest tokens, which stay in device DRAM so that rejected drafts can be
            removed.  As many as are drafted at once, at least.
        mode: what a decode step attends: `commands.Mode` or its name in lower case; prompts are attended densely.
        channels: see `Sequence.attend`, as the following.
        units: no more are attended than there are.
        local: likewise.
        unit: of the mode centroid, too; a codeword's tokens if None.
        options: of the sequences, see `Device.create_sequence`.

    Attributes:
        device: the drive.
        capacity_tokens: tokens that each row can hold.
        sequences: one for each row of the batch; none before the first tokens.

    Raises:
        RequestError: a wrong mode or number.
    """

    def __init__(self, device: Device | DriveArray, config: Any, *, capacity_tokens: int | None = None,
                 held_tokens: int = 64, mode: Mode | str = Mode.DENSE, channels: int | None = None,
                 units: int | None = None, local: int = 0, unit: int | None = None, **options: Any) -> None:
        text = config.get_text_config(decoder=True)
        names = {one.name.lower(): one for one in Mode}
        found = names.get(mode) if isinstance(mode, str) else mode
        if not isinstance(found, Mode):
            raise RequestError(f"mode must be one of {', '.join(names)}, not {mode!r}")
        if found is Mode.DENSE and (channels, units, local, unit) != (None, None, 0, None):
            raise RequestError("mode dense attends all tokens: channels, units, local and unit must not be given")
        if found is not Mode.DENSE and units is None:
            raise RequestError(f"mode {found.name.lower()} needs units (the paper's k)")
        if found in (Mode.FETCHED, Mode.CENTROID):
            unit = device.config.tokens_per_codeword if unit is None else unit
            unit_bits(unit, device.config)
        dim = _heads(text)[1]
        if dim > device.config.head_dim:
            raise RequestError(f"the model's head_dim is {dim}, the drive's {device.config.head_dim}; it must be as "
                               "large or larger: open it with config_for(model)")
        super().__init__(layers=[DriveLayer(self, number) for number in range(int(text.num_hidden_layers))])
        self.device = device
        self.capacity_tokens = int(text.max_position_embeddings) if capacity_tokens is None else capacity_tokens
        self.sequences: list[Sequence | ArraySequence] = []
        self._mode, self._channels, self._units, self._local, self._unit = found, channels, units, local, unit
        self._held_tokens, self._recording = held_tokens, False
        self._options = options
        self._writing: deque[DriveLayer] = deque()
        # What masks say, by their identity: the layers of a step share them.
        self._read: dict[tuple[int, int, int], tuple[torch.Tensor | None, _Rows]] = {}

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        end_block(self.reset, error)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RequestError("K and V in the drive cannot be copied: make another DriveCache")

    def _start(self, rows: int, kv_heads: int, dim: int) -> None:
        """Sequences for a batch, when its first layer comes."""
        if self.sequences:
            return
        if dim > self.device.config.head_dim:
            raise RequestError(f"the model's head_dim is {dim}, the drive's {self.device.config.head_dim}")
        sparse, centroid = self._mode in (Mode.SPARF, Mode.FETCHED), self._mode is Mode.CENTROID
        try:
            for _ in range(rows):
                self.sequences.append(self.device.create_sequence(
                    kv_heads, capacity_tokens=self.capacity_tokens, layers=len(self.layers), sparse=sparse,
                    centroids=self._unit if centroid else None, **self._options))
        except BaseException:
            self.reset()
            raise
        self._hold()

    def reset(self) -> None:
        """Forget everything and give the flash back; the next batch may have another size.

        Raises:
            DeviceStatusError: see `Sequence.free`.
        """
        sequences, self.sequences = self.sequences, []
        self._read.clear()
        self._writing.clear()
        for layer in self.layers:
            with suppress(KvatticError):    # K and V that could not be written are forgotten like the others
                layer.wait()
            layer.reset()
        for sequence in sequences:
            sequence.free()

    def wait(self) -> None:
        """Wait until all K and V are written, and report what failed.

        Raises:
            CapacityError, DeviceStatusError: see `Sequence.append`.
        """
        for layer in self.layers:
            layer.wait()

    def activate_past_recording(self) -> None:
        """Called before drafts are verified: the newest tokens stay in device DRAM from now on."""
        self._recording = True
        self._hold()

    def _hold(self) -> None:
        for sequence in self.sequences if self._recording else ():
            if not isinstance(sequence, Sequence):
                raise RequestError("drafts can be removed from a single drive only, not from several")
            sequence.held_tokens = self._held_tokens

    def _write_next(self, layer: DriveLayer) -> None:
        """Another layer's first tokens are about to be written: not too many at a time, for they hold their memory."""
        while len(self._writing) >= LAYERS_IN_FLIGHT:
            self._writing.popleft().wait()
        self._writing.append(layer)

    # Attention.

    def _rows(self, mask: torch.Tensor | None, before: list[Flags], count: int) -> _Rows:
        key = (id(mask), len(before[0]), count)
        if key not in self._read:
            if any(past != len(before[0]) for _, past, _ in self._read):
                self._read.clear()
            # The mask is kept, so that its id is not another one's.
            self._read[key] = (mask, _read_mask(mask, before, count))
        return self._read[key][1]

    def _plan(self, sequence: Sequence | ArraySequence, layer: int, query: NDArray[np.float32], window: int | None,
              scale: float) -> AttendPlan | ArrayPlan:
        """Attention of a row's newest tokens; all that the drive computes goes through here."""
        if self._mode is Mode.DENSE:
            return sequence.plan(query, layer=layer, scale=scale, causal=True, window=window)
        assert self._units is not None
        stop, size = sequence.length(layer), self._unit or 1
        first = 0 if window is None else max(stop - query.shape[1] + 1 - window, 0)
        first -= first % sequence.stripe_tokens
        units = min(self._units, -(-(stop - first) // size))
        return sequence.plan(query, layer=layer, scale=scale, causal=True, window=window, mode=self._mode,
                             channels=self._channels, units=units, local=min(self._local, units * size),
                             unit=self._unit)


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The backend: what transformers call as the attention of a layer."""
    layer = getattr(key, _MARK, None)
    if not isinstance(layer, DriveLayer):
        raise RequestError(f"attn_implementation={NAME!r} attends K and V that a DriveCache returned: give "
                           "past_key_values=DriveCache(device, model.config); models that change them afterwards are "
                           "not supported")
    if changes := [name for name in _CHANGES if kwargs.get(name) is not None]:
        raise RequestError(f"the drive's attention has no {', '.join(changes)}, which this model needs")
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise RequestError("the drive's attention has no gradient and no dropout: call model.eval(), and the model "
                           "inside torch.no_grad()")
    return layer.attend(module, query, key, value, attention_mask, scaling), None


def _mask(*, q_offset: int = 0, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """The masks that belong to it: bool; None for a prompt that is attended causally without padding."""
    if "allow_is_bidirectional_skip" in kwargs:
        raise RequestError("the drive attends causally: a model whose tokens attend later ones is not supported")
    # Behind the prompt, the mask is how the backend learns of padding and windows.
    skip = allow_is_causal_skip and q_offset == 0
    mask: torch.Tensor | None = sdpa_mask(q_offset=q_offset, allow_is_causal_skip=skip, **kwargs)
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
