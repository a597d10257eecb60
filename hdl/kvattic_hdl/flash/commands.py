"""The state of the controller's machine that gives commands with a row address."""

from amaranth.hdl import Mux

from kvattic_hdl.flash.machine import DieMachine, Phase, Push
from kvattic_hdl.flash.sequencers import Addresses
from kvattic_hdl.lib.arithmetic import times


def push_states(machine: DieMachine) -> None:
    """Give the command that `push` names."""
    m, config, part, work = machine.m, machine.config, machine.part, machine.work
    job, events, push, again, writing = machine.job, machine.events, machine.push, machine.again, machine.writing
    write_count, joins, rest, command = machine.write_count, machine.joins, machine.rest, machine.command
    row_command, busy_limit = machine.row_command, machine.busy_limit
    with m.State("PUSH"):
        m.next = "STORE"
        with m.Switch(push):
            with m.Case(Push.READ):
                # What is read last is what the die's output is on, from that column on.
                command(0x00, busy=part.t_r)
                row_command(Addresses.BOTH, times(work.codeword, config.raw_codeword_bytes),
                            Mux(rest.any(), 0x32, Mux(work.cached, 0x31, 0x30)))
                with m.If(rest.any()):
                    busy_limit(part.t_dbsy)
                with m.Elif(work.cached):
                    busy_limit(part.t_r + part.t_rcbsy)
                m.d.sync += [
                    work.batch.eq(rest), work.phase.eq(Mux(rest.any(), Phase.READ, Phase.ARRAY)),
                    work.aimed.eq(~work.cached), work.near.eq(~work.cached), work.selected.eq(work.plane),
                ]
                m.d.comb += events.page_reads.eq(1)
            with m.Case(Push.COLUMN):
                command(0x05, wait=part.t_ccs)
                row_command(Addresses.COLUMN, times(work.codeword, config.raw_codeword_bytes), 0xE0)
                with m.If(~work.near | (work.selected != work.plane)):
                    m.d.comb += [job.first.eq(0x06), job.addresses.eq(Addresses.BOTH)]
                m.d.sync += [work.aimed.eq(1), work.near.eq(1), work.selected.eq(work.plane)]
            with m.Case(Push.PROGRAM):
                command(0x80, wait=part.t_adl)
                row_command(Addresses.BOTH)
                m.d.sync += [work.phase.eq(Phase.WRITE), writing.eq(1), write_count.eq(0)]
            with m.Case(Push.ERASE):
                command(0x60, busy=part.t_bers)
                row_command(Addresses.ROW, second=Mux(joins, 0xD1, 0xD0))
                with m.If(joins):
                    busy_limit(part.t_dbsy)
                m.d.sync += [
                    work.phase.eq(Mux(joins, Phase.MORE, Phase.WORKING)), work.several.eq(work.several | joins)]
                m.d.comb += events.block_erases.eq(1)
            with m.Case(Push.STATUS):
                command(0x70, wait=part.t_whr)
                with m.If(work.several):
                    m.d.comb += job.first.eq(0x78)
                    row_command(Addresses.ROW)
                m.d.sync += work.phase.eq(Phase.STATUS_READ)
            with m.Case(Push.PROBE):
                command(0x00, busy=part.t_r)
                row_command(Addresses.BOTH, part.mark_column, 0x30)
                m.d.sync += work.phase.eq(Phase.PROBE)
                m.d.comb += events.page_reads.eq(1)
            with m.Case(Push.RETRY):
                command(0x00, busy=part.t_r)
                row_command(Addresses.BOTH, times(again.codeword, config.raw_codeword_bytes), 0x30)
                m.d.sync += work.phase.eq(Phase.RETRY)
                m.d.comb += events.page_reads.eq(1)
