"""The walker of the first pass: turns a sparse job into the requests of what its mode reads first."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import PAGE_BITS, TOKEN_BITS, Shapes


def first_walk_shape(config: Config) -> data.StructLayout:
    """A job as `FirstWalker` needs it: `Shapes.walk` without stripe_bits, and mode, features, unit_bits, sinks."""
    shapes = Shapes(config)
    names = ("mode", "features", "unit_bits", *(("sinks",) if config.codes else ()))
    return data.StructLayout(
        {name: field.shape for name, field in shapes.walk if name != "stripe_bits"}
        | {name: shapes.start[name].shape for name in names})


def sink_bits(config: Config) -> int:
    """Bits of the codewords of K that hold sinks, of which CODES may have half of a stripe."""
    return bits_for(Shapes(config).octet_place)


def first_stripe_shape(config: Config) -> data.StructLayout:
    """Where what the first pass reads of a stripe begins: page, codeword, dram, of_lane; whole; token, its first one.

    whole: it is attended whole, as one in DRAM always is, and page is the first one of its K.
    """
    shapes = Shapes(config)
    request = shapes.request
    return data.StructLayout({
        "page": request["page"].shape, "codeword": request["codeword"].shape, "dram": 1, "whole": 1,
        "token": TOKEN_BITS} | shapes.of_lane)


class FirstWalker(wiring.Component):
    """Requests what the first pass of each sparse job reads, in slot order; waits for dense jobs to take their places.

    Of each stripe of the lane's list, which opens a group: the chosen features, all octets of codes (behind K of the
    sinks), or all centroids; of one that is attended whole (the tail) K, up to `end_token`, or nothing if centroids are
    what counts.  Takes all of the job's
    places of the score ring when it begins.  At most one request in four cycles.  A job ends with the list, or at once
    when it failed.  Reset forgets everything.

    Parameters
    ----------
    config : Config

    Members
    -------
    enable : In(jobs_in_flight)
        Strobes: the job of the slot has come; its lists are complete.
    slot : Out(slot)
        The job in work, or the next one.  `job` must hold its parameters in the same cycle.
    job : In(`first_walk_shape`)
    keys_walked : In(1)
        The job of `slot` is dense and has taken all of its places in the ring, so that it can be passed.
    fits : In(1)
        The ring has room for all stripes of the job of `slot`; of the `slot` of two cycles before.
    failed : In(1)
        The job of `slot` is being abandoned; of the `slot` of the cycle before.
    stripe_address : Out
        Cat(number in the list, slot) of a stripe.
    stripe : In(`first_stripe_shape`)
        That stripe, one cycle later.
    chosen_address : Out
        Cat(number among the chosen, slot) of a chosen feature.
    chosen : In(feature of q)
        That feature, one cycle later.
    sink_page : In
        The first page of K of the sequence of `slot`, in the same cycle.  Only if `config.codes`.
    requests : Out(stream of request)
    asked : Out(1)
        As `Walker`'s.
    follow : Out(1)
        As `Walker`'s, of centroids and of K.
    begin : Out(1)
        Strobe: the job of `slot` begins, and takes `fits`'s places of the ring.
    end : Out(1)
        Strobe: all requests of the (sparse) job of `slot` are made.
    room : In(1)
        A group may be opened.
    open, close : Out(1)
        Strobes: a group begins, of the stripe with first place `place` (in the job), first token `token`, which is read
        in features if `features`, but `sinks` codewords of K exactly; all of it is asked for.
    place, token, features : Out
    sinks : Out
        Only if `config.codes`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.feature_bits = ceil_log2(config.head_dim)
        self.request: Any = Signal(shapes.request)
        self.left = Signal(shapes.walk["stripes"].shape)   # stripes that are still to be read
        self.index = Signal(shapes.list_bits)              # of the stripe in work
        # Where its codewords begin, how many there are, the next one's number; by feature, or ended by `end_token`.
        self.first = Signal(len(self.request.page) + ceil_log2(config.codewords_per_page))
        self.limit, self.number = Signal(bits_for(config.group_codewords)), Signal(bits_for(config.group_codewords))
        self.by_feature, self.bounded = Signal(), Signal()
        self.next_token = Signal(TOKEN_BITS + 1)   # of the next codeword, if the job's last stripe is a tail
        self.more, self.go_on, self.centroids = Signal(), Signal(), Signal()
        self.codes, self.in_sinks = Signal(), Signal()   # the mode; K of the sinks is asked for, before the codes
        # Of `slot`, a cycle late: any job is there; its own is; was the cycle before, so that `fits` is about it; is
        # dense; has taken all of its places.
        self.known = [Signal(name=name) for name in ("any_here", "here", "stayed", "dense", "walked")]
        self.asking = Signal()   # in state "ask"
        self.following = Signal()   # `follow`, from the cycle after `asked` on
        self.looked = Signal(2)   # it is the same as in the cycle before; as two cycles before
        super().__init__({
            "enable": In(config.jobs_in_flight),
            "slot": Out(shapes.slot),
            "job": In(first_walk_shape(config)),
            "keys_walked": In(1),
            "fits": In(1),
            "failed": In(1),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe": In(first_stripe_shape(config)),
            "chosen_address": Out(self.feature_bits + shapes.slot.width),
            "chosen": In(self.feature_bits),
            "requests": Out(stream.Signature(shapes.request)),
            "asked": Out(1),
            "follow": Out(1),
            "begin": Out(1),
            "end": Out(1),
            "room": In(1),
            "open": Out(1),
            "close": Out(1),
            "place": Out(shapes.place),
            "token": Out(TOKEN_BITS),
            "features": Out(1),
        } | ({"sink_page": In(PAGE_BITS), "sinks": Out(sink_bits(config))} if config.codes else {}))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        enabled = Signal(config.jobs_in_flight)
        self._describe(m)
        _, here, *_ = self.known
        now = (enabled.any(), enabled.bit_select(self.slot, 1), here, self.job.mode == Mode.DENSE, self.keys_walked)
        m.d.sync += [known.eq(value) for known, value in zip(self.known, now, strict=True)]
        m.d.sync += self.asked.eq(self.requests.valid & self.requests.ready)
        m.d.sync += self.looked.eq(Mux(self.go_on, 0, Cat(Const(1, 1), self.looked)))
        with m.FSM(name="state"):
            self._begin_job(m)
            self._open_stripe(m)
            self._ask(m)
        with m.If(self.go_on):
            m.d.sync += [
                enabled.bit_select(self.slot, 1).eq(0),
                self.slot.eq(Mux(self.slot == config.jobs_in_flight - 1, 0, self.slot + 1)),
            ]
        for s in range(config.jobs_in_flight):
            with m.If(self.enable[s]):
                m.d.sync += enabled[s].eq(1)
        return m

    def _describe(self, m: Module) -> None:
        """The stripe in work, and what is asked for."""
        m.d.comb += [
            self.requests.valid.eq(self.asking & ~self.asked & ~self.failed),
            self.follow.eq(Mux(self.asked, (~self.by_feature | self.codes) & ~self.request.dram
                               & (self.request.codeword != self.config.codewords_per_page - 1), self.following)),
            self.centroids.eq(self.job.mode == Mode.CENTROID),
            self.codes.eq(self.job.mode == Mode.CODES if self.config.codes else 0),
            self.more.eq((self.number != self.limit) & (~self.bounded | (self.next_token < self.job.end_token))),
            self.stripe_address.eq(Cat(self.index, self.slot)),
            self.chosen_address.eq(Cat(self.number[: self.feature_bits], self.slot)),
            self.token.eq(self.stripe.token),
            self.features.eq(~self.stripe.whole & ~self.centroids),
            self.requests.payload.eq(self.request),
        ]
        if self.config.codes:
            up = self.config.tokens_per_codeword - 1
            with m.If(self.codes & ~self.stripe.whole & (self.stripe.token == 0)):
                m.d.comb += self.sinks.eq((self.job.sinks + up) >> self.config.slot_bits_per_codeword)

    def _end_job(self, m: Module) -> None:
        m.d.comb += [self.end.eq(1), self.go_on.eq(1)]
        m.next = "idle"

    def _close_stripe(self, m: Module) -> None:
        m.d.comb += self.close.eq(1)
        m.d.sync += [
            self.following.eq(0), self.left.eq(self.left - 1), self.index.eq(self.index + 1),
            self.place.eq(self.place + self.config.group_codewords)]
        m.next = "next"

    def _begin_job(self, m: Module) -> None:
        any_here, here, stayed, dense, walked = self.known
        with m.State("idle"):
            m.d.sync += [self.index.eq(0), self.left.eq(self.job.stripes), self.place.eq(0)]
            with m.If(self.looked.all()):
                with m.If(~here):
                    m.d.comb += self.go_on.eq(any_here)   # also past a slot whose job never came to the lanes
                with m.Elif(dense):
                    m.d.comb += self.go_on.eq(walked)
                with m.Elif(self.failed):
                    self._end_job(m)
                with m.Elif(self.fits & stayed):
                    m.d.comb += self.begin.eq(1)
                    m.next = "next"

    def _open_stripe(self, m: Module) -> None:
        config, stripe = self.config, self.stripe
        codeword_bits = ceil_log2(config.codewords_per_page)
        with m.State("next"):   # the stripe comes
            m.next = "stripe"
        with m.State("stripe"):
            with m.If(self.failed | (self.left == 0)):
                self._end_job(m)
            with m.Elif(self.room):
                m.d.comb += self.open.eq(1)
                m.d.sync += [
                    self.first.eq(Cat(stripe.codeword[:codeword_bits], stripe.page)),
                    self.by_feature.eq(self.features),
                    self.request.dram.eq(stripe.dram),
                    *([self.request.of_lane.eq(stripe.of_lane)] if config.lane_channels > 1 else []),
                    self.number.eq(0),
                    self.bounded.eq(stripe.whole & (self.left == 1) & self.job.tail),
                    self.next_token.eq(self.job.last_token),
                    self.limit.eq(config.group_codewords),
                ]
                with m.If(self.features):
                    m.d.sync += self.limit.eq(self.job.features)
                with m.Elif(self.centroids):
                    units = config.group_codewords // config.tokens_per_codeword
                    m.d.sync += self.limit.eq(Mux(stripe.whole, 0, units >> self.job.unit_bits))
                if config.codes:
                    with m.If(self.codes & ~stripe.whole):
                        m.d.sync += self.limit.eq(config.octets)
                        with m.If(self.sinks.any()):
                            m.d.sync += [
                                self.in_sinks.eq(1), self.by_feature.eq(0), self.limit.eq(self.sinks),
                                self.first.eq(Cat(Const(0, codeword_bits), self.sink_page))]
                m.next = "choose"

    def _pass_sinks(self, m: Module) -> None:
        """K of the sinks is asked for: go on with the stripe's codes."""
        config, stripe = self.config, self.stripe
        m.d.sync += [
            self.in_sinks.eq(0), self.by_feature.eq(1), self.following.eq(0), self.number.eq(0),
            self.limit.eq(config.octets),
            self.first.eq(Cat(stripe.codeword[: ceil_log2(config.codewords_per_page)], stripe.page))]

    def _ask(self, m: Module) -> None:
        """Ask for the stripe's codewords one by one."""
        config, request, number = self.config, self.request, self.number
        codeword_bits = ceil_log2(config.codewords_per_page)
        chosen = Mux(self.by_feature & ~self.codes, self.chosen, number)
        # Octets have places of their own, beside those of K.
        octet = Mux(self.by_feature & self.codes, self.shapes.octet_place, 0)
        position = self.first + chosen
        with m.State("choose"):   # the feature comes
            with m.If(self.more & ~self.failed):
                m.next = "form"
            with m.Elif(self.in_sinks & ~self.failed):
                self._pass_sinks(m)
            with m.Else():
                m.d.sync += self.in_sinks.eq(0)
                self._close_stripe(m)
        with m.State("form"):
            m.d.sync += [
                request.page.eq(position >> codeword_bits),
                request.codeword.eq(position[:codeword_bits]),
                request.tag.place.eq(self.place + (chosen | octet)),
                request.tag.kind.eq(Mux(self.by_feature, Kind.FEATURE, Kind.SKETCH)),
                request.tag.slot.eq(self.slot),
                request.tag.epoch.eq(self.job.epoch),
                self.asking.eq(1),
            ]
            m.next = "ask"
        with m.State("ask"):
            with m.If(self.asked):
                m.d.sync += [
                    self.asking.eq(0),
                    self.following.eq(self.follow),
                    number.eq(number + 1),
                    self.next_token.eq(self.next_token + config.tokens_per_codeword),
                ]
                m.next = "choose"
            with m.Elif(self.failed):
                m.d.sync += [self.asking.eq(0), self.in_sinks.eq(0)]
                self._close_stripe(m)
