"""The states of the controller's machine that move what is loaded, or give it up."""

from amaranth.hdl import Mux

from kvattic.spec.commands import MediaCause
from kvattic_hdl.flash.machine import DieMachine, Phase
from kvattic_hdl.flash.sequencers import Transfer


def move_states(machine: DieMachine) -> None:
    """Move the runs of the pages that are loaded, codeword by codeword."""
    m, work, die, queues, run = machine.m, machine.work, machine.die, machine.queues, machine.run
    mover, burst, waiting_after = machine.mover, machine.burst, machine.waiting_after
    data_place, bit, after, page_of = machine.data_place, machine.bit, machine.after, machine.page_of
    # The next run to be moved: of the plane `work.plane`, or of the next one with a page.
    with m.State("AIM"):
        with m.If(work.loaded.bit_select(work.plane, 1)):
            m.next = "AIMED"
        with m.Else():
            m.d.sync += work.plane.eq(after(work.plane))
    with m.State("AIMED"):
        m.d.sync += [
            work.row.eq(run.row), work.tag.eq(run.tag), work.last.eq(run.last), machine.next_codeword.eq(run.codeword),
        ]
        m.next = "AIMED_AT"
    with m.State("AIMED_AT"):
        m.d.sync += [
            work.codeword.eq(machine.next_codeword),
            work.aimed.eq(work.failed | (work.aimed & (work.codeword == machine.next_codeword))),
        ]
        m.next = "STORE"

    with m.State("MOVE"):
        m.d.comb += [
            mover.jobs.valid.eq(1),
            burst.transfer.eq(Transfer.CODEWORD),
            burst.header.tag.eq(work.tag),
            burst.header.page.eq(page_of(work.plane, die, work.row)),
            burst.header.codeword.eq(work.codeword),
            burst.header.cause.eq(Mux(work.failed, MediaCause.DIE_TIMEOUT, 0)),
        ]
        m.d.sync += [
            work.codeword.eq(work.codeword + 1), work.tag.place.eq(work.tag.place + 1), data_place.eq(0)]
        m.next = "STORE"
        with m.If(queues.pop):
            m.next = "POPPED"
    with m.State("POPPED"):
        m.next = "FOLLOWS"
    with m.State("FOLLOWS"):
        m.d.sync += [
            machine.goes_on.eq(waiting_after & (run.row == work.row)), machine.next_codeword.eq(run.codeword)]
        m.next = "FOLLOWED"
    with m.State("FOLLOWED"):
        m.next = "STORE"
        with m.If(machine.goes_on):
            m.d.sync += [
                work.tag.eq(run.tag), work.codeword.eq(machine.next_codeword), work.last.eq(run.last),
                work.aimed.eq(work.failed | (machine.next_codeword == work.last + 1)),
            ]
        with m.Else():
            left = work.loaded & ~bit(work.plane)
            m.d.sync += [work.loaded.eq(left), work.aimed.eq(0)]
            with m.If(left.any()):
                m.next = "AIM"
            with m.Else():
                m.d.sync += [work.phase.eq(Mux(work.ahead.any(), Phase.NEXT, Phase.IDLE)), work.failed.eq(0)]


def give_up_states(machine: DieMachine) -> None:
    """Give up the pages that are loaded, or all that a dead die was asked for."""
    m, config, part, work, waiting = machine.m, machine.config, machine.part, machine.work, machine.waiting
    command = machine.command
    # Its registers are wanted for something else; what was in them is read again later.
    with m.State("DROP"):
        m.d.sync += [work.loaded.eq(0), work.failed.eq(0), work.phase.eq(Phase.IDLE)]
        m.next = "STORE"
        if config.cache_reads:
            with m.If(work.ahead.any()):
                command(0x3F, busy=part.t_r + part.t_rcbsy)
                m.d.sync += [work.ahead.eq(0), work.phase.eq(Phase.RELEASE)]
    with m.State("GIVE_UP"):
        m.d.sync += [work.loaded.eq(waiting), work.failed.eq(1), work.phase.eq(Phase.LOADED)]
        m.next = "AIM"
