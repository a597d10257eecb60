"""Walks through the groups of tokens of a job that one lane holds."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import TOKEN_BITS, Shapes


def position_bits(config: Config) -> int:
    """Bits of a token's place in a lane's list of stripes."""
    return ceil_log2(config.ring_codewords * config.tokens_per_codeword)


def step_layout(config: Config) -> data.StructLayout:
    """A step of the walk: `Config.sweep_tokens` tokens, a unit or a codeword."""
    shapes = Shapes(config)
    return data.StructLayout({
        "index": config.slot_bits_per_codeword,   # its first token's, inside of the codeword
        "ring": shapes.ring,
        "position": position_bits(config),   # of the (first) unit's first token, in the lane's list
        "first": 1,                  # the unit's first step
        "last": 1,                   # its last one
        "whole": 1,
        # Of each of its tokens:
        "forced": config.sweep_tokens,   # its unit has sinks, or reaches into the local window
        "inside": config.sweep_tokens,   # before the end
    })


class GroupWalk(wiring.Component):
    """Walks through the stripes of a job in this lane's list, in their order, one step a cycle.

    Latency: from `begin` to the first step eight cycles.  Throughput: a step a cycle; a stripe shorter than four steps
    takes four.  Ordering: that of the list.  Reset: no walk.

    Parameters
    ----------
    config : Config
        One with `sparse`.

    Members
    -------
    begin : In(1)
        Strobe: walk.
    begun : Out(1)
        The cycle after.
    running : Out(1)
        Steps may still come.
    room : In(1)
        A step may be made.
    all_tokens : In(1)
        Walk through all tokens of all stripes; else neither beyond the end nor, with `skip_whole`, through whole ones.
    skip_whole : In(1)
        Leave out stripes that are attended whole.
    by_unit : In(1)
        A step is a unit, or several of one token each: all of what it is of.
    unit_mask : In
        Tokens of a unit, less one.
    step_tokens : In
        Tokens of a step.
    slot, end_token, local_token, sinks, stripes, ring_base : In
        See `LaneTopK`; stable from the cycle after `begin` on.
    stripe_address : Out
        Cat(number in the list, slot) of a stripe.
    stripe_token, stripe_whole : In(24), In(1)
        Its first token, and whether it is attended whole; one cycle later.
    go : Out(1)
        Strobe: a step is made.
    unit_position : Out
        In that cycle: the place of its (first) unit's first token in the list.
    valid, step, unit_token : Out(1), Out(step_layout), Out(24)
        A cycle later: the step, and its (first) unit's first token.
    """

    begin: Signal
    begun: Signal
    running: Signal
    room: Signal
    all_tokens: Signal
    skip_whole: Signal
    by_unit: Signal
    unit_mask: Signal
    step_tokens: Signal
    slot: Signal
    end_token: Signal
    local_token: Signal
    sinks: Signal
    stripes: Signal
    ring_base: Signal
    stripe_address: Signal
    stripe_token: Signal
    stripe_whole: Signal
    go: Signal
    unit_position: Signal
    valid: Signal
    step: data.View
    unit_token: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        self._group_bits = group_bits = ceil_log2(config.group_tokens)
        super().__init__({
            "begin": In(1),
            "begun": Out(1),
            "running": Out(1),
            "room": In(1),
            "all_tokens": In(1),
            "skip_whole": In(1),
            "by_unit": In(1),
            "unit_mask": In(group_bits),
            "step_tokens": In(group_bits + 1),
            "slot": In(shapes.slot),
            "end_token": In(TOKEN_BITS),
            "local_token": In(TOKEN_BITS),
            "sinks": In(shapes.start["sinks"].shape),
            "stripes": In(shapes.walk["stripes"].shape),
            "ring_base": In(shapes.ring),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "stripe_whole": In(1),
            "go": Out(1),
            "unit_position": Out(position_bits(config)),
            "valid": Out(1),
            "step": Out(step_layout(config)),
            "unit_token": Out(TOKEN_BITS),
        })
        self._index = Signal(shapes.list_bits, name="index")  # of the stripe that stands ready
        self._settled = Signal(3, name="settled")
        self._offset = Signal(group_bits, name="offset")  # token inside of the stripe
        self._last_step = Signal(name="last_step")
        # Tokens of the stripe before the end, before the local window, and that are sinks.
        self._limit, self._local_limit, self._sink_limit = (
            Signal(group_bits + 1, name=name) for name in ("limit", "local_limit", "sink_limit"))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        group_tokens = self._config.group_tokens
        stripe_token, stripe_whole, distances = self._next_stripe(m)
        left = Signal.like(self.stripes)
        within, fetch, useful = Signal(), Signal(), Signal()
        base, whole = Signal(TOKEN_BITS), Signal()
        number = Signal(self._shapes.list_bits)
        after = Signal(self._group_bits + 2)  # the token after this step
        m.d.comb += [
            self.go.eq(within & self.room),
            after.eq(self._offset + self.step_tokens),
            self._last_step.eq(after >= Mux(self.all_tokens, group_tokens, self._limit)),
            fetch.eq(self.running & ~self.begun & (left != 0) & self._settled[-1]
                     & (~within | (self.go & self._last_step))),
            useful.eq(self.all_tokens | ((distances[0] > 0) & ~(stripe_whole & self.skip_whole))),
        ]
        with m.If(self.go):
            m.d.sync += [self._offset.eq(after), within.eq(~self._last_step)]
        with m.If(fetch):
            limits = (self._limit, self._local_limit, self._sink_limit)
            m.d.sync += [
                base.eq(stripe_token),
                whole.eq(stripe_whole),
                *(limit.eq(self._clamped(distance)) for limit, distance in zip(limits, distances, strict=True)),
                number.eq(self._index),
                self._offset.eq(0),
                within.eq(useful),
                left.eq(left - 1),
                self._index.eq(self._index + 1),
                self._settled.eq(0),
            ]
        with m.If(self.begun):
            m.d.sync += left.eq(self.stripes)
        with m.Elif(~within & (left == 0)):
            m.d.sync += self.running.eq(0)
        m.d.sync += self.begun.eq(self.begin)
        with m.If(self.begin):
            m.d.sync += [self.running.eq(1), self._index.eq(0), self._settled.eq(0)]
        self._describe(m, number, base, whole)
        return m

    def _clamped(self, distance: Signal) -> Value:
        """Tokens of the stripe below a limit that is so far from its first."""
        bits = self._group_bits
        return Mux(distance[-1], 0, Mux(distance[bits:-1].any(), self._config.group_tokens, distance[:bits]))

    def _next_stripe(self, m: Module) -> tuple[Signal, Signal, list[Signal]]:
        """The next stripe stands ready: (its token, whether it is whole, its distances to end, window and sinks)."""
        stripe_token, stripe_whole = Signal(TOKEN_BITS), Signal()
        distances = [Signal(signed(TOKEN_BITS + 1), name=f"to_{name}") for name in ("end", "local", "sinks")]
        m.d.comb += self.stripe_address.eq(Cat(self._index, self.slot))
        m.d.sync += [
            self._settled.eq(Cat(Const(1, 1), self._settled)),
            stripe_token.eq(self.stripe_token),
            stripe_whole.eq(self.stripe_whole),
            *(distance.eq(limit - stripe_token) for distance, limit in zip(
                distances, (self.end_token, self.local_token, self.sinks), strict=True)),
        ]
        return stripe_token, stripe_whole, distances

    def _describe(self, m: Module, number: Signal, base: Signal, whole: Signal) -> None:
        """What is known of a step's unit."""
        offset, mask, by_unit = self._offset, self.unit_mask, self.by_unit
        bits = ceil_log2(self._config.sweep_tokens)
        tokens = [Cat(Const(i, bits), offset[bits:]) for i in range(self._config.sweep_tokens)]
        step = Signal(step_layout(self._config), reset_less=True)
        unit_token = Signal(TOKEN_BITS, reset_less=True)
        unit_offset = offset & ~mask
        position = Cat(offset, number)[: len(self.unit_position)]
        index_bits = len(step.index)
        m.d.comb += [
            self.unit_position.eq(Cat(unit_offset, number)),
            self.step.eq(step),
            self.unit_token.eq(unit_token),
        ]
        m.d.sync += [
            self.valid.eq(self.go),
            step.index.eq(offset[:index_bits]),
            step.ring.eq(self.ring_base + position[index_bits:]),
            step.position.eq(self.unit_position),
            step.first.eq(by_unit | ((offset & mask) == 0)),
            step.last.eq(by_unit | ((tokens[-1] & mask) == mask) | self._last_step),
            step.whole.eq(whole),
            step.forced.eq(Cat(((token | mask) >= self._local_limit) | ((token & ~mask) < self._sink_limit)
                               for token in tokens)),
            step.inside.eq(Cat(token < self._limit for token in tokens)),
            unit_token.eq(base + unit_offset),
        ]
