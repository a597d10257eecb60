"""A lane's door: checks the tag of each arriving codeword, and buffers its beats while its weights are made."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.interfaces import EPOCH_BITS, TOKEN_BITS, Shapes


class Intake(wiring.Component):
    """Takes codewords in any order; lets each one that was asked for through exactly once.

    A codeword is framed by `last`; its tag is read with the first beat.  It is dropped whole, with an event,
    when its epoch is not the slot's or the job failed (stale), when it was not requested or is a V codeword whose slot
    is not open (bad tag), or when it came before (duplicate).  One bit for each place of the score ring tells: K
    sets it, V clears it, so that it is clear again for the place's next user.  The first pass has bits of its own,
    which are scrubbed when all of it came.  A codeword with an error counts as any other.

    Latency 4 cycles and that of the FIFO; one beat each cycle.  After reset `ready` stays low until the bits are swept.

    Parameters
    ----------
    config : Config
    depth : int
        Beats that are buffered: covers the time from a V codeword's arrival to its first weight.

    Members
    -------
    codewords : In(stream of beat)
    slot : Out(slot)
        Slot of the tag being checked; the following inputs describe it, in the same cycle.
    epoch : In
    active : In(1)
        Its job is in flight and its K requests have begun.
    open : In(1)
        Its V codewords are welcome.
    failed : In(1)
    asked : In
        Its codewords that were requested so far (K): a place below it may have come.
    first_asked : In
        The same for its first pass.
    first_done : In(1)
        All of its first pass came.
    sparse, centroid : In(1), unit_bits : In
        Its mode is not DENSE; is CENTROID; log2 of the codewords of its units.
    first_group : In(group)
        The group buffer of its first stripe.
    ring_base : In(ring)
    stripe_bits : In(stripe_bits)
        log2 of the pages of its stripes.
    stripe_address : Out
        Cat(number in the list, slot) of the codeword's stripe.
    stripe_token : In(24)
        That stripe's first token, one cycle later.
    stripe_whole : In(1), with it
        That stripe is a tail.
    channel : Out
        Number of the codeword in its stripe, which is the channel of a CHANNEL.
    chosen : In(1), one cycle later
        That channel is one of those that `slot`'s job reads.
    mark_read : Out(1), mark_ring : Out(ring)
        Asks which tokens of this place are selected.
    marks : In(tokens_per_codeword), one cycle later
    headers : Out(stream of header)
        One for each codeword let through: slot, key (goes into the score window), ring, token (its first token's
        number), error.  In a sparse configuration also first (of the first pass), channel, centroid; number (of the
        codeword in its stripe), group (buffer), marks (selected tokens), unit_bits.  Ring and token of a CHANNEL are
        those of its stripe, of centroids those of their first unit.
    beats : Out(stream of beat_bytes * 8 bits)
        Their beats; zeros where the codeword has an error.
    value_requests : Out(stream of slot, ring)
        The V codewords among them, for the weight unit; never waits.
    scrub : In(1)
        Clear the bits of ring place `scrub_ring` when `scrubbed`.
    scrub_first : In(1)
        Only that of the first pass.
    scrub_ring : In(ring)
    scrubbed : Out(1)
    duplicate, stale, bad_tag : Out(1)
        Strobes.
    offender : Out(tag)
        The tag that the strobes are about.
    ready : Out(1)
    """

    def __init__(self, config: Config, depth: int) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.depth = depth
        group = (config.groups_in_flight - 1).bit_length()
        number = unsigned(ceil_log2(config.group_codewords) if config.sparse else 1)
        header = {"ring": shapes.ring, "slot": shapes.slot, "key": 1, "token": TOKEN_BITS, "error": 1}
        if config.sparse:
            header |= {"first": 1, "channel": 1, "centroid": 1, "number": number, "group": group,
                       "marks": config.tokens_per_codeword, "unit_bits": shapes.start["unit_bits"].shape}
        self.header = data.StructLayout(header)
        self.value_request = data.StructLayout({"slot": shapes.slot, "ring": shapes.ring})
        self.header_depth = depth // config.beats_per_codeword + 2
        super().__init__({
            "codewords": In(stream.Signature(shapes.beat)),
            "slot": Out(shapes.slot),
            "epoch": In(EPOCH_BITS),
            "active": In(1),
            "open": In(1),
            "failed": In(1),
            "asked": In(shapes.place.width + 1),
            "first_asked": In(shapes.place.width + 1),
            "first_done": In(1),
            "sparse": In(1),
            "centroid": In(1),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "first_group": In(group),
            "ring_base": In(shapes.ring),
            "stripe_bits": In(shapes.stripe_bits),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "stripe_whole": In(1),
            "channel": Out(number),
            "chosen": In(1),
            "mark_read": Out(1),
            "mark_ring": Out(shapes.ring),
            "marks": In(config.tokens_per_codeword),
            "headers": Out(stream.Signature(self.header)),
            "beats": Out(stream.Signature(config.beat_bytes * 8)),
            "value_requests": Out(stream.Signature(self.value_request)),
            "scrub": In(1),
            "scrub_first": In(1),
            "scrub_ring": In(shapes.ring),
            "scrubbed": Out(1),
            "duplicate": Out(1),
            "stale": Out(1),
            "bad_tag": Out(1),
            "offender": Out(shapes.tag),
            "ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        sparse = config.sparse

        # Beats on their way through the check hold a place in the FIFO, so that nothing in between can stall.
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=config.beat_bytes * 8, depth=self.depth)
        credit = Signal(range(self.depth + 1), init=self.depth)
        at_first = Signal(init=1)   # framed by `last`, so that a reset amid a codeword loses no step
        take, dropped = Signal(), Signal()
        first_1, valid_1, error_1 = Signal(), Signal(), Signal()
        data_1 = Signal(config.beat_bytes * 8)
        tag_1 = Signal(shapes.tag)
        beat = self.codewords.payload
        m.d.comb += [
            self.codewords.ready.eq((credit != 0) & self.ready),
            take.eq(self.codewords.valid & self.codewords.ready),
        ]
        m.d.sync += [
            credit.eq(credit - take + dropped + (self.beats.valid & self.beats.ready)),
            valid_1.eq(take),
            first_1.eq(at_first),
            data_1.eq(beat.data),
            error_1.eq(beat.error),
        ]
        with m.If(beat.error):
            m.d.sync += data_1.eq(0)
        with m.If(take):
            m.d.sync += at_first.eq(beat.last)
            with m.If(at_first):
                m.d.sync += tag_1.eq(beat.tag)

        # 1: look the slot up, and send for the stripe: only the last of a list can be partial: the place tells which.
        page_bits = ceil_log2(config.codewords_per_page)
        page, codeword = tag_1.place >> page_bits, tag_1.place[:page_bits]
        page_of_stripe = Signal(shapes.list_bits)
        m.d.comb += [
            self.slot.eq(tag_1.slot),
            self.stripe_address.eq(Cat((page >> self.stripe_bits)[: shapes.list_bits], tag_1.slot)),
            page_of_stripe.eq(page & ((1 << self.stripe_bits) - 1)),
        ]
        valid_2, first_2, error_2, data_2, tag_2 = (
            Signal.like(s, name_suffix="_2") for s in (valid_1, first_1, error_1, data_1, tag_1))
        current_2, asked_2, open_2 = Signal(), Signal(), Signal()
        ring_2 = Signal(shapes.ring)
        token_2 = Signal(range(config.ring_codewords * config.tokens_per_codeword))
        within = Value.cast(Cat(codeword, page_of_stripe))   # number of the first K codeword in the stripe
        of_first_1 = tag_1.kind[1] if sparse else Const(0)
        if sparse:
            # A centroid stands for its unit, whose scores are at the unit's first codeword.
            number_bits = len(self.channel)
            centroid_1, beyond_1 = Signal(), Signal()
            unit_1 = Signal(number_bits + config.slot_bits_per_codeword + config.unit_bits_max)
            m.d.comb += [
                centroid_1.eq((tag_1.kind == Kind.SKETCH) & self.centroid),
                self.channel.eq(tag_1.place),
                unit_1.eq(times(self.channel, config.tokens_per_codeword) << self.unit_bits),
                beyond_1.eq(unit_1[number_bits:].any()),
            ]
            place_1 = Cat(unit_1[:number_bits], tag_1.place[number_bits:])
            within = Mux(tag_1.kind == Kind.FEATURE, 0, Mux(centroid_1, unit_1[:number_bits], within))
            asked_1 = Mux(of_first_1, self.sparse & (tag_1.place < self.first_asked), tag_1.place < self.asked)
            ride = data.StructLayout({
                "sparse": 1, "all_came": 1, "centroids": 1, "beyond": 1, "ring": shapes.ring,
                "number": number_bits, "group": self.first_group.shape(), "unit_bits": self.unit_bits.shape()})
            ride_2, ride_3 = Signal(ride), Signal(ride)
            m.d.sync += [
                ride_2.sparse.eq(self.sparse),
                ride_2.all_came.eq(self.first_done),
                ride_2.centroids.eq(self.centroid),
                ride_2.beyond.eq(beyond_1),
                ride_2.ring.eq(self.ring_base + Mux(
                    tag_1.kind == Kind.FEATURE, Cat(Const(0, number_bits), tag_1.place[number_bits:]),
                    Mux(centroid_1, place_1, tag_1.place))),
                ride_2.number.eq(self.channel),
                ride_2.group.eq(self.first_group + (page >> self.stripe_bits)),
                ride_2.unit_bits.eq(self.unit_bits),
                ride_3.eq(ride_2),
            ]
        else:
            asked_1 = (tag_1.place < self.asked) & ~tag_1.kind[1]
        m.d.sync += [
            valid_2.eq(valid_1), first_2.eq(first_1), error_2.eq(error_1), data_2.eq(data_1), tag_2.eq(tag_1),
            current_2.eq((tag_1.epoch == self.epoch) & self.active & ~self.failed),
            asked_2.eq(asked_1),
            open_2.eq(self.open),
            ring_2.eq(self.ring_base + tag_1.place),
            token_2.eq(times(within, config.tokens_per_codeword)),
        ]

        # 2: has it come before?
        m.submodules.arrived = arrived = Memory(shape=1, depth=config.ring_codewords, init=[])
        seen = arrived.read_port(domain="sync")
        mark = arrived.write_port(domain="sync")
        if sparse:
            m.submodules.first_arrived = first_arrived = Memory(shape=1, depth=config.ring_codewords, init=[])
            first_seen, first_mark = first_arrived.read_port(domain="sync"), first_arrived.write_port(domain="sync")
            m.d.comb += [
                first_seen.addr.eq(ring_2),
                self.mark_read.eq(valid_2 & first_2),
                self.mark_ring.eq(ring_2),
            ]
        valid_3, first_3, error_3, data_3, tag_3 = (
            Signal.like(s, name_suffix="_3") for s in (valid_1, first_1, error_1, data_1, tag_1))
        current_3, asked_3, open_3 = Signal(), Signal(), Signal()
        ring_3 = Signal(shapes.ring)
        token_3 = Signal(TOKEN_BITS)
        m.d.comb += seen.addr.eq(ring_2)
        welcome_2 = (tag_2.kind == Kind.KEY) | open_2
        if sparse:
            channel_2 = self.chosen & ~self.stripe_whole & ~ride_2.centroids
            sketch_2 = Mux(ride_2.centroids, ~self.stripe_whole & ~ride_2.beyond, self.stripe_whole)
            welcome_2 = Mux(tag_2.kind[1], Mux(tag_2.kind[0], sketch_2, channel_2), welcome_2)
        m.d.sync += [
            valid_3.eq(valid_2), first_3.eq(first_2), error_3.eq(error_2), data_3.eq(data_2), tag_3.eq(tag_2),
            current_3.eq(current_2),
            asked_3.eq(asked_2 & welcome_2),
            open_3.eq(open_2),
            ring_3.eq(ring_2),
            token_3.eq(self.stripe_token + token_2),
        ]

        # 3: the verdict holds for the whole codeword.
        key_3 = tag_3.kind == Kind.KEY
        of_first_3 = tag_3.kind[1] if sparse else Const(0)
        new, requested = Signal(), Signal()
        good, good_held, accept = Signal(), Signal(), Signal()
        header_3 = Signal()
        m.d.comb += [
            new.eq((seen.data != key_3) & ~(key_3 & open_3)),   # V is open only when all of K came
            requested.eq(asked_3),
            header_3.eq(valid_3 & first_3),
            good.eq(current_3 & requested & new),
            accept.eq(valid_3 & ((first_3 & good) | (~first_3 & good_held))),
            dropped.eq(valid_3 & ~accept),
            fifo.w_data.eq(data_3),
            fifo.w_en.eq(accept),
            self.beats.payload.eq(fifo.r_data),
            self.beats.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.beats.ready),
        ]
        m.d.sync += [
            self.stale.eq(header_3 & ~current_3),
            self.bad_tag.eq(header_3 & current_3 & ~requested),
            self.duplicate.eq(header_3 & current_3 & requested & ~new),
            self.offender.eq(tag_3),
        ]
        if sparse:
            # Of a sparse job's K and V only what has a selected token is asked for.
            m.d.comb += requested.eq(asked_3 & (of_first_3 | ~ride_3.sparse | self.marks.any()))
            with m.If(of_first_3):
                m.d.comb += new.eq(~first_seen.data & ~ride_3.all_came)
        with m.If(header_3):
            m.d.sync += good_held.eq(good)

        m.submodules.header_fifo = headers = SyncFIFOBuffered(width=self.header.size, depth=self.header_depth)
        header = data.View(self.header, headers.w_data)
        m.d.comb += [
            header.ring.eq(ring_3),
            header.slot.eq(tag_3.slot),
            header.key.eq(tag_3.kind != Kind.VALUE),
            header.token.eq(token_3),
            header.error.eq(error_3),
            headers.w_en.eq(header_3 & good),
            self.headers.payload.eq(headers.r_data),
            self.headers.valid.eq(headers.r_rdy),
            headers.r_en.eq(self.headers.ready),
            self.value_requests.payload.slot.eq(tag_3.slot),
            self.value_requests.payload.ring.eq(ring_3),
            self.value_requests.valid.eq(header_3 & good & (tag_3.kind == Kind.VALUE)),
        ]
        if sparse:
            m.d.comb += [
                header.ring.eq(ride_3.ring),
                header.first.eq(of_first_3),
                header.channel.eq(tag_3.kind == Kind.FEATURE),
                header.centroid.eq(of_first_3 & ride_3.centroids),
                header.number.eq(ride_3.number),
                header.group.eq(ride_3.group),
                header.marks.eq(self.marks | (of_first_3 | ~ride_3.sparse).replicate(config.tokens_per_codeword)),
                header.unit_bits.eq(ride_3.unit_bits),
            ]

        # The bits: set by K, cleared by V, by a scrub after a failed job, and by the sweep after reset.
        sweep = Signal(range(config.ring_codewords + 1))
        m.d.comb += [
            self.ready.eq(sweep == config.ring_codewords),
            mark.en.eq(1),
        ]
        with m.If(~self.ready):
            m.d.sync += sweep.eq(sweep + 1)
            m.d.comb += mark.addr.eq(sweep)
        with m.Elif(header_3):
            m.d.comb += [mark.en.eq(good & ~of_first_3), mark.addr.eq(ring_3), mark.data.eq(key_3)]
        with m.Else():
            m.d.comb += [
                mark.en.eq(self.scrub & ~self.scrub_first), mark.addr.eq(self.scrub_ring), self.scrubbed.eq(1)]
        if sparse:
            with m.If(~self.ready):
                m.d.comb += [first_mark.en.eq(1), first_mark.addr.eq(sweep)]
            with m.Elif(header_3):
                m.d.comb += [first_mark.en.eq(good & of_first_3), first_mark.addr.eq(ring_3), first_mark.data.eq(1)]
            with m.Else():
                m.d.comb += [first_mark.en.eq(self.scrub), first_mark.addr.eq(self.scrub_ring)]
        return m
