"""The register map: one table that the RTL builds its bank from, and driver and docs read.

32-bit registers behind AXI4-Lite; 64-bit values take two, low half first.
"""

from dataclasses import dataclass
from enum import IntFlag, StrEnum

ID_MAGIC = 0x5441564B
"""'KVAT' in little-endian ASCII."""
VERSION = 0x0004_0001
"""Major in the upper half; a change of meaning raises it."""
QUEUES = 8
"""Pairs of a submission and a completion queue; queue 0 is the admin queue."""
MAX_ENTRIES = 4096
"""Entries of a queue's ring, at most; rings have a power of two of them, 2 at least."""
MAX_REGIONS = 4096
"""Regions that device DRAM is granted in, at most."""
DOORBELLS = 0x1000
"""Address of the first doorbell, as in NVMe."""
DOORBELL_STRIDE_BITS = 9
"""NVMe's CAP.DSTRD: two doorbells are 4 << DSTRD bytes apart.  Tail and head of a pair so share a page of 4 KiB, which
can be mapped into the process of its user, and no other doorbell is in it."""
DOORBELL_STRIDE = 4 << DOORBELL_STRIDE_BITS
DOORBELL_PAGE = 2 * DOORBELL_STRIDE
"""Bytes from the doorbells of one queue to those of the next."""


class Access(StrEnum):
    """Who may change a register."""

    RO = "ro"
    RW = "rw"
    W1C = "w1c"
    """Writing a one clears the bit."""
    WO = "wo"
    """Writing acts; reads as zero."""


@dataclass(frozen=True, slots=True)
class Register:
    """One register: name, byte address, width in bits (32 or 64), access, reset value, meaning."""

    name: str
    address: int
    width: int
    access: Access
    reset: int
    doc: str


class Control(IntFlag):
    """Bits of CONTROL."""

    RESET = 1
    """Aborts everything and clears the engine, registers, counters and queues included; STATUS.READY returns when it is
    clean.  The table of owners stays."""


class StatusBit(IntFlag):
    """Bits of STATUS; all but BUSY and READY are cleared by writing a one."""

    BUSY = 1
    """A command waits in a queue, is under way, or its completion is not written yet."""
    READY = 2
    """Memories are swept; commands are fetched."""
    INVALID_DOORBELL = 4
    """A doorbell was refused and changed nothing; see DOORBELL_ERROR."""
    BAD_TAG = 8
    """A codeword with a tag that nobody asked for was dropped; see TAG_ERROR."""
    BUS_ERROR = 16
    """Host memory answered a read or write with an error."""
    STALE_CODEWORD = 32
    """A late codeword of a job that had ended was dropped."""
    MEDIA_ERROR = 64
    """A codeword could not be read; see MEDIA_ERROR and MEDIA_CAUSE."""


