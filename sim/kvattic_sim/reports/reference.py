"""Generated documentation: `make docs` writes docs/commands.md and include/kvattic.h from the host library's tables.

Registers and records are read as objects; what a member of an enumeration means stands in the string under it, which
exists in the source only and is read from there.  `tests/packaging` fails when a written file is stale.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, IntEnum, IntFlag
from pathlib import Path

import kvattic
from kvattic.spec import commands, formats, registers
from kvattic.spec.commands import Field, Record
from kvattic.spec.config import HEAD_DIMS
from kvattic.support.files import write_whole
from kvattic.support.terminal import run_command

__all__ = ["FILES", "header", "member_docs", "reference", "write"]

SIGNED = {("Trailer", "maximum")}
"""Fields that hold a signed number."""


def member_docs(enumeration: type[Enum]) -> dict[str, str]:
    """The string under each member of an enumeration, by the member's name; members without one are left out."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(enumeration))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


def _summary(thing: object) -> str:
    """First paragraph of a docstring, on one line."""
    return _line((inspect.getdoc(thing) or "").partition("\n\n")[0])


def _line(text: str) -> str:
    return " ".join(text.split())


def _members(enumeration: type[IntEnum] | type[IntFlag]) -> Iterator[tuple[IntEnum | IntFlag, str]]:
    """The members by value, each with its docs on one line."""
    docs = member_docs(enumeration)
    for member in sorted(enumeration, key=int):
        yield member, _line(docs.get(member.name or "", ""))


# Markdown.


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _enumeration(enumeration: type[IntEnum] | type[IntFlag]) -> list[str]:
    flags, codes = issubclass(enumeration, IntFlag), enumeration is commands.Opcode
    return _table(
        ("bit" if flags else "value", "name", "meaning"),
        ((str(m.bit_length() - 1) if flags else f"{m:#04x}" if codes else str(int(m)), f"`{m.name}`", doc)
         for m, doc in _members(enumeration)))


def _parts(record: Record) -> Iterator[tuple[int, int, Field | None]]:
    """(offset, size, field) of a record, without holes; reserved bytes that adjoin are one part, with None."""
    begin = 0
    for field in sorted(record.fields, key=lambda f: f.offset):
        if not field.name.startswith("reserved"):
            if field.offset > begin:
                yield begin, field.offset - begin, None
            yield field.offset, field.size, field
            begin = field.offset + field.size
    if record.size > begin:
        yield begin, record.size - begin, None


def _record(record: Record) -> list[str]:
    def row(offset: int, size: int, field: Field | None) -> Sequence[str]:
        place = f"{offset}" if size == 1 else f"{offset}-{offset + size - 1}"
        return (place, f"`{field.name}`", field.doc) if field else (place, "", "reserved, zero")

    return _table(("bytes", "field", "meaning"), (row(*part) for part in _parts(record)))


def _plain_registers() -> Iterator[registers.Register]:
    """All but the doorbells."""
    return (r for r in registers.REGISTERS if r.address < registers.DOORBELLS)


def _doorbells() -> Iterator[tuple[registers.Register, int, str, str]]:
    """(queue 0's, its number among queue 0's, name without number, meaning for queue q) of each kind of doorbell."""
    for register in registers.REGISTERS:
        if register.address >= registers.DOORBELLS and register.name.endswith("_0"):
            number, rest = divmod(register.address - registers.DOORBELLS, registers.DOORBELL_STRIDE)
            assert not rest
            yield register, number, register.name.removesuffix("_0"), register.doc.replace("queue 0", "queue q")


def _registers() -> list[str]:
    def reset(register: registers.Register) -> str:
        return {"ID": f"{register.reset:#010x}", "VERSION": f"{register.reset:#010x}",
                "CONFIG_HASH": "the configuration's"}.get(register.name, f"{register.reset:,}")

    rows = [(f"{r.address:#04x}", f"`{r.name}`", str(r.width), r.access.value, reset(r), r.doc)
            for r in _plain_registers()]
    rows += [(f"{registers.DOORBELLS:#x} + {f'(2q + {number})' if number else '2q'} * {registers.DOORBELL_STRIDE:#x}",
              f"`{name}_q`", str(r.width), r.access.value, reset(r), doc) for r, number, name, doc in _doorbells()]
    return _table(("address", "name", "bits", "access", "reset", "meaning"), iter(rows))


