"""K and V of a batch in the drive: the cache that a model of transformers gets."""

from collections import deque
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from kvattic.array import ArrayPlan, ArraySequence, DriveArray
from kvattic.driver.checks import as_member, check_positive
from kvattic.driver.device import Device
from kvattic.driver.results import AttendPlan
from kvattic.driver.sequence import Sequence
from kvattic.errors import KvatticError, RequestError
from kvattic.integrations.configuration import check_model, heads_of, latent_width, longest_window, most_positions
from kvattic.integrations.layer import DriveLayer
from kvattic.integrations.layers import make_layers
from kvattic.integrations.masks import Flags, Rows, read_mask
from kvattic.integrations.options import check_mode, check_options, count_sinks
from kvattic.integrations.report import Meter, Report
from kvattic.spec.commands import Mode
from kvattic.spec.elements import Integers
from kvattic.support.closing import Closing
from kvattic.support.renamed import old_selection_keywords

__all__ = ["HELD_TOKENS", "LAYERS_IN_FLIGHT", "NAME", "DriveCache"]

NAME = "kvattic"
"""What `attn_implementation` is set to."""

HELD_TOKENS = 64
"""Newest tokens of a row that stay in device DRAM, unless a `DriveCache` is told otherwise."""

LAYERS_IN_FLIGHT = 2
"""Layers of a prompt that are written while the next one is computed, at most."""

E = TypeVar("E", bound=BaseException)


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
        cross: it holds K and V of an encoder's tokens, which come once (`DriveEncoderDecoderCache`).
        options: of the sequences, see `create_sequence` of `Device` and `DriveArray`: isolated, split.

    Attributes:
        device: the drive.
        capacity_tokens: tokens that each row can hold.
        sequences: one for each row of the batch; none before the first tokens.
        drive_layers: the layers with attention, whose K and V are in the drive.
        mode: what a decode step attends.
        meter: sums of what the steps cost, for `report`.

    Raises:
        TypeError: there is no such option.
        RequestError: a wrong mode or number, K and V do not fit the drive, or the model needs what the drive lacks.
        ConfigError: a sparse mode, and the drive is without sparse attention.
    """

    @old_selection_keywords
    def __init__(self, device: Device | DriveArray, config: Any, *, capacity_tokens: int | None = None,
                 held_tokens: int | None = None, mode: Mode | str = Mode.DENSE, features: int | None = None,
                 top_units: int | None = None, local_tokens: int = 0, sinks: int | None = None,
                 unit_tokens: int | None = None, cross: bool = False, **options: Any) -> None:
        text = config.get_text_config(decoder=True)
        check_model(config, cross=cross)
        several = isinstance(device, DriveArray)
        check_options(options, several)
        found = as_member("mode", mode, Mode)
        if cross and found is not Mode.DENSE:
            raise RequestError(f"mode {found.name.lower()}: an encoder's tokens are attended densely, mode='dense'")
        unit_tokens = check_mode(device.config, found, features, top_units, local_tokens, sinks, unit_tokens)
        if found is not Mode.DENSE and options.get("split") == "context":
            raise RequestError(f"mode {found.name.lower()} chooses from all tokens, which no drive has if sequences "
                               "are split by context: take split='heads', or mode='dense'")
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
        super().__init__(layers=make_layers(self, text, cross=cross))
        self.drive_layers = [layer for layer in self.layers if isinstance(layer, DriveLayer)]
        self.device = device
        self.capacity_tokens = capacity
        self.sequences: list[Sequence | ArraySequence] = []
        self.mode: Mode = found
        self._features, self._top_units = features, top_units
        self._local_tokens, self._unit_tokens = local_tokens, unit_tokens
        self._held_tokens, self._sinks = held, kept_sinks
        self._text = text
        self._cross = cross
        self._failed = ""   # an error, from which its layers hold different tokens
        self.meter = Meter(device.config, dense=found is Mode.DENSE)
        self._options = options
        self._writing: deque[DriveLayer] = deque()
        # What masks say, by their identity: the layers of a step share them.
        self._read: dict[tuple[int, int, int], tuple[torch.Tensor | None, Rows]] = {}

    # Life.

    def _end_block(self) -> None:
        self.reset()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RequestError("K and V in the drive cannot be copied: make another DriveCache")

    def start(self, rows: int, kv_heads: int, tokens: int = 0) -> None:
        """Sequences for a batch, when its first layer comes.

        Args:
            rows: of the batch.
            kv_heads: of a layer.
            tokens: of an encoder, of which there will be no more.
        """
        if self.sequences:
            return
        capacity = tokens if self._cross else self.capacity_tokens
        sparse, centroid = self.mode.blended, self.mode is Mode.CENTROID
        options = self._options
        if self.mode is not Mode.DENSE:
            options = options | {"sinks": self._sinks, "window": longest_window(self._text) if sparse else None}
        try:
            for _ in range(rows):
                self.sequences.append(self.device.create_sequence(
                    kv_heads, capacity_tokens=capacity, layers=len(self.drive_layers), sparse=sparse,
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
        return self.meter.report(parts, mode=self.mode.name.lower(), layers=len(self.drive_layers))

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
