"""The NAND model's ONFI parameter page as two hosts read it, which do not share a line with it or with each other.

`LINUX` is struct nand_onfi_params of Linux (include/linux/mtd/onfi.h, read by drivers/mtd/nand/raw/nand_onfi.c);
`PHOENIX` is onfi_paramPage_t of Phoenix-RTOS (plo, devices/flash-nandfctrl2/onfi-4.h, ONFI 4.0).  Both are written down
here as offsets and sizes of what they read; ATOSE's table (nand_onfi_parameters.h, ONFI 3.0), which numbers its bytes,
agrees with both.
"""

import math
import struct
from dataclasses import replace

import pytest

from kvattic.spec.config import PAPER, TINY
from kvattic.spec.nand import PARTS, PSLC, TINY_PART, NandPart, part
from kvattic_sim.nand.twin import PARAMETER_COPIES, NandChannel, onfi_crc, parameter_page

LINUX = {  # field: (offset, bytes)
    "sig": (0, 4), "revision": (4, 2), "features": (6, 2), "opt_cmd": (8, 2), "ext_param_page_length": (12, 2),
    "num_of_param_pages": (14, 1), "manufacturer": (32, 12), "model": (44, 20), "jedec_id": (64, 1),
    "byte_per_page": (80, 4), "spare_bytes_per_page": (84, 2), "pages_per_block": (92, 4), "blocks_per_lun": (96, 4),
    "lun_count": (100, 1), "addr_cycles": (101, 1), "bits_per_cell": (102, 1), "bb_per_lun": (103, 2),
    "block_endurance": (105, 2), "guaranteed_good_blocks": (107, 1), "programs_per_page": (110, 1),
    "ecc_bits": (112, 1), "interleaved_bits": (113, 1), "interleaved_ops": (114, 1), "sdr_timing_modes": (129, 2),
    "t_prog": (133, 2),
    "t_bers": (135, 2), "t_r": (137, 2), "t_ccs": (139, 2), "nvddr_timing_modes": (141, 1),
    "nvddr2_timing_modes": (142, 1), "nvddr_nvddr2_features": (143, 1), "t_int_r": (152, 2), "t_adl": (154, 2),
    "vendor_revision": (164, 2), "vendor": (166, 88), "crc": (254, 2),
}
MICRON_READ_RETRY_OPTIONS = 14
"""Offset in `vendor` (struct nand_onfi_vendor_micron of Linux' nand_micron.c)."""

PHOENIX = (  # in order, without gaps: format (struct) and field
    ("4s", "signature"), ("H", "revision"), ("H", "features"), ("H", "optionalCmds"), ("B", "primAdvCmdSupport"),
    ("x", None), ("H", "extParamPageLen"), ("B", "numOfParamPages"), ("17s", "res1"), ("12s", "devManufacturer"),
    ("20s", "devModel"), ("B", "jedecId"), ("2s", "dateCode"), ("13s", "res2"), ("I", "bytesPerPage"),
    ("H", "spareBytesPerPage"), ("I", "bytesPerPartialPage"), ("H", "spareBytesPerPartialPage"), ("I", "pagesPerBlock"),
    ("I", "blocksPerLun"), ("B", "numLuns"), ("B", "addrCycles"), ("B", "bitsPerCell"), ("H", "maxBadBlocksPerLun"),
    ("H", "blockEndurance"), ("B", "guaranteedValidBlock"), ("H", "blockEnduranceGvb"), ("B", "programsPerPage"),
    ("B", "partialProgAttr"), ("B", "eccBits"), ("B", "planeAddrBits"), ("B", "multiplaneOpAttr"),
    ("B", "ezNandSupport"), ("12s", "res3"), ("B", "ioPinCapacitance"), ("H", "timingMode"),
    ("H", "progCacheTimingMode"), ("H", "tPageProg"), ("H", "tBlkErase"), ("H", "tPageRead"), ("H", "tCCS"),
    ("B", "nvddrTimingMode"), ("B", "nvddr2TimingMode"), ("B", "nvddrFeat"), ("H", "clkInputPinCap"),
    ("H", "ioPinCap"), ("H", "inputPinCap"), ("B", "inputPinCapMax"), ("B", "drvStrength"), ("H", "tMR"), ("H", "tADL"),
    ("H", "tPageReadEZ"), ("B", "nvddr23Feat"), ("B", "nvddr23WarmupCyc"), ("H", "nvddr3TimingMode"),
    ("B", "nvddr2TimingMode2"), ("x", None), ("H", "vendorRevision"), ("88s", "vendorSpecific"), ("H", "crc"),
)

