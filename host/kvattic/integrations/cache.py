"""K and V of a batch in the drive: the cache that a model of transformers gets."""

from collections import deque
from contextlib import suppress
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from kvattic.array import ArrayPlan, ArraySequence, DriveArray
from kvattic.driver.checks import as_member, check_positive
from kvattic.driver.device import Device
from kvattic.driver.planning import AttendOptions
from kvattic.driver.results import AttendPlan
from kvattic.driver.scales import check_scales
from kvattic.driver.sequence import Sequence
from kvattic.errors import CapacityError, KvatticError, RequestError
from kvattic.integrations.configuration import check_model, heads_of, latent_width, longest_window, most_positions
from kvattic.integrations.layer import DriveLayer
from kvattic.integrations.layers import make_layers
from kvattic.integrations.masks import Flags, Rows, read_mask
from kvattic.integrations.options import check_format, check_mode, check_options, count_sinks
from kvattic.integrations.report import Meter, Report
from kvattic.integrations.saved import attached
from kvattic.spec import layout
from kvattic.spec.commands import Kind, Mode
from kvattic.spec.elements import Integers
from kvattic.spec.formats import KvFormat
from kvattic.support.closing import Closing
from kvattic.support.renamed import old_selection_keywords
from kvattic.timing.cost import Cost

__all__ = ["HELD_TOKENS", "LAYERS_IN_FLIGHT", "NAME", "DriveCache"]

NAME = "kvattic"
"""What `attn_implementation` is set to."""

HELD_TOKENS = 64
"""Newest tokens of a row that stay in device DRAM, unless a `DriveCache` is told otherwise."""

ROOM = 1024
"""Tokens of a row beyond those at hand for which flash is reserved, unless a `DriveCache` is told how many come."""

LAYERS_IN_FLIGHT = 2
"""Layers of a prompt that are written while the next one is computed, at most."""

_KIND = "DriveCache"
"""What a manifest of a cache says that it is of."""

E = TypeVar("E", bound=BaseException)


def _by_slot(layers: list[Any]) -> list[DriveLayer]:
    """Those in the drive, as a step comes to them."""
    return sorted((layer for layer in layers if isinstance(layer, DriveLayer)), key=lambda layer: layer.slot)