def _access() -> str:
    docs = member_docs(registers.Access)
    words = {"RO": "read only", "RW": "read and write"} | {
        name: text[0].lower() + text[1:].rstrip(".") for name, text in docs.items()}
    return "; ".join(f"*{a.value}*: {words[a.name]}" for a in registers.Access)


def _presets() -> list[str]:
    names = ("channels", "beat_bytes", "rows", "head_dim", "element", "dies", "ecc_t", "dram_beat_bytes", "page_bytes",
             "codeword_bytes", "score_depth", "jobs_in_flight", "groups_in_flight")
    return _table(
        ("preset", *(f"`{n}`" for n in names), "part", "max. tokens of a job", "`CONFIG_HASH`"),
        ((f"`{preset}`", *(f"{value:,}" if isinstance(value := getattr(config, n), int) else f"{value}" for n in names),
          f"`{config.part.name}`", f"{config.max_tokens:,}", f"`{config.hash:#010x}`")
         for preset, config in kvattic.PRESETS.items()))


Part = str | list[str]
"""A paragraph or heading, or lines that stay as they are."""


def reference() -> str:
    """Text of docs/commands.md."""
    parts = [*_running_commands(), *_register_sections(), *_command_sections(), *_block_sections(),
             *_completion_sections(), *_presets_section()]
    return "\n\n".join(_paragraph(part) if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"


def _running_commands() -> list[Part]:
    """What this is, and how commands are run."""
    line = commands.LINE_BYTES
    return [
        "<!-- Generated by `make docs` from host/kvattic/spec/registers.py and commands.py: edit those. -->",
        "# Registers and commands",
        f"What crosses between host and device. [`include/kvattic.h`](../include/kvattic.h) has the same for C. "
        f"Integers are little-endian. Every record but a table's entry is a whole number of {line}-byte lines, every "
        f"address in a command and of a ring is {line}-byte aligned, and each AXI4 burst is one line.",
        "## Running commands",
        "A queue is a pair of rings in host memory, one of commands and one of completions, with as many entries "
        f"each: a power of two, 2 to {registers.MAX_ENTRIES:,}. There are up to {registers.QUEUES}. Queue 0 is the "
        "admin queue: it is made by registers, makes the others, and says what they may do.",
        _steps(
            "Read `ID`, `VERSION` (the upper half must match) and `CONFIG_HASH`; wait for `STATUS.READY`.",
            "The admin queue: clear its completion ring; write `ADMIN_SUBMISSION`, `ADMIN_COMPLETION`, `ADMIN_BASE`, "
            "`ADMIN_LIMIT`, and at last `ADMIN_ENTRIES`, which creates it, empty.",
            "In the admin queue: IDENTIFY tells the configuration that the device was built from; CREATE_QUEUE makes a "
            "queue for commands, with the window of memory that their blocks may lie in. Clear its completion ring "
            "first.",
            "Write `REGION_BITS`. In the admin queue: GRANT zones of flash and regions of device DRAM to a domain, and "
            "the domain to the queues whose commands may name it. After power-up they are nobody's.",
            "To submit: write query blocks, tables and so on into the window, and the commands into the submission "
            "ring from its tail on; then write the new tail to the queue's `SUBMISSION_TAIL`.",
            "Wait for the interrupt (`INTERRUPT_MASK`), or look at the next entry of the completion ring: it is new "
            "when the phase bit in its `state` is that of this round of the ring, 1 in the first one, then 0, and so "
            "on.",
            "Take the completions: by `identifier` they belong to commands. Those of one queue come in any order, but "
            "ATTENDs and READs end in the order in which they were fetched. Results are in memory before their "
            "completion is.",
            "Write the number of the next entry to be taken to `COMPLETION_HEAD`: those before it can be used again."),
        "A command that did not end `OK` has a completion and no results; the others are served as usual. The device "
        "fetches from the queues in turns, and from each only while the completions that its commands will have, and "
        "those that the host has not taken, fit the ring less one entry. `head` of a completion tells which entries of "
        "the submission ring were fetched: those before it may be written again. A ring with equal head and tail is "
        "empty; so a ring holds one command less than it has entries.",
        "A doorbell whose number is not below the queue's entries, that would move the tail back or beyond the head, "
        "that takes more completions than there are, or whose queue is not there, changes nothing: it sets "
        "`STATUS.INVALID_DOORBELL`, and `DOORBELL_ERROR` keeps the first such doorbell since that bit was clear.",
        "A queue wants an interrupt while it has completions that the host has not taken: `INTERRUPT_AFTER` of them, "
        "or any if nothing of it is under way. The line is up while any queue of `INTERRUPT_MASK` wants it.",
        "DELETE_QUEUE stops fetching from a queue. While commands of it are under way it ends `QUEUE_BUSY`; take their "
        "completions and repeat it. `CONTROL.RESET` removes all queues, queue 0 too.",
    ]


def _register_sections() -> list[Part]:
    """The registers."""
    return [
        "## Registers",
        f"AXI4-Lite, 32 bits of data, {registers.ADDRESS_BITS} bits of address. 64-bit registers take two accesses, "
        f"low half first. Each queue's two doorbells have a page of their own, which can be mapped into a process; "
        f"they are where NVMe has them with a CAP.DSTRD of {registers.DOORBELL_STRIDE_BITS}. Access: {_access()}.",
        _registers(),
        "### CONTROL", _enumeration(registers.Control),
        "### STATUS", _summary(registers.StatusBit), _enumeration(registers.StatusBit),
    ]


def _command_sections() -> list[Part]:
    """The commands."""
    line = commands.LINE_BYTES
    return [
        "## Command",
        f"A submission entry is one line. Opcodes from {commands.ADMIN_OPCODES:#x} on are for queue 0 alone, which "
        "takes all of them. [Queues](queues.md) says what is as in NVMe, and what not:",
        _enumeration(commands.Opcode),
        "### ATTEND", _record(commands.COMMAND),
        "Modes ([sparse attention](sparse.md)):", _enumeration(commands.Mode),
        "A stripe is `stripe_pages` pages of K and as many of V, of `stripe_pages` times the tokens of a page. The "
        "table has an entry of 8 bytes for each stripe of the job, in the order of its tokens; see "
        "[placement](placement.md):",
        _record(commands.TABLE_ENTRY),
        "Its flags:", _enumeration(commands.TableFlag),
        "In sparse modes each entry is followed by another 8 bytes, so a stripe has 16:",
        _record(commands.SKETCH_ENTRY),
        "Every place that the table names must be the command's `domain`'s: the zones of a stripe's pages, or the "
        "regions of device DRAM, and the pages of its sketch; a stripe must not leave its zone.",
        "### READ", _record(commands.READ_COMMAND),
        "Writes K of the first token, V of the first token, K of the second one, and so on, each padded with zeros to "
        f"whole lines, {commands.READ_BYTES:,} bytes at most. Tokens are numbered from 0, also in `where` of the "
        "completion. It is checked and served like a dense ATTEND, and completes in one order with them. NaN and "
        "infinity are numbers like any other here. The target is written while the codewords come, in any order: "
        "unless the completion says `OK`, what is there means nothing.",
        "### PROGRAM, ERASE, PROBE, MAP", _record(commands.FLASH_COMMAND),
        "Those of one channel begin in their order, and an ERASE or PROGRAM of a die in the order of its pages; they "
        "complete in any order, and beside attention. One that waits for its channel holds back its own queue only.",
        "### IDENTIFY, COUNTERS", _record(commands.DATA_COMMAND),
        f"IDENTIFY writes {commands.IDENTIFY_BYTES:,} bytes: the configuration as JSON text, padded with zeros. "
        f"COUNTERS writes {line * commands.lines(8 * len(registers.COUNTERS))} bytes: {len(registers.COUNTERS)} "
        f"numbers of 8 bytes, and zeros, in the order of the registers: "
        f"{', '.join(f'`{r.name}`' for r in registers.COUNTERS)}.",
        "### CREATE_QUEUE, DELETE_QUEUE", _record(commands.QUEUE_COMMAND),
        "### GRANT", _record(commands.GRANT_COMMAND),
        _enumeration(commands.Grant),
        f"Domains are numbered 1 to {commands.DOMAINS - 1}; 0 is nobody. A zone is the same zone number of all "
        "channels. Owners stay over `CONTROL.RESET`.",
    ]


def _block_sections() -> list[Part]:
    """Blocks of queries and results."""
    return [
        "## Query block",
        "`rows` times this head, each followed by the row's `head_dim` elements in the configuration's 16-bit format, "
        "padded with zeros to a whole line. A row attends the tokens of its window; from `tree_token` on, only those "
        "of them whose bit is set.",
        _record(commands.ROW),
        "Bytes of a row:",
        _table(("`head_dim`", *map(str, HEAD_DIMS)),
               iter([("query block", *(str(commands.query_row_bytes(d)) for d in HEAD_DIMS)),
                     ("result block", *(str(commands.result_row_bytes(d)) for d in HEAD_DIMS)),
                     ("READ, of a token", *(str(commands.read_token_bytes(d)) for d in HEAD_DIMS)),
                     ("READ, of a token in 8 bits", *(str(commands.read_token_bytes(d, 1)) for d in HEAD_DIMS))])),
        "## Result block",
        f"For each of the command's rows: `head_dim` outputs in fp32, padded to a whole line, then this trailer. "
        f"`SCORE_FRACTION` is {formats.SCORE_FRACTION}, `VALUE_FRACTION` is {formats.VALUE_FRACTION}, `SCORE_MASKED` "
        f"is {formats.SCORE_MASKED:,}; see [numerics](numerics.md). Output, maximum and denominator are what "
        "flash-decoding needs to merge partial results; in sparse modes maximum and denominator are those of the "
        "selected tokens.",
        _record(commands.TRAILER),
    ]


def _completion_sections() -> list[Part]:
    """Completions and their statuses."""
    return [
        "## Completion",
        _record(commands.COMPLETION),
        "The counters are all of the same cycle: beats and stalls add up to channels times `cycle`. Each wraps at its "
        "width.",
        "### Status", _enumeration(commands.Status),
        "A command is checked before anything of it runs. The first that applies is reported: a bus error of the "
        "command's line, `INVALID_OPCODE`, `NOT_PERMITTED` where 0, `INVALID_FIELD`. Then of ATTEND: `INVALID_ROWS`, "
        "`INVALID_LENGTH`, `INVALID_SELECTION`, `INVALID_ADDRESS`, `INVALID_SCALE`, `NOT_PERMITTED` where 1, a "
        "bus error of its blocks, `INVALID_TABLE`, `NOT_OWNED`, `NO_SKETCH`, `NAN_QUERY`, `NAN_MEAN`; of READ those "
        "of them that it can have; of PROGRAM and ERASE: `INVALID_PLACE`, `NOT_PERMITTED` where 1, `NOT_OWNED`; of the "
        "others, their own statuses in the order of `where`. What the pages bring is known at the end: "
        "`CODEWORD_TIMEOUT`, `UNREADABLE_SKETCH`, `UNREADABLE_KEY`, `UNREADABLE_VALUE`, `NAN_KEY`, `NAN_VALUE`, and a "
        "bus error when the result was written. A PROGRAM ends with `BUS_ERROR` if device DRAM answered with one. "
        "`where` is 0 unless the table says otherwise.",
        "### Flags", _enumeration(commands.CompletionFlag),
        "### Causes of a media error", _enumeration(commands.MediaCause),
        "### Kinds of codeword", _enumeration(commands.Kind),
    ]


def _presets_section() -> list[Part]:
    """The presets."""
    return [
        "## Presets",
        "Registers and records are the same for all configurations. A driver must know the geometry that the device "
        "was built with; `CONFIG_HASH` tells whether it does, and IDENTIFY tells the geometry.",
        _presets(),
    ]


def _paragraph(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


def _steps(*texts: str) -> list[str]:
    return [line for number, text in enumerate(texts, 1)
            for line in textwrap.wrap(f"{number}. {text}", 120, subsequent_indent="   ", break_long_words=False,
                                      break_on_hyphens=False)]


# C.


def _comment(text: str) -> str:
    return f"  /* {text.replace('`', '').replace('*/', '* /')} */" if text else ""


def _define(name: str, value: str, doc: str = "") -> str:
    return f"#define KVATTIC_{name} {value}{_comment(doc)}"


def _enum(enumeration: type[IntEnum] | type[IntFlag], prefix: str) -> list[str]:
    written = "{:#x}" if issubclass(enumeration, IntFlag) or enumeration is commands.Opcode else "{}"
    return [f"enum kvattic_{prefix} {{{_comment(_summary(enumeration))}",
            *(f"    KVATTIC_{prefix.upper()}_{m.name} = {written.format(int(m))},{_comment(doc)}"
              for m, doc in _members(enumeration)),
            "};"]


def _struct(record: Record, doc: str) -> list[str]:
    """A struct without packing: all fields are naturally aligned or bytes; the assertions hold the compiler to it."""
    name = "kvattic_" + re.sub(r"(?<!^)(?=[A-Z])", "_", record.name).lower()
    lines = [f"struct {name} {{{_comment(doc)}"]
    for offset, size, field in _parts(record):
        if field is None:
            lines.append(f"    uint8_t reserved_at_{offset}[{size}];  /* zero */")
        elif size == 3:
            lines.append(f"    uint8_t {field.name}[3];{_comment(f'{field.doc} (KVATTIC_PUT24)')}")
        elif size not in (1, 2, 4, 8) or offset % size:
            raise ValueError(f"{record.name}.{field.name} must be 1, 2, 4 or 8 bytes at a multiple of its size, or 3, "
                             f"not {size} at {offset}")
        else:
            unsigned = "" if (record.name, field.name) in SIGNED else "u"
            lines.append(f"    {unsigned}int{size * 8}_t {field.name};{_comment(field.doc)}")
    lines += ["};", f"KVATTIC_ASSERT({name}_size, sizeof(struct {name}) == {record.size});"]
    return lines + [f"KVATTIC_ASSERT({name}_{field.name}, offsetof(struct {name}, {field.name}) == {offset});"
                    for offset, _, field in _parts(record) if field is not None]


def _counters() -> list[str]:
    """The block that the command COUNTERS writes."""
    names, size = [r.name.lower() for r in registers.COUNTERS], commands.LINE_BYTES * commands.lines(
        8 * len(registers.COUNTERS))
    rest = size - 8 * len(names)
    return ["struct kvattic_counters {  /* what COUNTERS writes: the registers of these names */",
            *(f"    uint64_t {name};" for name in names),
            *([f"    uint8_t reserved_at_{8 * len(names)}[{rest}];  /* zero */"] if rest else []),
            "};",
            f"KVATTIC_ASSERT(kvattic_counters_size, sizeof(struct kvattic_counters) == {size});"]


def _packed(record: Record, name: str, doc: str) -> list[str]:
    """A macro that packs a record of 8 bytes, whose fields are not aligned, into an integer."""
    fields = [field for field in record.fields if not field.name.startswith("reserved")]
    names = ", ".join(field.name for field in fields)
    value = " | ".join(f"(uint64_t)({field.name}) << {8 * field.offset}" for field in fields)
    lines = [f"/* {doc} */", f"#define KVATTIC_{name}({names}) \\", f"    ({value})"]
    return lines + [f"/* {f.name}: {f.size * 8} bits: {f.doc.replace('`', '')} */" for f in fields]


def header() -> str:
    """Text of include/kvattic.h."""
    line = commands.LINE_BYTES
    blocks: list[list[str]] = [
        ["/* Registers, commands and completions of a kvattic device.",
         " *",
         " * Generated by `make docs` from host/kvattic/spec/registers.py and commands.py: edit those.",
         " * C99.  The device is little-endian; so must be the host, or it swaps bytes.  docs/commands.md explains.",
         " */"],
        ["#ifndef KVATTIC_H", "#define KVATTIC_H"],
        ["#include <stddef.h>", "#include <stdint.h>"],
        ["/* C99 has no _Static_assert: an array of negative size is an error. */",
         "#define KVATTIC_ASSERT(name, condition) typedef char kvattic_assert_##name[(condition) ? 1 : -1]"],
        [_define("ID_MAGIC", f"{registers.ID_MAGIC:#010x}u", "what register ID reads"),
         _define("VERSION", f"{registers.VERSION:#010x}u", "of this header; the upper half must equal the device's"),
         _define("LINE_BYTES", f"{line}", "alignment of every address"),
         _define("QUEUES", f"{registers.QUEUES}", "pairs of queues, queue 0 included"),
         _define("MAX_ENTRIES", f"{registers.MAX_ENTRIES}", "of a ring; a power of two, at least 2"),
         _define("MAX_REGIONS", f"{registers.MAX_REGIONS}", "of device DRAM"),
         _define("DOORBELL_STRIDE", f"{registers.DOORBELL_STRIDE:#x}u",
                 f"between two doorbells: NVMe's CAP.DSTRD is {registers.DOORBELL_STRIDE_BITS}"),
         _define("ADMIN_OPCODES", f"{commands.ADMIN_OPCODES:#x}", "from this opcode on, for queue 0 alone"),
         _define("DOMAINS", f"{commands.DOMAINS}", "0 stands for nobody"),
         _define("IDENTIFY_BYTES", f"{commands.IDENTIFY_BYTES}", "what IDENTIFY writes: JSON text, padded with zeros"),
         _define("READ_BYTES", f"{commands.READ_BYTES}", "what READ writes, at most"),
         _define("TREE_BITS", f"{commands.TREE_BITS}", "draft tokens that a row can attend"),
         _define("SCORE_FRACTION", f"{formats.SCORE_FRACTION}", "fractional bits of kvattic_trailer.maximum"),
         _define("SCORE_MASKED", f"(-INT64_C({-formats.SCORE_MASKED}))", "maximum of a row that attends nothing"),
         _define("VALUE_FRACTION", f"{formats.VALUE_FRACTION}", "fractional bits of kvattic_trailer.denominator")],
        ["/* CONFIG_HASH of the presets. */",
         *(_define(f"CONFIG_HASH_{name.upper()}", f"{config.hash:#010x}u")
           for name, config in kvattic.PRESETS.items())],
        ["/* Register addresses; 64-bit registers take two accesses, low half first. */",
         *(_define(f"REG_{r.name}", f"{r.address:#04x}u", f"{r.width} bits, {r.access.value}: {r.doc}")
           for r in _plain_registers())],
        ["/* Doorbells: addresses, by queue. */",
         *(_define(f"REG_{name}(queue)",
                   f"({registers.DOORBELLS:#x}u + (2u * (queue) + {number}u) * KVATTIC_DOORBELL_STRIDE)",
                   f"{r.width} bits, {r.access.value}: {doc}")
           for r, number, name, doc in _doorbells())],
        ["/* A number of 24 bits in a field of three bytes. */",
         "#define KVATTIC_PUT24(field, value) \\",
         "    ((field)[0] = (uint8_t)(value), (field)[1] = (uint8_t)((value) >> 8), \\",
         "     (field)[2] = (uint8_t)((value) >> 16))",
         "#define KVATTIC_GET24(field) \\",
         "    ((uint32_t)(field)[0] | (uint32_t)(field)[1] << 8 | (uint32_t)(field)[2] << 16)"],
        _enum(registers.Control, "control"),
        _enum(registers.StatusBit, "status_bit"),
        _enum(commands.Opcode, "opcode"),
        _enum(commands.Mode, "mode"),
        _enum(commands.Status, "status"),
        _enum(commands.Grant, "grant"),
        _enum(commands.CompletionFlag, "flag"),
        _enum(commands.MediaCause, "media_cause"),
        _enum(commands.Kind, "kind"),
        _enum(commands.TableFlag, "table_flag"),
        _struct(commands.COMMAND, "a submission entry: ATTEND"),
        _packed(commands.TABLE_ENTRY, "TABLE_ENTRY", "An entry of ATTEND's table: where a stripe lies."),
        _packed(commands.SKETCH_ENTRY, "SKETCH_ENTRY", "Follows it in sparse modes: what the first pass reads."),
        _struct(commands.READ_COMMAND, "a submission entry: READ; its table is a dense ATTEND's"),
        _struct(commands.FLASH_COMMAND, "a submission entry: PROGRAM, ERASE, PROBE, MAP"),
        _struct(commands.DATA_COMMAND, "a submission entry: IDENTIFY, COUNTERS"),
        _struct(commands.QUEUE_COMMAND, "a submission entry: CREATE_QUEUE, DELETE_QUEUE"),
        _struct(commands.GRANT_COMMAND, "a submission entry: GRANT"),
        _struct(commands.ROW, "head of each row of a query block; q follows, padded with zeros to whole lines"),
        _struct(commands.TRAILER, "follows the padded fp32 outputs of each row of a result block"),
        _struct(commands.COMPLETION, "a completion entry"),
        ["/* Parts of kvattic_completion.state. */",
         _define("PHASE(state)", "((state) & 1u)", "1 in the first round of the completion ring, then 0, and so on"),
         _define("STATUS(state)", f"((enum kvattic_status)((state) >> 1 & {(1 << commands.STATUS_BITS) - 1:#x}u))"),
         _define("STATUS_TYPE(state)", f"((state) >> {1 + commands.STATUS_BITS} & "
                 f"{(1 << commands.STATUS_TYPE_BITS) - 1}u)", f"0 of OK, {commands.STATUS_TYPE} of all others")],
        _counters(),
        ["/* Bytes of one row of a query block, of a result block, and of a token that READ writes; elements have two "
         "bytes (K and V one, where they are stored in 8 bits), outputs four. */",
         _define("LINES(bytes)", f"(((bytes) + {line - 1}) / {line} * {line})"),
         _define("QUERY_ROW_BYTES(head_dim)", "(sizeof(struct kvattic_row) + KVATTIC_LINES((head_dim) * 2))"),
         _define("RESULT_ROW_BYTES(head_dim)", "(KVATTIC_LINES((head_dim) * 4) + sizeof(struct kvattic_trailer))"),
         _define("READ_TOKEN_BYTES(head_dim)", "(2 * KVATTIC_LINES((head_dim) * 2))"),
         _define("READ_TOKEN_BYTES_8(head_dim)", "(2 * KVATTIC_LINES(head_dim))"),
         *(f"KVATTIC_ASSERT(query_row_{d}, KVATTIC_QUERY_ROW_BYTES({d}) == {commands.query_row_bytes(d)});"
           for d in HEAD_DIMS),
         *(f"KVATTIC_ASSERT(result_row_{d}, KVATTIC_RESULT_ROW_BYTES({d}) == {commands.result_row_bytes(d)});"
           for d in HEAD_DIMS),
         *(f"KVATTIC_ASSERT(read_token_{d}, KVATTIC_READ_TOKEN_BYTES({d}) == {commands.read_token_bytes(d)});"
           for d in HEAD_DIMS),
         *(f"KVATTIC_ASSERT(read_token_8_{d}, KVATTIC_READ_TOKEN_BYTES_8({d}) == {commands.read_token_bytes(d, 1)});"
           for d in HEAD_DIMS)],
        ["#endif"],
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


FILES: dict[str, Callable[[], str]] = {"docs/commands.md": reference, "include/kvattic.h": header}
"""Every generated file: its path in the repository and what makes its text."""


def write(root: Path) -> list[Path]:
    """Write the files that are missing or stale below `root`; which those were."""
    written = []
    for name, make in FILES.items():
        path, text = root / name, make()
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="the repository; default: the current directory")
    options = parser.parse_args(arguments)
    if not (options.root / "pyproject.toml").exists():
        parser.error(f"--root must be the repository's root, not {options.root.resolve()}: it has no pyproject.toml")
    for path in write(options.root):
        print(f"{path}: written")


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.reference"))
