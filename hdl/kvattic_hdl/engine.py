"""The whole engine: registers, host memory and device DRAM on one side, each flash channel's streams on the other."""

from dataclasses import dataclass, field

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS, QUEUES
from kvattic_hdl.frontend.loader import Loader
from kvattic_hdl.lane.copier import Copier
from kvattic_hdl.lane.lane import Lane
from kvattic_hdl.lib.axi import AXI_READ, AXI_WRITE, axi_lite
from kvattic_hdl.lib.shapes import EPOCH_BITS, Shapes
from kvattic_hdl.nvme.access import Owners
from kvattic_hdl.nvme.admin import Admin
from kvattic_hdl.nvme.control import Control
from kvattic_hdl.nvme.queues import Queues
from kvattic_hdl.nvme.stamps import JobStamps
from kvattic_hdl.reduce.finisher import Finisher
from kvattic_hdl.reduce.maximum import Maximum
from kvattic_hdl.reduce.watchdog import Watchdog
from kvattic_hdl.sparse.topk import TopK
from kvattic_hdl.storage.crossing import LaneCrossing
from kvattic_hdl.storage.dram_reader import DramReader, dram_signature
from kvattic_hdl.storage.operations import Operations
from kvattic_hdl.verilog.shared import shared

FINISHER_FIELDS = ("queue", "identifier", "result", "status", "where")
"""Members of a job that only the finisher has a use for."""


@dataclass(slots=True, kw_only=True)
class _Parts:
    """The engine's blocks; `selection` is None where there are no sparse modes."""

    control: Control
    loader: Loader
    copier: Copier
    maximum: Maximum
    finisher: Finisher
    watchdog: Watchdog
    queues: Queues
    admin: Admin
    owners: Owners
    operations: Operations
    dram_reader: DramReader
    stamps: JobStamps
    selection: TopK | None
    lanes: list[Lane] = field(default_factory=list)


@dataclass(slots=True)
class _Central:
    """Signals that all lanes share."""

    load: Signal
    load_valid: Signal
    start: Signal
    start_valid: Signal
    report_slot: Signal


