"""The states of the controller's machine that read a codeword again, and that deal with dies that stay busy."""

from amaranth.hdl import Mux

from kvattic.spec.commands import MediaCause
from kvattic_hdl.flash.machine import DieMachine, Phase, Push, Trouble
from kvattic_hdl.flash.sequencers import Addresses, Transfer

RETRY_FEATURE = 0x89
"""Address of the feature that chooses a read-retry level."""


def retry_states(machine: DieMachine) -> None:
    """Set the level, read the page, move the codeword, and set the default again."""
    m, part, work, mover, job = machine.m, machine.part, machine.work, machine.mover, machine.job
    burst, events, push, again = machine.burst, machine.events, machine.push, machine.again
    retrying, command, row_command = machine.retrying, machine.command, machine.row_command
    retries = machine.retries
    again_plane, _, again_row = machine.parts(again.page)
    with m.State("RETRY"):
        m.d.comb += events.retry.eq(1)
        m.d.sync += [
            retries.take.eq(1), again.eq(retries.retry), retrying.eq(1), work.loaded.eq(0),
            work.phase.eq(Phase.FEATURE), work.trouble.eq(Trouble.RETRY)]
        m.next = "STORE"
        with m.If(work.dead):
            m.d.sync += work.phase.eq(Phase.RECOVER)
    with m.State("FEATURE"):
        command(0xEF, wait=part.t_adl)
        row_command(Addresses.COLUMN, RETRY_FEATURE)
        m.d.comb += job.short.eq(1)
        m.d.sync += work.phase.eq(Phase.FEATURE_DATA)
        m.next = "STORE"
    with m.State("FEATURE_DATA"):
        m.d.comb += [
            mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.FEATURE), burst.header.level.eq(again.level)]
        m.d.sync += work.phase.eq(Phase.FEATURE_SET)
        m.next = "STORE"
    with m.State("FEATURE_SET"):
        m.d.sync += [work.plane.eq(again_plane), work.row.eq(again_row), push.eq(Push.RETRY)]
        m.next = "LOOKUP"
        with m.If(again.level == 0):
            m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
            m.next = "STORE"
    with m.State("RETRY_MOVE"):
        m.d.comb += [
            mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.CODEWORD), burst.header.tag.eq(again.tag),
            burst.header.page.eq(again.page), burst.header.codeword.eq(again.codeword),
            burst.header.level.eq(again.level), burst.header.cause.eq(
                Mux(work.phase == Phase.RECOVER, MediaCause.DIE_TIMEOUT, 0)),
        ]
        m.d.sync += [again.level.eq(0), work.phase.eq(Phase.FEATURE)]
        with m.If(work.dead):
            m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
        m.next = "STORE"


def timeout_states(machine: DieMachine) -> None:
    """Reset a die that stays busy; if that does not help either, it is dead."""
    m, part, work, again, retrying = machine.m, machine.part, machine.work, machine.again, machine.retrying
    command = machine.command
    with m.State("TIMEOUT"):
        m.next = "STORE"
        with m.If((work.phase == Phase.RESETTING) | (work.phase == Phase.RECOVER)):
            m.d.sync += [work.dead.eq(1), work.phase.eq(Phase.RECOVER)]
            with m.If(work.phase == Phase.RESETTING):
                m.d.sync += work.trouble.eq(Trouble.NONE)
        with m.Else():
            command(0xFF, busy=part.t_rst, factor=1)
            m.d.sync += work.phase.eq(Phase.RECOVER)
            with m.Switch(work.phase):
                with m.Case(Phase.READ, Phase.ARRAY):
                    m.d.sync += work.trouble.eq(Trouble.READ)
                with m.Case(Phase.RELEASE):
                    m.d.sync += work.trouble.eq(Trouble.NONE)
                with m.Case(Phase.FEATURE_SET, Phase.RETRY):
                    m.d.sync += work.trouble.eq(Trouble.RETRY)
                with m.Default():
                    m.d.sync += work.trouble.eq(Trouble.OPERATION)
    with m.State("RECOVERED"):
        m.next = "STORE"
        with m.Switch(work.trouble):
            with m.Case(Trouble.NONE):
                m.d.sync += work.phase.eq(Phase.IDLE)
            with m.Case(Trouble.READ):
                m.d.sync += [
                    work.failed.eq(1), work.loaded.eq(work.loaded | work.ahead), work.ahead.eq(0),
                    work.batch.eq(0), work.phase.eq(Phase.LOADED)]
                m.next = "AIM"
            with m.Case(Trouble.OPERATION):
                m.d.sync += work.phase.eq(Phase.FAILED)
            with m.Case(Trouble.RETRY):
                m.next = "RETRY_MOVE"
                with m.If(again.level == 0):
                    m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
                    m.next = "STORE"
