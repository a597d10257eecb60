"""Fetches commands, queries and tables, checks them, loads and starts the lanes, hands all other commands over."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.spec.commands import COMMAND, FLASH_COMMAND, STATUS_BITS, Status
from kvattic.spec.config import Config
from kvattic.spec.registers import QUEUES
from kvattic_hdl.frontend.fetch import Fetch, command_fields, row_lines
from kvattic_hdl.frontend.hand_over import HandOver
from kvattic_hdl.frontend.load_job import LoadJob
from kvattic_hdl.frontend.validate import FP32_FRACTION, Validate
from kvattic_hdl.lib.axi import AXI_READ, LINE_ADDRESS_BITS
from kvattic_hdl.lib.shapes import EPOCH_BITS, PAGE_BITS, TOKEN_BITS, Shapes
from kvattic_hdl.nvme.queues import FETCH


class Loader(wiring.Component):
    """Fetches and checks commands, loads the lanes and starts the jobs, hands flash and admin commands over.

    Latency: for a job of one row about the memory's latency + 17 cycles of checking + a cycle for
    each word of its query block and its table.  The next command is requested right behind these,
    so its fetch costs its eight words only.  A flash command takes the memory's latency + 19 cycles.
    A CENTROID job has two words for each stripe.  SPARF and FETCHED take the `Ranker`'s digits, or a
    cycle for each word of mean and table if these take longer; the `Ranker`'s time from `go` to
    `done`; three cycles.
    Throughput: one word a cycle while a block arrives; one job at a time.
    Ordering: jobs leave in the order in which they are fetched, and so do flash and admin commands; a
    job's `start` comes two cycles or more after the last `load`, its record on `jobs` one cycle or
    more after its `start`.  A flash command that nobody takes waits beside, with its queue on `hold`.
    Reset: no command; the epoch goes on, so that codewords of jobs before the reset are recognised as
    stale.  Reads under way must have ended before: raise `stop` until `quiet`.

    A command that fails its checks becomes a job without lanes, of mode DENSE; so does one with a
    bad query block, mean or table.  The first that applies is reported: BUS_ERROR of the command
    line, INVALID_OPCODE, NOT_PERMITTED (opcode), INVALID_FIELD; for ATTEND: INVALID_ROWS,
    INVALID_LENGTH, INVALID_SELECTION (features, top_units, local_tokens, unit_bits), INVALID_ADDRESS (query,
    result, table), INVALID_SCALE, NOT_PERMITTED (domain), BUS_ERROR of query block, mean or table,
    INVALID_TABLE, NOT_OWNED, NO_SKETCH, NAN_QUERY, NAN_MEAN; for READ those of them that it can have; for flash
    commands: INVALID_PLACE,
    NOT_PERMITTED (domain), NOT_OWNED.  `where` is zero for those that commands.Status gives none.
    Without `config.sparse` there is no mode but DENSE.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : Out(AXI_READ)
        Host memory.
    fetch : In(stream of FETCH)
        Line of the next command, and its queue; taken when the line has come.
    asked : Out(1)
        Strobe: the next command's line is requested.
    hold : Out(QUEUES)
        Offer nothing of these on `fetch`: a flash command of it waits for its channel, or its last command
        could be one.
    create_valid, create_queue : In(1), In(3)
        Strobe: this queue is created.  Its window is the one of the CREATE_QUEUE that was taken from
        `admin` last; that of queue 0 is `admin_base` to `admin_limit` in this cycle and the next.
    admin_base, admin_limit : In(64)
        The registers.
    domain, page, dram_page : Out(8), Out(24), Out(24)
        What the current command names, for `Owners`.
    domain_queues : In(QUEUES)
        Queues that may name the domain.
    page_owned, dram_owned : In(1)
        The pages of the flash command are the domain's.
    entry_number : Out(16)
        Number of the stripe that is being loaded.
    owner_clear : Out(1)
        A new table will come.
    not_owned, not_owned_where : In(1), In(16)
        An entry of the table is not the domain's; the first.
    load_valid, load : Out(1), Out(Shapes.load)
        Written to all lanes.
    start_valid, start : Out(1), Out(Shapes.start)
        Given to all lanes when everything is loaded.
    mean_valid, mean : Out(1), Out(Shapes.mean)
        Words of the mean of V of a SPARF or FETCHED job, before its `start`; also of one that fails later checks.
    jobs : Out(stream of Shapes.job)
        The jobs.
    flash : Out(stream of Shapes.flash_command)
        Flash commands that passed their checks; they take no slot.
    admin : Out(stream of Shapes.admin_command)
        The commands for `Admin`.
    freed : In(1)
        Strobe: a slot is free again.
    lists_room : In(1)
        The lanes have room for another job's stripes; at most ten cycles after a `start` or a `freed`.
    bus_error : Out(1)
        Strobe: a word was not answered with OKAY.
    stop : In(1)
        Start no read, drop what comes, hand no flash command over; a reset will follow.
    quiet : Out(1)
        No read is under way.
    """

    bus: wiring.PureInterface
    fetch: stream.Interface
    asked: Signal
    hold: Signal
    create_valid: Signal
    create_queue: Signal
    admin_base: Signal
    admin_limit: Signal
    domain: Signal
    page: Signal
    dram_page: Signal
    domain_queues: Signal
    page_owned: Signal
    dram_owned: Signal
    entry_number: Signal
    owner_clear: Signal
    not_owned: Signal
    not_owned_where: Signal
    load_valid: Signal
    load: data.View
    start_valid: Signal
    start: data.View
    mean_valid: Signal
    mean: data.View
    jobs: stream.Interface
    flash: stream.Interface
    admin: stream.Interface
    freed: Signal
    lists_room: Signal
    bus_error: Signal
    stop: Signal
    quiet: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__(
            {
                "bus": Out(AXI_READ),
                "fetch": In(stream.Signature(FETCH)),
                "asked": Out(1),
                "hold": Out(QUEUES),
                "create_valid": In(1),
                "create_queue": In(range(QUEUES)),
                "admin_base": In(64),
                "admin_limit": In(64),
                "domain": Out(8),
                "page": Out(PAGE_BITS),
                "dram_page": Out(PAGE_BITS),
                "domain_queues": In(QUEUES),
                "page_owned": In(1),
                "dram_owned": In(1),
                "entry_number": Out(16),
                "owner_clear": Out(1),
                "not_owned": In(1),
                "not_owned_where": In(16),
                "load_valid": Out(1),
                "load": Out(shapes.load),
                "start_valid": Out(1),
                "start": Out(shapes.start),
                "mean_valid": Out(1),
                "mean": Out(shapes.mean),
                "jobs": Out(stream.Signature(shapes.job)),
                "flash": Out(stream.Signature(shapes.flash_command)),
                "admin": Out(stream.Signature(shapes.admin_command)),
                "freed": In(1),
                "lists_room": In(1),
                "bus_error": Out(1),
                "stop": In(1),
                "quiet": Out(1, init=1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        m.submodules.fetch = fetch = Fetch(config)
        m.submodules.validate = validate = Validate(config)
        m.submodules.load_job = load_job = LoadJob(config)
        m.submodules.hand_over = hand_over = HandOver(config)
        fields = command_fields(config, COMMAND, fetch.command)
        status, where, handed_over = Signal(STATUS_BITS), Signal(32), Signal()
        commanding = Signal(init=1)    # in state `command`; what follows from it goes far
        self._connect_fetch(m, fetch, fields, validate)
        self._connect_validate(m, validate, fetch, hand_over)
        self._connect_load(m, load_job, fetch, validate)
        self._connect_hand_over(m, hand_over, fetch, validate)
        slot, epoch, slot_free = self._slots(m, used=self.jobs.valid & self.jobs.ready)
        m.d.comb += [load_job.slot.eq(slot), load_job.slot_free.eq(slot_free & self.lists_room)]
        self._describe_start(m, fields, slot, epoch, validate)
        self._describe_job(m, fields, slot, fetch.queue, validate.is_read, status, where)

        m.d.comb += fetch.in_command.eq(commanding)
        with m.FSM(name="state"):
            with m.State("command"):
                m.d.comb += [part.eq(1) for part in (validate.clear, load_job.clear, self.owner_clear)]
                with m.If(fetch.fetched):
                    m.d.sync += commanding.eq(0)
                    m.next = "check"
            with m.State("check"):
                m.d.comb += [validate.checking.eq(1), load_job.prepare.eq(1)]
                with m.If(validate.judged):
                    m.d.sync += [
                        status.eq(validate.judgement.status), where.eq(validate.judgement.where),
                        handed_over.eq(validate.hand_over)]
                    m.next = "judged"
            with m.State("judged"):
                with m.If(handed_over):
                    m.next = "hand_over"
                with m.Else():
                    m.d.comb += [fetch.want.eq(1), fetch.unreadable.eq(fetch.broken)]
                    with m.If(slot == 0):
                        # Once for each turn round the slots, at its beginning: it also tells jobs after a reset
                        # from those before.
                        m.d.sync += epoch.eq(epoch + 1)
                    m.next = "report"
                    with m.If(status == Status.OK):
                        m.d.comb += [fetch.ask.eq(1), load_job.begin.eq(1)]
                        m.next = "load"
            with m.State("load"):
                with m.If(load_job.refused):
                    m.d.sync += [status.eq(load_job.judgement.status), where.eq(load_job.judgement.where)]
                    m.next = "report"
                with m.Elif(load_job.done):
                    m.next = "start"
            with m.State("start"):
                m.d.comb += self.start_valid.eq(1)
                m.next = "report"
            with m.State("report"):
                m.d.comb += self.jobs.valid.eq(slot_free)
                with m.If(self.jobs.valid & self.jobs.ready):
                    m.d.comb += fetch.clear.eq(1)
                    m.d.sync += commanding.eq(1)
                    m.next = "command"
            with m.State("hand_over"):
                m.d.comb += hand_over.valid.eq(1)
                with m.If(hand_over.ready):
                    m.d.comb += [fetch.want.eq(1), fetch.clear.eq(1)]
                    m.d.sync += commanding.eq(1)
                    m.next = "command"
        return m

    def _connect_fetch(self, m: Module, fetch: Fetch, fields: dict[str, Value], validate: Validate) -> None:
        """What `Fetch` asks memory for."""
        connect(m, fetch.bus, flipped(self.bus))
        connect(m, flipped(self.fetch), fetch.fetch)
        rows = fields["rows"][: bits_for(self._config.rows)]
        table_lines = Signal.like(validate.table_lines)    # known long before they are asked for
        m.d.sync += table_lines.eq(validate.table_lines)
        m.d.comb += [
            fetch.stop.eq(self.stop),
            self.quiet.eq(fetch.quiet),
            self.asked.eq(fetch.asked),
            self.bus_error.eq(fetch.bus_error),
            fetch.query_line.eq(fields["query"][-LINE_ADDRESS_BITS:]),
            fetch.query_lines.eq(rows * row_lines(self._config)),
            fetch.table_line.eq(fields["table"][-LINE_ADDRESS_BITS:]),
            fetch.table_lines.eq(table_lines),
        ]

    def _connect_validate(self, m: Module, validate: Validate, fetch: Fetch, hand_over: HandOver) -> None:
        """What a command is judged by, and what `Owners` is asked."""
        flash = command_fields(self._config, FLASH_COMMAND, fetch.command)
        m.d.comb += [
            self.domain.eq(flash["domain"]),
            self.page.eq(flash["page"]),
            self.dram_page.eq(flash["argument"]),
            validate.create_window.eq(hand_over.window),
        ]
        for name in ("command", "reserved", "needless", "queue", "broken"):
            m.d.comb += getattr(validate, name).eq(getattr(fetch, name))
        for name in ("create_valid", "create_queue", "admin_base", "admin_limit", "domain_queues", "page_owned",
                     "dram_owned"):
            m.d.comb += getattr(validate, name).eq(getattr(self, name))

    def _connect_load(self, m: Module, load_job: LoadJob, fetch: Fetch, validate: Validate) -> None:
        """What is loaded, and where to."""
        connect(m, fetch.words, load_job.words)
        m.d.comb += [
            load_job.command.eq(fetch.command),
            load_job.scale.eq(self.start.scale),
            load_job.broken.eq(fetch.broken),
            load_job.not_owned.eq(self.not_owned),
            load_job.not_owned_where.eq(self.not_owned_where),
        ]
        for name in ("is_read", "sparse", "ranked", "stripe_tokens", "lane_limit", "k_offset"):
            m.d.comb += getattr(load_job, name).eq(getattr(validate, name))
        for name in ("load_valid", "load", "entry_number", "mean_valid", "mean"):
            m.d.comb += getattr(self, name).eq(getattr(load_job, name))

    def _connect_hand_over(self, m: Module, hand_over: HandOver, fetch: Fetch, validate: Validate) -> None:
        """What happens to all commands but ATTEND."""
        connect(m, hand_over.flash, flipped(self.flash))
        connect(m, hand_over.admin, flipped(self.admin))
        m.d.comb += [
            hand_over.stop.eq(self.stop),
            hand_over.is_flash.eq(validate.is_flash),
            hand_over.command.eq(fetch.command),
            hand_over.queue.eq(fetch.queue),
            hand_over.bad_address.eq(validate.bad_block),
            # Nobody knows yet whether the command that was fetched last will have to wait.
            self.hold.eq(hand_over.hold | Mux(fetch.wanting, 0, 1 << fetch.queue)),
        ]

    def _slots(self, m: Module, *, used: Value) -> tuple[Signal, Signal, Value]:
        """The next job's slot, which goes round as jobs leave: (slot, epoch, whether it is free)."""
        jobs_in_flight = self._config.jobs_in_flight
        slot = Signal(self._shapes.slot)
        # Not reset: see the docstring.
        epoch = Signal(EPOCH_BITS, reset_less=True)
        free = Signal(range(jobs_in_flight + 1), init=jobs_in_flight)
        freed = Signal()
        m.d.sync += freed.eq(self.freed)
        with m.If(used & ~freed):
            m.d.sync += free.eq(free - 1)
        with m.Elif(~used & freed):
            m.d.sync += free.eq(free + 1)
        with m.If(used):
            m.d.sync += slot.eq(Mux(slot == jobs_in_flight - 1, 0, slot + 1))
        return slot, epoch, free.any()

    def _describe_start(self, m: Module, fields: dict[str, Value], slot: Signal, epoch: Signal,
                        validate: Validate) -> None:
        """What the lanes are told of the job."""
        start = self.start
        m.d.comb += [
            start.slot.eq(slot),
            start.epoch.eq(epoch),
            start.stripe_bits.eq(validate.stripe_bits),
            start.last_token.eq(self.load.start),  # the last one loaded
            start.end_token.eq(fields["end_token"]),
            start.read.eq(validate.is_read),
            start.tree_token.eq(fields["tree_token"]),
            start.k_offset.eq(validate.k_offset),
            start.scale.eq(Cat(fields["scale"][:FP32_FRACTION], 1)),
        ]
        if not self._config.sparse:
            m.d.comb += start.local_token.eq(fields["end_token"])
            return
        local_token = Signal(TOKEN_BITS)
        before = fields["end_token"][:TOKEN_BITS] - fields["local_tokens"]
        m.d.sync += local_token.eq(Mux(before < 0, 0, before))
        m.d.comb += [
            start.mode.eq(fields["mode"]),
            start.unit_bits.eq(fields["unit_bits"]),
            start.features.eq(fields["features"]),
            start.local_token.eq(local_token),
            start.sinks.eq(fields["sinks"]),
        ]

    def _describe_job(self, m: Module, fields: dict[str, Value], slot: Signal, queue: Signal, is_read: Signal,
                      status: Signal, where: Signal) -> None:
        """What the later stages are told of the job."""
        job = self.jobs.payload
        m.d.comb += [
            job.slot.eq(slot),
            job.lanes.eq(status == Status.OK),
            job.queue.eq(queue),
            job.identifier.eq(fields["identifier"]),
            # The stages behind the lanes take at least one.
            job.rows.eq(Mux(is_read, 1, fields["rows"])),
            job.read.eq(is_read),
            job.result.eq(fields["result"]),
            job.status.eq(status),
            job.where.eq(where),
        ]
        if self._config.sparse:
            m.d.comb += [job.mode.eq(Mux(status == Status.OK, fields["mode"], 0)), job.units.eq(fields["top_units"])]
