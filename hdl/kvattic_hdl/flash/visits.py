"""The state of the controller's machine that looks at a die: in turn for data to move, and for what it wants."""

from kvattic.spec.commands import Opcode
from kvattic_hdl.flash.machine import DieMachine, Phase, Push
from kvattic_hdl.lib.shapes import operation_code


def visit_states(machine: DieMachine) -> None:
    """Look at a die, and go on with it."""
    m, work, data_turn, commander = machine.m, machine.work, machine.data_turn, machine.commander
    operation = machine.operation
    with m.State("VISIT"):
        m.d.sync += [*machine.look, data_turn.eq(~data_turn)]
        m.d.sync += [signal.eq(0) for signal in (
            machine.scan, machine.best, machine.mates, machine.second_pass, machine.among_others, machine.look_ahead,
            machine.candidate, machine.seen)]
        # While no command can be given, the same die stays the next one: each has its turn.
        with m.If(~data_turn & commander.jobs.ready):
            m.d.sync += machine.command_die.eq(machine.command_die + 1)
        m.next = "DECIDE"
    with m.State("DECIDE"):
        m.next = "VISIT"
        with m.If(~data_turn):      # the visit was for data
            _offer_data(machine)
        with m.Elif(machine.operation_ready & (operation.opcode == operation_code(Opcode.MAP))):
            m.next = "MAP"
        with m.Elif(machine.overdue & commander.jobs.ready):
            m.next = "TIMEOUT"
        with m.Elif(machine.free & ~machine.outstanding & commander.jobs.ready):
            with m.Switch(work.phase):
                _visit_reset(machine)
                _visit_idle(machine)
                _visit_reading(machine)
                _visit_loaded(machine)
                _visit_operation(machine)
                _visit_retry(machine)


def _offer_data(machine: DieMachine) -> None:
    m, work = machine.m, machine.work
    with m.If(machine.mover.jobs.ready):
        with m.If(machine.free & (work.phase == Phase.LOADED) & work.aimed & ~machine.parked
                  & (~machine.retries.full | work.failed)):
            m.d.sync += machine.moves.eq(1)
            m.next = "MOVE"
        with m.Elif(machine.free & (work.phase == Phase.WRITE) & machine.words.i.valid):
            m.next = "WRITE"
        with m.Else():
            m.d.sync += machine.data_place.eq(machine.data_place + 1)


def _visit_reset(machine: DieMachine) -> None:
    m = machine.m
    with m.Case(Phase.RESET):
        m.next = "RESET"
    with m.Case(Phase.RESETTING, Phase.RELEASE):
        m.d.sync += machine.work.phase.eq(Phase.IDLE)
        m.next = "STORE"


def _visit_idle(machine: DieMachine) -> None:
    m, has_work = machine.m, machine.has_work
    with m.Case(Phase.IDLE):
        with m.If(machine.retry_here):
            m.next = "RETRY"
        with m.Elif(machine.claimed):
            m.next = "OPERATION"
        with m.Elif(has_work & machine.work.dead):
            m.next = "GIVE_UP"
        with m.Elif(has_work & machine.gathered):
            m.d.sync += machine.planning.eq(1)
            m.next = "PLAN"


def _visit_reading(machine: DieMachine) -> None:
    m, config, work, claimed = machine.m, machine.config, machine.work, machine.claimed
    with m.Case(Phase.READ):
        m.next = "SEEK"
    with m.Case(Phase.ARRAY):
        m.d.sync += work.phase.eq(Phase.LOADED)
        m.d.sync += machine.order.loaded.eq(1)
        m.next = "AIM"
        if config.cache_reads:
            with m.If(~work.cached & ~claimed):
                m.d.sync += [machine.look_ahead.eq(1), machine.planning.eq(1)]
                m.next = "SKIP"
    with m.Case(Phase.NEXT):
        if config.cache_reads:
            m.d.sync += [work.loaded.eq(work.ahead), work.ahead.eq(0), machine.look_ahead.eq(1)]
            m.d.sync += machine.planning.eq(~claimed)
            m.next = "SKIP"
            with m.If(claimed):
                m.next = "LAST"


def _visit_loaded(machine: DieMachine) -> None:
    """Give the pages up, look for what may be moved instead of them, or aim at the next codeword."""
    m, work, parked = machine.m, machine.work, machine.parked
    with m.Case(Phase.LOADED):
        with m.If((parked | machine.retries.full) & (machine.retry_here | (parked & machine.operation_here))):
            m.next = "DROP"
        with m.Elif(parked):
            m.d.sync += work.tried.eq(~work.tried)
            with m.If(machine.others_wait & ~work.tried):
                m.d.sync += [machine.among_others.eq(1), machine.planning.eq(~work.dead)]
                m.next = "PLAN"
                with m.If(work.dead):
                    m.next = "DROP"
            with m.Elif((work.loaded & ~machine.bit(work.plane)).any()):
                m.d.sync += [work.plane.eq(machine.after(work.plane)), work.aimed.eq(0)]
                m.next = "AIM"
            with m.Else():
                m.next = "STORE"
        with m.Elif(~work.aimed):
            m.d.sync += machine.push.eq(Push.COLUMN)
            m.next = "LOOKUP"


def _visit_operation(machine: DieMachine) -> None:
    m, mover = machine.m, machine.mover
    with m.Case(Phase.WRITTEN):
        m.next = "WRITTEN"
    with m.Case(Phase.MORE):
        with m.If(machine.operation_here):
            m.next = "OPERATION"
    with m.Case(Phase.WORKING):
        m.d.sync += machine.work.phase.eq(Phase.STATUS)
        m.next = "STORE"
    with m.Case(Phase.STATUS):
        m.next = "SEEK"
    with m.Case(Phase.STATUS_READ, Phase.PROBE):
        with m.If(~machine.byte_used & mover.jobs.ready):
            m.next = "BYTE"
    with m.Case(Phase.RESULT):
        with m.If(machine.outcome_free):
            m.next = "RESULT"
    with m.Case(Phase.FAILED):
        with m.If(machine.outcome_free):
            m.next = "SEEK"


def _visit_retry(machine: DieMachine) -> None:
    m, mover = machine.m, machine.mover
    with m.Case(Phase.FEATURE):
        m.next = "FEATURE"
    with m.Case(Phase.FEATURE_DATA):
        with m.If(mover.jobs.ready):
            m.next = "FEATURE_DATA"
    with m.Case(Phase.FEATURE_SET):
        m.next = "FEATURE_SET"
    with m.Case(Phase.RETRY):
        with m.If(mover.jobs.ready):
            m.next = "RETRY_MOVE"
    with m.Case(Phase.RECOVER):
        with m.If(mover.jobs.ready):
            m.next = "RECOVERED"