class Engine(wiring.Component):
    """Attention over KV pages that arrive as tagged codewords, each lane with the codewords of one or several channels.

    Commands are fetched from queues in host memory; up to `jobs_in_flight` jobs overlap (load, first
    pass and selection of sparse modes, K pass, maximum, V pass, drain and write-back), so that a channel with a
    codeword to move is moving it.  Results do not depend on the order in which codewords come.  Flash commands go to
    their channels and complete out of order.  A command reaches only what belongs to its domain, and host memory only
    in its queue's window.  A soft reset (CONTROL.RESET) ends the bus transfers and the flash operations first, and
    removes the queues; who owns what stays.

    Parameters
    ----------
    config : Config

    Members
    -------
    host : In(axi_lite)
        Registers (kvattic.spec.registers).
    read, write : Out(AXI4 channels)
        Host memory: commands and queries are read, results and completions written.
    dram : Out(dram_signature)
        Device DRAM: the tail, and the pages to be programmed.
    requests : Array of Out(stream of request)
        Codewords wanted from each channel (`dram` is 0).
    codewords : Array of In(stream of channel_word)
        Codewords from each channel, in any order; a V codeword may only be sent while it is welcome, see the next two.
    value_open : Out(jobs_in_flight)
        V codewords of this slot may be sent; without it only those of another epoch than the slot's `epoch`.
    epoch : Out(ArrayLayout(EPOCH_BITS, jobs_in_flight))
        Epoch of the slot's latest job.
    operations : Array of Out(stream of operation)
        Flash commands for each channel, begun in order.
    page_words : Array of Out(stream of page_word)
        The page data of its PROGRAMs, in the same order.
    outcomes : Array of In(stream of outcome)
        How they ended, in any order.
    flash_events : In(ArrayLayout(flash_events, channels))
    media_errors : In(ArrayLayout(media_error, channels))
        The codeword that `flash_events.unreadable` is about, in the same cycle.
    irq : Out(1)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "host": In(axi_lite(ADDRESS_BITS)),
            "read": Out(AXI_READ),
            "write": Out(AXI_WRITE),
            "dram": Out(dram_signature(config)),
            "requests": Out(stream.Signature(shapes.request)).array(config.channels),
            "codewords": In(stream.Signature(shapes.channel_word)).array(config.channels),
            "value_open": Out(config.jobs_in_flight),
            "epoch": Out(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "operations": Out(stream.Signature(shapes.operation)).array(config.channels),
            "page_words": Out(stream.Signature(shapes.page_word)).array(config.channels),
            "outcomes": In(stream.Signature(shapes.outcome)).array(config.channels),
            "flash_events": In(data.ArrayLayout(shapes.flash_events, config.channels)),
            "media_errors": In(data.ArrayLayout(shapes.media_error, config.channels)),
            "irq": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        parts = self._add_parts(m, platform)
        self._connect_host(m, parts)
        self._connect_queues(m, parts)
        self._connect_owners(m, parts)
        self._connect_commands(m, parts)
        self._connect_jobs(m, parts)
        live = self._track_slots(m, parts)
        central = self._register_central(m, parts)
        for channel in range(self.config.channels):
            self._connect_channel(m, parts, channel)
        for number in range(self.config.lanes):
            self._connect_storage(m, parts, number)
            self._connect_lane(m, parts, number, live, central)
        self._connect_chain(m, parts)
        self._connect_copier(m, parts)
        self._connect_watchdog(m, parts)
        self._connect_stamps(m, parts)
        return m

    def _add_parts(self, m: Module, platform: object) -> _Parts:
        """Add all blocks; a soft reset clears all but Control, Owners, Operations and DramReader."""
        config = self.config
        m.submodules.control = control = Control(config)
        parts = _Parts(
            control=control, loader=Loader(config), copier=Copier(config), maximum=Maximum(config),
            finisher=Finisher(config), watchdog=Watchdog(config), queues=Queues(), admin=Admin(config),
            owners=Owners(config), operations=Operations(config), dram_reader=DramReader(config),
            stamps=JobStamps(config),
            selection=TopK(config) if config.sparse else None)
        reset = ResetInserter(control.reset)
        for name in ("loader", "copier", "maximum", "finisher", "watchdog", "queues", "admin", "stamps"):
            m.submodules[name] = reset(getattr(parts, name))
        for name in ("owners", "operations", "dram_reader"):
            m.submodules[name] = getattr(parts, name)
        for number in range(config.lanes):
            lane, submodule = shared(platform, "kvattic_lane", lambda: Lane(config), control.reset)
            m.submodules[f"lane_{number}"] = submodule
            m.d.comb += lane.lane.eq(number)
            parts.lanes.append(lane)
        return parts

    def _connect_host(self, m: Module, parts: _Parts) -> None:
        """Registers, host memory and the interrupt."""
        control, loader, finisher, queues, operations = (
            parts.control, parts.loader, parts.finisher, parts.queues, parts.operations)
        connect(m, flipped(self.host), control.bus)
        connect(m, loader.bus, flipped(self.read))
        connect(m, finisher.axi, flipped(self.write))
        m.d.comb += [
            self.irq.eq(control.irq),
            control.bus_error.eq(loader.bus_error | finisher.write_error),
            control.fetched.eq(queues.fetch.valid & queues.fetch.ready),
            control.completed.eq(finisher.completed),
            control.busy.eq(queues.busy),
            control.interrupts.eq(queues.interrupts),
            control.refused.eq(queues.refused),
            control.refused_doorbell.eq(queues.refused_doorbell),
            control.quiet.eq(loader.quiet & finisher.quiet & operations.quiet),
            control.flash_events.eq(self.flash_events),
            control.media_errors.eq(self.media_errors),
            loader.stop.eq(control.stop),
            finisher.stop.eq(control.stop),
            finisher.snapshot.eq(control.snapshot),
        ]

    def _connect_queues(self, m: Module, parts: _Parts) -> None:
        """Doorbells to queues, commands to the loader, completions back."""
        control, loader, finisher, queues, admin = (
            parts.control, parts.loader, parts.finisher, parts.queues, parts.admin)
        connect(m, queues.fetch, loader.fetch)
        m.d.comb += [
            queues.doorbell.eq(control.doorbell),
            queues.interrupt_after.eq(control.interrupt_after),
            queues.hold.eq(loader.hold | (~control.ready).replicate(QUEUES)),
            queues.post_queue.eq(finisher.post_queue),
            queues.post.eq(finisher.post),
            queues.posted.eq(finisher.completed),
            queues.posted_queue.eq(finisher.post_queue),
            finisher.post_line.eq(queues.post_line),
            finisher.post_phase.eq(queues.post_phase),
            finisher.post_head.eq(queues.post_head),
            # Not while commands of it are under way: then it is only removed.
            loader.create_valid.eq(queues.create.valid & ~queues.under_way.bit_select(queues.create.queue, 1)),
            loader.create_queue.eq(queues.create.queue),
            loader.admin_base.eq(control.admin_base),
            loader.admin_limit.eq(control.admin_limit),
        ]
        # A cycle late, which no doorbell notices: they come every other cycle at most.
        m.d.sync += [queues.create.eq(admin.create), queues.remove.eq(admin.remove)]
        # Queue 0 comes from registers, when Admin cannot be at work for it.
        with m.If(control.admin_create):
            m.d.sync += [
                queues.create.valid.eq(1),
                queues.create.queue.eq(0),
                queues.create.entries_bits.eq(control.admin_bits),
                queues.create.submission.eq(control.admin_submission),
                queues.create.completion.eq(control.admin_completion),
            ]
        with m.If(control.admin_remove):
            m.d.sync += [queues.remove.valid.eq(1), queues.remove.queue.eq(0)]

    def _connect_owners(self, m: Module, parts: _Parts) -> None:
        """Whose each place is that a command names."""
        control, loader, admin, owners = parts.control, parts.loader, parts.admin, parts.owners
        connect(m, admin.grant, owners.grant)
        m.d.comb += [
            owners.region_bits.eq(control.region_bits),
            owners.domain.eq(loader.domain),
            owners.page.eq(loader.page),
            owners.dram_page.eq(loader.dram_page),
            owners.entry_valid.eq(loader.load_valid & (loader.load.stripe | loader.load.sketch)),
            owners.entry.eq(loader.load.data),
            owners.sketch.eq(loader.load.sketch),
            owners.number.eq(loader.entry_number),
            owners.stripe_bits.eq(loader.start.stripe_bits),
            owners.mode.eq(loader.start.mode),
            owners.unit_bits.eq(loader.start.unit_bits),
            owners.clear.eq(loader.owner_clear),
            loader.domain_queues.eq(owners.queues),
            loader.page_owned.eq(owners.page_owned),
            loader.dram_owned.eq(owners.dram_owned),
            loader.not_owned.eq(owners.found),
            loader.not_owned_where.eq(owners.where),
        ]

    def _connect_commands(self, m: Module, parts: _Parts) -> None:
        """Admin and flash commands from the loader, and how they ended to the finisher."""
        control, loader, finisher, queues, admin, operations, dram_reader = (
            parts.control, parts.loader, parts.finisher, parts.queues, parts.admin, parts.operations, parts.dram_reader)
        connect(m, loader.admin, admin.commands)
        connect(m, loader.flash, operations.commands)
        m.d.comb += [
            admin.present.eq(queues.present),
            admin.under_way.eq(queues.under_way),
            control.counter_number.eq(admin.counter_number),
            control.counter_first.eq(admin.counter_first),
            admin.counter_there.eq(control.counter_there),
            admin.counter.eq(control.counter),
            admin.block_index.eq(finisher.block_index),
            finisher.block_data.eq(admin.block_data),
            finisher.outcomes.valid.eq(admin.outcomes.valid | operations.outcomes.valid),
            finisher.outcomes.payload.eq(Mux(
                admin.outcomes.valid, admin.outcomes.payload.as_value(), operations.outcomes.payload.as_value())),
            admin.outcomes.ready.eq(finisher.outcomes.ready),
            operations.outcomes.ready.eq(finisher.outcomes.ready & ~admin.outcomes.valid),
        ]
        connect(m, operations.fetches, dram_reader.fetches)
        connect(m, dram_reader.axi, flipped(self.dram))
        m.d.comb += [
            operations.failed.eq(dram_reader.failed),
            dram_reader.value_open.eq(self.value_open),
            dram_reader.epoch.eq(self.epoch),
        ]

    def _connect_jobs(self, m: Module, parts: _Parts) -> None:
        """Jobs on their way: loader, selection in sparse modes, maximum, finisher.

        What only the finisher has a use for goes past the others, in a queue of its own: jobs leave in their order.
        """
        control, loader, maximum, finisher, selection = (
            parts.control, parts.loader, parts.maximum, parts.finisher, parts.selection)
        config, job = self.config, self.shapes.job
        of_finisher = data.StructLayout({name: job[name].shape for name in FINISHER_FIELDS})
        of_all = data.StructLayout({name: field.shape for name, field in job if name not in FINISHER_FIELDS})
        steps = [("loaded", loader.jobs, maximum.jobs_i), ("scored", maximum.jobs_o, finisher.jobs)]
        if config.sparse:
            m.submodules.selection = ResetInserter(control.reset)(selection)
            steps[:1] = [("loaded", loader.jobs, selection.jobs_i), ("selected", selection.jobs_o, maximum.jobs_i)]
        # As many as there are slots, and those that were freed and are not handed over.
        rest = self._queue_jobs(m, parts, "described", of_finisher, 2 * config.jobs_in_flight)
        for name, source, sink in steps:
            first, last = source is loader.jobs, sink is finisher.jobs
            queue = self._queue_jobs(m, parts, name, of_all, config.jobs_in_flight)
            also_room, also_there = rest.w_rdy if first else 1, rest.r_rdy if last else 1
            given, found = data.View(of_all, queue.w_data), data.View(of_all, queue.r_data)
            m.d.comb += [
                *(given[member].eq(source.payload[member]) for member, _ in of_all),
                queue.w_en.eq(source.valid & also_room),
                source.ready.eq(queue.w_rdy & also_room),
                *(sink.payload[member].eq(found[member]) for member, _ in of_all),
                sink.valid.eq(queue.r_rdy & also_there),
                queue.r_en.eq(sink.ready & also_there),
            ]
        given, found = data.View(of_finisher, rest.w_data), data.View(of_finisher, rest.r_data)
        m.d.comb += [
            *(given[name].eq(loader.jobs.payload[name]) for name in FINISHER_FIELDS),
            rest.w_en.eq(loader.jobs.valid & loader.jobs.ready),
            *(finisher.jobs.payload[name].eq(found[name]) for name in FINISHER_FIELDS),
            rest.r_en.eq(finisher.jobs.valid & finisher.jobs.ready),
        ]

    @staticmethod
    def _queue_jobs(m: Module, parts: _Parts, name: str, shape: data.Layout, depth: int) -> SyncFIFOBuffered:
        """A queue of what belongs to jobs."""
        queue = SyncFIFOBuffered(width=shape.size, depth=depth)
        m.submodules[name] = ResetInserter(parts.control.reset)(queue)
        return queue

    def _track_slots(self, m: Module, parts: _Parts) -> Signal:
        """Which slots have a job in the lanes, and what the flash side may send."""
        control, loader, maximum, finisher, watchdog, selection = (
            parts.control, parts.loader, parts.maximum, parts.finisher, parts.watchdog, parts.selection)
        live, epochs = Signal(self.config.jobs_in_flight), Signal.like(self.epoch)
        freed, freed_slot, lists_room = Signal(), Signal(self.shapes.slot), Signal()
        m.d.sync += lists_room.eq(Cat(lane.lists_room for lane in parts.lanes).all())
        m.d.sync += [freed.eq(finisher.freed & ~control.reset), freed_slot.eq(finisher.freed_slot)]
        with m.If(freed):
            m.d.sync += live.bit_select(freed_slot, 1).eq(0)
        with m.If(loader.start_valid):
            m.d.sync += live.bit_select(loader.start.slot, 1).eq(1)
            m.d.sync += epochs.as_value().word_select(loader.start.slot, EPOCH_BITS).eq(loader.start.epoch)
        with m.If(control.reset):
            m.d.sync += live.eq(0)
        m.d.comb += [
            self.value_open.eq(~live | maximum.value_open | watchdog.failed),
            self.epoch.eq(epochs),
            loader.freed.eq(freed),
            # A few cycles late, in which the next command is checked.
            loader.lists_room.eq(lists_room),
            maximum.freed.eq(freed),
            maximum.freed_slot.eq(freed_slot),
            watchdog.freed.eq(freed),
            watchdog.freed_slot.eq(freed_slot),
            maximum.final_slot.eq(finisher.final_slot),
            maximum.final_row.eq(finisher.final_row),
            finisher.final.eq(maximum.final),
            finisher.failed.eq(watchdog.failed),
            finisher.failed_where.eq(watchdog.where),
            finisher.mean_valid.eq(loader.mean_valid),
            finisher.mean.eq(loader.mean),
        ]
        if self.config.sparse:
            m.d.comb += [
                selection.failed.eq(watchdog.failed),
                selection.alpha_slot.eq(finisher.final_slot),
                selection.alpha_row.eq(finisher.final_row),
                finisher.alpha.eq(selection.alpha),
                watchdog.selection_waiting.eq(selection.waiting),
                watchdog.selection_slot.eq(selection.waiting_slot),
                watchdog.selected.eq(selection.jobs_o.valid & selection.jobs_o.ready),
            ]
        return live

    def _register_central(self, m: Module, parts: _Parts) -> _Central:
        """What is the same for all lanes; loads are registered, as the way is long."""
        loader, finisher, watchdog = parts.loader, parts.finisher, parts.watchdog
        load, load_valid = Signal(self.shapes.load), Signal()
        start, start_valid = Signal(self.shapes.start), Signal()
        m.d.sync += [load.eq(loader.load), load_valid.eq(loader.load_valid)]
        m.d.comb += [start.eq(loader.start), start_valid.eq(loader.start_valid)]
        report_slot = Signal(self.shapes.slot)
        m.d.comb += report_slot.eq(Mux(watchdog.probing, watchdog.report_slot, finisher.report_slot))
        return _Central(load, load_valid, start, start_valid, report_slot)

    def _connect_channel(self, m: Module, parts: _Parts, channel: int) -> None:
        """A channel's operations."""
        operations, dram_reader = parts.operations, parts.dram_reader
        connect(m, operations.operations[channel], flipped(self.operations[channel]))
        connect(m, dram_reader.page_words[channel], flipped(self.page_words[channel]))
        connect(m, flipped(self.outcomes[channel]), operations.channel_outcomes[channel])

    def _connect_storage(self, m: Module, parts: _Parts, number: int) -> None:
        """Requests and codewords of a lane, in flash and in device DRAM."""
        lane, dram_reader = parts.lanes[number], parts.dram_reader
        m.submodules[f"crossing_{number}"] = crossing = LaneCrossing(self.config)
        connect(m, lane.requests, crossing.requests)
        connect(m, crossing.tails, dram_reader.tails[number])
        connect(m, dram_reader.codewords[number], crossing.tail_codewords)
        connect(m, crossing.codewords, lane.codewords)
        for of_lane, channel in enumerate(range(number, self.config.channels, self.config.lanes)):
            connect(m, crossing.channel_requests[of_lane], flipped(self.requests[channel]))
            connect(m, flipped(self.codewords[channel]), crossing.words[of_lane])

    def _connect_lane(self, m: Module, parts: _Parts, number: int, live: Signal, central: _Central) -> None:
        """A lane and the central blocks."""
        control, maximum, finisher, watchdog, selection, lanes = (
            parts.control, parts.maximum, parts.finisher, parts.watchdog, parts.selection, parts.lanes)
        lane = lanes[number]
        m.d.comb += [
            lane.load_valid.eq(central.load_valid),
            lane.load.eq(central.load),
            lane.start_valid.eq(central.start_valid),
            lane.start.eq(central.start),
            lane.live.eq(live),
            lane.value_open.eq(maximum.value_open),
            lane.failed.eq(watchdog.failed),
            lane.maximum_slot.eq(maximum.maximum_slot),
            lane.maximum_row.eq(maximum.maximum_row),
            lane.maximum_write.eq(maximum.maximum_write),
            lane.maximum_new.eq(maximum.maximum_new),
            lane.denominator_slot.eq(finisher.denominator_slot),
            lane.denominator_row.eq(finisher.denominator_row),
            lane.report_slot.eq(central.report_slot),
            watchdog.first_done[number].eq(lane.first_done),
            maximum.keys_done[number].eq(lane.keys_done),
            maximum.maximum[number].eq(lane.maximum),
            finisher.values_done[number].eq(lane.values_done),
            finisher.denominators[number].eq(lane.denominator),
            finisher.reports[number].eq(lane.report),
            watchdog.keys_done[number].eq(lane.keys_done),
            watchdog.values_done[number].eq(lane.values_done),
            watchdog.missing_key[number].eq(lane.missing_key),
            watchdog.missing_value[number].eq(lane.missing_value),
            control.events[number].eq(lane.events),
            control.bad_tags[number].eq(lane.offender.as_value()),
        ]
        if self.config.sparse:
            m.d.comb += [
                *(getattr(lane, name).eq(getattr(selection, name)) for name in (
                    "first_slot", "first_row", "sweep_valid", "sweep", "reference_write", "reference_row",
                    "reference", "sum_row", "bin", "select_valid", "select_slot")),
                *(getattr(selection, name)[number].eq(getattr(lane, name)) for name in (
                    "first_done", "first_maximum", "sweep_done", "sum", "count", "unmarked")),
            ]

    def _connect_chain(self, m: Module, parts: _Parts) -> None:
        """Accumulators: from the finisher through all lanes and back."""
        finisher, lanes = parts.finisher, parts.lanes
        connect(m, finisher.chain_head, lanes[0].chain_i)
        for before, after in zip(lanes, lanes[1:], strict=False):
            connect(m, before.chain_o, after.chain_i)
        connect(m, lanes[-1].chain_o, finisher.chain_tail)

    def _connect_copier(self, m: Module, parts: _Parts) -> None:
        """READs: from the lanes to host memory."""
        loader, copier, finisher = parts.loader, parts.copier, parts.finisher
        for lane, link in zip(parts.lanes, copier.lanes, strict=True):
            connect(m, lane.copy, link)
        connect(m, copier.o, finisher.copies)
        m.d.comb += [
            copier.start_valid.eq(loader.start_valid),
            copier.slot.eq(loader.start.slot),
            copier.result.eq(loader.jobs.payload.result),
            copier.tokens.eq(loader.start.end_token),
            finisher.copies_slot.eq(copier.o_slot),
        ]

    def _connect_watchdog(self, m: Module, parts: _Parts) -> None:
        """What counts as progress, and what the watchdog waits for."""
        control, loader, maximum, finisher, watchdog, lanes = (
            parts.control, parts.loader, parts.maximum, parts.finisher, parts.watchdog, parts.lanes)
        channels = range(self.config.channels)
        progress = Signal()
        m.d.sync += progress.eq(
            Cat(lane.events.beat for lane in lanes).any()
            | (self.read.arvalid & self.read.arready) | (self.read.rvalid & self.read.rready)
            | (self.write.awvalid & self.write.awready) | (self.write.bvalid & self.write.bready)
            | loader.start_valid | finisher.completed
            | Cat(self.flash_events[c].word | self.flash_events[c].command for c in channels).any())
        m.d.comb += [
            control.lanes_ready.eq(Cat(lane.ready for lane in lanes).all()),
            watchdog.timeout.eq(control.timeout),
            watchdog.progress.eq(progress),
            # A die may be busy for long, with something that the job waits behind.
            watchdog.activity.eq(Cat(self.flash_events[c].dies_busy.any() for c in channels).any()),
            watchdog.maximum_waiting.eq(maximum.waiting),
            watchdog.maximum_slot.eq(maximum.waiting_slot),
            watchdog.finisher_waiting.eq(finisher.waiting),
            watchdog.finisher_slot.eq(finisher.waiting_slot),
            watchdog.handed.eq(maximum.jobs_o.valid & maximum.jobs_o.ready),
        ]

    def _connect_stamps(self, m: Module, parts: _Parts) -> None:
        """When each job's command was fetched, and when its beats moved."""
        control, loader, finisher, stamps, lanes = (
            parts.control, parts.loader, parts.finisher, parts.stamps, parts.lanes)
        job, used = loader.jobs.payload, loader.jobs.valid & loader.jobs.ready
        m.d.comb += [
            stamps.cycle.eq(control.snapshot.cycle),
            stamps.asked.eq(loader.asked),
            stamps.fetched.eq(control.fetched),
            stamps.used.eq(used),
            stamps.used_slot.eq(job.slot),
            # A job that failed before the lanes heard of it forgets the beats of the one before it here.
            stamps.started.eq(loader.start_valid | (used & ~job.lanes)),
            stamps.started_slot.eq(job.slot),
            stamps.beats.eq(Cat(lane.events.beat for lane in lanes)),
            *(slot.eq(lane.beat_slot) for slot, lane in zip(stamps.beat_slots, lanes, strict=True)),
            stamps.slot.eq(finisher.waiting_slot),
            finisher.stamps.eq(stamps.stamps),
        ]