class DriveCache(Closing, Cache):
    """K and V of a batch in the drive: what a model gets as `cache`, with attn_implementation="kvattic".

    Usable as a context manager, which gives the flash back at the end; so does `Device.close`.  Each row of the batch
    is a `Sequence` of its own, made when the first tokens come.

    Args:
        device: the drive, or several as one; its head_dim must be the model's or larger (`config_for`).
        config: the model's configuration.
        capacity_tokens: tokens that each row can hold, prompt and answer, for which flash is reserved at once.  If
            None, the model's most positions, and flash is reserved as they come (on several drives at once).
        held_tokens: the newest tokens of each row, which stay in device DRAM, where `crop` and rejected drafts can
            remove them: as many as are drafted at once, at least.  64 if None, and 0 on several drives, which cannot.
        mode: what a decode step attends: `commands.Mode` or its name in lower case; prompts are attended densely.
        features: see `Sequence.attend`, as the following.
        top_units: no more are attended than there are.
        local_tokens: likewise.
        sinks: sparse modes: the first stored tokens of each row (padding is not stored), which are always attended
            and count among `top_units`; in codes half a stripe's at most.  If None, 16, or as many as `top_units` and
            `local_tokens` leave room for.
        unit_tokens: of the mode centroid, too; a codeword's tokens if None.
        kv: how K and V are stored: `formats.KvFormat` or its name.  The drive's configuration says it (`Config.kv`), so
            this is what it must be; anything if None.
        cross: it holds K and V of an encoder's tokens, which come once (`DriveEncoderDecoderCache`).
        options: of the sequences, see `create_sequence` of `Device` and `DriveArray`: isolated, split, and what a
            stored 1.0 stands for: key_scale, value_scale.

    Attributes:
        device: the drive.
        capacity_tokens: tokens that each row can hold.
        sequences: one for each row of the batch; none before the first tokens.
        drive_layers: the layers with attention, whose K and V are in the drive, as a step comes to them.
        mode: what a decode step attends.
        meter: sums of what the steps cost, for `report`.
        note: what was saved beside a cache that was loaded.

    Raises:
        TypeError: there is no such option.
        RequestError: a wrong mode or number, K and V do not fit the drive, or the model needs what the drive lacks.
        ConfigError: a sparse mode, and the drive is without sparse attention (or without codes); or the drive stores K
            and V otherwise.
    """

    @old_selection_keywords
    def __init__(self, device: Device | DriveArray, config: Any, *, capacity_tokens: int | None = None,
                 held_tokens: int | None = None, mode: Mode | str = Mode.DENSE, features: int | None = None,
                 top_units: int | None = None, local_tokens: int = 0, sinks: int | None = None,
                 unit_tokens: int | None = None, kv: KvFormat | str | None = None, cross: bool = False,
                 **options: Any) -> None:
        text = config.get_text_config(decoder=True)
        check_model(config, cross=cross)
        several = isinstance(device, DriveArray)
        check_options(options, several)
        check_format(device.config, kv)
        found = as_member("mode", mode, Mode)
        if cross and found is not Mode.DENSE:
            raise RequestError(f"mode {found.name.lower()}: an encoder's tokens are attended densely, mode='dense'")
        unit_tokens = check_mode(device.config, found, features, top_units, local_tokens, sinks, unit_tokens)
        if found is not Mode.DENSE and options.get("split") == "context":
            raise RequestError(f"mode {found.name.lower()} chooses from all tokens, which no drive has if sequences "
                               "are split by context: take split='heads', or mode='dense'")
        self._grows = capacity_tokens is None and not several and not cross
        if capacity_tokens is None:
            # An encoder's tokens say themselves how many they are.
            capacity_tokens = 1 if cross else most_positions(text)
        capacity = capacity_tokens
        check_positive("capacity_tokens", capacity)
        held = (0 if several else HELD_TOKENS) if held_tokens is None else held_tokens
        if isinstance(held, bool) or not isinstance(held, int) or held < 0:
            raise RequestError(f"held_tokens must be an int, 0 or more, not {held!r}")
        if held and several:
            raise RequestError("held_tokens: tokens can be removed from a single drive only, not from several")
        kept_sinks = 0
        if found is not Mode.DENSE:
            kept_sinks = count_sinks(top_units or 1, max(local_tokens - held, 0), sinks, unit_tokens or 1)
        dim = heads_of(text)[1]
        if dim > device.config.head_dim:
            raise RequestError(f"the model's head_dim is {dim}, the drive's {device.config.head_dim}; it must be as "
                               "large or larger: open it with config_for(model)")
        layers = make_layers(self, text, cross=cross)
        super().__init__(layers=layers)
        self.layers: list[Any] = layers
        self.drive_layers = _by_slot(layers)
        self.device = device
        self.capacity_tokens = capacity
        self.sequences: list[Sequence | ArraySequence] = []
        self.mode: Mode = found
        self._features, self._top_units = features, top_units
        self._local_tokens, self._unit_tokens = local_tokens, unit_tokens
        self._held_tokens, self._sinks = held, kept_sinks
        self._text = text
        self.note: Any = None
        self._cross = cross
        self._causal: AttendOptions | None = None   # of the last dense step without a window
        self._failed = ""   # an error, from which its layers hold different tokens
        self.meter = Meter(device.config, dense=found is Mode.DENSE)
        self._options = options
        self._gone: list[dict[str, Cost]] = []      # what the drive did for rows that are not there any more
        self._writing: deque[DriveLayer] = deque()
        # What masks say, by their identity: the layers of a step share them.
        self._read: dict[tuple[int, int, int], tuple[torch.Tensor | None, Rows]] = {}

    # Life.

    def _end_block(self) -> None:
        self.reset()

    def start(self, rows: int, kv_heads: int, tokens: int = 0) -> None:
        """Sequences for a batch, when its first layer comes.

        Args:
            rows: of the batch.
            kv_heads: of a layer.
            tokens: of the first step; of an encoder's there will be no more.
        """
        if self.sequences:
            return
        capacity = tokens if self._cross else self.capacity_tokens
        if self._grows:
            capacity = min(capacity, tokens + ROOM)
        options = self._options
        if self.mode is not Mode.DENSE:
            window = longest_window(self._text) if self.mode.blended else None
            options = options | {"sinks": self._sinks, "window": window}
        try:
            for _ in range(rows):
                self.sequences.append(self.device.create_sequence(
                    kv_heads, capacity_tokens=capacity, layers=len(self.drive_layers), **self._sketches,
                    **options))
        except BaseException:
            self.reset()
            raise
        for sequence in self.sequences:
            if isinstance(sequence, Sequence):
                sequence.held_tokens = self._held_tokens

    @property
    def _sketches(self) -> dict[str, Any]:
        """What its sequences have for the mode's first pass, as `create_sequence` takes it."""
        return {"sparse": self.mode.featured, "codes": self.mode is Mode.CODES,
                "centroids": self._unit_tokens if self.mode is Mode.CENTROID else None}

    def make_room(self, tokens: int) -> None:
        """Reserve flash for more tokens, before the first layer of a step writes them.

        A row that is full becomes a fork of itself with more room: its stripes in flash stay where they are.

        Args:
            tokens: that a row will hold.

        Raises:
            CapacityError: flash or DRAM have no room.
        """
        if not self._grows or tokens <= (room := min(one.capacity_tokens for one in self.sequences)):
            return
        least = min(tokens, self.capacity_tokens)
        if least <= room:   # the sequence will say so
            return
        self.wait()
        for row, sequence in enumerate(self.sequences):
            assert isinstance(sequence, Sequence)
            try:
                grown = sequence.fork(capacity_tokens=min(max(2 * room, least + ROOM), self.capacity_tokens))
            except CapacityError:
                grown = sequence.fork(capacity_tokens=least)
            self.sequences[row] = grown
            self._gone.append(sequence.statistics_by_part())
            sequence.free()

    def reset(self) -> None:
        """Forget everything and give the flash back; the next batch may have another size.

        Raises:
            DeviceStatusError: see `Sequence.free`.
        """
        sequences, self.sequences = self.sequences, []
        self.meter = Meter(self.device.config, dense=self.mode is Mode.DENSE)
        self._read.clear()
        self._writing.clear()
        self._gone.clear()
        self._failed = ""
        for layer in self.drive_layers:
            with suppress(KvatticError):    # K and V that could not be written are forgotten like the others
                layer.wait()
            layer.reset()
        # States of other layers have the batch's size: they begin anew.
        others = make_layers(self, self._text, cross=self._cross)
        self.layers = [layer if isinstance(layer, DriveLayer) else other
                       for layer, other in zip(self.layers, others, strict=True)]
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
        return self.meter.report([*parts, *self._gone], rows=len(parts), mode=self.mode.name.lower(),
                                 layers=len(self.drive_layers))

    # Copies of rows.

    def fork(self) -> "DriveCache":
        """Another cache that begins with the same tokens, and goes on by itself; `copy.deepcopy` does the same.

        Stripes in flash are shared (`Sequence.fork`), so that one prefix serves many prompts.

        Raises:
            RequestError: an earlier step failed, or is not complete.
            CapacityError: flash or DRAM have no room.
        """
        self._check_rows_whole()
        made = copy(self)
        made.__dict__.update(sequences=[], meter=Meter(self.device.config, dense=self.mode is Mode.DENSE), _gone=[],
                             _writing=deque(), _read={})
        made.layers = [layer.fork(made) if isinstance(layer, DriveLayer) else deepcopy(layer) for layer in self.layers]
        made.drive_layers = _by_slot(made.layers)
        try:
            for sequence in self.sequences:
                made.sequences.append(sequence.fork())
        except BaseException:
            made.reset()
            raise
        return made

    # Outliving the process.

    def save(self, path: Path | str, *, note: Any = None) -> None:
        """Write a manifest of what this cache holds, between two steps; see `Device.save`.

        Args:
            path: the file; one that is there is replaced.
            note: anything that can be JSON, such as the token ids so far; `load` gives it back as `DriveCache.note`.

        Raises:
            RequestError: several drives, nothing to save, or an earlier step failed or is not complete.
            OSError: the file cannot be written; an earlier one is still there and still true.
        """
        self._check_rows_whole()
        if isinstance(self.device, DriveArray):
            raise RequestError("what is on a single drive can be saved, not what is on several")
        if self._cross:
            raise RequestError("an encoder's tokens cannot be saved")
        self.check_stateless()
        if not self.sequences:
            raise RequestError("there is nothing to save: this DriveCache holds no tokens")
        rows = [sequence for sequence in self.sequences if isinstance(sequence, Sequence)]
        kept = [flags.astype(int).tolist() for flags in self.drive_layers[0].kept]
        self.device.save(path, rows, note={"kind": _KIND, "mode": self.mode.name.lower(), "kept": kept, "note": note})

    @classmethod
    def load(cls, device: Device, config: Any, path: Path | str, **options: Any) -> "DriveCache":
        """A cache as it was saved; arguments as of `DriveCache` and `Device.attach`.

        Args:
            device: the same drive, opened anew: nothing may have been written yet.
            config: the model's configuration.
            path: what `save` wrote.
            options: as the cache was made with.

        Raises:
            RequestError: the file is of something else, or of a cache of another model or with other options.
            ManifestError, ConfigMismatchError, CapacityError, OSError: see `Device.attach`.
        """
        cache = cls(device, config, **options)
        with attached(device, path, _KIND, capacity_tokens=options.get("capacity_tokens")) as (sequences, found):
            if found["mode"] != cache.mode.name.lower():
                raise RequestError(f"{path} is of a DriveCache with mode={found['mode']!r}, not "
                                   f"{cache.mode.name.lower()!r}")
            cache.adopt(sequences, [np.array(flags, np.bool_) for flags in found["kept"]])
        cache.note = found["note"]
        return cache

    @property
    def stripe_tokens(self) -> int:
        """Tokens of a stripe of its rows: what a row can be shared in."""
        config = self.device.config
        return layout.stripe_pages(config, sparse=self.mode is not Mode.DENSE) * config.tokens_per_page

    def adopt(self, sequences: list[Sequence], kept: list[Flags] | None = None) -> None:
        """Take sequences as the rows of a cache that is empty; they are freed with it.

        Args:
            sequences: one for each row, with the same positions.
            kept: of each row: which positions are tokens, not padding; all if None.

        Raises:
            RequestError: the cache is not empty, or they were made with other options than its own would be.
        """
        if self.sequences:
            raise RequestError("this DriveCache holds tokens already; reset() it first")
        flags = kept or [np.ones(sequence.length(), np.bool_) for sequence in sequences]
        for sequence, mine in zip(sequences, flags, strict=True):
            self.check_alike(sequence)
            lengths = {sequence.length(layer) for layer in range(sequence.layers)}
            if lengths != {int(mine.sum())} or len(mine) != len(flags[0]):
                raise RequestError(f"all rows and layers must have the same positions, not {lengths} tokens in "
                                   f"{len(mine)} and {len(flags[0])} positions")
        for sequence in sequences:
            sequence.held_tokens = self._held_tokens
        self.sequences = list(sequences)
        for layer in self.drive_layers:
            layer.resume(flags)

    def check_alike(self, sequence: Sequence) -> None:
        """Refuse a sequence that was made with other options than this cache's own are.

        Raises:
            RequestError: says what differs.
        """
        self.check_stateless()
        mine = {"layers": len(self.drive_layers), "kv_heads": heads_of(self._text)[2], **self._sketches,
                "sinks": self._sinks}
        for name, wanted in mine.items():
            if (found := getattr(sequence, name)) != wanted:
                raise RequestError(f"a sequence with {name} {found} does not fit this DriveCache, which needs "
                                   f"{wanted}: its model or its options are others")
        for kind, name in ((Kind.KEY, "key_scale"), (Kind.VALUE, "value_scale")):
            scales = check_scales(name, self._options.get(name), sequence.layers, sequence.kv_heads)
            for layer in range(sequence.layers):
                stored = sequence.scales(kind, layer)
                own, theirs = None if scales is None else [*scales[layer]], None if stored is None else stored.tolist()
                if own != theirs:
                    raise RequestError(f"a sequence with {name} {theirs} (layer {layer}) does not fit this DriveCache, "
                                       f"whose is {own}")

    def check_stateless(self) -> None:
        """Refuse a model some of whose layers keep a state outside of the drive, or K and V.

        Raises:
            RequestError: it has such layers.
        """
        if any(isinstance(layer, (LinearAttentionLayer, DynamicLayer)) for layer in self.layers):
            raise RequestError("some layers of this model are not in the drive: their state would be missing")

    def __deepcopy__(self, memo: dict[int, Any]) -> "DriveCache":
        memo[id(self)] = made = self.fork()
        return made

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Choose rows, as beam search does at every step: row i becomes row `beam_idx[i]` of before.

        A row that is chosen once stays as it is, each further time it is forked; one that is not chosen is freed.

        Args:
            beam_idx: integers, (rows,).

        Raises:
            RequestError: there is no such row, or an earlier step failed or is not complete.
            CapacityError: flash or DRAM have no room; the cache must be reset then.
        """
        self._choose_rows(torch.as_tensor(beam_idx).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other; errors as of `reorder_cache`."""
        check_positive("repeats", repeats)
        self._choose_rows([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows: integers, or a bool for each; errors as of `reorder_cache`."""
        chosen = torch.as_tensor(indices)
        self._choose_rows((torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen).tolist())

    def _choose_rows(self, rows: list[int]) -> None:
        self._check_rows_whole()
        if not (before := self.sequences):
            return
        if wrong := [row for row in rows if not 0 <= row < len(before)]:
            raise RequestError(f"rows must be 0 to {len(before) - 1}, of the {len(before)} that this DriveCache holds, "
                               f"not {wrong[0]}")
        if not rows:
            raise RequestError("a DriveCache must keep at least one row; reset() it to forget all")
        kept = [layer.kept for layer in self.drive_layers]
        made: list[Sequence | ArraySequence] = []
        try:
            for row in sorted({*range(len(before))} - {*rows}):     # whose room the forks may need
                self._gone.append(before[row].statistics_by_part())
                before[row].free()
            for place, row in enumerate(rows):
                made.append(before[row].fork() if row in rows[:place] else before[row])
        except KvatticError as error:
            self.sequences = [*dict.fromkeys([*before, *made])]     # for `reset`
            raise self.fail(error) from None
        self.sequences = made
        self.forget_masks()
        for layer, flags in zip(self.drive_layers, kept, strict=True):
            layer.resume([flags[row] for row in rows] if flags else [])
        for other in self.layers:
            if isinstance(other, LinearAttentionLayer):     # hybrid ones are both
                LinearAttentionLayer.reorder_cache(other, torch.tensor(rows))
            elif isinstance(other, DynamicLayer):
                other.batch_select_indices(torch.tensor(rows))

    def _check_rows_whole(self) -> None:
        """Wait for what is being written, and refuse rows whose layers hold different tokens."""
        if self._failed:
            raise RequestError(f"an earlier step of this DriveCache failed ({self._failed}): reset() it first")
        if any(layer.unattended for layer in self.drive_layers):
            raise RequestError("a step of this DriveCache is not complete: its rows can be copied between two steps")
        self.wait()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions.  Those in flash stay there until their zone is erased; see `Sequence.fork`.

        Args:
            tokens_to_remove: minus their number, as transformers want it.

        Raises:
            RequestError: a positive number; or several drives.
            CapacityError: flash or DRAM have no room for the row without its last tokens.
        """
        if tokens_to_remove < 0 and not self.is_croppable:
            number = next(number for number, layer in enumerate(self.layers) if not layer.is_croppable)
            raise RequestError(f"layer {number} has the state of a linear layer, from which tokens cannot be removed")
        if tokens_to_remove < 0 and not self._cross:
            self.wait()
            self._cut_flash([int(kept[:tokens_to_remove].sum()) for kept in self.drive_layers[0].kept])
        super().crop(tokens_to_remove)

    def _cut_flash(self, left: list[int]) -> None:
        """Cut the rows that have too many tokens in flash down to `left`, if all of them can be."""
        cut = {row: tokens for row, (tokens, sequence) in enumerate(zip(left, self.sequences, strict=True))
               if tokens < max(sequence.flushed(layer) for layer in range(sequence.layers))}
        rows = {row: self.sequences[row] for row in cut}
        if not all(isinstance(sequence, Sequence) for sequence in rows.values()):
            return      # the layers say why not
        for row, sequence in rows.items():
            self.sequences[row] = sequence.fork(cut[row])
            self._gone.append(sequence.statistics_by_part())
            sequence.free()

    def forget_masks(self) -> None:
        """Forget what masks of earlier steps say."""
        self._read.clear()

    def wait(self) -> None:
        """Wait until all K and V are written, and report what failed.

        Raises:
            CapacityError, DeviceStatusError: see `Sequence.append`.
        """
        for layer in self.drive_layers:
            layer.wait()

    def activate_past_recording(self) -> None:
        """Prepare for drafts: the newest tokens stay in device DRAM anyway, other layers record what they forget.

        Raises:
            RequestError: several drives, from which rejected drafts cannot be removed.
        """
        if isinstance(self.device, DriveArray):
            raise RequestError("drafts can be removed from a single drive only, not from several")
        for layer in self.layers:
            if not isinstance(layer, DriveLayer) and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def fail(self, error: E) -> E:
        """Note that a step failed, so that the layers hold different tokens from now on; returns the error."""
        self._failed = f"{type(error).__name__}: {error}"
        for layer in self.drive_layers:
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
        for other in self.drive_layers:
            if other.unattended:
                raise RequestError(f"layer {other.number}: the K and V that this DriveCache returned last were not "
                                   f"attended by the backend {NAME!r}: {self._why_not()}; reset() the DriveCache "
                                   "afterwards")
        before = self.drive_layers[layer.slot - 1] if layer.slot else layer
        length, wanted = layer.get_seq_length(), before.get_seq_length()
        if before is not layer and wanted and wanted != length + count:
            raise RequestError(f"layer {layer.number} holds {length} positions and gets {count} more, but layer "
                               f"{before.number} holds {wanted}: an earlier step was interrupted; reset() the "
                               "DriveCache and begin again with the whole text")

    def _why_not(self) -> str:
        """Why K and V may not have come to the backend."""
        found = getattr(self._text, "_attn_implementation", NAME)
        if found != NAME:
            return f"the model's attention is {found!r}, call model.set_attn_implementation({NAME!r})"
        return "the model computes attention by itself and is not supported, or a step was interrupted"

    def latent_width(self, keys: torch.Tensor) -> int | None:
        """Elements of the compressed vector that a model with latent attention stores as K; None: K are K."""
        return latent_width(self._text, tuple(keys.shape))

    def write_next(self, layer: DriveLayer) -> None:
        """Make room for writing another layer's first tokens: each layer that is being written holds its memory."""
        while len(self._writing) >= LAYERS_IN_FLIGHT:
            self._writing.popleft().wait()
        self._writing.append(layer)

    # Attention.

    def rows(self, mask: torch.Tensor | None, before: list[Flags], count: int) -> Rows:
        """What a step's mask says, read once for all layers; arguments as of `read_mask`."""
        key = (id(mask), len(before[0]), count)
        if key not in self._read:
            if any(past != len(before[0]) for _, past, _ in self._read):
                self._read.clear()
            # The mask is kept, so that its id is not another one's.
            self._read[key] = (mask, read_mask(mask, before, count))
        return self._read[key][1]

    def check_rows(self, rows: Rows) -> None:
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
            # The same in all layers of a step.
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
