"""Hugging Face transformers with K and V in the drive: `DriveCache` and the attention backend `kvattic`.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvattic")
    with kvattic.open("model", config_for(model)) as device, DriveCache(device, model.config) as cache:
        model.generate(**inputs, cache=cache)

Importing this module registers the backend; it needs torch and transformers (the extra `transformers`).  What is
computed where: docs/transformers.md.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from threading import local
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import output_capturing

from kvattic.array import SPLITS, ArrayPlan, ArraySequence, DriveArray
from kvattic.driver.checks import as_member, check_integer, check_positive
from kvattic.driver.device import Device
from kvattic.driver.jobs import MAX_SINKS, MAX_UNITS
from kvattic.driver.planning import AttendOptions
from kvattic.driver.results import AttendPlan, AttendResult
from kvattic.driver.sequence import Sequence
from kvattic.errors import ConfigError, KvatticError, RangeError, RequestError
from kvattic.integrations.report import Meter, Report
from kvattic.spec.commands import Mode
from kvattic.spec.config import ELEMENT_BYTES, HEAD_DIMS, MAX_ROWS, PAPER, Config, preset
from kvattic.spec.elements import Integers, from_bits, special, to_bits
from kvattic.spec.formats import Element
from kvattic.spec.layout import unit_bits
from kvattic.support.closing import Closing
from kvattic.support.renamed import old_selection_keywords

__all__ = ["NAME", "DriveCache", "DriveLayer", "config_for", "round_to_storage"]

NAME = "kvattic"
"""What `attn_implementation` is set to."""

HELD_TOKENS = 64
"""Newest tokens of a row that stay in device DRAM, unless a `DriveCache` is told otherwise."""

SINKS = 16
"""First tokens of a row that sparse modes attend in any case, unless a `DriveCache` is told otherwise."""

LAYERS_IN_FLIGHT = 2
"""Layers of a prompt that are written while the next one is computed, at most."""

Flags = NDArray[np.bool_]
E = TypeVar("E", bound=BaseException)
P = ParamSpec("P")
T = TypeVar("T")

_STORAGE = {Element.FP16: torch.float16, Element.BF16: torch.bfloat16}
_MARK = "_kvattic_layer"
_CHANGES = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments of an attention function that change its result in ways that the drive does not know."""
_OWN_OPTIONS = {"self", "kv_heads", "capacity_tokens", "layers", "sparse", "centroids", "sinks", "window"}
"""Arguments of `create_sequence` that a `DriveCache` sets itself."""
_WIDTHS = ("head_dim", "v_head_dim", "qk_head_dim", "swa_head_dim", "swa_v_head_dim", "global_head_dim")
"""Names that configurations have for what a head of K or V has of elements."""

_CAN_SET_ATTENTION, _COLLECTOR = "_can_set_attn_implementation", "_active_collector"
"""What transformers has no public names for: whether a model's attention can be exchanged, and what it shall return."""

_last = local()
"""In `layer`, a weak reference to the `DriveLayer` that took K and V last, of each thread."""


def _not_traced(function: Callable[P, T]) -> Callable[P, T]:
    """Exclude a function from torch.compile, which then calls it as it is, between two graphs."""
    called: Callable[P, T] = torch.compiler.disable(function)
    return called