REGISTERS: tuple[Register, ...] = (
    Register("ID", 0x00, 32, Access.RO, ID_MAGIC, "magic number"),
    Register("VERSION", 0x04, 32, Access.RO, VERSION, "version of the register and command layout"),
    Register("CONFIG_HASH", 0x08, 32, Access.RO, 0, "kvattic.Config.hash of the configuration this was built from"),
    Register("CONTROL", 0x0C, 32, Access.RW, 0, "`Control`"),
    Register("STATUS", 0x10, 32, Access.W1C, 0, "`StatusBit`"),
    Register("TAG_ERROR", 0x14, 32, Access.RO, 0, "channel << 24 | low 24 bits of the first bad tag"),
    Register("TIMEOUT", 0x18, 32, Access.RW, 1_000_000, "cycles without progress until the oldest job fails; 0: never"),
    Register("DOORBELL_ERROR", 0x1C, 32, Access.RO, 0, "the first refused doorbell: queue << 24 | 1 << 16 if it was "
             "COMPLETION_HEAD | low 16 bits of its value"),
    Register("INTERRUPT_MASK", 0x20, 32, Access.RW, 0, "bit q: queue q may raise the interrupt line"),
    Register("INTERRUPT_AFTER", 0x24, 32, Access.RW, 1, "completions that the host has not taken, from which on a "
             "queue wants an interrupt (16 bits); a queue with nothing under way wants it with any"),
    Register("INTERRUPTS", 0x28, 32, Access.RO, 0, "bit q: queue q wants an interrupt, masked or not"),
    Register("ADMIN_ENTRIES", 0x2C, 32, Access.WO, 0, "entries of each ring of queue 0, a power of two: creates it "
             "anew, empty; another number removes it"),
    Register("ADMIN_SUBMISSION", 0x30, 64, Access.RW, 0, "address of queue 0's submission ring, 64-byte aligned"),
    Register("ADMIN_COMPLETION", 0x38, 64, Access.RW, 0, "address of its completion ring, 64-byte aligned"),
    Register("ADMIN_BASE", 0x40, 64, Access.RW, 0, "first address that the blocks of queue 0's commands may use"),
    Register("ADMIN_LIMIT", 0x48, 64, Access.RW, 0, "one past the last address that they may use"),
    Register("MEDIA_ERROR", 0x50, 32, Access.RO, 0, "channel << 24 | page of the first codeword not read"),
    Register("MEDIA_CAUSE", 0x54, 32, Access.RO, 0, "`MediaCause` << 16 | codeword of that page"),
    Register("REGION_BITS", 0x58, 32, Access.RW, 0, "log2 of the pages of a region of device DRAM (4 bits)"),
    Register("FETCHED", 0x70, 32, Access.RO, 0, "commands fetched since the reset"),
    Register("COMPLETED", 0x74, 32, Access.RO, 0, "completions written since the reset"),
    Register("CYCLES", 0x80, 64, Access.RO, 0, "cycles in which STATUS.BUSY was set"),
    Register("BEATS", 0x88, 64, Access.RO, 0, "lane beats used, all lanes"),
    Register("FIRST_BEAT", 0x90, 64, Access.RO, 0, "cycle of the first beat since the drive got work after it "
             "had none; 0: no beat since"),
    Register("LAST_BEAT", 0x98, 64, Access.RO, 0, "cycle of the latest beat; 0: no beat yet"),
    Register("STARVED", 0xA0, 64, Access.RO, 0, "lane cycles without a beat although codewords were requested"),
    Register("BARRIER", 0xA8, 64, Access.RO, 0, "lane cycles in which V waited for the maximum"),
    Register("WEIGHTS", 0xB0, 64, Access.RO, 0, "lane cycles in which a V beat waited for its weight"),
    Register("SCORES", 0xB8, 64, Access.RO, 0, "lane cycles in which a K beat waited for the score unit"),
    Register("IDLE", 0xC0, 64, Access.RO, 0, "lane cycles without work"),
    Register("DUPLICATES", 0xC8, 32, Access.RO, 0, "codewords dropped because they came twice"),
    Register("STALES", 0xCC, 32, Access.RO, 0, "codewords dropped because their job had ended"),
    Register("FLASH_WORDS", 0x100, 64, Access.RO, 0, "beats moved on the flash buses, in both directions"),
    Register("FLASH_COMMANDS", 0x108, 64, Access.RO, 0, "command and address cycles on the flash buses"),
    Register("DIE_BUSY", 0x110, 64, Access.RO, 0, "die cycles busy with reading, programming or erasing"),
    Register("CODEWORDS", 0x118, 64, Access.RO, 0, "codewords read from flash"),
    Register("CORRECTED", 0x120, 64, Access.RO, 0, "codewords read with errors, all of them corrected"),
    Register("BIT_ERRORS", 0x128, 64, Access.RO, 0, "bits corrected"),
    Register("RETRIES", 0x130, 64, Access.RO, 0, "codewords read again with a read-retry setting"),
    Register("UNREADABLE", 0x138, 64, Access.RO, 0, "codewords that could not be read"),
    Register("PAGE_READS", 0x140, 64, Access.RO, 0, "pages read from the arrays"),
    Register("PAGE_PROGRAMS", 0x148, 64, Access.RO, 0, "pages programmed"),
    Register("BLOCK_ERASES", 0x150, 64, Access.RO, 0, "blocks erased"),
    *(register for q in range(QUEUES) for register in (
        Register(f"SUBMISSION_TAIL_{q}", DOORBELLS + 2 * q * DOORBELL_STRIDE, 32, Access.WO, 0,
                 f"doorbell: queue {q} has commands up to this entry, exclusive"),
        Register(f"COMPLETION_HEAD_{q}", DOORBELLS + (2 * q + 1) * DOORBELL_STRIDE, 32, Access.WO, 0,
                 f"doorbell: the host has taken queue {q}'s completions up to this entry, exclusive"),
    )),
)

REGISTER_MAP = {register.name: register for register in REGISTERS}
ADDRESS_BITS = 16
"""Width of the AXI4-Lite address."""
COUNTERS = tuple(r for r in REGISTERS if 0x80 <= r.address < 0x400)
"""What the command COUNTERS writes: 8 bytes for each, in this order.

They count from power-up or the last CONTROL.RESET on, and nothing else clears them: who wants to know what something
took subtracts what they were before.  FIRST_BEAT and LAST_BEAT are times on the clock CYCLES.  All but DUPLICATES and
STALES, which count whenever they happen, count while STATUS.BUSY is set."""
