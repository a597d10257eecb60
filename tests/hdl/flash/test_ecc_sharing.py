"""Decoders that share a corrector: each gets what it would get alone, and in time."""

import random
from dataclasses import dataclass, field

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out, connect, flipped
from tests.hdl.compiled import simulation
from tests.hdl.flash.test_ecc_corrector import chunks_of, problem, receive, send
from tests.hdl.flash.test_ecc_decoder import CONFIGS, Codeword, Maker, Seen, check, words_of

from kvattic.spec import ecc
from kvattic.spec.config import TINY, Config
from kvattic.spec.scheduling import CORRECTOR_CHANNELS, channels_of_corrector
from kvattic_hdl.flash.corrections import CorrectorShapes
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.flash.decoder import Decoder
from kvattic_hdl.flash.steps import CodeSteps


class Group(wiring.Component):
    """Decoders, one for each channel, and their corrector."""

    def __init__(self, config: Config, channels: int, buffers: int = 8) -> None:
        self.decoders = [Decoder(config, buffers, shares=True) for _ in range(channels)]
        self.config = config
        self.shown = [name for name in self.decoders[0].signature.members if name not in ("steps", "corrections")]
        members = self.decoders[0].signature.members
        super().__init__({f"channels_{i}": Out(wiring.Signature({name: members[name] for name in self.shown}))
                          for i in range(channels)})

    @property
    def channels(self) -> list:
        return [getattr(self, f"channels_{i}") for i in range(len(self.decoders))]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.corrector = corrector = Corrector(self.config, len(self.decoders))
        for number, (decoder, outside) in enumerate(zip(self.decoders, self.channels, strict=True)):
            m.submodules[f"decoder_{number}"] = decoder
            m.submodules[f"steps_{number}"] = steps = CodeSteps(self.config)
            connect(m, decoder.steps, steps.users[0])
            connect(m, decoder.corrections, corrector.channels[number])
            for name in self.shown:
                inner, outer = getattr(decoder, name), getattr(outside, name)
                member = decoder.signature.members[name]
                if member.is_signature:
                    connect(m, inner, flipped(outer))
                else:
                    source, sink = (inner, outer) if member.flow is Out else (outer, inner)
                    m.d.comb += sink.eq(source)
        return m


@dataclass
class Bus:
    """What one channel's bus brings, and how fast: a word each 1 / rate cycles while a buffer is free."""

    codewords: list[Codeword]
    rate: float = 1.0
    seen: Seen = field(default_factory=Seen)
    finished: int = 0
    """Cycle after which nothing came any more."""


def run(config: Config, buses: list[Bus], buffers: int = 8) -> None:
    """Send the codewords of all buses and collect what leaves, until all has left."""
    dut, simulator = simulation(Group, config, len(buses), buffers)

    def serve(bus: Bus, channel):
        seen, total = bus.seen, len(bus.codewords)

        announced = 0

        async def announce(ctx):
            nonlocal announced
            payload = channel.header.payload
            for number, codeword in enumerate(bus.codewords):
                ctx.set(payload, {"page": codeword.page, "codeword": codeword.index, "level": codeword.level,
                                  "cause": codeword.cause})
                ctx.set(payload.tag.as_value(), number)
                ctx.set(channel.header.valid, 1)
                await ctx.tick().until(channel.header.ready)
                ctx.set(channel.header.valid, 0)
                announced += 1

        async def move(ctx):
            due = 0.0
            for number, codeword in enumerate(bus.codewords):
                while announced <= number:
                    await ctx.tick()
                for word in [] if codeword.cause else words_of(codeword.raw, config):
                    due += 1 / bus.rate
                    while due >= 2:
                        due -= 1
                        await ctx.tick()
                    ctx.set(channel.words, word)
                    ctx.set(channel.words_valid, 1)
                    await ctx.tick()
                    due -= 1
                    ctx.set(channel.words_valid, 0)

        async def take(ctx):
            cycle, current, idle = 0, None, 0
            ctx.set(channel.codewords.ready, 1)
            ctx.set(channel.retry.ready, 1)
            while idle < 30:
                *_, valid, beat, again, retry, corrected, bits, unreadable, error, ended = await ctx.tick().sample(
                    channel.codewords.valid, channel.codewords.payload, channel.retry.valid, channel.retry.payload,
                    channel.corrected, channel.bit_errors, channel.unreadable, channel.media_error, channel.codeword)
                cycle += 1
                if valid:
                    number = beat.tag.as_bits()
                    assert current in (None, number), "beats of two codewords are mixed"
                    if number not in seen.beats:
                        seen.order.append(number)
                    seen.beats.setdefault(number, []).append(beat)
                    current = None if beat.last else number
                if again:
                    seen.retries.append(retry)
                if unreadable:
                    seen.media.append((error.page, error.codeword, error.cause))
                for name, value in (("codeword", ended), ("corrected", corrected), ("bit_errors", bits)):
                    seen.strobes[name] += value
                over = len(seen.order) + len(seen.retries) == total and current is None
                idle = idle + 1 if over else 0
                assert cycle < 5000 + total * 3000, f"left: {seen.order}"
                if not over:
                    bus.finished = cycle

        return announce, move, take

    simulator.add_clock(1e-6)
    for bus, channel in zip(buses, dut.channels, strict=True):
        for bench in serve(bus, channel):
            simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.parametrize("channels", [2, 4])
