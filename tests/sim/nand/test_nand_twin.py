"""The NAND twin at its PHY interface: commands, times, violations, faults."""

import random
from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Elaboratable, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from amaranth.sim import Simulator

from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.nand import TINY_PART
from kvattic_hdl.flash.phy import phy_signature
from kvattic_sim.nand.twin import (
    FRACTION,
    NandChannel,
    NandFaults,
    Timing,
    Violation,
    onfi_crc,
    parameter_page,
    read_id,
)

RAW = TINY_PART.raw_bytes
WORD = TINY.beat_bytes


class Host:
    """A controller that does one thing after the other and waits as long as it must (or not: `hasty`)."""

    def __init__(self, channel: NandChannel, *, reset: bool = True) -> None:
        self.channel = channel
        self.config = channel.config
        self.hasty: set[str] = set()
        """Waits that are left out: wb, ready, rr, ccs, adl, whr."""
        if reset:
            for die in range(self.config.dies):
                self.command(die, 0xFF)
            for die in range(self.config.dies):
                self.ready(die)

    def wait(self, name: str) -> None:
        """Wait t_<name>, counted from the end of the last cycle."""
        if name not in self.hasty:
            part = self.config.part
            for _ in range(self.config.cycles(part.t_cad + getattr(part, f"t_{name}"))):
                self.channel.step()

    def cycle(self, die: int, byte: int, *, address: bool = False) -> None:
        for _ in range(100_000):
            taken = self.channel.outputs.cycles_ready
            self.channel.step(cycle=(die, int(address), byte))
            if taken:
                return
        raise AssertionError("the PHY takes no cycle")

    def command(self, die: int, byte: int, address: bytes = b"", confirm: int | None = None) -> None:
        self.cycle(die, byte)
        for a in address:
            self.cycle(die, a, address=True)
        if confirm is not None:
            self.cycle(die, confirm)

    def ready(self, die: int, limit: int = 1_000_000) -> int:
        """Wait until R/B_n says ready; cycles that it took."""
        if "wb" not in self.hasty:
            self.wait("wb")
            self.channel.step()
        count = 0
        if "ready" not in self.hasty:
            while not self.channel.outputs.ready >> die & 1:
                self.channel.step()
                count += 1
                assert count < limit, "the die stays busy"
        return count

    def read_burst(self, die: int, length: int) -> bytes:
        data, left, taken = bytearray(), -(-length // WORD), False
        for _ in range(100_000):
            taken_now = not taken and bool(self.channel.outputs.bursts_ready)
            out = self.channel.step(burst=None if taken else (die, 0, length))
            taken = taken or taken_now
            if out.read_valid:
                data += out.read.to_bytes(WORD, "little")
                left -= 1
            if taken and left == 0:
                return bytes(data[:length])
        raise AssertionError("the words do not come")

    def write_burst(self, die: int, data: bytes) -> None:
        words = [int.from_bytes(data[i : i + WORD].ljust(WORD, b"\0"), "little") for i in range(0, len(data), WORD)]
        taken = False
        for _ in range(100_000):
            shown = self.channel.outputs
            self.channel.step(burst=None if taken else (die, 1, len(data)), word=words[0])
            taken = taken or bool(shown.bursts_ready)
            if shown.write_ready:
                del words[0]
            if not words:
                return
        raise AssertionError("the words are not taken")

    # Whole operations.

    def status(self, die: int) -> int:
        self.command(die, 0x70)
        self.wait("whr")
        return self.read_burst(die, 1)[0]

    def plane_status(self, die: int, plane: int, block: int = 0, page: int = 0) -> int:
        self.command(die, 0x78, self.config.part.address(plane, block, page)[2:])
        self.wait("whr")
        return self.read_burst(die, 1)[0]

    def read(self, die: int, plane: int, block: int, page: int, column: int = 0, length: int = RAW) -> bytes:
        self.command(die, 0x00, self.config.part.address(plane, block, page, column), 0x30)
        return self.data(die, length)

    def data(self, die: int, length: int = RAW) -> bytes:
        self.ready(die)
        self.wait("rr")
        return self.read_burst(die, length)

    def column(self, die: int, column: int, length: int, place: tuple[int, int, int] | None = None) -> bytes:
        if place is None:
            self.command(die, 0x05, column.to_bytes(2, "little"), 0xE0)
        else:
            self.command(die, 0x06, self.config.part.address(*place, column), 0xE0)
        self.wait("ccs")
        return self.read_burst(die, length)

    def fill(self, die: int, plane: int, block: int, page: int, data: bytes, confirm: int, first: int = 0x80) -> None:
        self.command(die, first, self.config.part.address(plane, block, page))
        self.wait("adl")
        self.write_burst(die, data)
        self.cycle(die, confirm)

    def program(self, die: int, plane: int, block: int, page: int, data: bytes) -> int:
        self.fill(die, plane, block, page, data, 0x10)
        self.ready(die)
        return self.status(die)

    def erase(self, die: int, plane: int, block: int) -> int:
        self.command(die, 0x60, self.config.part.address(plane, block, 0)[2:], 0xD0)
        self.ready(die)
        return self.status(die)

    def clean(self) -> None:
        assert self.channel.violations == []

    def violated(self, violation: Violation) -> None:
        """Exactly this was done wrong since the last call."""
        found = self.channel.violations[:]
        assert [violation.value in text for text in found] == [True], found
        self.channel.violations.clear()


def host(config: Config = TINY, **settings) -> Host:
    return Host(NandChannel(config, **settings))


def noise(seed: int, length: int = RAW) -> bytes:
    return random.Random(seed).randbytes(length)


# ---------------------------------------------------------------------------------------------- commands


def test_identity() -> None:
    h = host()
    for address in (0x00, 0x20):
        h.command(1, 0x90, bytes([address]))
        h.wait("whr")
        assert h.read_burst(1, 8) == read_id(address)
    assert read_id(0x20)[:4] == b"ONFI"
    h.command(1, 0xEC, b"\0")
    pages = h.data(1, 768)
    assert pages[:256] == pages[256:512] == pages[512:] == parameter_page(TINY_PART, TINY.ecc_t, TINY.codeword_bytes)
    assert pages[:4] == b"ONFI"
    assert onfi_crc(pages[:254]) == int.from_bytes(pages[254:256], "little")
    assert int.from_bytes(pages[80:84], "little") == TINY_PART.page_bytes
    assert int.from_bytes(pages[84:86], "little") == TINY_PART.spare_bytes
    assert int.from_bytes(pages[92:96], "little") == TINY_PART.pages
    assert pages[101] == 0x23
    assert h.column(1, 256, 4) == b"ONFI"
    h.clean()


def test_onfi_crc() -> None:
    # The check value of CRC-16 with this polynomial, shifted left, first value 4F4Eh, worked out bit by bit.
    def bitwise(data: bytes) -> int:
        crc = 0x4F4E
        for bit in (byte >> i & 1 for byte in data for i in reversed(range(8))):
            top = crc >> 15 ^ bit
            crc = crc << 1 & 0xFFFF ^ (0x8005 if top else 0)
        return crc

    for data in (b"", b"\0", b"123456789", noise(1, 254)):
        assert onfi_crc(data) == bitwise(data)


def test_read() -> None:
    h = host()
    data = noise(1)
    h.channel.load((1, 1, 3, 5), data)
    assert h.channel.dump((1, 1, 3, 5)) == data
    assert h.read(1, 1, 3, 5) == data
    assert h.read(1, 1, 3, 4) == b"\xff" * RAW
    assert h.read(1, 1, 3, 5, 100, 33) == data[100:133]
    assert h.read_burst(1, 7) == data[133:140], "a burst goes on where the last one ended"
    assert h.column(1, 1001, 20) == data[1001:1021]
    h.clean()


def test_multi_plane_read_and_registers() -> None:
    h = host()
    pages = {plane: noise(plane) for plane in range(2)}
    for plane, data in pages.items():
        h.channel.load((0, plane, 2 + plane, 4), data)
    h.command(0, 0x00, TINY_PART.address(0, 2, 4), 0x32)
    busy = h.ready(0)
    assert busy + TINY.cycles(TINY_PART.t_wb) <= TINY.cycles(TINY_PART.t_dbsy + TINY_PART.t_wb) + 2
    h.command(0, 0x00, TINY_PART.address(1, 3, 4), 0x30)
    assert h.data(0) == pages[1], "the plane addressed last"
    assert h.column(0, 40, 100, (0, 2, 4)) == pages[0][40:140]
    assert h.column(0, 8, 8, (1, 3, 4)) == pages[1][8:16]
    other = noise(9)
    h.channel.load((0, 1, 3, 0), other)
    assert h.read(0, 1, 3, 0) == other
    assert h.column(0, 0, RAW, (0, 2, 4)) == pages[0], "a read of one plane leaves the other's register"
    h.clean()


def test_cache_read_sequential() -> None:
    h = host()
    pages = [noise(i) for i in range(4)]
    for page, data in enumerate(pages):
        h.channel.load((0, 0, 1, page), data)
    h.command(0, 0x00, TINY_PART.address(0, 1, 0), 0x30)
    h.ready(0)
    for page in range(4):
        h.cycle(0, 0x31 if page < 3 else 0x3F)
        assert h.data(0, 64) == pages[page][:64]
        if page == 1:
            assert h.status(0) & 0x60 == 0x40, "the array works on"
            h.command(0, 0x00)
            h.wait("whr")
            assert h.read_burst(0, 64) == pages[page][64:128]
    h.clean()
    assert h.status(0) == 0xE0


def test_cache_read_random_multi_plane() -> None:
    h = host()
    rounds = [((0, 1, 3), (1, 2, 3)), ((0, 4, 0), (1, 4, 0)), ((0, 1, 6), (1, 1, 6))]
    for places in rounds:
        for place in places:
            h.channel.load((0, *place), noise(hash(place)))

    def request(places, confirm):
        h.command(0, 0x00, TINY_PART.address(*places[0]), 0x32)
        h.ready(0)
        h.command(0, 0x00, TINY_PART.address(*places[1]), confirm)
        h.ready(0)

    request(rounds[0], 0x30)
    for i, places in enumerate(rounds):
        if i + 1 < len(rounds):
            request(rounds[i + 1], 0x31)
        else:
            h.cycle(0, 0x3F)
            h.ready(0)
        for place in places:
            assert h.column(0, 16, 500, place) == noise(hash(place))[16:516]
    h.clean()


def test_program_erase() -> None:
    h = host()
    data = noise(3)
    assert h.program(1, 0, 2, 0, data) == 0xE0
    assert h.channel.dump((1, 0, 2, 0)) == data
    assert h.read(1, 0, 2, 0) == data
    assert h.channel.programmed(1, 0, 2) == 1
    assert h.erase(1, 0, 2) == 0xE0
    assert h.read(1, 0, 2, 0) == b"\xff" * RAW
    assert (h.channel.erases(1, 0, 2), h.channel.programmed(1, 0, 2)) == (1, 0)
    h.clean()


def test_change_write_column() -> None:
    h = host()
    h.command(0, 0x80, TINY_PART.address(0, 0, 0, 100))
    h.wait("adl")
    h.write_burst(0, b"abc")
    h.write_burst(0, b"defgh")
    h.command(0, 0x85, (1000).to_bytes(2, "little"))
    h.wait("ccs")
    h.write_burst(0, b"x" * 20)
    h.cycle(0, 0x10)
    h.ready(0)
    page = h.channel.dump((0, 0, 0, 0))
    assert page == (b"\xff" * 100 + b"abcdefgh").ljust(1000, b"\xff") + b"x" * 20 + b"\xff" * (RAW - 1020)
    h.clean()


@pytest.mark.parametrize("second", [0x80, 0x81])
def test_multi_plane_program_and_erase(second: int) -> None:
    h = host(faults=NandFaults(program_fails=((0, 1, 5, None),), erase_fails=((0, 0, 4),)))
    for page in range(2):
        h.fill(0, 0, 4, page, noise(page), 0x11)
        h.ready(0)
        h.fill(0, 1, 5, page, noise(page + 7), 0x10, second)
        h.ready(0)
    assert h.channel.dump((0, 0, 4, 1)) == noise(1)
    assert h.channel.dump((0, 1, 5, 1)) != noise(8)
    assert h.status(0) == 0xE1
    assert h.plane_status(0, 0) == 0xE0
    assert h.plane_status(0, 1) == 0xE1
    h.command(0, 0x60, TINY_PART.address(0, 4, 0)[2:], 0xD1)
    h.ready(0)
    h.command(0, 0x60, TINY_PART.address(1, 5, 0)[2:], 0xD0)
    h.ready(0)
    assert (h.plane_status(0, 0), h.plane_status(0, 1)) == (0xE1, 0xE0)
    assert h.channel.programmed(0, 0, 4) == 2, "a failed erase leaves the block"
    assert h.channel.programmed(0, 1, 5) == 0
    h.clean()


def test_cache_program() -> None:
    h = host(faults=NandFaults(program_fails=((0, 0, 1, 1),)))
    begun = h.channel.now
    for page in range(3):
        h.fill(0, 0, 1, page, noise(page), 0x15)
        h.ready(0)
    assert h.status(0) & 0x63 == 0x42, "page 1 failed before page 2"
    while h.status(0) & 0x20 == 0:
        pass
    assert h.status(0) == 0xE2
    took = h.channel.now - begun
    assert 3 * TINY.cycles(TINY_PART.t_prog) < took < 3 * TINY.cycles(
        TINY_PART.t_prog + TINY_PART.t_pcbsy) + 2 * TINY.cycles(RAW / TINY_PART.bus_mts * 1000)
    assert h.channel.dump((0, 0, 1, 2)) == noise(2)
    h.clean()


def test_features() -> None:
    h = host()
    h.command(0, 0xEF, b"\x89")
    h.wait("adl")
    h.write_burst(0, bytes([2, 7, 8, 9]))
    h.ready(0)
    h.command(0, 0xEE, b"\x89")
    assert h.data(0, 4) == bytes([2, 7, 8, 9])
    h.command(1, 0xEE, b"\x89")
    assert h.data(1, 4) == bytes(4)
    h.clean()


# ---------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("config", [TINY, PAPER], ids=["tiny", "paper"])
def test_bus_rate(config: Config) -> None:
    """Bursts back to back (also behind that of `read`) are one: no t_pre between them, no whole-cycle rounding."""
    h = host(config)
    h.read(0, 0, 0, 0, 0, 8)
    length, count = config.raw_codeword_bytes, 2
    begun, left, words, first = h.channel.now, count, 0, None
    while words < count * config.raw_codeword_words:
        taken = left and h.channel.outputs.bursts_ready
        out = h.channel.step(burst=(0, 0, length) if left else None)
        left -= bool(taken)
        words += out.read_valid
        if out.read_valid and first is None:
            first = h.channel.now
    part = config.part
    exact = config.clock_mhz * length / part.bus_mts * count
    assert exact <= h.channel.now - begun <= exact + 2.1
    h.clean()


def test_short_last_word() -> None:
    """A last word of a few bytes takes a whole cycle: what follows cannot overtake it."""
    h = host()
    data = noise(4)
    h.channel.load((0, 0, 0, 0), data)
    h.read(0, 0, 0, 0, 0, 8)
    found = b"".join(h.read_burst(0, 9) for _ in range(20))
    assert found == data[8 : 8 + 20 * 9]
    assert h.read_burst(0, 17) == data[188:205]
    h.cycle(0, 0x70)
    h.clean()


def test_cycles_take_t_cad() -> None:
    h = host(PAPER, recording=True)
    begun, sent = h.channel.now, 0
    while sent < 40:
        sent += h.channel.outputs.cycles_ready
        h.channel.step(cycle=(0, 0, 0xFF) if sent < 40 else None)
    assert h.channel.now - begun == pytest.approx(39 * 7.125, abs=2)


def test_writes_wait_for_words() -> None:
    h = host()
    h.command(0, 0x80, TINY_PART.address(0, 0, 0))
    h.wait("adl")
    data, words = noise(1, 256), 0
    taken = False
    generator = random.Random(1)
    while words < 32:
        offered = generator.random() < 0.3
        shown = h.channel.outputs
        assert not (taken and shown.bursts_ready)
        word = int.from_bytes(data[8 * words : 8 * words + 8], "little")
        h.channel.step(burst=None if taken else (0, 1, 256), word=word if offered else None)
        taken = taken or bool(shown.bursts_ready)
        words += offered and shown.write_ready
    h.cycle(0, 0x10)
    h.ready(0)
    assert h.channel.dump((0, 0, 0, 0))[:256] == data
    h.clean()


def test_tie_on_a_shared_bus() -> None:
    """A cycle and a burst that are taken together: the cycle goes first."""
    h = host()
    h.read(0, 0, 0, 0, 0, 8)
    assert h.channel.outputs.cycles_ready and h.channel.outputs.bursts_ready
    begun = h.channel.now
    out = h.channel.step(cycle=(1, 0, 0x70), burst=(0, 0, 8))
    assert not out.cycles_ready and not out.bursts_ready
    while not out.read_valid:
        out = h.channel.step()
    part = TINY_PART
    assert h.channel.now - begun >= TINY.cycles(part.t_cad + part.t_pre + 8 * 1000 / part.bus_mts) - 1
    h.clean()


def test_separate_command_bus() -> None:
    config = replace(TINY, part=replace(TINY_PART, separate_command_bus=True))
    h = host(config)
    h.read(0, 0, 0, 0, 0, 8)
    h.channel.step(burst=(0, 0, 1000))
    for _ in range(3):
        h.channel.step()
    assert h.channel.outputs.cycles_ready and not h.channel.outputs.bursts_ready
    h.command(1, 0x00, TINY_PART.address(0, 0, 0), 0x30)
    assert not h.channel.outputs.bursts_ready
    h.clean()
    h.cycle(0, 0x70)
    h.violated(Violation.MOVING)


HASTE = {
    "rr": (Violation.T_RR, lambda h: h.read(0, 0, 0, 0)),
    "ccs": (Violation.T_CCS, lambda h: (h.read(0, 0, 0, 0, 0, 8), h.column(0, 8, 8))),
    "adl": (Violation.T_ADL, lambda h: (h.command(0, 0x80, TINY_PART.address(0, 0, 0)), h.wait("adl"),
                                        h.write_burst(0, b"12345678"))),
    "whr": (Violation.T_WHR, lambda h: h.status(0)),
    "ready": (Violation.DATA_BUSY, lambda h: h.read(0, 0, 0, 0)),
}


@pytest.mark.parametrize("wait", HASTE)
def test_haste(wait: str) -> None:
    h = host()
    violation, act = HASTE[wait]
    act(h)
    h.clean()
    h = host()
    h.hasty = {wait}
    act(h)
    h.violated(violation)


def test_before_t_wb() -> None:
    """R/B_n is not low yet, and means nothing."""
    h = host()
    h.command(0, 0x00, TINY_PART.address(0, 0, 0), 0x30)
    assert h.channel.outputs.ready & 1
    h.cycle(0, 0x70)
    h.violated(Violation.T_WB)
    h.command(1, 0x00, TINY_PART.address(0, 0, 0), 0x30)
    assert h.read_burst(1, 8) == b"\xff" * 8
    h.violated(Violation.T_WB)


def test_busy_times() -> None:
    h = host()
    part = TINY_PART

    def busy(expected: float) -> None:
        """From the last cycle's take to ready, less t_cad and tWB."""
        before = TINY.cycles(part.t_cad + part.t_wb) + 1
        count = h.ready(0) + before
        exact = TINY.clock_mhz / 1000 * (part.t_cad + part.t_wb + expected)
        assert exact - 2 <= count <= exact + 2

    h.command(0, 0x00, part.address(0, 0, 0), 0x30)
    busy(part.t_r)
    h.cycle(0, 0x31)
    busy(part.t_rcbsy)
    h.cycle(0, 0x31)
    busy(part.t_r + part.t_rcbsy - 1000 / TINY.clock_mhz * 2 - part.t_wb - part.t_cad)
    h.cycle(0, 0xFF)
    busy(part.t_rst)
    h.command(0, 0x60, part.address(0, 0, 0)[2:], 0xD0)
    busy(part.t_bers)
    h.command(0, 0x80, part.address(0, 0, 0))
    h.cycle(0, 0x15)
    busy(part.t_pcbsy)
    h.cycle(0, 0x70)
    h.clean()


def test_timing_rounds_down() -> None:
    timing = Timing.of(PAPER)
    assert timing.t_cad == round(7.125 * (1 << FRACTION))
    for name in Timing.__slots__:
        if name not in ("t_byte", "t_rst_idle"):
            ticks = getattr(timing, name)
            assert 0 <= (PAPER.cycles(getattr(PAPER.part, name)) << FRACTION) - ticks < 1 << FRACTION
    fast = replace(PAPER, part=replace(PAPER.part, bus_mts=4800.0))
    assert Timing.of(fast).t_byte == (1 << FRACTION) // 8, "a word a cycle is the most"


# ---------------------------------------------------------------------------------------------- violations

ADDRESS = TINY_PART.address(0, 0, 0)


def start_read(h: Host) -> None:
    h.command(0, 0x00, ADDRESS, 0x30)
    h.ready(0)


WRONG = {
    "unknown": (Violation.UNKNOWN, lambda h: h.cycle(0, 0x42)),
    "busy": (Violation.BUSY, lambda h: (h.command(0, 0x00, ADDRESS, 0x30), h.wait("wb"), h.channel.step(),
                                        h.cycle(0, 0x00))),
    "sequence": (Violation.SEQUENCE, lambda h: (h.command(0, 0x00, ADDRESS), h.cycle(0, 0x60))),
    "sequence status": (Violation.SEQUENCE, lambda h: (h.command(0, 0x80, ADDRESS), h.cycle(0, 0x70))),
    "queue": (Violation.SEQUENCE, lambda h: (h.command(0, 0x00, ADDRESS, 0x32), h.ready(0), h.cycle(0, 0x60))),
    "address": (Violation.NO_ADDRESS, lambda h: h.cycle(0, 0, address=True)),
    "sixth address": (Violation.NO_ADDRESS, lambda h: h.command(0, 0x00, ADDRESS + b"\0")),
    "short read": (Violation.NO_CONFIRM, lambda h: h.command(0, 0x00, ADDRESS[:4], 0x30)),
    "confirm": (Violation.NO_CONFIRM, lambda h: h.cycle(0, 0x10)),
    "wrong confirm": (Violation.NO_CONFIRM, lambda h: h.command(0, 0x60, ADDRESS[2:], 0x30)),
    "lone 81h": (Violation.NO_CONFIRM, lambda h: h.cycle(0, 0x81)),
    "lone 85h": (Violation.NO_CONFIRM, lambda h: h.cycle(0, 0x85)),
    "block": (Violation.RANGE, lambda h: h.command(0, 0x00, TINY_PART.address(0, 8, 0), 0x30)),
    "row": (Violation.RANGE, lambda h: h.command(0, 0x60, b"\0\0\x80", 0xD0)),
    "column": (Violation.RANGE, lambda h: h.command(0, 0x80, TINY_PART.address(0, 0, 0, RAW))),
    "same plane": (Violation.SAME_PLANE, lambda h: (h.command(0, 0x00, ADDRESS, 0x32), h.ready(0),
                                                    h.command(0, 0x00, ADDRESS, 0x30))),
    "other page": (Violation.OTHER_PAGE, lambda h: (h.command(0, 0x00, ADDRESS, 0x32), h.ready(0),
                                                    h.command(0, 0x00, TINY_PART.address(1, 0, 1), 0x30))),
    "no read": (Violation.NO_READ, lambda h: h.cycle(0, 0x31)),
    "no read random": (Violation.NO_READ, lambda h: h.command(0, 0x00, ADDRESS, 0x31)),
    "no cache read": (Violation.NO_READ, lambda h: (start_read(h), h.cycle(0, 0x3F))),
    "last page": (Violation.LAST_PAGE, lambda h: (h.read(0, 0, 0, 7), h.cycle(0, 0x31))),
    "array": (Violation.ARRAY_BUSY, lambda h: (start_read(h), h.cycle(0, 0x31), h.ready(0), h.cycle(0, 0x60))),
    "not erased": (Violation.NOT_ERASED, lambda h: (h.program(0, 0, 0, 0, b"a"), h.program(0, 0, 0, 0, b"b"))),
    "order": (Violation.ORDER, lambda h: h.program(0, 0, 0, 1, b"a")),
    "not held": (Violation.NOT_HELD, lambda h: (start_read(h), h.column(0, 0, 8, (0, 0, 1)))),
    "nothing": (Violation.NOTHING, lambda h: h.read_burst(0, 8)),
    "programmed": (Violation.NOTHING, lambda h: (h.program(0, 0, 0, 0, b"a"), h.column(0, 0, 8))),
    "no program": (Violation.NO_PROGRAM, lambda h: h.write_burst(0, b"12345678")),
    "beyond": (Violation.BEYOND, lambda h: h.read(0, 0, 0, 0, 1, RAW)),
    "beyond in": (Violation.BEYOND, lambda h: (h.command(0, 0x80, TINY_PART.address(0, 0, 0, 8)), h.wait("adl"),
                                               h.write_burst(0, bytes(RAW)))),
    "short feature": (Violation.BEYOND, lambda h: (h.command(0, 0xEF, b"\x89"), h.wait("adl"),
                                                   h.write_burst(0, b"123"))),
    "empty": (Violation.EMPTY, lambda h: (start_read(h), h.wait("rr"), h.read_burst(0, 0))),
    "level": (Violation.LEVEL, lambda h: (h.command(0, 0xEF, b"\x89"), h.wait("adl"), h.write_burst(0, b"\4\0\0\0"))),
    "feature": (Violation.FEATURE, lambda h: h.command(0, 0xEE, b"\x77")),
}


@pytest.mark.parametrize("case", WRONG)
def test_violations(case: str) -> None:
    h = host()
    violation, act = WRONG[case]
    act(h)
    h.violated(violation)
    h.cycle(0, 0xFF)  # a reset mends it
    h.ready(0)
    h.channel.load((0, 1, 7, 7), noise(5))
    assert h.read(0, 1, 7, 7) == noise(5)
    h.clean()


def test_every_violation_is_tested() -> None:
    tested = {v for v, _ in (*WRONG.values(), *HASTE.values())}
    elsewhere = {Violation.NEEDS_RESET, Violation.T_WB, Violation.MOVING, Violation.NO_DIE}
    assert tested | elsewhere == set(Violation)


def test_messages_name_the_place() -> None:
    h = Host(NandChannel(TINY, channel=3), reset=False)
    h.cycle(1, 0x70)
    assert h.channel.violations == [f"channel 3 die 1 cycle {h.channel.now - 1}: needs a reset (FFh) after power-up "
                                    "(byte 70h)"]
    h.channel.violations.clear()
    one = Host(NandChannel(replace(TINY, dies=1)))
    one.cycle(1, 0x70)
    one.violated(Violation.NO_DIE)
    one.read_burst(1, 16)
    one.violated(Violation.NO_DIE)


# ---------------------------------------------------------------------------------------------- faults


def flips(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def test_bit_errors() -> None:
    rate, reads = 1e-3, 40
    h = host(seed=1, faults=NandFaults(bit_error_rate=rate))
    data = noise(1)
    h.channel.load((0, 0, 0, 0), data)
    counts = [flips(h.read(0, 0, 0, 0), data) for _ in range(reads)]
    expected = rate * RAW * 8
    assert sum(counts) == h.channel.bit_flips
    assert abs(sum(counts) / reads - expected) < 4 * (expected / reads) ** 0.5
    assert len(set(counts)) > 1
    again = host(seed=1, faults=NandFaults(bit_error_rate=rate))
    again.channel.load((0, 0, 0, 0), data)
    assert flips(again.read(0, 0, 0, 0), data) == counts[0], "the same seed, the same errors"
    assert h.channel.dump((0, 0, 0, 0)) == data


def test_stuck_columns() -> None:
    h = host(faults=NandFaults(stuck_columns=((0, 1, 10, 0x0F, 0x05), (0, 1, 11, 0xFF, 0x00))))
    for plane in range(2):
        assert h.program(0, plane, 0, 0, b"\xff" * 10 + b"\x3a\x77") == 0xE0
    assert h.read(0, 1, 0, 0, 10, 2) == b"\x35\x00"
    assert h.read(0, 0, 0, 0, 10, 2) == b"\x3a\x77"


def test_bad_blocks() -> None:
    h = host(faults=NandFaults(factory_bad=((0, 1, 3),), grown_bad=((0, 0, 2, 1),)))
    assert [page for page in range(8) if h.read(0, 1, 3, page, TINY_PART.page_bytes, 1) == b"\0"] == [0, 7]
    assert h.read(0, 1, 3, 1, TINY_PART.page_bytes, 1) == b"\xff"
    assert h.read(0, 0, 3, 0, TINY_PART.page_bytes, 1) == b"\xff"
    assert h.program(0, 1, 3, 0, b"a") == 0xE1
    assert h.erase(0, 1, 3) == 0xE1
    assert h.read(0, 1, 3, 0, TINY_PART.page_bytes, 1) == b"\0"
    assert h.program(0, 0, 2, 0, b"a") == 0xE0
    assert h.erase(0, 0, 2) == 0xE0
    assert h.program(0, 0, 2, 0, b"a") == 0xE1
    assert h.erase(0, 0, 2) == 0xE1
    assert (h.channel.program_failures, h.channel.erase_failures) == (2, 2)
    h.clean()


def test_marks_stand_where_the_part_says() -> None:
    part = replace(TINY_PART, mark_pages=(1, -2), mark_byte=3)
    bad = ((0, 1, 3), (1, 0, 2, 6), (1, 0, 4, 5))    # the last two in one page alone, of the part's or not
    h = host(replace(TINY, part=part), faults=NandFaults(factory_bad=bad))

    def marked(die: int, plane: int, block: int) -> list[int]:
        around = [h.read(die, plane, block, page, TINY_PART.page_bytes + 2, 3) for page in range(8)]
        assert set(around) <= {b"\xff\xff\xff", b"\xff\0\xff"}
        return [page for page in range(8) if around[page] == b"\xff\0\xff"]

    assert marked(0, 1, 3) == [1, 6]
    assert marked(1, 0, 2) == [6]
    assert marked(1, 0, 4) == [5]
    assert marked(0, 0, 3) == []
    for die, plane, block, *_ in bad:
        assert h.erase(die, plane, block) == 0xE1
    h.clean()


def test_marks_are_read_with_bit_errors() -> None:
    rate, reads = 0.05, 100
    h = host(seed=2, faults=NandFaults(bit_error_rate=rate, factory_bad=((0, 1, 3),)))
    ones = [h.read(0, 1, 3, 0, TINY_PART.page_bytes, 1)[0].bit_count() for _ in range(reads)]
    assert abs(sum(ones) / reads - 8 * rate) < 4 * (8 * rate / reads) ** 0.5
    h.clean()


def test_endurance() -> None:
    h = host(replace(TINY, part=replace(TINY_PART, endurance=2)))
    assert [h.erase(0, 0, 0) for _ in range(3)] == [0xE0, 0xE0, 0xE1]
    h.clean()


def test_stuck_busy() -> None:
    h = host(faults=NandFaults(stuck_busy=((1, 2),)))
    h.read(1, 0, 0, 0)
    h.command(1, 0x00, ADDRESS, 0x30)
    with pytest.raises(AssertionError, match="stays busy"):
        h.ready(1, 20_000)
    assert h.status(1) & 0x60 == 0
    h.cycle(1, 0xFF)
    with pytest.raises(AssertionError, match="stays busy"):
        h.ready(1, 20_000)
    h.read(0, 0, 0, 0)
    h.clean()


def test_read_retry() -> None:
    h = host(faults=NandFaults(retry=((0, 0, 1, 2, 3), (0, 1, None, None, 1)), retry_error_rate=0.02))
    for place in ((0, 1, 2), (0, 1, 3), (1, 5, 5)):
        h.channel.load((0, *place), noise(7))

    def errors(place, level):
        h.command(0, 0xEF, b"\x89")
        h.wait("adl")
        h.write_burst(0, bytes([level, 0, 0, 0]))
        h.ready(0)
        return flips(h.read(0, *place), noise(7))

    assert [errors((0, 1, 2), level) > 50 for level in range(4)] == [True, True, True, False]
    assert [errors((1, 5, 5), level) > 50 for level in range(4)] == [True, False, True, True]
    assert errors((0, 1, 2), 3) == errors((0, 1, 3), 0) == errors((0, 1, 3), 2) == 0
    h.clean()


@pytest.mark.parametrize("what", ["program", "erase", "queued"])
def test_power_cut(what: str) -> None:
    h = host(seed=5)
    old = b"\0" * RAW
    assert h.program(0, 0, 2, 0, old) == 0xE0
    h.channel.load((0, 0, 3, 0), noise(4))
    h.channel.configure(NandFaults(power_cuts=((1200 if what == "queued" else 800, 500),)), 5)
    data = noise(8)
    if what == "erase":
        h.command(0, 0x60, TINY_PART.address(0, 2, 0)[2:], 0xD0)
    elif what == "program":
        h.fill(0, 0, 2, 1, data, 0x10)
    else:
        for page in (1, 2):
            h.fill(0, 0, 2, page, data, 0x15)
            if page == 1:
                h.ready(0)
    while h.channel.powered:
        h.channel.step()
    for _ in range(499):
        assert h.channel.outputs.ready == 0
        h.channel.step()
    h.channel.step()
    h.channel.step()
    assert h.channel.powered and h.channel.outputs.ready == 3
    h.clean()
    h.cycle(0, 0x70)
    h.violated(Violation.NEEDS_RESET)
    h.cycle(0, 0xFF)
    h.ready(0)
    assert h.read_burst(0, 8) == b"\xff" * 8
    h.violated(Violation.NOTHING)
    assert h.read(0, 0, 3, 0) == noise(4)
    if what == "erase":
        garbage = h.read(0, 0, 2, 0)
        assert garbage not in (old, b"\xff" * RAW) and garbage == h.read(0, 0, 2, 0)
        assert h.read(0, 0, 2, 5) not in (garbage, b"\xff" * RAW)
        h.program(0, 0, 2, 2, b"a")
        h.violated(Violation.NOT_ERASED)
        assert h.erase(0, 0, 2) == 0xE0
        assert h.read(0, 0, 2, 0) == b"\xff" * RAW
    else:
        partial = h.read(0, 0, 2, 1)
        assert all(p & d == d for p, d in zip(partial, data, strict=True)), "only zeros may be missing"
        assert partial not in (data, b"\xff" * RAW)
        assert h.read(0, 0, 2, 0) == old
        if what == "queued":
            assert h.read(0, 0, 2, 2) == b"\xff" * RAW, "it had not begun"
            assert h.channel.programmed(0, 0, 2) == 2
    h.clean()


def test_reset_interrupts() -> None:
    h = host()
    data = noise(2)
    h.fill(0, 0, 2, 0, data, 0x10)
    h.wait("wb")
    h.cycle(0, 0xFF)
    assert h.ready(0) > TINY.cycles(TINY_PART.t_rst) - 50
    assert h.read(0, 0, 2, 0) not in (data, b"\xff" * RAW)
    h.clean()


def test_faults_are_checked() -> None:
    with pytest.raises(ValueError, match="bit_error_rate must be 0, or from 1e-12 to below 1, not 1"):
        NandFaults(bit_error_rate=1)
    with pytest.raises(ValueError, match="power_cuts must be in the order of their cycles"):
        NandFaults(power_cuts=((5, 1), (3, 1)))
    channel = NandChannel(TINY)
    with pytest.raises(ValueError, match=r"die, plane, block, page must be below \(2, 2, 8, 8\), not \(0, 2, 0, 0\)"):
        channel.load((0, 2, 0, 0), b"")
    with pytest.raises(ValueError, match="data must be at most 1152 bytes, not 1153"):
        channel.load((0, 0, 0, 0), bytes(1153))


# ---------------------------------------------------------------------------------------------- events


def test_events() -> None:
    h = host()
    h.channel.events.clear()
    h.read(1, 1, 2, 3, 0, 64)
    page = TINY_PART.page_index(1, 1, 2, 3)
    kinds = [(e.kind, e.die, e.plane, e.page) for e in h.channel.events]
    assert kinds == [("command", 1, -1, page), ("read", 1, 1, page), ("out", 1, -1, page)]
    command, read, out = h.channel.events
    assert command.start < command.end <= read.start < read.end <= out.start < out.end
    assert read.end - read.start == pytest.approx(TINY.cycles(TINY_PART.t_r), abs=1)
    assert out.end - out.start == pytest.approx(
        TINY.clock_mhz / 1000 * (TINY_PART.t_pre + 64e3 / TINY_PART.bus_mts), abs=1)
    assert h.channel.words_moved == 8
    quiet = Host(NandChannel(TINY, recording=False))
    quiet.read(0, 0, 0, 0)
    assert quiet.channel.events == []


# ---------------------------------------------------------------------------------------------- Amaranth


class Reader(wiring.Component):
    """Reads page 0 of die 0 and sums up its first words, as a controller of four states would."""

    phy: Out(phy_signature(TINY))
    total: Out(64)
    words: Out(8)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        script = [(0, 0xFF), None, (0, 0x00), *((1, a) for a in ADDRESS), (0, 0x30), None]
        step = Signal(range(len(script) + 3))
        wait = Signal(16)
        cycles = self.phy.cycles
        with m.Switch(step):
            for i, entry in enumerate(script):
                with m.Case(i):
                    if entry is None:
                        m.d.sync += wait.eq(wait + 1)
                        with m.If((wait > 60) & self.phy.ready[0]):
                            m.d.sync += [wait.eq(0), step.eq(i + 1)]
                    else:
                        m.d.comb += [cycles.valid.eq(1), cycles.payload.address.eq(entry[0]),
                                     cycles.payload.byte.eq(entry[1])]
                        with m.If(cycles.ready):
                            m.d.sync += step.eq(i + 1)
            with m.Case(len(script)):
                m.d.sync += wait.eq(wait + 1)
                m.d.comb += [self.phy.bursts.valid.eq(wait > 20), self.phy.bursts.payload.bytes.eq(64)]
                with m.If(self.phy.bursts.ready & (wait > 20)):
                    m.d.sync += step.eq(len(script) + 1)
        with m.If(self.phy.read_valid):
            m.d.sync += [self.total.eq(self.total + self.phy.read), self.words.eq(self.words + 1)]
        return m


@pytest.mark.parametrize("process", [True, False])
def test_attach(process: bool) -> None:
    from kvattic_sim.nand.twin import attach

    channel = NandChannel(TINY)
    data = noise(6)
    channel.load((0, 0, 0, 0), data)
    dut = Reader()
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    if process:
        sim.add_process(attach(channel, dut.phy))
    else:
        sim.add_testbench(attach(channel, dut.phy), background=True)

    async def bench(ctx):
        for _ in range(20_000):
            await ctx.tick()
            if ctx.get(dut.words) == 8:
                break
        expected = np.frombuffer(data[:64], "<u8").sum(dtype=np.uint64)
        assert ctx.get(dut.total) == int(expected)

    sim.add_testbench(bench)
    sim.run()
    assert channel.violations == []
