"""The golden device's owners: the domains of flash zones and DRAM regions, and the queues that may name each domain."""

from typing import Any

import numpy as np

from kvattic.golden.rejected import RejectedError
from kvattic.spec.commands import DOMAINS, AttendCommand, Grant, GrantCommand, Mode, Status
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.elements import Booleans
from kvattic.spec.layout import Entries, Sketches
from kvattic.spec.registers import MAX_REGIONS, QUEUES

__all__ = ["Owners"]


class Owners:
    """Domains by zone and by region, 0 for nobody; and the queues that may name each domain.

    Args:
        config: geometry.

    Attributes:
        zones: owners of the zones, uint8.
        regions: owners of the regions, uint8.
        queues: by domain, a bit for each queue that it is granted to.
        version: another number after each change of zones or regions.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.zones = np.zeros(config.part.blocks, np.uint8)
        self.regions = np.zeros(MAX_REGIONS, np.uint8)
        self.queues = [0] * DOMAINS
        self.version = 0

    def clear(self) -> None:
        """Take everything from everybody."""
        self.version += 1
        self.zones[:] = 0
        self.regions[:] = 0
        self.queues[:] = [0] * DOMAINS

    def grant(self, command: GrantCommand) -> None:
        """GRANT.

        Raises:
            RejectedError: it is not valid.
        """
        kind, first, count, domain = command.kind, command.first, command.count, command.domain
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
            self.version += 1
            owners[first : first + count] = domain

    def check_permitted(self, domain: int, queue: int) -> None:
        """Refuse a domain that the queue's commands may not name.

        Raises:
            RejectedError: NOT_PERMITTED.
        """
        if domain >= DOMAINS or not self.queues[domain] >> queue & 1:
            raise RejectedError(Status.NOT_PERMITTED, 1)

    def owns_pages(self, domain: int, page: Any, count: Any) -> Booleans:
        """Whether each run of flash pages lies in one zone, which is the domain's.

        Args:
            domain: who asks.
            page: first page of each run, an integer or an array.
            count: pages of each run; likewise.
        """
        page = np.asarray(page)
        bits = self._config.zone_page_bits
        zone = page >> bits
        there = (zone < len(self.zones)) & ((page & (1 << bits) - 1) + count <= 1 << bits)
        found: Booleans = there & (self.zones[np.where(there, zone, 0)] == domain)
        return found

    def owns_dram(self, domain: int, page: Any, count: int, region_bits: int) -> Booleans:
        """Whether the regions of the first and the last page of runs in device DRAM are the domain's."""
        found = np.full(np.shape(page), count <= 1 << region_bits)
        for each in (np.asarray(page), np.asarray(page) + count - 1):
            region = each >> region_bits
            there = (each < 1 << PAGE_NUMBER_BITS) & (region < len(self.regions))
            found &= there & (self.regions[np.where(there, region, 0)] == domain)
        return found

    def first_foreign(self, command: AttendCommand, entries: Entries, sketch: Sketches,
                      region_bits: int) -> int | None:
        """The first entry of an ATTEND's table that is not its domain's.

        Args:
            command: it.
            entries: of its table.
            sketch: likewise; meaningless in a dense job.
            region_bits: the register.
        """
        config, domain, count = self._config, command.domain, command.stripe_pages
        flash, dram = np.ones((2, len(entries.dram)), np.bool_)
        for page in (entries.key_page, entries.value_page):
            flash &= self.owns_pages(domain, page, count)
            dram &= self.owns_dram(domain, page, count, region_bits)
        if command.mode != Mode.DENSE:
            pages: Any = config.group_pages
            if not Mode(command.mode).featured:
                centroids = (config.group_codewords >> command.unit_bits) // config.tokens_per_codeword
                codewords = centroids if command.mode == Mode.CENTROID else config.octets
                pages = -(-(sketch.codeword + codewords) // config.codewords_per_page)
            flash &= (sketch.written == 0) | self.owns_pages(domain, sketch.page, pages)
        owned = np.where(entries.dram == 1, dram, flash)
        return None if owned.all() else int(np.argmin(owned))
