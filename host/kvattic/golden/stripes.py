"""Reading a job's stripes: the golden device's K, V, and sketches of K, from flash and device DRAM."""

from typing import NamedTuple

import numpy as np

from kvattic.golden.storage import Storage
from kvattic.spec import codes, layout
from kvattic.spec.blocks import Table
from kvattic.spec.commands import AttendCommand, Kind
from kvattic.spec.config import Config
from kvattic.spec.elements import Bits, Bytes, Integers

__all__ = ["Found", "FoundCodes", "StripeReader"]


class Found(NamedTuple):
    """What was read.

    Members:
        bits: uint16, (tokens or units, head_dim), bit patterns; zero where nothing was read, or could not be.
        lost: the first token that could not be read, or None.
    """

    bits: Bits
    lost: int | None


class FoundCodes(NamedTuple):
    """Codes that were read.

    Members:
        codes: of all stripes of the job; zero where nothing was read, or could not be.
        lost: the first token of the first stripe with an octet that could not be read, or None.
    """

    codes: codes.KeyCodes
    lost: int | None


class StripeReader:
    """Reads what a job needs, and counts it.

    Args:
        config: geometry.
        storage: where it reads.
        command: of the job.
        table: of the job.
    """

    def __init__(self, config: Config, storage: Storage, command: AttendCommand, table: Table) -> None:
        self._config = config
        self._storage = storage
        self._command = command
        self._table = table

    def tokens(self, kind: Kind, codewords: Integers) -> Found:
        """K or V from base_token on, in whole stripes.

        Args:
            kind: VALUE; KEY, or SKETCH for K in the first pass.
            codewords: int64, which are read, ascending, counted from base_token.
        """
        config, command, entries = self._config, self._command, self._table.entries
        per_page = config.codewords_per_page
        images = np.zeros((command.stripes * command.stripe_pages * per_page, config.codeword_bytes), np.uint8)
        first_pages = entries.value_page if kind is Kind.VALUE else entries.key_page
        lost: int | None = None
        pages = np.unique(codewords // per_page)
        ends = np.searchsorted(codewords, np.append(pages, codewords[-1:] // per_page + 1) * per_page).tolist()
        for page, begin, end in zip(pages.tolist(), ends, ends[1:], strict=False):
            stripe, inside = divmod(page, command.stripe_pages)
            wanted = codewords[begin:end]
            images[wanted], gone = self._storage.read(
                kind, int(entries.channel[stripe]), int(first_pages[stripe]) + inside, wanted - page * per_page,
                dram=bool(entries.dram[stripe]))
            if gone is not None and lost is None:
                lost = command.base_token + int(wanted[gone]) * config.tokens_per_codeword
        return Found(layout.unpack_pages(images.reshape(-1, config.page_bytes), config), lost)

    def features(self, features: Integers) -> Found:
        """Some features of K of the stripes outside of the tail; a stripe that cannot be read whole is lost whole.

        Args:
            features: int64, their numbers, ascending.
        """
        command, size = self._command, self._config.group_tokens
        key = np.zeros((command.stripes * size, self._config.head_dim), np.uint16)
        lost: int | None = None
        for stripe in np.flatnonzero(~self._table.tail).tolist():
            codewords, gone = self._sketch(Kind.FEATURE, stripe, features)
            key[stripe * size : (stripe + 1) * size, features] = layout.unpack_codes(codewords, self._config).T
            if gone is not None and lost is None:
                lost = command.base_token + stripe * size
        return Found(key, lost)

    def centroids(self) -> Found:
        """Mean keys of all units, (units, head_dim), zero for those of the tail."""
        config, command = self._config, self._command
        units = config.group_codewords >> command.unit_bits
        unit_tokens = config.tokens_per_codeword << command.unit_bits
        numbers = np.arange(units // config.tokens_per_codeword)
        key = np.zeros((command.stripes, units, config.head_dim), np.uint16)
        lost: int | None = None
        for stripe in np.flatnonzero(~self._table.tail).tolist():
            codewords, gone = self._sketch(Kind.SKETCH, stripe, numbers)
            used = np.ascontiguousarray(codewords[:, : config.tokens_per_codeword * config.token_bytes])
            key[stripe] = layout.unpack_codes(used, config).reshape(units, config.head_dim)
            if gone is not None and lost is None:
                unit = stripe * units + gone * config.tokens_per_codeword
                token = command.base_token + unit * unit_tokens
                # Only units with a token before the end matter.
                lost = token if token < command.end_token else None
        return Found(key.reshape(-1, config.head_dim), lost)

    def octets(self) -> FoundCodes:
        """Codes of the stripes outside of the tail."""
        config, command = self._config, self._command
        numbers = np.arange(config.octets)
        data = np.zeros((command.stripes, config.octets, config.codeword_bytes), np.uint8)
        lost: int | None = None
        for stripe in np.flatnonzero(~self._table.tail).tolist():
            data[stripe], gone = self._sketch(Kind.CODES, stripe, numbers)
            if gone is not None and lost is None:
                lost = command.base_token + stripe * config.group_tokens
        return FoundCodes(codes.unpack(data, config), lost)

    def _sketch(self, kind: Kind, stripe: int, codewords: Integers) -> tuple[Bytes, int | None]:
        """Codewords of a stripe's sketch, (codewords, codeword_bytes), and the index of the first that is lost."""
        config, sketches = self._config, self._table.sketches
        found = np.zeros((len(codewords), config.codeword_bytes), np.uint8)
        page, codewords = np.divmod(codewords + int(sketches.codeword[stripe]), config.codewords_per_page)
        lost: int | None = None
        for each in np.unique(page).tolist():
            places = np.flatnonzero(page == each)
            found[places], gone = self._storage.read(
                kind, int(self._table.entries.channel[stripe]), int(sketches.page[stripe]) + each, codewords[places],
                dram=False)
            if gone is not None and lost is None:
                lost = int(places[gone])
        return found, lost
