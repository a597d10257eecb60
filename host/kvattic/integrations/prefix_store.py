"""`PrefixStore`: beginnings of texts whose K and V stay in the drive, for prompts that begin with the same tokens.

    with PrefixStore(device, model, budget_tokens=100_000) as store:
        answer = store.generate(tokens, max_new_tokens=64)

docs/transformers.md explains it.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvattic.array import DriveArray
from kvattic.driver.checks import check_integer, check_positive
from kvattic.driver.device import Device
from kvattic.driver.sequence import Sequence
from kvattic.errors import CapacityError, RequestError
from kvattic.integrations.cache import DriveCache
from kvattic.integrations.saved import attached
from kvattic.support.closing import Closing

__all__ = ["PrefixStatistics", "PrefixStore", "digest_of"]

Tokens = NDArray[np.int64]
_KIND = "PrefixStore"
"""What a manifest of a store says that it is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStatistics:
    """What a `PrefixStore` did since it was made, and what it holds.

    Attributes:
        lookups: texts that were looked up, each row of a batch for itself.
        hits: those of which it had at least a block.
        asked_tokens: tokens of all of them.
        matched_tokens: those that did not have to be computed.
        stored: texts that were put in.
        evicted: texts that were removed for the budget, or because the drive was full.
        texts: texts that it holds.
        tokens: tokens that these have in flash, those that they share counted once.
    """

    lookups: int
    hits: int
    asked_tokens: int
    matched_tokens: int
    stored: int
    evicted: int
    texts: int
    tokens: int


@dataclass(slots=True, eq=False)
class _Text:
    """The beginning of a text: digests of its blocks, each of all tokens up to its end; and their K and V."""

    digests: list[bytes]
    sequence: Sequence = field(repr=False)

    def matched(self, digests: list[bytes]) -> int:
        """How many blocks it has in common with another text."""
        pairs = enumerate(zip(self.digests, digests, strict=False))
        return next((i for i, (mine, other) in pairs if mine != other), min(len(self.digests), len(digests)))


def digest_of(model: Any) -> str:
    """What K and V depend on beside the tokens: the model's configuration and all its weights, as a hexadecimal digest.

    It reads all weights once, at a gigabyte or so a second.

    Args:
        model: of transformers.
    """
    digest = blake2b(digest_size=16)
    # The attention backend and where the files lay do not change K and V.
    config = {name: value for name, value in model.config.to_dict().items()
              if not name.startswith("_") and name not in ("transformers_version",)}
    digest.update(repr(sorted(config.items(), key=lambda item: item[0])).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().to("cpu").contiguous().view(torch.uint8).numpy() if values.dim() else b"")
    return digest.hexdigest()