def test_everything_that_can_happen_on_all_of_them(channels):
    buses = [Bus(Maker(TINY, 20 + number).mixed(33)) for number in range(channels)]
    run(TINY, buses, buffers=5)
    for bus in buses:
        check(TINY, bus.codewords, bus.seen)


def test_one_whose_codewords_all_have_errors_does_not_starve_another():
    # Two channels keep the corrector busy with its longest searches; a third has an error now and then.
    config = CONFIGS["paper"]
    last = ecc.code(config).code_bits - 1
    makers = [Maker(config, 30 + number) for number in range(3)]
    buses = [Bus([maker.make(bits=[0, last]) for _ in range(12)]) for maker in makers[:2]]
    buses.append(Bus([makers[2].make(errors=number % 4 == 1) for number in range(24)]))
    run(config, buses)
    for bus in buses:
        check(config, bus.codewords, bus.seen)
    longest = 640                                            # cycles of a search to the end
    assert buses[2].finished < 24 * 66 + 6 * (2 * longest + 100), "the third waited for more than one of each other"


def turns(wanted: tuple[int, ...]) -> list[int]:
    """Channels in the order of their answers, where each wants so many corrections, one after the other."""
    dut, simulator = simulation(Corrector, TINY, 4)
    found: list[int] = []

    def serve(channel, number: int, times: int):
        async def bench(ctx):
            for _ in range(times):
                await send(ctx, channel, chunks_of(TINY, problem(TINY, [8, 600])))
                answer = await receive(ctx, channel, 64, 2000, lambda cycle: True)
                assert (answer.good, answer.errors) == (1, 2)
                found.append(number)
        return bench

    simulator.add_clock(1e-6)
    for number, times in enumerate(wanted):
        if times:
            simulator.add_testbench(serve(dut.channels[number], number, times))
    simulator.run()
    return found


def test_channels_have_their_turns():
    found = turns((5, 5, 5, 5))
    assert all(sorted(found[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4)), found
    found = turns((4, 0, 4, 1))
    assert found[:3] in ([0, 2, 3], [2, 3, 0], [3, 0, 2])
    assert found[3:] in ([0, 2] * 3, [2, 0] * 3)


def test_how_many_share_one():
    assert CORRECTOR_CHANNELS == (4, 2, 1)
    shared = {channels: channels_of_corrector(type("Drive", (), {"channels": channels})()) for channels in range(1, 9)}
    assert shared == {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 1, 8: 4}


def test_a_corrector_has_at_least_one_channel():
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        Corrector(TINY, channels=0)


def test_a_problem_is_sent_in_chunks():
    assert CorrectorShapes(CONFIGS["paper"]).chunks == 16
    assert CorrectorShapes(CONFIGS["padding_words"]).remainder_chunks == 9      # 65 bits


def measure(channels: int, rate: float, count: int, seed: int = 1) -> float:
    """Cycles a codeword of `paper` on each channel at 1,400 MT/s, over `count` codewords of each."""
    config = CONFIGS["paper"]
    words = 1400 / config.clock_mhz / config.word_bytes
    buses = []
    for number in range(channels):
        maker, choose = Maker(config, seed * 100 + number), random.Random(f"{seed} {number}")
        clean = [maker.make() for _ in range(8)]
        codewords = []
        for _ in range(count):
            codeword = choose.choice(clean)
            wrong = sum(choose.random() < rate for _ in range(maker.code.code_bits)) if rate else 0
            codewords.append(damaged(codeword, choose.sample(range(maker.code.code_bits), wrong)))
        buses.append(Bus(codewords, rate=words))
    run(config, buses)
    return sum(bus.finished for bus in buses) / channels / count


def damaged(codeword: Codeword, bits: list[int]) -> Codeword:
    raw = bytearray(codeword.raw)
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    return Codeword(bytes(raw), codeword.page, codeword.index)


def test_sharing_costs_nothing_at_the_error_rate_that_is_modelled():
    # A slower check of the same kind gave docs/ecc.md its table.
    assert measure(4, 1e-5, 60) < measure(4, 0, 60) * 1.003 + 3
