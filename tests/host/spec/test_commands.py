"""What an NVMe engineer looks for: where fields stand in commands and completions, codes, doorbells."""

import pytest

from kvattic.spec import commands, registers
from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    COMMANDS,
    COMPLETION,
    DATA_COMMAND,
    FLASH_COMMAND,
    GRANT_COMMAND,
    QUEUE_COMMAND,
    READ_COMMAND,
    Command,
    Completion,
    Opcode,
    Status,
    pack_state,
    unpack_state,
)

RECORDS = (COMMAND, READ_COMMAND, FLASH_COMMAND, DATA_COMMAND, QUEUE_COMMAND, GRANT_COMMAND)
CDW2, MPTR, PRP1, PRP2, CDW10 = range(8, 16), range(16, 24), range(24, 32), range(32, 40), range(40, 64)
ADDRESSES = {"query": PRP1, "result": PRP2, "table": MPTR, "submission": PRP1, "completion": PRP2}
"""Of blocks and rings; `base` and `limit` of a window are numbers."""
DOORBELLS = ("SUBMISSION_TAIL", "COMPLETION_HEAD")
NONE, TO_DEVICE, FROM_DEVICE, BOTH = range(4)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_command_has_nvmes_fields(record):
    assert [(f.name, f.offset, f.size) for f in record.fields[:3]] == [
        ("opcode", 0, 1), ("flags", 1, 1), ("identifier", 2, 2)]
    places = [f.offset for f in record.fields for _ in range(f.size)]
    assert len(places) == record.size == 64                # each byte belongs to one field
    assert sorted(b for f in record.fields for b in range(f.offset, f.offset + f.size)) == list(range(64))
    for field in record.fields[3:]:
        bytes_ = range(field.offset, field.offset + field.size)
        if field.name == "domain":
            assert bytes_ == range(4, 8)                    # NSID
        elif field.name == "result" and record is DATA_COMMAND:
            assert bytes_ == PRP1
        elif field.name in ADDRESSES:
            assert bytes_ == ADDRESSES[field.name]
        elif not field.name.startswith("reserved"):
            assert set(bytes_) <= {*CDW2, *CDW10}
    assert "domain" in {f.name for f in record.fields} or record is QUEUE_COMMAND


def test_passthrough_can_carry_flash_commands_and_grants():
    """Linux lets its user set NSID and command dwords 2, 3 and 10 to 15, and maps one buffer to PRP1."""
    for record, mapped in ((FLASH_COMMAND, set()), (GRANT_COMMAND, set()), (DATA_COMMAND, set(PRP1))):
        used = {b for f in record.fields[3:] if not f.name.startswith("reserved")
                for b in range(f.offset, f.offset + f.size)}
        assert used <= {*range(4, 8), *CDW2, *CDW10} | mapped


def test_opcodes():
    """Vendor specific for I/O and admin commands; the low bits say which way data goes."""
    assert len(set(Opcode)) == 11
    assert all(0xC0 <= opcode <= 0xFF for opcode in Opcode)
    assert {opcode: opcode & 3 for opcode in Opcode} == {
        Opcode.ATTEND: BOTH, Opcode.READ: BOTH, Opcode.PROGRAM: NONE, Opcode.ERASE: NONE, Opcode.COUNTERS: FROM_DEVICE,
        Opcode.PROBE: NONE, Opcode.MAP: NONE, Opcode.IDENTIFY: FROM_DEVICE, Opcode.CREATE_QUEUE: NONE,
        Opcode.DELETE_QUEUE: NONE, Opcode.GRANT: NONE}
    assert {opcode for opcode in Opcode if opcode < ADMIN_OPCODES} == {
        Opcode.ATTEND, Opcode.READ, Opcode.PROGRAM, Opcode.ERASE, Opcode.COUNTERS}


@pytest.mark.parametrize("opcode", Opcode)
def test_commands_are_decoded(opcode):
    """Every field comes back under its own name; reserved bytes have none."""
    record, decoded = COMMANDS[opcode]
    named = [f for f in record.fields if not f.name.startswith("reserved")]
    values = {f.name: (1 << 8 * f.size) - 1 - number for number, f in enumerate(named)} | {"flags": 0, "opcode": opcode}
    line = record.pack(**values)
    command = decoded.unpack(line)
    assert {name: getattr(command, name) for name in values} == values
    assert Command.unpack(line) == Command(opcode=opcode, identifier=values["identifier"])
    assert record.reserved_is_zero(line)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_each_reserved_byte_is_looked_at(record):
    reserved = {b for f in record.fields if f.name == "flags" or f.name.startswith("reserved")
                for b in range(f.offset, f.offset + f.size)}
    for place in range(record.size):
        line = bytes(place) + b"\x80" + bytes(record.size - place - 1)
        assert record.reserved_is_zero(line) == (place not in reserved)


