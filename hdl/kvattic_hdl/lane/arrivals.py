"""Arriving codewords: each tag is checked, and each codeword that was asked for let through once, to its buffer."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.exponential import Exponential
from kvattic_hdl.lib.shapes import EPOCH_BITS, TOKEN_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import Queue


def beats_buffered(config: Config) -> int:
    """Beats that are buffered: covers the time from a V codeword's arrival to its first weight.

    An octet is issued only when all of it is there, so that it must not hold the last place.
    """
    weights = 1 << (Exponential.LATENCY + 12 + config.rows - 1).bit_length()
    return max(weights, 2 * config.group_words) if config.codes else weights


def headers_buffered(config: Config) -> int:
    """Codewords that may begin within `beats_buffered`, and two."""
    return beats_buffered(config) // config.beats_per_codeword + 2


def header_shape(config: Config) -> data.StructLayout:
    """A codeword that was let through.

    slot; ring (its place in the score ring), token (its first token's number): of a FEATURE those of its stripe, of
    centroids those of their first unit; into_score: all but V; error; read: it is to be copied.  Sparse
    configurations only: first (it is of the first pass), feature, centroid, number (of the codeword in its stripe),
    group (its buffer), marks (selected tokens), unit_bits.  `Config.codes` only: codes: an octet of codes.
    """
    shapes = Shapes(config)
    header = {"ring": shapes.ring, "slot": shapes.slot, "into_score": 1, "token": TOKEN_BITS, "error": 1,
              "read": 1}
    if config.sparse:
        header |= {"first": 1, "feature": 1, "centroid": 1, "number": ceil_log2(config.group_codewords),
                   "group": (config.groups_in_flight - 1).bit_length(), "marks": config.tokens_per_codeword,
                   "unit_bits": shapes.start["unit_bits"].shape}
    if config.codes:
        header["codes"] = 1
    return data.StructLayout(header)


class CodewordBuffer(wiring.Component):
    """FIFOs of the codewords that were let through, headers and beats.  `Arrivals` counts the beats' places.

    Latency 2 cycles of headers, 1 of beats.  Reset empties them.

    Parameters
    ----------
    config : Config

    Members
    -------
    headers_i : In(stream of header), beats_i : In(stream of beat_bytes * 8 bits)
        Written by `Arrivals`.
    headers_o : Out(stream of header), beats_o : Out(stream of beat_bytes * 8 bits)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        headers, beats = header_shape(config), config.beat_bytes * 8
        super().__init__({
            "headers_i": In(stream.Signature(headers, always_ready=True)),
            "beats_i": In(stream.Signature(beats, always_ready=True)),
            "headers_o": Out(stream.Signature(headers)),
            "beats_o": Out(stream.Signature(beats)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        headers = SyncFIFOBuffered(width=header_shape(self.config).size, depth=headers_buffered(self.config))
        m.submodules.headers = headers
        m.submodules.beats = beats = Queue(self.config.beat_bytes * 8, beats_buffered(self.config))
        connect(m, flipped(self.beats_i), beats.i)
        connect(m, beats.o, flipped(self.beats_o))
        m.d.comb += [
            headers.w_data.eq(self.headers_i.payload),
            headers.w_en.eq(self.headers_i.valid),
            self.headers_o.payload.eq(headers.r_data),
            self.headers_o.valid.eq(headers.r_rdy),
            headers.r_en.eq(self.headers_o.ready),
        ]
        return m


class ArrivalBits(wiring.Component):
    """One bit for each place of the score ring: its codeword of K came, that of V not yet.  Another for the first pass.

    K sets the bit, V clears it, so that it is clear again for the place's next user; those of abandoned jobs and of
    first passes are scrubbed, when nothing arrives.  After reset all bits are cleared, until `ready`.

    Parameters
    ----------
    config : Config

    Members
    -------
    ring : In(ring)
        Whose bits are read.
    came, first_came : Out(1), one cycle later
    header : In(1)
        A codeword arrived; the following inputs are about it.
    good : In(1)
        It is let through.
    first : In(1), key : In(1)
        It is of the first pass, or else of K.
    header_ring : In(ring)
    scrub : In(1), scrub_first : In(1), scrub_ring : In(ring)
        Clear both bits of this place, or only that of the first pass.
    scrubbed : Out(1)
        They are cleared in this cycle.
    ready : Out(1)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "ring": In(shapes.ring),
            "came": Out(1),
            "first_came": Out(1),
            "header": In(1),
            "good": In(1),
            "first": In(1),
            "key": In(1),
            "header_ring": In(shapes.ring),
            "scrub": In(1),
            "scrub_first": In(1),
            "scrub_ring": In(shapes.ring),
            "scrubbed": Out(1),
            "ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        places = self.config.ring_codewords
        m.submodules.bits = bits = Memory(shape=1, depth=places, init=[])
        read, write = bits.read_port(domain="sync"), bits.write_port(domain="sync")
        cleared = Signal(range(places))
        m.d.comb += [
            read.addr.eq(self.ring),
            self.came.eq(read.data),
            write.en.eq(1),
        ]
        with m.If(~self.ready):
            m.d.sync += [cleared.eq(cleared + 1), self.ready.eq(cleared == places - 1)]
            m.d.comb += write.addr.eq(cleared)
        with m.Elif(self.header):
            m.d.comb += [
                write.en.eq(self.good & ~self.first), write.addr.eq(self.header_ring), write.data.eq(self.key)]
        with m.Else():
            m.d.comb += [
                write.en.eq(self.scrub & ~self.scrub_first), write.addr.eq(self.scrub_ring), self.scrubbed.eq(1)]
        if self.config.sparse:
            m.submodules.first_bits = first_bits = Memory(shape=1, depth=places, init=[])
            read, write = first_bits.read_port(domain="sync"), first_bits.write_port(domain="sync")
            m.d.comb += [read.addr.eq(self.ring), self.first_came.eq(read.data)]
            with m.If(~self.ready):
                m.d.comb += [write.en.eq(1), write.addr.eq(cleared)]
            with m.Elif(self.header):
                m.d.comb += [
                    write.en.eq(self.good & self.first), write.addr.eq(self.header_ring), write.data.eq(1)]
            with m.Else():
                m.d.comb += [write.en.eq(self.scrub), write.addr.eq(self.scrub_ring)]
        return m


class Arrivals(wiring.Component):
    """Takes codewords in any order; lets each one that was asked for through exactly once.

    A codeword is framed by `last`; its tag is read with the first beat.  It is dropped whole, with an event,
    when its epoch is not the slot's or the job failed (stale), when it was not requested or is a V codeword whose slot
    is not open (bad tag), or when it came before (duplicate).  One bit for each place of the score ring tells: K
    sets it, V clears it, so that it is clear again for the place's next user.  The first pass has bits of its own,
    which are scrubbed when all of it came.  A codeword with an error counts as any other.

    Latency 4 cycles; one beat each cycle.  After reset `ready` stays low until the bits are cleared.

    Parameters
    ----------
    config : Config

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
    begun : In(1), asked : In
        Its K walk has begun; its codewords that were requested so far: a place below it may have come.
    read : In(1)
        It is a READ.
    first_asked : In
        The same for its first pass.
    first_done : In(1)
        All of its first pass came.
    sparse, centroid : In(1), unit_bits : In
        Its mode is not DENSE; is CENTROID; log2 of the codewords of its units.
    first_group : In(group)
        The group buffer of its first stripe.
    ring_base : In(ring)
    next_slot : Out(slot), stripe_bits : In(stripe_bits)
        The slot of the beat that comes; log2 of the pages of its job's stripes.  A cycle before the others, for the
        stripe's address hangs on it.
    stripe_address : Out
        Cat(number in the list, slot) of the codeword's stripe.
    stripe_token : In(24)
        That stripe's first token, one cycle later.
    stripe_whole : In(1), with it
        That stripe is a tail.
    codes : In(1), sinks : In
        Its mode is CODES; the sequence's first tokens, whose K belongs to its first pass.  Only if `config.codes`.
    stripe_first : In(1), with `stripe_token`
        That stripe is the sequence's first one.  Only if `config.codes`.
    feature : Out
        Number of the codeword in its stripe, which is the feature of a FEATURE.
    chosen : In(1), one cycle later
        That feature is one of those that `slot`'s job reads.
    mark_read : Out(1), mark_ring : Out(ring)
        Asks which tokens of this place are selected.
    marks : In(tokens_per_codeword), one cycle later
    headers : Out(stream of header)
        One for each codeword let through, see `header_shape`.
    beats : Out(stream of beat_bytes * 8 bits)
        Their beats; zeros where the codeword has an error.  At most `beats_buffered` are under way.
    beat_taken : In(1)
        Strobe: one of them was taken out of its buffer.
    codes_taken : In(1)
        Likewise, of an octet.  Only if `config.codes`.
    heading : Out(1)
        If there is one of `beats`, it is its codeword's first: known before it is let through.  Only if `config.codes`.
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

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.bits = ArrivalBits(config)
        group = (config.groups_in_flight - 1).bit_length()
        number = unsigned(ceil_log2(config.group_codewords) if config.sparse else 1)
        unit_bits = shapes.start["unit_bits"].shape
        arriving = {"valid": 1, "first": 1, "error": 1, "data": config.beat_bytes * 8, "tag": shapes.tag}
        known = {"current": 1, "asked": 1, "due": 1, "open": 1, "ring": shapes.ring, "read": 1}
        if config.sparse:
            known |= {"sparse": 1, "first_asked": 1, "any_token": 1, "all_came": 1, "centroids": 1, "beyond": 1,
                      "header_ring": shapes.ring, "number": number, "group": group, "unit_bits": unit_bits,
                      "ring_base": shapes.ring, "stripe": group}
        if config.codes:
            known |= {"codes": 1, "octet": 1, "sink": 1}
        self.arriving = data.StructLayout(arriving)   # a beat, in each stage; first: of its codeword
        self.known = data.StructLayout(known)         # what its tag means, from stage 2 on
        self.value_request = data.StructLayout({"slot": shapes.slot, "ring": shapes.ring})
        super().__init__({
            "codewords": In(stream.Signature(shapes.beat)),
            "slot": Out(shapes.slot),
            "epoch": In(EPOCH_BITS),
            "active": In(1),
            "open": In(1),
            "failed": In(1),
            "begun": In(1),
            "asked": In(shapes.place.width + 1),
            "read": In(1),
            "first_asked": In(shapes.place.width + 1),
            "first_done": In(1),
            "sparse": In(1),
            "centroid": In(1),
            "unit_bits": In(unit_bits),
            "first_group": In(group),
            "ring_base": In(shapes.ring),
            "next_slot": Out(shapes.slot),
            "stripe_bits": In(shapes.stripe_bits),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "stripe_whole": In(1),
            "feature": Out(number),
            "chosen": In(1),
            "mark_read": Out(1),
            "mark_ring": Out(shapes.ring),
            "marks": In(config.tokens_per_codeword),
            "headers": Out(stream.Signature(header_shape(config), always_ready=True)),
            "beats": Out(stream.Signature(config.beat_bytes * 8, always_ready=True)),
            "beat_taken": In(1),
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
        } | ({
            "codes": In(1), "sinks": In(shapes.start["sinks"].shape), "stripe_first": In(1), "codes_taken": In(1),
            "heading": Out(1)}
            if config.codes else {}))
        self._stripe_bits = Signal(shapes.stripe_bits, name="stripe_bits_1")    # stage 1

    def elaborate(self, platform: object) -> Module:
        m = Module()
        stage_1, stage_2, stage_3 = (Signal(self.arriving, name=f"stage_{i}") for i in (1, 2, 3))
        known_2, known_3 = Signal(self.known), Signal(self.known)
        token_2 = Signal(range(self.config.ring_codewords * self.config.tokens_per_codeword))   # in its stripe
        token_3 = Signal(TOKEN_BITS)
        dropped = Signal()
        welcome = self._welcome(stage_2.tag, known_2)
        m.d.sync += [
            stage_2.eq(stage_1),
            stage_3.eq(stage_2),
            known_3.eq(known_2),
            known_3.asked.eq(welcome),
            known_3.due.eq(known_2.current & welcome),
            token_3.eq(self.stripe_token + token_2),
        ]
        self._take(m, stage_1, dropped)
        self._look_up(m, stage_1.tag, known_2, token_2)
        if self.config.sparse:
            self._look_up_first_pass(m, stage_1.tag, known_2)
            m.d.comb += [
                self.mark_read.eq(stage_2.valid & stage_2.first),
                self.mark_ring.eq(known_2.ring),
            ]
            m.d.sync += [
                known_3.any_token.eq(stage_2.tag.kind[1] | ~known_2.sparse),
                # Stage 1 found how far from the job's first place, and from its first group.
                known_3.header_ring.eq(known_2.ring_base + known_2.header_ring),
                known_3.group.eq(known_2.group + known_2.stripe),
            ]
        header_3 = Signal()
        m.d.sync += header_3.eq(stage_2.valid & stage_2.first)
        self._judge(m, stage_3, header_3, known_2, known_3, token_3, dropped)
        return m

    def _take(self, m: Module, stage_1: Any, dropped: Signal) -> None:
        """Take a beat.  Those under way to the buffer hold a place in it, so that nothing in between can stall."""
        depth = beats_buffered(self.config)
        credit = Signal(range(depth + 1), init=depth)
        has_credit = Signal()   # for one more, whatever is taken in this cycle
        at_first = Signal(init=1)   # framed by `last`, so that a reset amid a codeword loses no step
        take, given_back = Signal(), Signal(2)
        beat = self.codewords.payload
        m.d.comb += [
            self.next_slot.eq(beat.tag.slot),
            self.codewords.ready.eq(has_credit),
            take.eq(self.codewords.valid & self.codewords.ready),
        ]
        m.d.sync += [
            given_back.eq(dropped + self.beat_taken + (self.codes_taken if self.config.codes else 0)),
            credit.eq(credit - take + given_back),
            has_credit.eq(self.ready & ((credit > 1) | given_back.any())),
            stage_1.valid.eq(take),
            stage_1.first.eq(at_first),
            stage_1.data.eq(Mux(beat.error, 0, beat.data)),
            stage_1.error.eq(beat.error),
        ]
        with m.If(take):
            m.d.sync += at_first.eq(beat.last)
            with m.If(at_first):
                m.d.sync += [stage_1.tag.eq(beat.tag), self._stripe_bits.eq(self.stripe_bits)]

    def _parts(self, tag: Any) -> tuple[Value, Value]:
        """The place's page, and codeword in that page."""
        page_bits = ceil_log2(self.config.codewords_per_page)
        return tag.place >> page_bits, tag.place[:page_bits]

    def _unit(self, tag: Any) -> Value:
        """Number in the stripe of the first K codeword of a centroid's unit: the centroid's scores are kept there."""
        number_bits = len(self.feature)
        unit = Value.cast(times(self.feature, self.config.tokens_per_codeword) << self.unit_bits)
        return unit[: number_bits + self.config.slot_bits_per_codeword + self.config.unit_bits_max]

    def _look_up(self, m: Module, tag: Any, known_2: Any, token_2: Signal) -> None:
        """Stage 1: look the slot up, and send for the stripe.

        Only the last stripe of a list can be partial, so that the place tells which one it is.
        """
        config, shapes = self.config, self.shapes
        page, codeword = self._parts(tag)
        page_of_stripe = Signal(shapes.list_bits)
        within = Value.cast(Cat(codeword, page_of_stripe))   # number of the first K codeword in the stripe
        if config.sparse:
            of_unit = self._unit(tag)[: len(self.feature)]
            centroid = (tag.kind == Kind.SKETCH) & self.centroid
            within = Mux(tag.kind == Kind.FEATURE, 0, Mux(centroid, of_unit, within))
            m.d.sync += known_2.first_asked.eq(tag.place < self.first_asked)
        m.d.comb += [
            self.slot.eq(tag.slot),
            self.stripe_address.eq(Cat((page >> self._stripe_bits)[: shapes.list_bits], tag.slot)),
            page_of_stripe.eq(page & ((1 << self._stripe_bits) - 1)),
        ]
        m.d.sync += [
            known_2.current.eq((tag.epoch == self.epoch) & self.active & ~self.failed),
            known_2.asked.eq((tag.place < self.asked) & self.begun),
            known_2.open.eq(self.open),
            known_2.ring.eq(self.ring_base + tag.place),
            known_2.read.eq(self.read),
            token_2.eq(times(within, config.tokens_per_codeword)),
        ]

    def _look_up_first_pass(self, m: Module, tag: Any, known_2: Any) -> None:
        """Stage 1, too: what only codewords of a first pass need."""
        number_bits = len(self.feature)
        page, _ = self._parts(tag)
        unit = self._unit(tag)
        of_stripe = tag.place[number_bits:]
        centroid = (tag.kind == Kind.SKETCH) & self.centroid
        place = Mux(tag.kind == Kind.FEATURE, Cat(Const(0, number_bits), of_stripe),
                    Mux(centroid, Cat(unit[:number_bits], of_stripe), tag.place))
        m.d.comb += self.feature.eq(tag.place)
        m.d.sync += [
            known_2.sparse.eq(self.sparse),
            known_2.all_came.eq(self.first_done),
            known_2.centroids.eq(self.centroid),
            known_2.beyond.eq(unit[number_bits:].any()),
            known_2.ring_base.eq(self.ring_base),
            known_2.header_ring.eq(place),
            known_2.number.eq(self.feature),
            known_2.group.eq(self.first_group),
            known_2.stripe.eq(page >> self._stripe_bits),
            known_2.unit_bits.eq(self.unit_bits),
        ]
        if self.config.codes:
            octets = self.shapes.octet_place
            first_beyond = self.sinks + self.config.tokens_per_codeword - 1 >> self.config.slot_bits_per_codeword
            m.d.sync += [
                known_2.codes.eq(self.codes),
                known_2.octet.eq((self.feature >= octets) & (self.feature < octets + self.config.octets)),
                known_2.sink.eq(self.codes & (self.feature < first_beyond)),
            ]

    def _welcome(self, tag: Any, known: Any) -> Value:
        """Stage 2: whether the codeword was asked for and may come now."""
        welcome = known.asked & ((tag.kind == Kind.KEY) | (known.open & ~tag.kind[1]))
        if self.config.sparse:
            chosen, whole = self.chosen, self.stripe_whole
            if self.config.codes:
                chosen = Mux(known.codes, known.octet, chosen)
                whole = whole | (known.sink & self.stripe_first)
            feature = chosen & ~self.stripe_whole & ~known.centroids
            sketch = Mux(known.centroids, ~self.stripe_whole & ~known.beyond, whole)
            first = known.sparse & known.first_asked & Mux(tag.kind[0], sketch, feature)
            welcome = Mux(tag.kind[1], first, welcome)
        return welcome

    def _judge(self, m: Module, stage_3: Any, header: Signal, known_2: Any, known: Any, token: Signal,
               dropped: Signal) -> None:
        """Stages 2 and 3: has it come before?  The verdict holds for the whole codeword."""
        m.submodules.arrival_bits = bits = self.bits
        tag = stage_3.tag
        key = tag.kind == Kind.KEY
        first_pass = tag.kind[1] if self.config.sparse else Const(0)
        new, wanted = Signal(), Signal()
        good, good_held, accept = Signal(), Signal(), Signal()
        m.d.comb += [
            bits.ring.eq(known_2.ring),
            new.eq((bits.came != key) & ~(key & known.open)),   # V is open only when all of K came
            wanted.eq(1),
            good.eq(known.due & wanted & new),
            accept.eq((header & good) | (stage_3.valid & ~stage_3.first & good_held)),
            dropped.eq(stage_3.valid & ~accept),
            bits.header.eq(header),
            bits.good.eq(good),
            bits.first.eq(first_pass),
            bits.key.eq(key),
            bits.header_ring.eq(known.ring),
            bits.scrub.eq(self.scrub),
            bits.scrub_first.eq(self.scrub_first),
            bits.scrub_ring.eq(self.scrub_ring),
            self.scrubbed.eq(bits.scrubbed),
            self.ready.eq(bits.ready),
        ]
        if self.config.sparse:
            # Of a sparse job's K and V only what has a selected token is asked for.
            m.d.comb += wanted.eq(known.any_token | self.marks.any())
            with m.If(first_pass):
                m.d.comb += new.eq(~bits.first_came & ~known.all_came)
        with m.If(header):
            m.d.sync += good_held.eq(good)
        m.d.sync += [
            self.stale.eq(header & ~known.current),
            self.bad_tag.eq(header & known.current & ~(known.asked & wanted)),
            self.duplicate.eq(header & known.due & wanted & ~new),
            self.offender.eq(tag),
        ]
        self._let_through(m, stage_3, known, token, header & good, accept)

    def _let_through(self, m: Module, stage_3: Any, known: Any, token: Signal, begins: Value,
                     accept: Signal) -> None:
        """Give the codeword to its buffer, and one of V to the weight unit."""
        header, tag = self.headers.payload, stage_3.tag
        m.d.comb += [
            self.beats.payload.eq(stage_3.data),
            self.beats.valid.eq(accept),
            header.ring.eq(known.ring),
            header.slot.eq(tag.slot),
            header.into_score.eq(tag.kind != Kind.VALUE),
            header.token.eq(token),
            header.error.eq(stage_3.error),
            header.read.eq(known.read),
            self.headers.valid.eq(begins),
        ]
        m.d.sync += [
            self.value_requests.payload.slot.eq(tag.slot),
            self.value_requests.payload.ring.eq(known.ring),
            self.value_requests.valid.eq(begins & (tag.kind == Kind.VALUE)),
        ]
        if self.config.sparse:
            first_pass = tag.kind[1]
            m.d.comb += [
                header.ring.eq(known.header_ring),
                header.first.eq(first_pass),
                header.feature.eq(tag.kind == Kind.FEATURE),
                header.centroid.eq(first_pass & known.centroids),
                header.number.eq(known.number),
                header.group.eq(known.group),
                header.marks.eq(self.marks | known.any_token.replicate(self.config.tokens_per_codeword)),
                header.unit_bits.eq(known.unit_bits),
            ]
        if self.config.codes:
            feature = tag.kind == Kind.FEATURE
            m.d.comb += [header.feature.eq(feature & ~known.codes), header.codes.eq(feature & known.codes)]
            m.d.comb += self.heading.eq(stage_3.first)