def config_for(model: Any, base: Config | str = PAPER, *, queries: int = 1, **changes: Any) -> Config:
    """A drive's configuration that a model's attention fits.

    The head dimension is the smallest of the drive's that holds the model's K and V, the query rows those of a KV head
    (16 at most), the storage format bf16 for a model in bfloat16 and else fp16; the sparse modes are left out where the
    head dimension forbids them.

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
    if heads % kv_heads:
        raise ConfigError(f"the model's {heads} query heads are no multiple of its {kv_heads} KV heads")
    base = preset(base) if isinstance(base, str) else base
    wanted: dict[str, Any] = {"head_dim": next((size for size in HEAD_DIMS if size >= dim), None),
                              "rows": min(heads // kv_heads * queries, MAX_ROWS)} | changes
    if wanted["head_dim"] is None:
        raise ConfigError(f"the model's head_dim is {dim}, the drive's is at most {HEAD_DIMS[-1]}")
    codeword = changes.get("codeword_bytes", base.codeword_bytes)
    if wanted["head_dim"] in HEAD_DIMS and wanted["head_dim"] * ELEMENT_BYTES > codeword:
        raise ConfigError(
            f"the model's head_dim is {dim}, for which a drive needs {wanted['head_dim']} (there are "
            f"{', '.join(map(str, HEAD_DIMS))}): a token has {wanted['head_dim'] * ELEMENT_BYTES} bytes then, but this "
            f"base has codewords of {codeword}; take another base, such as 'paper'")
    dtype = getattr(model, "dtype", None) or getattr(text, "dtype", None)
    wanted = {"element": Element.BF16 if dtype == torch.bfloat16 else Element.FP16} | wanted
    try:
        return replace(base, **wanted)
    except ConfigError:
        if "sparse" in changes or not base.sparse:
            raise
        return replace(base, **wanted, sparse=False)


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, the elements of a head of K or V, whichever has more in any layer, KV heads.

    Raises:
        ConfigError: the layers differ in their heads.
    """
    layers = getattr(config, "per_layer_config", None)  # of models whose layers differ
    each = [config] if layers is None else [layers[number] for number in range(config.num_hidden_layers)]
    found = {(heads := int(one.num_attention_heads), int(getattr(one, "num_key_value_heads", None) or heads))
             for one in each}
    if len(found) > 1:
        raise ConfigError("a model whose layers differ in their heads is not supported, this one has layers with "
                          f"{' and '.join(f'{heads} query and {kv} KV heads' for heads, kv in sorted(found))}")
    [(heads, kv_heads)] = found
    return heads, max(_width(one, heads) for one in each), kv_heads