class PrefixStore(Closing):
    """Keeps the K and V of texts in flash, and gives their beginnings to new prompts.

    Texts are known by their content: the model and the token ids, in blocks of a stripe.  A prompt gets the longest
    beginning that any text has in common with it, by a fork (`Sequence.fork`): nothing is copied or written for it.  At
    least one token is left to be computed.  When the budget is full, the texts that were not used for longest go.

    Usable as a context manager, which frees all texts at the end.

    Args:
        device: the drive.
        model: of transformers; its attention must be `kvattic` when it generates.
        budget_tokens: tokens that it keeps in flash, those that texts share counted once.
        name: stands for the model's configuration and weights; if None, a digest of them, for which all are read once.
        options: of the caches that it makes, see `DriveCache`.

    Attributes:
        device, model, budget_tokens, name: the same.
        block_tokens: tokens of a block.

    Raises:
        RequestError: several drives, isolated sequences, which share nothing with others, no positive budget, or a
            model some of whose layers keep a state outside of the drive.
        TypeError, ConfigError: see `DriveCache`.
    """

    def __init__(self, device: Device | DriveArray, model: Any, *, budget_tokens: int, name: str | None = None,
                 **options: Any) -> None:
        if isinstance(device, DriveArray):
            raise RequestError("a PrefixStore is on a single drive, not on several")
        check_positive("budget_tokens", budget_tokens)
        if options.get("isolated"):
            raise RequestError("isolated sequences share nothing with others: a PrefixStore must not be isolated")
        self.device = device
        self.model = model
        self.budget_tokens = budget_tokens
        self.name = digest_of(model) if name is None else name
        self._options = options
        cache = self._new_cache()
        cache.check_stateless()
        self.block_tokens = cache.stripe_tokens
        self._texts: dict[int, _Text] = {}      # the one that was not used for longest first
        self._numbers = 0
        self._lookups = self._hits = self._asked = self._matched = self._stored = self._evicted = 0

    def _end_block(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free all texts; the store can be used again."""
        for number in list(self._texts):
            self._texts.pop(number).sequence.free()

    def _new_cache(self) -> DriveCache:
        return DriveCache(self.device, self.model.config, **self._options)

    # Outliving the process.

    def save(self, path: Path | str) -> None:
        """Write a manifest of all texts; see `Device.save`.

        Raises:
            OSError: the file cannot be written; an earlier one is still there and still true.
        """
        texts = list(self._texts.values())
        self.device.save(path, [text.sequence for text in texts], note={
            "kind": _KIND, "model": self.name, "block_tokens": self.block_tokens,
            "texts": [[digest.hex() for digest in text.digests] for text in texts]})

    @classmethod
    def load(cls, device: Device, model: Any, path: Path | str, **options: Any) -> "PrefixStore":
        """A store with the texts that were saved; arguments as of `PrefixStore`.

        Args:
            device: the same drive, opened anew: nothing may have been written yet.
            model: of transformers, with the same weights.
            path: what `save` wrote.
            options: of the store: budget_tokens, name, and those of its caches.

        Raises:
            RequestError: the file is of something else, or of a store of another model or with other options.
            ManifestError, ConfigMismatchError, CapacityError, OSError: see `Device.attach`.
        """
        store = cls(device, model, **options)
        with attached(device, path, _KIND) as (sequences, found):
            if found["model"] != store.name:
                raise RequestError(f"{path} is of a PrefixStore of another model: {found['model']}, not {store.name}")
            for sequence, digests in zip(sequences, found["texts"], strict=True):
                store.keep([bytes.fromhex(digest) for digest in digests], sequence)
        return store

    def keep(self, digests: list[bytes], sequence: Sequence) -> None:
        """For `load`: take a text that was saved.

        Raises:
            RequestError: it was stored with other options.
        """
        self._new_cache().check_alike(sequence)
        self._numbers += 1
        self._texts[self._numbers] = _Text(digests, sequence)

    # Looking up.

    def match(self, tokens: Any) -> int:
        """How many of a text's first tokens are stored, whole blocks.

        Args:
            tokens: integers, (tokens,).

        Raises:
            RequestError: not such an array.
        """
        return self._find(self._digests(_row(tokens)))[0] * self.block_tokens

    def cache(self, tokens: Any) -> DriveCache:
        """A cache that holds the beginnings of prompts, as far as all are stored; it is the caller's to `reset`.

        Args:
            tokens: integers, (tokens,) or (rows, tokens), all without padding, since rows have the same positions.

        Raises:
            RequestError: not such an array.
            CapacityError: the drive is full, though all texts that can go are gone.
        """
        rows = _rows(tokens)
        count = rows.shape[1]
        digests = [self._digests(row) for row in rows]
        self._lookups += len(rows)
        self._asked += rows.size
        found = [self._find(each) for each in digests]
        # At least one token must be left, and all rows must have as many.
        blocks = min(min(matched for matched, _ in found), (count - 1) // self.block_tokens)
        cache = self._new_cache()
        if blocks:
            self._hits += len(rows)
            self._matched += blocks * self.block_tokens * len(rows)
            forks: list[Sequence] = []
            try:
                for _, number in found:
                    forks.append(self._fork(self._texts[number].sequence, blocks * self.block_tokens,
                                            cache.capacity_tokens, {one for _, one in found}))
                cache.adopt(forks)
            except BaseException:
                for sequence in forks:
                    sequence.free()
                raise
        for _, number in found:
            self._touch(number)
        return cache

    def _find(self, digests: list[bytes]) -> tuple[int, int]:
        """(blocks, number) of the text that has most of a text's blocks."""
        found = [(matched, number) for number, text in self._texts.items() if (matched := text.matched(digests))]
        return max(found, default=(0, -1))

    def _touch(self, number: int) -> None:
        if number in self._texts:
            self._texts[number] = self._texts.pop(number)

    def _digests(self, tokens: Tokens) -> list[bytes]:
        """A digest for each whole block, of the model and all tokens up to its end."""
        found, last = [], self.name.encode()
        for first in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            last = blake2b(last + tokens[first : first + self.block_tokens].tobytes(), digest_size=16).digest()
            found.append(last)
        return found

    # Storing.

    def put(self, tokens: Any, cache: DriveCache, *, row: int = 0) -> int:
        """Keep the beginning of a text that a cache holds: the blocks that are in flash, as far as the budget allows.

        Args:
            tokens: integers, (tokens,): of the row, from its first position on; K and V must be those of this model.
            cache: that holds them; it goes on as if nothing had happened.
            row: of the batch.

        Returns:
            How many tokens of the text are stored now.

        Raises:
            RequestError: the cache has another drive or other options than this store's, or the row has fewer tokens or
                padding.
            CapacityError: the drive is full, though all texts that can go are gone.
        """
        ids = _row(tokens)
        check_integer("row", row, 0, len(cache.sequences) - 1)
        sequence = cache.sequences[row]
        cache.wait()
        if not isinstance(sequence, Sequence) or sequence.device is not self.device or sequence.isolated:
            raise RequestError("the DriveCache must be on this store's drive, and not isolated")
        self._new_cache().check_alike(sequence)
        kept = cache.drive_layers[0].kept[row]
        if len(kept) < len(ids) or not kept[: len(ids)].all():
            raise RequestError(f"row {row} of the DriveCache holds {int(kept.sum())} tokens in {len(kept)} positions, "
                               f"not these {len(ids)} tokens without padding")
        flushed = min(sequence.flushed(layer) for layer in range(sequence.layers))
        blocks = min(len(ids), flushed, self.budget_tokens) // self.block_tokens
        digests = self._digests(ids)[:blocks]
        matched, number = self._find(digests)
        if matched == blocks:
            self._touch(number)
            return blocks * self.block_tokens
        kept_tokens = blocks * self.block_tokens
        made = self._fork(sequence, kept_tokens, kept_tokens, set())
        self._numbers += 1
        self._texts[self._numbers] = text = _Text(digests, made)
        self._stored += 1
        for other in [n for n, each in self._texts.items() if each is not text and each.matched(digests) == len(
                each.digests)]:
            self._texts.pop(other).sequence.free()      # the new one has all of it
        while len(self._texts) > 1 and self._tokens() > self.budget_tokens:
            self._evict(set())
        return kept_tokens

    def _fork(self, sequence: Sequence, length: int, capacity: int, needed: set[int]) -> Sequence:
        """A fork, for which texts that are not needed go if the drive is full."""
        while True:
            try:
                return sequence.fork(length, capacity_tokens=capacity)
            except CapacityError:
                if not self._evict(needed):
                    raise

    def _evict(self, needed: set[int]) -> bool:
        """Remove the text that was not used for longest, unless it is needed; whether there was one."""
        number = next((number for number in self._texts if number not in needed), None)
        if number is None:
            return False
        self._texts.pop(number).sequence.free()
        self._evicted += 1
        return True

    def _tokens(self) -> int:
        """Tokens in flash, those that are shared counted once."""
        places: set[int] = set()
        for text in self._texts.values():
            places |= text.sequence.places()
        return len(places) * self.block_tokens

    @property
    def statistics(self) -> PrefixStatistics:
        """What it did and what it holds."""
        return PrefixStatistics(
            lookups=self._lookups, hits=self._hits, asked_tokens=self._asked, matched_tokens=self._matched,
            stored=self._stored, evicted=self._evicted, texts=len(self._texts), tokens=self._tokens())

    # Generating.

    def generate(self, tokens: torch.Tensor, **options: Any) -> Any:
        """The model's `generate`, with what is stored of the prompts; afterwards prompts and answers are stored.

        Of beams and several answers to a prompt, the prompts alone are stored.

        Args:
            tokens: int64, (rows, tokens), without padding.
            options: of `generate`; not `cache`.

        Raises:
            RequestError: see `cache`.
        """
        if "cache" in options or "past_key_values" in options:
            raise RequestError("a PrefixStore makes the cache itself: leave it out")
        known = {**self.model.generation_config.to_dict(), **options}
        each = max(int(known.get("num_beams") or 1), int(known.get("num_return_sequences") or 1))
        with self.cache(tokens) as cache:
            if each > 1:
                cache.batch_repeat_interleave(each)
            answer = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=cache, **options)
            texts = getattr(answer, "sequences", answer)
            for row in range(len(tokens)):
                # The newest token was not computed with yet.
                self.put(texts[row][:-1] if each == 1 else tokens[row], cache, row=row * each)
            return answer


def _row(tokens: Any) -> Tokens:
    rows = _rows(tokens)
    if len(rows) != 1:
        raise RequestError(f"tokens must be integers (tokens,), not {rows.shape}")
    row: Tokens = rows[0]
    return row


def _rows(tokens: Any) -> Tokens:
    """Token ids, (rows, tokens)."""
    values: Any = tokens.detach().to("cpu").numpy() if isinstance(tokens, torch.Tensor) else tokens
    array = np.atleast_2d(np.asarray(values))
    if array.dtype.kind not in "iu" or array.ndim != 2 or 0 in array.shape:
        raise RequestError(f"tokens must be integers (rows, tokens), not {array.dtype} {np.shape(values)}")
    rows: Tokens = array.astype("<i8")
    return rows
