"""The walker of K or V: turns a job into the codeword requests of one lane, without host or firmware work."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import TOKEN_BITS, Shapes


class Walker(wiring.Component):
    """Requests the codewords of one kind (K or V) of each job, in slot order: stripe by stripe of the lane's list.

    A request every other cycle at most, as a walker goes on in the cycle after one is taken: whether it is hangs on the
    other walkers, too.  Four cycles between jobs.  A job ends with the list, in the job's last stripe before the first
    codeword whose tokens are all beyond `end_token`, or at once when it failed.  Of a sparse job only codewords with a selected token are requested; a place without one takes
    a cycle, or as long as it takes to look it up.  Reset forgets everything.

    Parameters
    ----------
    config : Config
    kind : commands.Kind

    Members
    -------
    enable : In(jobs_in_flight)
        Strobes: the job of the slot may be walked.  Its list is complete.
    expect : In(jobs_in_flight)
        The jobs of these slots are there, but may not be walked yet: do not go on to a later one.
    slot : Out(slot)
        The job in work, or the next one.  `job`, `skip`, `ring_base` must hold its parameters in the same cycle.
    job : In(walk)
    skip : In(1)
        It is a sparse one.
    ring_base : In(ring)
    look : Out(1), look_ring : Out(ring), look_granted : In(1)
        Does the codeword at this place of the ring have a selected token?
    wanted : In(1)
        It does; one cycle after `look` was granted.
    stripe_address : Out
        Cat(number in the list, slot) of a stripe.
    stripe : In(Shapes.stripe)
        That stripe, one cycle later.
    failed : In(1)
        The job in work is being abandoned; of the `slot` of the cycle before.
    ready_to_ask : Out(1)
        `requests` is valid, or would be if `room` were given.
    room : In(1)
        A request may be made.
    follow : Out(1)
        The next codeword of the page may follow the one just requested: nothing else should come in between, so that
        the controller reads them as one run.
    requests : Out(stream of request)
    asked : Out(1)
        Strobe: the request that was taken in the cycle before; `requests`' payload still shows it.
    begin : Out(1)
        Strobe: the job of `slot` begins.
    end : Out(1)
        Strobe: all requests of the job of `slot` are made.
    """

    def __init__(self, config: Config, kind: int) -> None:
        self.config = config
        self.kind = kind
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "enable": In(config.jobs_in_flight),
            "expect": In(config.jobs_in_flight),
            "slot": Out(shapes.slot),
            "job": In(shapes.walk),
            "skip": In(1),
            "ring_base": In(shapes.ring),
            "look": Out(1),
            "look_ring": Out(shapes.ring),
            "look_granted": In(1),
            "wanted": In(1),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe": In(shapes.stripe),
            "failed": In(1),
            "ready_to_ask": Out(1),
            "room": In(1),
            "follow": Out(1),
            "requests": Out(stream.Signature(shapes.request)),
            "asked": Out(1),
            "begin": Out(1),
            "end": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        page_bits = ceil_log2(config.codewords_per_page)
        enabled = Signal(config.jobs_in_flight)
        running = Signal()
        request = Signal(shapes.request)
        tag = request.tag
        m.d.comb += self.requests.payload.eq(request)

        # The next stripe of the list stands ready while one is walked.
        left = Signal(shapes.walk["stripes"].shape)
        index = Signal(shapes.list_bits)
        settled = Signal()
        within, final = Signal(), Signal()   # `request` is of a stripe; of the job's last one
        tail = Signal()
        # In the job's last stripe, if that is a tail: tokens from the codeword on; there were some at its beginning.
        tail_left, tail_begins = Signal(TOKEN_BITS), Signal()
        mask = Signal(shapes.list_bits)      # the bits of a page's number in its stripe
        more = Signal()      # the codeword has tokens
        fetch, page_end, stripe_end = Signal(), Signal(), Signal()
        here = Signal()      # the next place is worth a request
        advance = Signal()   # on to the next place
        m.d.comb += [
            self.begin.eq(~running & enabled.bit_select(self.slot, 1)),
            self.ready_to_ask.eq(running & within & more & here & ~self.failed & ~self.asked),
            self.requests.valid.eq(self.ready_to_ask & self.room),
            self.end.eq(running & ~self.asked & (self.failed | Mux(within, ~more, left == 0))),
            page_end.eq(request.codeword == config.codewords_per_page - 1),
            # A stripe begins at a multiple of its size, so a place tells where in its stripe it is.
            stripe_end.eq(page_end & (((tag.place >> page_bits) & mask) == mask)),
            fetch.eq(running & (left != 0) & settled & (~within | (advance & stripe_end))),
            self.stripe_address.eq(Cat(index, self.slot)),
        ]
        m.d.sync += [self.asked.eq(self.requests.valid & self.requests.ready), settled.eq(1)]
        if config.sparse:
            skip, looking, looked = Signal(), Signal(), Signal()
            ring_base = Signal(shapes.ring)
            follow = Signal()
            # While a place's answer comes the next one is looked up, for nothing if this one is wanted.
            m.d.comb += [
                self.look.eq(running & within & more & skip & ~looked & ~self.failed),
                self.look_ring.eq(ring_base + tag.place + looking),
                here.eq(~skip | looked),
                advance.eq(self.asked | (looking & more & ~self.wanted)),
                self.follow.eq(Mux(self.asked, skip & ~page_end, follow)),
            ]
            m.d.sync += looking.eq(self.look & self.look_granted & ~(looking & (self.wanted | stripe_end)))
            with m.If(looking & self.wanted):
                m.d.sync += looked.eq(1)
            with m.If(self.asked):
                m.d.sync += [looked.eq(0), follow.eq(skip & ~page_end)]
            with m.Elif(advance | self.end):
                m.d.sync += follow.eq(0)
            with m.If(self.begin):
                m.d.sync += [skip.eq(self.skip), looked.eq(0), ring_base.eq(self.ring_base)]
        else:
            m.d.comb += [here.eq(1), advance.eq(self.asked)]
        with m.If(advance):
            m.d.sync += [
                tag.place.eq(tag.place + 1),
                request.codeword.eq(Mux(page_end, 0, request.codeword + 1)),
                request.page.eq(request.page + page_end),
                within.eq(~stripe_end),
            ]
            with m.If(final):
                m.d.sync += [
                    tail_left.eq(tail_left - config.tokens_per_codeword),
                    more.eq(tail_left > config.tokens_per_codeword),
                ]
        is_final = (left == 1) & tail
        with m.If(fetch):
            m.d.sync += [
                request.page.eq(self.stripe.page),
                request.dram.eq(self.stripe.dram),
                *([request.of_lane.eq(self.stripe.of_lane)] if config.lane_channels > 1 else []),
                within.eq(1),
                final.eq(is_final),
                more.eq(~is_final | tail_begins),
                left.eq(left - 1),
                index.eq(index + 1),
                settled.eq(0),
            ]
        with m.If(self.begin):
            m.d.sync += [
                running.eq(1),
                within.eq(0),
                final.eq(0),
                left.eq(self.job.stripes),
                tail.eq(self.job.tail),
                more.eq(1),
                tail_left.eq(self.job.end_token - self.job.last_token),
                tail_begins.eq(self.job.last_token < self.job.end_token),
                mask.eq((1 << self.job.stripe_bits) - 1),
                request.codeword.eq(0),
                tag.place.eq(0),
                tag.kind.eq(self.kind),
                tag.slot.eq(self.slot),
                tag.epoch.eq(self.job.epoch),
            ]
        with m.If(self.end):
            m.d.sync += [running.eq(0), enabled.bit_select(self.slot, 1).eq(0), index.eq(0)]
        # On to the next slot; also past one whose job never came to the lanes, before it has another one.
        nothing = ~running & ~(enabled | self.expect).bit_select(self.slot, 1)
        with m.If(self.end | (nothing & (enabled | self.expect).any())):
            m.d.sync += [self.slot.eq(Mux(self.slot == config.jobs_in_flight - 1, 0, self.slot + 1)), settled.eq(0)]
        for s in range(config.jobs_in_flight):
            with m.If(self.enable[s]):
                m.d.sync += enabled[s].eq(1)
        return m
