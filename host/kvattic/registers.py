"""The register map: one table that the RTL builds its bank from, and driver and docs read.

32-bit registers behind AXI4-Lite; 64-bit values take two, low half first.
"""

from dataclasses import dataclass
from enum import IntFlag, StrEnum

ID_MAGIC = 0x5441564B
"""'KVAT' in little-endian ASCII."""
VERSION = 0x0002_0000
"""Major in the upper half; a change of meaning raises it."""


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
    """Aborts everything and clears the engine, registers included; STATUS.READY returns when it is clean."""
    IRQ_ENABLE = 2
    """Raise the interrupt line while STATUS.DONE is set."""


class StatusBit(IntFlag):
    """Bits of STATUS; all but BUSY and READY are cleared by writing a one."""

    BUSY = 1
    """A batch is running."""
    READY = 2
    """Memories are swept and a doorbell will be taken."""
    DONE = 4
    """The last batch is complete."""
    DOORBELL_WHILE_BUSY = 8
    """A doorbell was refused because a batch was running (or READY was low)."""
    BAD_TAG = 16
    """A codeword with a tag that nobody asked for was dropped; see TAG_ERROR."""
    BUS_ERROR = 32
    """Host memory answered a read or write with an error."""
    STALE_CODEWORD = 64
    """A late codeword of a job that had ended was dropped."""
    MEDIA_ERROR = 128
    """A codeword could not be read; see MEDIA_ERROR and MEDIA_CAUSE."""


REGISTERS: tuple[Register, ...] = (
    Register("ID", 0x00, 32, Access.RO, ID_MAGIC, "magic number"),
    Register("VERSION", 0x04, 32, Access.RO, VERSION, "version of the register and command layout"),
    Register("CONFIG_HASH", 0x08, 32, Access.RO, 0, "kvattic.Config.hash of the configuration this was built from"),
    Register("CONTROL", 0x0C, 32, Access.RW, 0, "`Control`"),
    Register("STATUS", 0x10, 32, Access.W1C, 0, "`StatusBit`"),
    Register("TAG_ERROR", 0x14, 32, Access.RO, 0, "channel << 24 | low 24 bits of the first bad tag"),
    Register("TIMEOUT", 0x18, 32, Access.RW, 1_000_000, "cycles without progress until the oldest job fails; 0: never"),
    Register("DOORBELL", 0x1C, 32, Access.WO, 0, "number of commands (1 to 65,535) at COMMAND_BASE: run them"),
    Register("COMPLETED", 0x20, 32, Access.RO, 0, "completions written since the doorbell"),
    Register("COMMAND_BASE", 0x28, 64, Access.RW, 0, "address of the commands, 64-byte aligned"),
    Register("COMPLETION_BASE", 0x30, 64, Access.RW, 0, "address of the completions, 64-byte aligned"),
    Register("BUFFER_BASE", 0x38, 64, Access.RW, 0, "first address that queries and results may use"),
    Register("BUFFER_LIMIT", 0x40, 64, Access.RW, 0, "one past the last address that queries and results may use"),
    Register("MEDIA_ERROR", 0x48, 32, Access.RO, 0, "channel << 24 | page of the first codeword not read"),
    Register("MEDIA_CAUSE", 0x4C, 32, Access.RO, 0, "`MediaCause` << 16 | codeword of that page"),
    Register("CYCLES", 0x80, 64, Access.RO, 0, "cycles from the doorbell to the last completion (running: until now)"),
    Register("BEATS", 0x88, 64, Access.RO, 0, "lane beats used, all lanes"),
    Register("FIRST_BEAT", 0x90, 64, Access.RO, 0, "cycle of the first beat"),
    Register("LAST_BEAT", 0x98, 64, Access.RO, 0, "cycle of the latest beat"),
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
)

REGISTER_MAP = {register.name: register for register in REGISTERS}
ADDRESS_BITS = 9
"""Width of the AXI4-Lite address."""
