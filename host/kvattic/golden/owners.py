"""The golden device's owners: whose the zones of flash and the regions of device DRAM are, and who may say so."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.golden.queues import RejectedError
from kvattic.spec.commands import DOMAINS, Grant, Mode, Status
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.layout import Entries, Sketches
from kvattic.spec.registers import MAX_REGIONS, QUEUES

__all__ = ["Owners"]


class Owners:
    """Domain numbers by zone and by region, 0 for nobody's; and the queues that may name each domain.

    Args:
        config: geometry.

    Attributes:
        zones: owners of the zones, uint8.
        regions: owners of the regions, uint8.
        queues: by domain, a bit for each queue that it is given to.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.zones = np.zeros(config.part.blocks, np.uint8)
        self.regions = np.zeros(MAX_REGIONS, np.uint8)
        self.queues = [0] * DOMAINS

    def grant(self, command: dict[str, int]) -> None:
        """GRANT."""
        kind, first, count, domain = (command[name] for name in ("kind", "first", "count", "domain"))
        if kind > max(Grant):
            raise RejectedError(Status.INVALID_GRANT, 0)
        if kind == Grant.QUEUES:
            bad = count != 0 or first >= 1 << QUEUES
        else:
            owners = self.zones if kind == Grant.ZONES else self.regions
            bad = count == 0 or first + count > len(owners)
        if bad:
            raise RejectedError(Status.INVALID_GRANT, 1)
        if domain >= DOMAINS or (kind == Grant.QUEUES and domain == 0):
            raise RejectedError(Status.INVALID_GRANT, 2)
        if kind == Grant.QUEUES:
            self.queues[domain] = first
        else:
            owners[first : first + count] = domain

    def check_permitted(self, domain: int, queue: int) -> None:
        """Refuse a domain that the queue's commands may not name."""
        if domain >= DOMAINS or not self.queues[domain] >> queue & 1:
            raise RejectedError(Status.NOT_PERMITTED, 1)

    def owns_pages(self, domain: int, page: Any, count: Any) -> NDArray[np.bool_]:
        """Whether runs of flash pages lie in one zone each, and that is the domain's; all but domain may be arrays."""
        page = np.asarray(page)
        bits = self._config.zone_page_bits
        zone = page >> bits
        there = (zone < len(self.zones)) & ((page & (1 << bits) - 1) + count <= 1 << bits)
        found: NDArray[np.bool_] = there & (self.zones[np.where(there, zone, 0)] == domain)
        return found

    def owns_dram(self, domain: int, page: Any, count: int, region_bits: int) -> NDArray[np.bool_]:
        """Whether the regions of the first and the last page of runs in device DRAM are the domain's."""
        found = np.full(np.shape(page), count <= 1 << region_bits)
        for each in (np.asarray(page), np.asarray(page) + count - 1):
            region = each >> region_bits
            there = (each < 1 << PAGE_NUMBER_BITS) & (region < len(self.regions))
            found &= there & (self.regions[np.where(there, region, 0)] == domain)
        return found

    def first_foreign(self, command: dict[str, int], entries: Entries, sketch: Sketches,
                      region_bits: int) -> int | None:
        """The first entry of an ATTEND's table that is not its domain's.

        Args:
            command: fields of `COMMAND`.
            entries: of its table.
            sketch: likewise; of a dense job nothing that means anything.
            region_bits: the register.
        """
        config, domain, count = self._config, command["domain"], command["stripe_pages"]
        flash, dram = np.ones((2, len(entries.dram)), np.bool_)
        for page in (entries.key_page, entries.value_page):
            flash &= self.owns_pages(domain, page, count)
            dram &= self.owns_dram(domain, page, count, region_bits)
        if command["mode"] != Mode.DENSE:
            pages: Any = config.group_pages
            if command["mode"] == Mode.CENTROID:
                codewords = (config.group_codewords >> command["unit_bits"]) // config.tokens_per_codeword
                pages = -(-(sketch.codeword + codewords) // config.codewords_per_page)
            flash &= (sketch.written == 0) | self.owns_pages(domain, sketch.page, pages)
        owned = np.where(entries.dram == 1, dram, flash)
        return None if owned.all() else int(np.argmin(owned))
