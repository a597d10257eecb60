"""A lane's door: checks the tag of each arriving codeword, and buffers its beats while its weights are made."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.commands import Kind
from kvattic.config import Config
from kvattic_hdl.arithmetic import times
from kvattic_hdl.interfaces import EPOCH_BITS, TOKEN_BITS, Shapes


class Intake(wiring.Component):
    """Takes codewords in any order; lets each one that was asked for through exactly once.

    A codeword is `beats_per_codeword` beats; its tag is read with the first one.  It is dropped whole, with an event,
    when its epoch is not the slot's or the job failed (stale), when it was not requested or is a V codeword whose slot
    is not open (bad tag), or when it came before (duplicate).  One bit for each place of the score ring tells: K
    sets it, V clears it, so that it is clear again for the place's next user.  A codeword with an error counts as any
    other.

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
        Its codewords that were requested so far (K).
    ring_base : In(ring)
    stripe_bits : In(stripe_bits)
        log2 of the pages of its stripes.
    stripe_address : Out
        Cat(number in the list, slot) of the codeword's stripe.
    stripe_token : In(24)
        That stripe's first token, one cycle later.
    headers : Out(stream of header)
        One for each codeword let through: slot, key, ring, token (its first token's number), error.
    beats : Out(stream of beat_bytes * 8 bits)
        Their beats; zeros where the codeword has an error.
    value_requests : Out(stream of slot, ring)
        The V codewords among them, for the weight unit; never waits.
    scrub : In(1)
        Clear the bit of ring place `scrub_ring` when `scrubbed`.
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
        self.header = data.StructLayout({
            "ring": shapes.ring, "slot": shapes.slot, "key": 1, "token": TOKEN_BITS, "error": 1})
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
            "ring_base": In(shapes.ring),
            "stripe_bits": In(shapes.stripe_bits),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "headers": Out(stream.Signature(self.header)),
            "beats": Out(stream.Signature(config.beat_bytes * 8)),
            "value_requests": Out(stream.Signature(self.value_request)),
            "scrub": In(1),
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
        m.d.sync += [
            valid_2.eq(valid_1), first_2.eq(first_1), error_2.eq(error_1), data_2.eq(data_1), tag_2.eq(tag_1),
            current_2.eq((tag_1.epoch == self.epoch) & self.active & ~self.failed),
            asked_2.eq(tag_1.place < self.asked),
            open_2.eq(self.open),
            ring_2.eq(self.ring_base + tag_1.place),
            token_2.eq(times(Cat(codeword, page_of_stripe), config.tokens_per_codeword)),
        ]

        # 2: has it come before?
        m.submodules.arrived = arrived = Memory(shape=1, depth=config.ring_codewords, init=[])
        seen = arrived.read_port(domain="sync")
        mark = arrived.write_port(domain="sync")
        valid_3, first_3, error_3, data_3, tag_3 = (
            Signal.like(s, name_suffix="_3") for s in (valid_1, first_1, error_1, data_1, tag_1))
        current_3, asked_3, open_3 = Signal(), Signal(), Signal()
        ring_3 = Signal(shapes.ring)
        token_3 = Signal(TOKEN_BITS)
        m.d.comb += seen.addr.eq(ring_2)
        m.d.sync += [
            valid_3.eq(valid_2), first_3.eq(first_2), error_3.eq(error_2), data_3.eq(data_2), tag_3.eq(tag_2),
            current_3.eq(current_2),
            asked_3.eq(asked_2 & ((tag_2.kind == Kind.KEY) | open_2)),
            open_3.eq(open_2),
            ring_3.eq(ring_2),
            token_3.eq(self.stripe_token + token_2),
        ]

        # 3: the verdict holds for the whole codeword.
        key_3 = tag_3.kind == Kind.KEY
        new = Signal()
        good, good_held, accept = Signal(), Signal(), Signal()
        header_3 = Signal()
        m.d.comb += [
            new.eq((seen.data != key_3) & ~(key_3 & open_3)),   # V is open only when all of K came
            header_3.eq(valid_3 & first_3),
            good.eq(current_3 & asked_3 & new),
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
            self.bad_tag.eq(header_3 & current_3 & ~asked_3),
            self.duplicate.eq(header_3 & current_3 & asked_3 & ~new),
            self.offender.eq(tag_3),
        ]
        with m.If(header_3):
            m.d.sync += good_held.eq(good)

        m.submodules.header_fifo = headers = SyncFIFOBuffered(width=self.header.size, depth=self.header_depth)
        header = data.View(self.header, headers.w_data)
        m.d.comb += [
            header.ring.eq(ring_3),
            header.slot.eq(tag_3.slot),
            header.key.eq(key_3),
            header.token.eq(token_3),
            header.error.eq(error_3),
            headers.w_en.eq(header_3 & good),
            self.headers.payload.eq(headers.r_data),
            self.headers.valid.eq(headers.r_rdy),
            headers.r_en.eq(self.headers.ready),
            self.value_requests.payload.slot.eq(tag_3.slot),
            self.value_requests.payload.ring.eq(ring_3),
            self.value_requests.valid.eq(header_3 & good & ~key_3),
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
            m.d.comb += [mark.en.eq(good), mark.addr.eq(ring_3), mark.data.eq(key_3)]
        with m.Else():
            m.d.comb += [mark.en.eq(self.scrub), mark.addr.eq(self.scrub_ring), self.scrubbed.eq(1)]
        return m