RATES = (66, 80, 133, 166, 200, 266, 333, 400, 533, 667, 800)
"""NV-DDR2's modes 0 to 10 (ONFI 4.0, its timing tables), MT/s."""


def linux(page: bytes) -> dict[str, int | bytes]:
    """Text as bytes, all else as numbers."""
    raw = {name: page[at:at + size] for name, (at, size) in LINUX.items()}
    return {name: value if name in ("sig", "manufacturer", "model", "vendor") else int.from_bytes(value, "little")
            for name, value in raw.items()}


def phoenix(page: bytes) -> dict[str, int | bytes]:
    layout = "<" + "".join(form for form, _ in PHOENIX)
    assert struct.calcsize(layout) == 256
    names = [name for _, name in PHOENIX if name]
    return dict(zip(names, struct.unpack(layout, page), strict=True))


def linux_crc(data: bytes) -> int:
    """As Linux does it: bytes from above, polynomial 8005h, first value 4F4Eh."""
    crc = 0x4F4E
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ (0x8005 if crc & 0x8000 else 0)
            crc &= 0xFFFF
    return crc


def limited(value: float) -> int:
    return min(math.ceil(value), 0xFFFF)


def expected(p: NandPart) -> dict[str, int]:
    """What a host should learn of the part, by names of our own."""
    modes = [mode for mode, rate in enumerate(RATES) if rate <= p.bus_mts]
    return {
        "page": p.page_bytes, "spare": p.spare_bytes, "pages": p.pages, "blocks": p.planes * p.blocks, "luns": 1,
        "cycles": 0x23, "bits": p.cell_bits, "planes": p.planes, "t_prog": limited(p.t_prog / 1000),
        "t_bers": limited(p.t_bers / 1000), "t_r": limited(p.t_r / 1000), "t_planes": limited(p.t_r / 1000),
        "t_ccs": limited(p.t_ccs), "t_adl": limited(p.t_adl), "modes": sum(1 << mode for mode in modes if mode < 8),
        "retries": p.retry_levels + 1, "copies": 3, "extended": 0}


@pytest.mark.parametrize("name", PARTS)
def test_as_linux_reads_it(name: str) -> None:
    """Also what the kernel does with it, which decides whether it takes the chip at all."""
    p = part(name)
    page = parameter_page(p, 8)
    found = linux(page)
    assert len(page) == 256 and found["sig"] == b"ONFI"
    assert found["crc"] == linux_crc(page[:254]) == onfi_crc(page[:254])
    endurance = found["block_endurance"]
    assert {
        "page": found["byte_per_page"], "spare": found["spare_bytes_per_page"], "pages": found["pages_per_block"],
        "blocks": found["blocks_per_lun"], "luns": found["lun_count"], "cycles": found["addr_cycles"],
        "bits": found["bits_per_cell"], "planes": 1 << found["interleaved_bits"], "t_prog": found["t_prog"],
        "t_bers": found["t_bers"], "t_r": found["t_r"], "t_planes": found["t_int_r"], "t_ccs": found["t_ccs"],
        "t_adl": found["t_adl"], "modes": found["nvddr2_timing_modes"],
        "retries": found["vendor"][MICRON_READ_RETRY_OPTIONS], "copies": found["num_of_param_pages"],
        "extended": found["ext_param_page_length"]} == expected(p)
    assert (endurance & 0xFF) * 10 ** (endurance >> 8) == pytest.approx(p.endurance, rel=0.1)
    assert found["vendor_revision"] >= 1     # or it does not look at the read retries
    # ONFI_VERSION_1_0 is bit 1, ONFI_VERSION_4_0 bit 9; the others follow each other.
    assert found["revision"] == sum(1 << bit for bit in range(1, 10))
    features = {bit for bit in range(16) if found["features"] >> bit & 1}
    assert features == {3, 6, 10}       # no 16-bit bus (0), no NV-DDR (5), no extended parameter page (7)
    assert found["nvddr_timing_modes"] == 0
    assert found["sdr_timing_modes"] & 1, "mode 0 shall be supported"
    assert found["opt_cmd"] & 0b110 == 0b110    # cache reads, set and get features
    assert found["ecc_bits"] == 8       # for steps of 512 bytes
    assert found["manufacturer"].decode().rstrip() == "KVATTIC"
    assert found["model"].decode().rstrip() == name.upper()


