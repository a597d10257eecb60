"""The planner's states of the controller's machine: what a die reads next."""

from amaranth.hdl import Mux

from kvattic_hdl.flash.machine import DieMachine, Phase, Push


def skip_states(machine: DieMachine) -> None:
    """Cache reads: for each plane with a page in its register, the first run of its next page."""
    m, shapes, part, work, queues = machine.m, machine.shapes, machine.part, machine.work, machine.queues
    run, scan, skip = machine.run, machine.scan, machine.skip
    skip_new, command = machine.skip_new, machine.command
    with m.State("SKIP"):
        m.d.sync += skip.eq(1)
        m.next = "SKIPPED"
        with m.If(scan == part.planes):
            m.d.sync += scan.eq(0)
            m.next = "PLAN"
        with m.Elif(~work.loaded.bit_select(scan[:shapes.plane.width], 1)):
            m.d.sync += scan.eq(scan + 1)
            m.next = "SKIP"
    with m.State("SKIPPED"):
        m.d.comb += queues.behind.eq(skip)
        m.next = "SKIP_SEEN"
    with m.State("SKIP_SEEN"):
        m.d.comb += skip_new.en.eq(1)
        with m.If(queues.there & run.again & (skip != machine.depth - 1)):
            m.d.sync += skip.eq(skip + 1)
            m.next = "SKIPPED"
        with m.Else():
            with m.If(~queues.there | run.again):
                m.d.comb += skip_new.data.eq(0)
            m.d.sync += scan.eq(scan + 1)
            m.next = "SKIP"
    with m.State("LAST"):
        command(0x3F, busy=part.t_r + part.t_rcbsy)
        m.d.sync += [work.cached.eq(1), work.aimed.eq(0), work.near.eq(0), work.phase.eq(Phase.ARRAY)]
        m.next = "STORE"


def plan_states(machine: DieMachine) -> None:
    """Choose a page: first that of the oldest run that may be moved, else of the oldest; then all planes with it."""
    m, config, shapes, part, work = machine.m, machine.config, machine.shapes, machine.part, machine.work
    queues, run, planning, scan = machine.queues, machine.run, machine.planning, machine.scan
    scanned, best, best_gated, best_stamp = machine.scanned, machine.best, machine.best_gated, machine.best_stamp
    best_page, second_pass, among_others = machine.best_page, machine.second_pass, machine.among_others
    look_ahead, candidate, seen, seen_gated = machine.look_ahead, machine.candidate, machine.seen, machine.seen_gated
    mates, skip_here, unit, bit = machine.mates, machine.skip_here, machine.unit, machine.bit
    with m.State("PLAN"):
        m.d.sync += [
            scan.eq(scan + 1), scanned.eq(scan),
            candidate.eq((scan < part.planes)
                         & queues.waiting.bit_select(unit, 1)
                         & ~(among_others & work.loaded.bit_select(scan[:shapes.plane.width], 1))),
            seen.eq(candidate), machine.seen_plane.eq(scanned), machine.seen_tag.eq(run.tag),
            machine.seen_stamp.eq(run.stamp), machine.seen_page.eq(run.row),
        ]
        if config.cache_reads:
            with m.If(look_ahead & work.loaded.bit_select(scan[:shapes.plane.width], 1)):
                m.d.comb += queues.behind.eq(skip_here.data)
                with m.If(skip_here.data == 0):
                    m.d.sync += candidate.eq(0)
        older = (machine.seen_stamp - best_stamp)[shapes.stamp.width - 1]
        with m.If(~second_pass):
            with m.If(seen & (~best | (best_gated & ~seen_gated) | ((best_gated == seen_gated) & older))):
                m.d.sync += [
                    best.eq(1), best_gated.eq(seen_gated), best_stamp.eq(machine.seen_stamp),
                    best_page.eq(machine.seen_page),
                ]
            with m.If(scan == part.planes + 1):
                m.d.sync += [scan.eq(0), second_pass.eq(1), candidate.eq(0), seen.eq(0)]
        with m.Else():
            with m.If(seen & (machine.seen_page == best_page)):
                m.d.sync += mates.eq(mates | bit(machine.seen_plane))
            with m.If(scan == part.planes + 1):
                m.d.sync += planning.eq(0)
                m.next = "PLANNED"
            with m.If(~best | (among_others & best_gated)):
                m.d.sync += planning.eq(0)
                m.next = "STORE"
                if config.cache_reads:
                    with m.If(look_ahead):
                        m.next = "AIM"
                        with m.If(work.phase == Phase.NEXT):
                            m.next = "LAST"
    with m.State("PLANNED"):
        m.d.sync += [
            work.batch.eq(mates), work.aimed.eq(0), work.near.eq(0), work.failed.eq(0), work.turn.eq(0),
            work.phase.eq(Phase.READ), work.cached.eq(look_ahead),
        ]
        with m.If(look_ahead):
            m.d.sync += work.ahead.eq(mates)
        with m.Else():
            m.d.sync += work.loaded.eq(mates)
        m.next = "SEEK"
        with m.If(among_others & work.ahead.any()):
            m.d.sync += work.phase.eq(Phase.LOADED)
            m.next = "DROP"


def seek_states(machine: DieMachine) -> None:
    """Find the next plane that wants a command, its run, and its block."""
    m, config, work, queues, run = machine.m, machine.config, machine.work, machine.queues, machine.run
    push, skip_here, sought, after = machine.push, machine.skip_here, machine.sought, machine.after
    with m.State("SEEK"):
        if config.cache_reads:
            with m.If((work.phase == Phase.READ) & work.cached & work.loaded.bit_select(work.plane, 1)):
                m.d.comb += queues.behind.eq(skip_here.data)
        with m.If(sought.bit_select(work.plane, 1)):
            m.d.sync += push.eq(Mux(work.phase == Phase.READ, Push.READ, Push.STATUS))
            m.next = "FETCH"
            with m.If(work.phase == Phase.FAILED):
                m.next = "RESULT"
        with m.Else():
            m.d.sync += work.plane.eq(after(work.plane))
    with m.State("FETCH"):
        with m.If(work.phase == Phase.READ):
            m.d.sync += [work.row.eq(run.row), work.codeword.eq(run.codeword)]
        m.next = "LOOKUP"
    with m.State("LOOKUP"):
        m.next = "PUSH"
