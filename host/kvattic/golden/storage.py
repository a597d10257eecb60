"""Where the golden device reads pages: flash and device DRAM, and the counters of what was read."""

from dataclasses import dataclass, field

import numpy as np

from kvattic.golden.flash import Flash
from kvattic.golden.registers import Registers
from kvattic.spec.codes import octet_beats
from kvattic.spec.commands import Kind
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.elements import Bytes, Integers
from kvattic.spec.registers import StatusBit
from kvattic.timing.record import Recorder
from kvattic.transport.base import check_range

__all__ = ["Storage", "Traffic"]


@dataclass(slots=True)
class Traffic:
    """What jobs read, in codewords, by `Kind`.

    Attributes:
        flash: codewords that came over the flash buses.
        dram: codewords read from device DRAM.
        page_reads: pages read from the flash arrays: for each job, the pages of which it read anything.
    """

    flash: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    dram: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    page_reads: int = 0


class Storage:
    """Flash and device DRAM.

    Args:
        config: geometry.
        flash: of the device.
        dram_bytes: size of the device DRAM.
        registers: of the device; its counters count what is read, MEDIA_ERROR names what cannot be.
        recorder: notes what is read.

    Attributes:
        flash: the same.
        dram_bytes: the same.
        traffic: what jobs read since power-up or the last reset.
        version: another number after each change of where pages of device DRAM lie in this process.
    """

    def __init__(self, config: Config, flash: Flash, dram_bytes: int, registers: Registers,
                 recorder: Recorder) -> None:
        self._config = config
        self._registers = registers
        self._recorder = recorder
        self.flash = flash
        self.dram_bytes = dram_bytes
        self.traffic = Traffic()
        self.version = 0
        self.clear_dram()

    def clear_dram(self) -> None:
        """Device DRAM after its supply came back."""
        self._dram = np.zeros(self.dram_bytes, np.uint8)
        self.version += 1

    def read_dram(self, address: int, size: int) -> bytes:
        """Bytes of device DRAM.

        Raises:
            RequestError: the range is not inside the device DRAM.
        """
        check_range("device DRAM", self.dram_bytes, address, size)
        return self._dram[address : address + size].tobytes()

    def write_dram(self, address: int, data: bytes) -> None:
        """Bytes into device DRAM.

        Raises:
            RequestError: the range is not inside the device DRAM.
        """
        check_range("device DRAM", self.dram_bytes, address, len(data))
        self._dram[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def dram_address(self, page: int) -> int | None:
        """Where a page of device DRAM begins in this process, until `version` changes; None: it is not wholly there."""
        at = page * self._config.page_bytes
        if at + self._config.page_bytes > self.dram_bytes:
            return None
        base: int = self._dram.__array_interface__["data"][0]
        return base + at

    def dram_page(self, page: int) -> tuple[Bytes, int]:
        """A page of device DRAM, uint8, (codewords, codeword_bytes), zeros beyond its end; and the codewords inside."""
        config = self._config
        image = np.zeros((config.codewords_per_page, config.codeword_bytes), np.uint8)
        data = self._dram[page * config.page_bytes :][: config.page_bytes]
        inside = len(data) // config.codeword_bytes
        image[:inside] = data[: inside * config.codeword_bytes].reshape(-1, config.codeword_bytes)
        return image, inside

    def read(self, kind: Kind, channel: int, page: int, codewords: Integers, *,
             dram: bool) -> tuple[Bytes, int | None]:
        """Codewords of a page for a job.

        Args:
            kind: what they hold, for the counters.
            channel: of the flash page.
            page: its number on the channel, or that of a page of device DRAM; it wraps as in the device.
            codewords: int64, their numbers in the page, ascending.
            dram: whether it is a page of device DRAM.

        Returns:
            uint8, (codewords, codeword_bytes), zeros where a codeword cannot be read; and the index of the first such
            one, or None.
        """
        page &= (1 << PAGE_NUMBER_BITS) - 1
        beats = octet_beats(self._config) if kind is Kind.CODES else self._config.beats_per_codeword
        self._registers.count("BEATS", len(codewords) * beats)
        self._recorder.read(kind, channel, page, codewords, dram=dram)
        if dram:
            self.traffic.dram[kind] += len(codewords)
            image, inside = self.dram_page(page)
            lost = np.flatnonzero(codewords >= inside)
            return image[codewords], int(lost[0]) if len(lost) else None
        return self._read_flash(kind, channel, page, codewords)

    def _read_flash(self, kind: Kind, channel: int, page: int, codewords: Integers) -> tuple[Bytes, int | None]:
        self.traffic.flash[kind] += len(codewords)
        self.traffic.page_reads += 1
        found, lost, cause = self.flash.read_page(channel, page, codewords)
        registers = self._registers
        registers.count("CODEWORDS", len(codewords))
        registers.count("FLASH_WORDS", len(codewords) * self._config.raw_codeword_words)
        registers.count("PAGE_READS")
        registers.count("UNREADABLE", len(lost))
        if not lost:
            return found, None
        registers.report(StatusBit.MEDIA_ERROR, MEDIA_ERROR=channel << 24 | page,
                         MEDIA_CAUSE=cause << 16 | int(codewords[lost[0]]))
        return found, lost[0]