def test_put_changes_the_named_fields_only():
    line = bytearray(b"\xff" * 64)
    COMMAND.put(line, end_token=0x010203, rows=5)
    assert line == b"\xff" * 12 + bytes((3, 2, 1, 5)) + b"\xff" * 48
    with pytest.raises(OverflowError):
        COMMAND.put(line, rows=256)
    with pytest.raises(OverflowError):
        COMMAND.put(line, rows=-1)
    with pytest.raises(KeyError, match="Command has no field 'row'"):
        COMMAND.put(line, row=1)
    with pytest.raises(KeyError, match="Command has no field 'row'"):
        COMMAND.pack(row=1)


def test_a_completion_has_nvmes_status_field():
    """DW2: SQHD, SQID; DW3: CID, phase in bit 16, status code in 24:17, its type in 27:25, and no bit above."""
    assert [(COMPLETION[n].offset, COMPLETION[n].size) for n in ("head", "queue", "identifier", "state")] == [
        (8, 2), (10, 2), (12, 2), (14, 2)]
    for phase in (0, 1):
        assert pack_state(Status.OK, phase) == phase
        for status in set(Status) - {Status.OK}:
            word = int.from_bytes(COMPLETION.pack(identifier=0xABCD, state=pack_state(status, phase))[12:16], "little")
            assert word == 0xABCD | phase << 16 | status << 17 | 7 << 25
    assert all(0 < status < 0x100 for status in set(Status) - {Status.OK})
    assert [*sorted(Status)] == [*range(len(Status))]


@pytest.mark.parametrize("state", [
    2, 7 << 9, 6 << 9 | 1 << 1, 7 << 9 | 255 << 1, 1 << 12 | 7 << 9 | 1 << 1, 1 << 15, 1 << 15 | 1, 255 << 1 | 1])
def test_states_that_are_none(state):
    with pytest.raises(ValueError, match=f"state must be a `Status` of its status code type .*, not {state:#06x}"):
        unpack_state(state)
    with pytest.raises(ValueError, match="state must be"):
        Completion.unpack(COMPLETION.pack(state=state))


def test_completions_are_unpacked():
    for status in Status:
        found = Completion.unpack(COMPLETION.pack(state=pack_state(status, 1), where=5, identifier=7, cycle=1 << 40))
        assert (found.status, found.where, found.identifier, found.cycle) == (status, 5, 7, 1 << 40)
    values = {f.name: number + 1 << 8 * (f.size - 1) for number, f in enumerate(COMPLETION.fields)}
    values |= {"state": pack_state(Status.NAN_KEY, 0), "flags": 3}
    found = Completion.unpack(COMPLETION.pack(**values))
    assert (found.status, found.flags) == (Status.NAN_KEY, 3)
    assert all(getattr(found, name) == value for name, value in values.items() if name not in ("state", "flags"))


def test_doorbells_are_at_nvmes_stride():
    """SQyTDBL at 0x1000 + 2y * (4 << DSTRD), CQyHDBL behind it; DSTRD has four bits.  A pair has a page of its own."""
    dstrd = registers.DOORBELL_STRIDE_BITS
    assert 0 <= dstrd < 16
    pages = set()
    for queue in range(registers.QUEUES):
        tail, head = (registers.REGISTER_MAP[f"{name}_{queue}"].address for name in DOORBELLS)
        assert tail == 0x1000 + (2 * queue) * (4 << dstrd)
        assert head == 0x1000 + (2 * queue + 1) * (4 << dstrd)
        assert tail // 4096 == head // 4096
        pages.add(tail // 4096)
    assert len(pages) == registers.QUEUES
    assert all(r.address < 0x1000 for r in registers.REGISTERS if not r.name.startswith(DOORBELLS))
    assert max(r.address for r in registers.REGISTERS) < 1 << registers.ADDRESS_BITS


def test_flags_of_table_entries_fit_their_byte():
    assert [int(flag) for flag in commands.TableFlag] == [1, 2]
    assert commands.TABLE_ENTRY["flags"].size == 1
