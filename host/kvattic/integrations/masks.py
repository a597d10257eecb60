"""What the masks of transformers say: which positions are tokens, and which range of them each one attends."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.masking_utils import sdpa_mask

from kvattic.errors import RequestError
from kvattic.spec.elements import Integers

__all__ = ["Flags", "Rows", "attended_tokens", "make_mask", "read_mask", "whole_mask"]

Flags = NDArray[np.bool_]

MASKED = -1e4
"""What is added to a score so that its weight is zero: this much, or less."""


class Rows(NamedTuple):
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


def read_mask(mask: torch.Tensor | None, before: list[Flags], count: int) -> Rows:
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
        return Rows([every] * len(before), [np.concatenate([kept, np.ones(count, np.bool_)]) for kept in before],
                     [None] * len(before), [None] * len(before))
    if mask.shape[1] != 1 or tuple(mask.shape[2:]) != (count, past + count) or mask.shape[0] not in (1, len(before)):
        raise RequestError(f"the attention mask must be of shape ({len(before)}, 1, {count}, {past + count}), the same "
                           f"for all heads, not {tuple(mask.shape)}")
    flags = _flags(mask)
    rows = Rows([], [], [], [])
    for row, kept in enumerate(before):
        flag: Flags = flags[row if len(flags) > 1 else 0].numpy()
        if count == 1 and past and flag.all() and kept.all():   # a decode step without padding and windows
            rows.new.append(np.zeros(1, np.intp))
            rows.kept.append(np.ones(past + 1, np.bool_))
            rows.start.append(None)
            rows.end.append(None)
            continue
        # A token attends itself, padding is attended by nobody.
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
    """The range of stored tokens that each of the new ones attends, see `Rows`.

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


def _flags(mask: torch.Tensor) -> torch.Tensor:
    """Which positions attend which: bool, (rows, positions, positions).

    Raises:
        RequestError: the mask adds something to the scores.
    """
    mask = mask.detach().to("cpu")[:, 0]
    if mask.dtype == torch.bool:
        return mask
    if ((mask != 0) & (mask > MASKED)).any():
        raise RequestError("the attention mask adds a bias to the scores, the drive attends a token or does not: such "
                           "models are not supported")
    return mask == 0


def whole_mask(count: int, tokens: int) -> torch.Tensor:
    """A mask of positions that attend all tokens: bool, (1, 1, count, tokens)."""
    return torch.ones(1, 1, count, tokens, dtype=torch.bool)


def attended_tokens(mask: torch.Tensor | None, rows: int, tokens: int) -> list[Flags]:
    """The encoder's tokens that are attended: bool, (tokens,), of each row.

    Args:
        mask: (rows, 1, positions, tokens), bool, or floats that are 0 where it attends; None: all are.
        rows: of the batch.
        tokens: of the encoder, padding included.

    Raises:
        RequestError: positions of a row attend different tokens, or the mask has another shape.
    """
    if mask is None:
        return [np.ones(tokens, np.bool_)] * rows
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != tokens or mask.shape[0] not in (1, rows):
        raise RequestError(f"the mask of the encoder's tokens must be of shape ({rows}, 1, positions, {tokens}), the "
                           f"same for all heads, not {tuple(mask.shape)}")
    flags: Flags = _flags(mask).numpy()
    if (flags != flags[:, :1]).any():
        raise RequestError("the positions of a step attend different tokens of the encoder, in the drive they attend "
                           "all that are stored")
    return [flags[row if len(flags) > 1 else 0, 0] for row in range(rows)]


def make_mask(*, q_offset: int = 0, allow_is_causal_skip: bool = True, **kwargs: Any) -> torch.Tensor | None:
    """The masks that belong to it: bool; None for a prompt that is attended causally without padding.

    Encoders and cross-attention have None too, where everything is attended.
    """
    # Behind the prompt, the mask is how the backend learns of padding and windows.
    skip = allow_is_causal_skip and q_offset == 0
    mask: torch.Tensor | None = sdpa_mask(q_offset=q_offset, allow_is_causal_skip=skip, **kwargs)
    return mask