@pytest.mark.parametrize("name", PARTS)
def test_as_phoenix_reads_it(name: str) -> None:
    p = part(name)
    page = parameter_page(p, 8)
    found = phoenix(page)
    assert found["signature"] == b"ONFI" and found["crc"] == linux_crc(page[:254])
    assert {
        "page": found["bytesPerPage"], "spare": found["spareBytesPerPage"], "pages": found["pagesPerBlock"],
        "blocks": found["blocksPerLun"], "luns": found["numLuns"], "cycles": found["addrCycles"],
        "bits": found["bitsPerCell"], "planes": 1 << found["planeAddrBits"], "t_prog": found["tPageProg"],
        "t_bers": found["tBlkErase"], "t_r": found["tPageRead"], "t_planes": found["tMR"], "t_ccs": found["tCCS"],
        "t_adl": found["tADL"], "modes": found["nvddr2TimingMode"],
        "retries": found["vendorSpecific"][MICRON_READ_RETRY_OPTIONS], "copies": found["numOfParamPages"],
        "extended": found["extParamPageLen"]} == expected(p)
    high = sum(1 << mode - 8 for mode, rate in enumerate(RATES) if mode >= 8 and rate <= p.bus_mts)
    assert (found["timingMode"], found["nvddr2TimingMode2"]) == (1, high)
    assert found["revision"] >> 9 & 1 and found["eccBits"] == 8
    # What ONFI reserves, or no die of ours has, is zero.
    for field in ("primAdvCmdSupport", "bytesPerPartialPage", "spareBytesPerPartialPage", "partialProgAttr",
                  "ezNandSupport", "nvddrTimingMode", "nvddrFeat", "tPageReadEZ", "nvddr23Feat", "nvddr23WarmupCyc"):
        assert found[field] == 0, field
    assert not any(found["res1"] + found["res2"] + found["res3"])


@pytest.mark.parametrize("ecc_t, codeword_bytes, bits", [
    (8, 512, 8), (8, 256, 16), (8, 1024, 4), (9, 1024, 5), (40, 2048, 10), (64, 64, 254)])
def test_ecc_is_told_for_512_bytes(ecc_t: int, codeword_bytes: int, bits: int) -> None:
    assert parameter_page(PSLC, ecc_t, codeword_bytes)[LINUX["ecc_bits"][0]] == bits


def test_a_slow_bus_has_no_ddr_mode() -> None:
    page = linux(parameter_page(replace(TINY_PART, bus_mts=50), 8))
    assert page["features"] == 1 << 3 | 1 << 6
    assert (page["nvddr2_timing_modes"], page["sdr_timing_modes"]) == (0, 1)


def test_long_times_are_the_longest_that_can_be_told() -> None:
    slow = replace(TINY_PART, t_prog=65_534_001.0, t_bers=1e9)
    page = linux(parameter_page(slow, 8))
    assert (page["t_prog"], page["t_bers"]) == (65_535, 65_535)


@pytest.mark.parametrize("config", [TINY, replace(PAPER, codeword_bytes=1024)], ids=["tiny", "1024"])
def test_dies_tell_their_drives_ecc(config) -> None:
    """What a die sends is the page of its part with the configuration's code, three times."""
    sent = bytes(NandChannel(config)._parameters)
    assert len(sent) == 256 * PARAMETER_COPIES
    assert sent == sent[:256] * PARAMETER_COPIES
    assert linux(sent)["ecc_bits"] == math.ceil(config.ecc_t * 512 / config.codeword_bytes)
