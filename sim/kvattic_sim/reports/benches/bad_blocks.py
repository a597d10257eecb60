"""How many blocks the scan for the factory's marks judges wrong at a raw bit-error rate.

A whole drive of RTL: the driver's scan, the controllers' PROBE, and the NAND model, which marks blocks as the part's
data say and reads all pages with bit errors.  A small drive is scanned again and again, each time with other marks and
other errors.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Self

from kvattic import TINY, Block, Config, Device
from kvattic.spec.nand import TINY_PART
from kvattic_sim.nand.twin import NandFaults
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.rtl.jobs import report, run_in_simulation
from kvattic_sim.rtl.transport import NandSettings, RtlTransport
from kvattic_sim.simulators.build import Simulator

__all__ = ["BENCHES", "BIT_ERROR_RATE", "CONFIG", "Judged", "judge", "scan"]

CONFIG = replace(TINY, part=replace(TINY_PART, name="tiny, fast reads", blocks=25, t_r=1_000.0))
"""200 blocks: 2 channels of 2 dies with 2 planes.  What a bit error does depends on no time, so reads are fast."""
DRIVES = 50
"""Scans: 10,000 blocks."""
BIT_ERROR_RATE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the scans made of the blocks.

    Attributes:
        blocks: scanned.
        marked: of them, with marks.
        lost: without a mark, and called bad.
        missed: with a mark, and called good.
    """

    blocks: int = 0
    marked: int = 0
    lost: int = 0
    missed: int = 0

    def __add__(self, other: Self) -> "Judged":
        return Judged(**{name: getattr(self, name) + getattr(other, name) for name in Judged.__slots__})


def marks(config: Config, random: Random) -> set[tuple[Block, int | None]]:
    """Half of a drive's blocks, and where each is marked: in one of the part's pages, or (None) in all of them."""
    part = config.part
    blocks = [Block(channel, die, plane, block) for channel in range(config.channels) for die in range(config.dies)
              for plane in range(part.planes) for block in range(part.blocks)]
    return {(block, random.choice((None, *part.marked_pages))) for block in random.sample(blocks, len(blocks) // 2)}


def scan(device: Device, drives: int, bit_error_rate: float, seed: int) -> Judged:
    """Scan a drive as if it were several new ones; this is the part that runs inside of the simulator.

    Args:
        device: the drive; nothing may be written.
        drives: how often.
        bit_error_rate: of each read.
        seed: of everything random.
    """
    transport, config, random = device.transport, device.config, Random(seed)
    assert isinstance(transport, RtlTransport)
    total = Judged()
    for drive in range(drives):
        chosen = marks(config, random)
        faults = {channel: NandFaults(bit_error_rate=bit_error_rate, factory_bad=tuple(
            (b.die, b.plane, b.block) if page is None else (b.die, b.plane, b.block, page)
            for b, page in sorted(chosen, key=lambda one: one[0]) if b.channel == channel))
            for channel in range(config.channels)}
        transport.set_flash(NandSettings(faults=faults, seed=random.getrandbits(31)))
        found, wanted = device.find_marks(), {block for block, _ in chosen}
        blocks = config.channels * config.dies * config.part.planes * config.part.blocks
        total += Judged(blocks=blocks, marked=len(wanted), lost=len(found - wanted), missed=len(wanted - found))
        report(f"{drive + 1}")
    return total


def judge(drives: int = DRIVES, bit_error_rate: float = BIT_ERROR_RATE, *, seed: int = 1,
          simulator: Simulator = Simulator.VERILATOR, lab: Lab | None = None) -> Judged:
    """Scan new drives.

    Args:
        drives: how many.
        bit_error_rate: of each read.
        seed: of everything random.
        simulator: of the RTL.
        lab: takes the progress.
    """
    def follow(line: str) -> None:
        if lab is not None:
            lab.progress("drives scanned", int(line), drives)

    found: Judged = run_in_simulation(
        CONFIG, scan, {"drives": drives, "bit_error_rate": bit_error_rate, "seed": seed}, simulator=simulator,
        progress=follow).result
    return found


def measure(lab: Lab) -> Figures:
    """Blocks judged wrong, of 10,000, half of which are marked."""
    found = judge(simulator=lab.simulator, lab=lab)
    return {"flash.bad_block_scan": found.lost + found.missed, "flash.bad_block_scan.lost": found.lost,
            "flash.bad_block_scan.missed": found.missed}


BENCHES = (Bench(keys=("flash.bad_block_scan", "flash.bad_block_scan.lost", "flash.bad_block_scan.missed"),
                 measure=measure),)
"""What the bench runner calls."""