def _width(config: Any, heads: int) -> int:
    """Elements of a head of K or V of a layer, whichever has more."""
    dims = [int(dim) for name in _WIDTHS if (dim := getattr(config, name, None))]
    if not getattr(config, "head_dim", None):
        dims.append(config.hidden_size // heads)
    return max(dims)


def round_to_storage(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Numbers as the drive holds them, in their own type: rounded once to nearest, ties to even."""
    if values.dtype == torch.float64:   # which torch would round to float32 first
        exact = from_bits(to_bits(values.detach().cpu().numpy(), element), element)
        return torch.from_numpy(exact).to(values.device, values.dtype)
    return values.to(_STORAGE[element]).to(values.dtype)


def _array(values: torch.Tensor, dim: int, element: Element) -> NDArray[Any]:
    """(rows, heads, tokens, dim) for the drive, whose head_dim may be larger: the rest is zero.

    Args:
        values: of all rows of the batch, float32 or rounded to storage.
        dim: the drive's head_dim.
        element: its storage format.

    Returns:
        Bit patterns; float32 if any number is not finite, so that whoever takes it says which one.
    """
    if values.requires_grad or values.device.type != "cpu":
        values = values.detach().to("cpu")
    array: NDArray[Any] = values.to(_STORAGE[element]).view(torch.int16).numpy().view(np.uint16)
    if special(array, element).any():
        array = values.to(torch.float32).numpy()
    missing = dim - array.shape[-1]
    return np.pad(array, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else array


def _some(values: NDArray[Any], tokens: NDArray[np.intp]) -> NDArray[Any]:
    """Some tokens, ascending, of (heads, tokens, dim)."""
    return values if len(tokens) == values.shape[1] else values[:, tokens]


class _Rows(NamedTuple):
    """What a mask says of a batch's rows.

    Members:
        new: int, (tokens,), of each row: which of the new positions are tokens, not padding.
        kept: bool, (positions,), of each row: which positions are tokens, the new ones included.
        start: int, (tokens,), of each row: the first stored token that each new one attends; None: the very first.
        end: likewise: one past the last one; None: the new token itself.
    """

    new: list[NDArray[np.intp]]
    kept: list[Flags]
    start: list[Integers | None]
    end: list[Integers | None]


def _read_mask(mask: torch.Tensor | None, before: list[Flags], count: int) -> _Rows:
    """Tokens of a batch's rows, and what they attend.

    Args:
        mask: (rows, 1, count, positions), bool, or floats that are 0 where it attends; None: causal, all are tokens.
        before: of each row, which earlier positions are tokens.
        count: new positions.

    Raises:
        RequestError: a token attends other tokens than a range of those that are stored.
    """
    past = len(before[0])
    if mask is None:
        every = np.arange(count)
        return _Rows([every] * len(before), [np.concatenate([kept, np.ones(count, np.bool_)]) for kept in before],
                     [None] * len(before), [None] * len(before))
    if mask.shape[1] != 1 or tuple(mask.shape[2:]) != (count, past + count) or mask.shape[0] not in (1, len(before)):
        raise RequestError(f"the attention mask must be of shape ({len(before)}, 1, {count}, {past + count}), the same "
                           f"for all heads, not {tuple(mask.shape)}")
    flags = (mask if mask.dtype == torch.bool else mask == 0).detach().to("cpu")[:, 0]
    rows = _Rows([], [], [], [])
    for row, kept in enumerate(before):
        flag: Flags = flags[row if len(flags) > 1 else 0].numpy()
        # A token attends itself, padding is attended by nobody.
        if count == 1 and flag.all() and kept.all():    # a decode step without padding and windows
            rows.new.append(np.zeros(1, np.intp))
            rows.kept.append(np.ones(past + 1, np.bool_))
            rows.start.append(None)
            rows.end.append(None)
            continue
        own = np.diagonal(flag, past).copy()
        new, kept = np.flatnonzero(own), np.concatenate([kept, own])
        rows.new.append(new)
        rows.kept.append(kept)
        # The first tokens are attended by the model itself, with any mask.
        start, end = _bounds(flag[new], kept, new + past, row) if past else (None, None)
        rows.start.append(start)
        rows.end.append(end)
    return rows


def _bounds(attended: Flags, kept: Flags, places: NDArray[np.intp],
            row: int) -> tuple[Integers | None, Integers | None]:
    """The range of stored tokens that each of the new ones attends, see `_Rows`.

    Args:
        attended: bool, (tokens, positions).
        kept: bool, (positions,), which positions are stored tokens.
        places: positions of the new tokens.
        row: of the batch.
    """
    if attended[:, ~kept].any():
        token, place = np.argwhere(attended & ~kept)[0]
        raise RequestError(f"row {row} of the batch: the attention mask lets position {places[token]} attend position "
                           f"{place}, which was padding when it came and is not stored")
    attended = attended[:, kept]
    tokens = attended.shape[1]
    start = attended.argmax(axis=1)
    end = start + attended.sum(axis=1)
    number = np.arange(tokens)
    if (wrong := (attended != ((number >= start[:, None]) & (number < end[:, None]))).any(axis=1)).any():
        raise RequestError(f"row {row} of the batch: the drive attends a range of tokens without gaps, such as a "
                           f"window of the last ones; the attention mask of position {places[wrong.argmax()]} asks "
                           "for something else")
    causal = (end == np.arange(tokens - len(attended), tokens) + 1).all()
    return start if start.any() else None, None if causal else end


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

    @_not_traced
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
        setattr(keys, _MARK, self)
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
            mask: see `_read_mask`.
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
        keys, values = (_array(states, config.head_dim, config.element) for states in (key, value))
        for row, sequence in enumerate(cache.sequences):
            if len(new := rows.new[row]):
                self._writes.append(sequence.append_async(_some(keys[row], new), _some(values[row], new),
                                                          layer=self.number))
        self._kept, self._given = rows.kept, None
        if past == 0 or query.dtype != torch.float32:   # else it is rounded on its way to the drive
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
        queries = _array(query, config.head_dim, config.element)
        scale = query.shape[-1]**-0.5 if scaling is None else float(scaling)
        plans: list[Any] = [
            cache.plan_row(cache.sequences[row], self.number, _some(queries[row], rows.new[row]), rows.start[row],
                           rows.end[row], scale) for row in busy]
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

    @property
    def positions(self) -> int:
        """Positions so far."""
        return self._length

    @_not_traced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that a mask must have for so many new ones, and the first one's number, 0."""
        return self._length + query_length, 0

    @_not_traced
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
                    f"make a DriveCache with more held_tokens than {sequence.held_tokens}")

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
        """Do nothing: K and V are not in this machine."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""


class DriveCache(Closing, Cache):
    """K and V of a batch in the drive: what a model gets as `cache`, with attn_implementation="kvattic".

    Usable as a context manager, which gives the flash back at the end; so does `Device.close`.  Each row of the batch
    is a `Sequence` of its own, made when the first tokens come.

    Args:
        device: the drive, or several as one; its head_dim must be the model's or larger (`config_for`).
        config: the model's configuration.
        capacity_tokens: tokens that each row can hold, prompt and answer; the model's most positions if None.
        held_tokens: the newest tokens of each row, which stay in device DRAM, where `crop` and rejected drafts can
            remove them: as many as are drafted at once, at least.  64 if None, and 0 on several drives, which cannot.
        mode: what a decode step attends: `commands.Mode` or its name in lower case; prompts are attended densely.
        features: see `Sequence.attend`, as the following.
        top_units: no more are attended than there are.
        local_tokens: likewise.
        sinks: sparse modes: the first stored tokens of each row (padding is not stored), which are always attended
            and count among `top_units`.  If None, 16, or as many as `top_units` and `local_tokens` leave room for.
        unit_tokens: of the mode centroid, too; a codeword's tokens if None.
        options: of the sequences, see `create_sequence` of `Device` and `DriveArray`: isolated, split.

    Attributes:
        device: the drive.
        capacity_tokens: tokens that each row can hold.
        sequences: one for each row of the batch; none before the first tokens.
        mode: what a decode step attends.
        meter: sums of what the steps cost, for `report`.

    Raises:
        TypeError: there is no such option.
        RequestError: a wrong mode or number, or K and V do not fit the drive.
        ConfigError: a sparse mode, and the drive is without sparse attention.
    """

    @old_selection_keywords
    def __init__(self, device: Device | DriveArray, config: Any, *, capacity_tokens: int | None = None,
                 held_tokens: int | None = None, mode: Mode | str = Mode.DENSE, features: int | None = None,
                 top_units: int | None = None, local_tokens: int = 0, sinks: int | None = None,
                 unit_tokens: int | None = None, **options: Any) -> None:
        text = config.get_text_config(decoder=True)
        several = isinstance(device, DriveArray)
        _check_options(options, several)
        found = as_member("mode", mode, Mode)
        unit_tokens = _check_mode(device.config, found, features, top_units, local_tokens, sinks, unit_tokens)
        if found is not Mode.DENSE and options.get("split") == "context":
            raise RequestError(f"mode {found.name.lower()} chooses from all tokens, which no drive has if sequences "
                               "are split by context: take split='heads', or mode='dense'")
        capacity = int(text.max_position_embeddings) if capacity_tokens is None else capacity_tokens
        check_positive("capacity_tokens", capacity)
        held = (0 if several else HELD_TOKENS) if held_tokens is None else held_tokens
        if isinstance(held, bool) or not isinstance(held, int) or held < 0:
            raise RequestError(f"held_tokens must be an int, 0 or more, not {held!r}")
        if held and several:
            raise RequestError("held_tokens: tokens can be removed from a single drive only, not from several")
        kept_sinks = 0
        if found is not Mode.DENSE:
            kept_sinks = _sinks(top_units or 1, max(local_tokens - held, 0), sinks, unit_tokens or 1)
        dim = _heads(text)[1]
        if dim > device.config.head_dim:
            raise RequestError(f"the model's head_dim is {dim}, the drive's {device.config.head_dim}; it must be as "
                               "large or larger: open it with config_for(model)")
        super().__init__(layers=[DriveLayer(self, number) for number in range(int(text.num_hidden_layers))])
        self.device = device
        self.capacity_tokens = capacity
        self.sequences: list[Sequence | ArraySequence] = []
        self.mode: Mode = found
        self._features, self._top_units = features, top_units
        self._local_tokens, self._unit_tokens = local_tokens, unit_tokens
        self._held_tokens, self._sinks = held, kept_sinks
        self._text = text
        self._failed = ""   # an error, from which its layers hold different tokens
        self.meter = Meter(device.config, dense=found is Mode.DENSE)
        self._options = options
        self._causal: AttendOptions | None = None   # of the last dense step without a window
        self._writing: deque[DriveLayer] = deque()
        # What masks say, by their identity: the layers of a step share them.
        self._read: dict[tuple[int, int, int], tuple[torch.Tensor | None, _Rows]] = {}

    # Life.

    def _end_block(self) -> None:
        self.reset()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RequestError("K and V in the drive cannot be copied: make another DriveCache")

    def start(self, rows: int, kv_heads: int) -> None:
        """Sequences for a batch, when its first layer comes."""
        if self.sequences:
            return
        sparse, centroid = self.mode.blended, self.mode is Mode.CENTROID
        options = self._options
        if self.mode is not Mode.DENSE:
            options = options | {"sinks": self._sinks, "window": _longest_window(self._text) if sparse else None}
        try:
            for _ in range(rows):
                self.sequences.append(self.device.create_sequence(
                    kv_heads, capacity_tokens=self.capacity_tokens, layers=len(self.layers), sparse=sparse,
                    centroids=self._unit_tokens if centroid else None, **options))
        except BaseException:
            self.reset()
            raise
        for sequence in self.sequences:
            if isinstance(sequence, Sequence):
                sequence.held_tokens = self._held_tokens

    def reset(self) -> None:
        """Forget everything and give the flash back; the next batch may have another size.

        Raises:
            DeviceStatusError: see `Sequence.free`.
        """
        sequences, self.sequences = self.sequences, []
        self.meter = Meter(self.device.config, dense=self.mode is Mode.DENSE)
        self._read.clear()
        self._writing.clear()
        self._failed = ""
        for layer in self.layers:
            with suppress(KvatticError):    # K and V that could not be written are forgotten like the others
                layer.wait()
            layer.reset()
        for sequence in sequences:
            sequence.free()

    def report(self) -> Report:
        """What the drive has done for the tokens that this cache holds: time, bytes and energy a token, prefill apart.

        Waits for what is being written.  Times are the timing model's on the golden device, of long texts from a
        sample of the steps; measured on hardware.  What dense attention would have cost is always modelled.

        Raises:
            RequestError: the cache holds nothing yet.
            CapacityError, DeviceStatusError: see `wait`.
        """
        if not self.sequences:
            raise RequestError("there is nothing to report: this DriveCache holds no tokens")
        self.wait()
        parts = [sequence.statistics_by_part() for sequence in self.sequences]
        return self.meter.report(parts, mode=self.mode.name.lower(), layers=len(self.layers))

    def forget_masks(self) -> None:
        """Forget what masks of earlier steps say."""
        self._read.clear()

    def wait(self) -> None:
        """Wait until all K and V are written, and report what failed.

        Raises:
            CapacityError, DeviceStatusError: see `Sequence.append`.
        """
        for layer in self.layers:
            layer.wait()

    def activate_past_recording(self) -> None:
        """Do nothing before drafts are verified, because the newest tokens stay in device DRAM anyway.

        Raises:
            RequestError: several drives, from which rejected drafts cannot be removed.
        """
        if isinstance(self.device, DriveArray):
            raise RequestError("drafts can be removed from a single drive only, not from several")

    def fail(self, error: E) -> E:
        """Note that a step failed, so that the layers hold different tokens from now on; returns the error."""
        self._failed = f"{type(error).__name__}: {error}"
        for layer in self.layers:
            if isinstance(layer, DriveLayer):
                layer.drop()
        return error

    def check_step(self, layer: DriveLayer, count: int) -> None:
        """Check that a layer's new K and V follow what all layers hold.

        Raises:
            RequestError: they do not, or an earlier step failed.
        """
        if self._failed:
            raise RequestError("an earlier step of this DriveCache failed, and its layers hold different tokens now: "
                               "reset() it and begin again with the whole text, or use another one; the error was: "
                               f"{self._failed}")
        for other in self.layers:
            if isinstance(other, DriveLayer) and other.unattended:
                raise RequestError(f"layer {other.number}: the K and V that this DriveCache returned last were not "
                                   f"attended by the backend {NAME!r}: {self._why_not()}; reset() the DriveCache "
                                   "afterwards")
        before = self.layers[layer.number - 1] if layer.number else layer
        length = layer.positions
        wanted = before.positions if isinstance(before, DriveLayer) else before.get_seq_length()
        if before is not layer and wanted and wanted != length + count:
            raise RequestError(f"layer {layer.number} holds {length} positions and gets {count} more, but layer "
                               f"{before.number} holds {wanted}: an earlier step was interrupted; reset() the "
                               "DriveCache and begin again with the whole text")

    def _why_not(self) -> str:
        """Why K and V may not have come to the backend."""
        found = getattr(self._text, "_attn_implementation", NAME)
        classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self._text), ())
        kinds = classes if isinstance(classes, tuple) else (classes,)
        if kinds and not any(getattr(kind, _CAN_SET_ATTENTION)() for kind in kinds):
            return (f"{kinds[0].__name__} computes attention by itself, without transformers' attention interface, and "
                    "is not supported")
        if found != NAME:
            return f"the model's attention is {found!r}, call model.set_attn_implementation({NAME!r})"
        return "the model computes attention by itself and is not supported, or a step was interrupted"

    def write_next(self, layer: DriveLayer) -> None:
        """Make room for writing another layer's first tokens: each layer that is being written holds its memory."""
        while len(self._writing) >= LAYERS_IN_FLIGHT:
            self._writing.popleft().wait()
        self._writing.append(layer)

    # Attention.

    def rows(self, mask: torch.Tensor | None, before: list[Flags], count: int) -> _Rows:
        """What a step's mask says, read once for all layers; arguments as of `_read_mask`."""
        key = (id(mask), len(before[0]), count)
        if key not in self._read:
            if any(past != len(before[0]) for _, past, _ in self._read):
                self._read.clear()
            # The mask is kept, so that its id is not another one's.
            self._read[key] = (mask, _read_mask(mask, before, count))
        return self._read[key][1]

    def check_rows(self, rows: _Rows) -> None:
        """Check that a sparse mode can serve a step's masks.

        Raises:
            RequestError: a token attends later ones.
        """
        if self.mode is not Mode.DENSE:
            for row, end in enumerate(rows.end):
                if end is not None:
                    raise RequestError(f"row {row} of the batch: a token attends later ones, which mode "
                                       f"{self.mode.name.lower()} does not; use mode='dense'")

    def plan_row(self, sequence: Sequence | ArraySequence, layer: int, query: NDArray[np.float32],
              start: Integers | None, end: Integers | None, scale: float) -> AttendPlan | ArrayPlan:
        """Attention of a row's newest tokens; all that the drive computes goes through here."""
        causal = end is None
        if self.mode is Mode.DENSE and start is None and causal and isinstance(sequence, Sequence):
            if self._causal is None or self._causal.scale != scale:
                self._causal = AttendOptions(scale=scale, causal=True)
            return sequence.plan_with(query, self._causal, layer=layer)
        if self.mode is Mode.DENSE:
            return sequence.plan(query, layer=layer, scale=scale, causal=causal, start=start, end=end)
        assert self._top_units is not None
        # No more units than the query with most of them has.
        size, count = self._unit_tokens or 1, query.shape[1]
        stop = sequence.length(layer) - count + 1 + np.arange(count)
        first = np.zeros(count, np.int64) if start is None else start - start % sequence.stripe_tokens
        units = min(self._top_units, int((-((first - stop) // size)).max()))
        return sequence.plan(query, layer=layer, scale=scale, causal=causal, start=start, mode=self.mode,
                             features=self._features, top_units=units,
                             local_tokens=min(self._local_tokens, units * size), unit_tokens=self._unit_tokens)


def _check_options(options: dict[str, Any], several: bool) -> None:
    """Check the options that `DriveCache` hands on to `create_sequence`.

    Raises:
        TypeError: it has no such argument, or it is not for the user.
        RequestError: a value that it does not take.
    """
    known = [name for name in signature(Device.create_sequence).parameters if name not in _OWN_OPTIONS]
    known += ["split"] * several
    for name, value in options.items():
        if name == "split" and not several:
            raise TypeError("DriveCache got the option 'split', which is for several drives only (DriveArray)")
        if name not in known:
            raise TypeError(f"DriveCache has no option {name!r}; those of its sequences are {', '.join(known)}")
        if name == "isolated" and not isinstance(value, bool):
            raise RequestError(f"isolated must be a bool, not {value!r}")
        if name == "split" and value not in SPLITS:
            raise RequestError(f"split must be one of {', '.join(SPLITS)}, not {value!r}")


def _check_mode(config: Config, mode: Mode, features: int | None, top_units: int | None, local_tokens: int,
                sinks: int | None, unit_tokens: int | None) -> int | None:
    """Check that a mode and its numbers go together; the tokens of a unit, None if the mode has no units."""
    name = mode.name.lower()
    if mode is Mode.DENSE:
        if (features, top_units, local_tokens, sinks, unit_tokens) != (None, None, 0, None, None):
            raise RequestError("mode dense attends all tokens: features, top_units, local_tokens, sinks and "
                               "unit_tokens must not be given")
        return None
    if not config.sparse:
        raise ConfigError(f"mode {name}: the drive is without sparse attention (Config.sparse)")
    if top_units is None:
        raise RequestError(f"mode {name} needs top_units (the paper's k)")
    check_integer("top_units (the paper's k)", top_units, 1, MAX_UNITS)
    if mode is not Mode.CENTROID:
        check_integer("features (the paper's r)", features, 1, config.head_dim)
    elif features is not None:
        raise RequestError(f"mode {name} has no features: it must not be given")
    if mode is Mode.SPARF:
        if unit_tokens is not None:
            raise RequestError(f"mode {name} has no unit_tokens: it must not be given")
    else:
        unit_tokens = config.tokens_per_codeword if unit_tokens is None else unit_tokens
        unit_bits(unit_tokens, config)
    check_integer("local_tokens", local_tokens, 0, top_units * (unit_tokens or 1))
    return unit_tokens


def _sinks(top_units: int, local_tokens: int, sinks: int | None, unit_tokens: int) -> int:
    """The number of sinks: as asked for, otherwise as many as there is room for.

    Args:
        top_units: that a step attends.
        local_tokens: newest tokens that are always attended and not held, and so lie in some of the units.
        sinks: as given.
        unit_tokens: tokens of a unit.

    Raises:
        RequestError: not a number of tokens, or sinks and local_tokens need more units than there are.
    """
    newest = -(-(local_tokens - 1) // unit_tokens) + 1 if local_tokens else 0     # wherever the last of them begins
    if sinks is None:
        return max(min(SINKS, (top_units - newest) * unit_tokens), 0)
    check_integer("sinks", sinks, 0, MAX_SINKS)
    if (needed := -(-sinks // unit_tokens) + newest) > top_units:
        raise RequestError(f"top_units (the paper's k) must be at least {needed} for {sinks} sinks and the newest "
                           f"{local_tokens} tokens that are not held, in units of {unit_tokens}, not {top_units}")
    return sinks


def _longest_window(config: Any) -> int | None:
    """Tokens of the longest range that a layer attends which does not begin with the first token."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return None
    sizes = [size for name in ("sliding_window", "attention_chunk_size") if (size := getattr(config, name, None))]
    return max(sizes, default=None)


@_not_traced
def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The backend: what transformers call as the attention of a layer."""
    layer = getattr(key, _MARK, None)
    if not isinstance(layer, DriveLayer):
        pending = getattr(_last, "layer", lambda: None)()
        if pending is not None and pending.unattended:
            raise pending.fail(RequestError(
                f"layer {pending.number}: the model changes K after the DriveCache returned them, before it attends "
                "them: such models are not supported"))
        raise RequestError(f"attn_implementation={NAME!r} attends K and V that a DriveCache returned, but there was "
                           "none: give the model, or generate(), cache=DriveCache(device, model.config)")
    if changes := [name for name in _CHANGES if kwargs.get(name) is not None]:
        raise layer.fail(RequestError(
            f"the drive's attention has no {', '.join(changes)}, which this model needs"))
    if kwargs.get("output_attentions") or "attentions" in (getattr(output_capturing, _COLLECTOR).get() or ()):
        raise layer.fail(RequestError(
            "output_attentions: the drive does not give attention weights; leave it out, or use "
            "attn_implementation='eager' without a DriveCache"))
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise layer.fail(RequestError(
            "the drive's attention has no gradient and no dropout: call model.eval(), and the model inside "
            "torch.no_grad()"))
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
