"""The states of the controller's machine that play operations."""

from amaranth.hdl import Mux, Signal

from kvattic.spec.commands import Opcode, Status
from kvattic.spec.nand import MARK_ZEROS
from kvattic_hdl.flash.machine import DieMachine, Phase, Push
from kvattic_hdl.flash.sequencers import Transfer
from kvattic_hdl.lib.shapes import operation_code

STATUS_FAIL = 0
"""Bit of a status byte: the operation failed."""


def begin_states(machine: DieMachine) -> None:
    """Begin an operation, or do all of it if it is a MAP."""
    m, work, words, operations, push = machine.m, machine.work, machine.words, machine.operations, machine.push
    operation, record_new, answer, bit = machine.operation, machine.record_new, machine.answer, machine.bit
    unit_of, block_map = machine.unit_of, machine.block_map
    operation_plane, operation_die, operation_row = machine.parts(operation.page)
    with m.State("MAP"):
        m.d.comb += [
            block_map.write.eq(1),
            block_map.write_unit.eq(unit_of(operation_plane, operation_die)),
            block_map.write_row.eq(operation_row),
            block_map.write_block.eq(operation.block),
            operations.take.eq(1),
        ]
        answer(Status.OK, operation)
        m.next = "VISIT"
    with m.State("OPERATION"):
        first = work.phase == Phase.IDLE
        m.d.comb += [
            record_new.addr.eq(unit_of(operation_plane, operation_die)),
            record_new.data.identity.eq(operation.identity),
            record_new.data.page.eq(operation.page),
            record_new.en.eq(1),
            operations.take.eq(1),
        ]
        m.d.sync += [
            work.plane.eq(operation_plane), work.row.eq(operation_row), work.opcode.eq(operation.opcode),
            work.loaded.eq(Mux(first, 0, work.loaded) | bit(operation_plane)), work.failed.eq(0),
            work.several.eq(~first), work.turn.eq(1),
        ]
        m.next = "TAKEN"
        with m.Switch(operation.opcode):
            with m.Case(operation_code(Opcode.PROGRAM)):
                m.d.sync += push.eq(Push.PROGRAM)
            with m.Case(operation_code(Opcode.ERASE)):
                m.d.sync += push.eq(Push.ERASE)
            with m.Default():
                m.d.sync += push.eq(Push.PROBE)
        with m.If(work.dead):
            answer(Status.DIE_TIMEOUT, operation)
            m.next = "VISIT"
            with m.If(operation.opcode == operation_code(Opcode.PROGRAM)):
                m.d.comb += words.discard.eq(1)
    with m.State("TAKEN"):      # until the next operation is there, which may join
        m.next = "LOOKUP"


def end_states(machine: DieMachine) -> None:
    """Move the data of a PROGRAM, fetch the byte that tells the outcome, and answer."""
    m, config, part, work, mover = machine.m, machine.config, machine.part, machine.work, machine.mover
    job, burst, events, writing = machine.job, machine.burst, machine.events, machine.writing
    write_count, byte_used, joins, record = machine.write_count, machine.byte_used, machine.joins, machine.record
    command, busy_limit, answer, bit = machine.command, machine.busy_limit, machine.answer, machine.bit
    with m.State("WRITE"):
        m.d.comb += [mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.WRITE)]
        m.d.sync += write_count.eq(write_count + 1)
        with m.If(write_count == config.codewords_per_page - 1):
            m.d.sync += work.phase.eq(Phase.WRITTEN)
        m.next = "STORE"
    with m.State("WRITTEN"):
        command(0x10, busy=part.t_prog)
        with m.If(joins):
            m.d.comb += job.first.eq(0x11)
            busy_limit(part.t_dbsy)
        m.d.comb += events.page_programs.eq(1)
        m.d.sync += [
            writing.eq(0), work.phase.eq(Mux(joins, Phase.MORE, Phase.WORKING)),
            work.several.eq(work.several | joins)]
        m.next = "STORE"
    with m.State("BYTE"):
        m.d.comb += [mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.BYTE)]
        m.d.sync += [byte_used.eq(1), work.phase.eq(Phase.RESULT)]
        m.next = "STORE"
    with m.State("RESULT"):
        left = work.loaded & ~bit(work.plane)
        status = Signal(8)
        with m.If(work.phase == Phase.FAILED):
            m.d.comb += status.eq(Status.DIE_TIMEOUT)
        with m.Elif(work.opcode == operation_code(Opcode.PROBE)):
            # Neither a mark nor its absence is protected by a code: most of the bits decide.
            zeros = sum(~mover.byte[i] for i in range(8))
            m.d.comb += status.eq(Mux(zeros >= MARK_ZEROS, Status.BAD_BLOCK, Status.OK))
        with m.Elif(mover.byte[STATUS_FAIL]):
            m.d.comb += status.eq(Mux(work.opcode == operation_code(Opcode.ERASE), Status.ERASE_FAILED,
                                      Status.PROGRAM_FAILED))
        answer(status, record.data)
        with m.If(work.phase == Phase.RESULT):
            m.d.sync += [byte_used.eq(0), work.phase.eq(Phase.STATUS)]
        m.d.sync += work.loaded.eq(left)
        with m.If(~left.any()):
            m.d.sync += work.phase.eq(Phase.IDLE)
        m.next = "STORE"
