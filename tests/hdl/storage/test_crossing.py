"""LaneCrossing and CodewordGather: requests reach their channels, and codewords come whole, whatever waits."""

import random
from dataclasses import replace

import pytest
from tests.hdl.bench import simulate

from kvattic.spec.config import TINY
from kvattic_hdl.storage.crossing import REQUESTS, LaneCrossing
from kvattic_hdl.storage.gather import CODEWORDS, CodewordGather

CONFIGS = {
    channels: replace(TINY, channels=2 * channels, lane_channels=channels, beat_bytes=8 * channels, dram_beat_bytes=32)
    for channels in (2, 4)}


def codewords_of(config, channel, count):
    """((channel, number), error, words) of codewords of a channel."""
    rng = random.Random(channel)
    return [((channel, number), rng.random() < 0.2, [rng.getrandbits(64) for _ in range(config.words_per_codeword)])
            for number in range(count)]


def words_of(codewords):
    """The payloads of a channel."""
    return [{"tag": {"slot": name[0], "place": name[1]}, "data": word, "last": number == len(words) - 1, "error": error}
            for name, error, words in codewords for number, word in enumerate(words)]


def offer(stream, payloads, rng=None):
    """Offer payloads, one after the other, now and then with a pause."""
    async def bench(ctx):
        for payload in payloads:
            while rng is not None and rng.random() < 0.3:
                await ctx.tick()
            ctx.set(stream.payload, payload)
            ctx.set(stream.valid, 1)
            await ctx.tick().until(stream.ready)
            ctx.set(stream.valid, 0)
    return bench


def collect(stream, found, count, rng=None):
    """Take payloads, and note the cycle of each."""
    async def bench(ctx):
        cycle = 0
        while len(found) < count:
            ctx.set(stream.ready, rng is None or rng.random() < 0.7)
            _, _, valid, ready, payload = await ctx.tick().sample(stream.valid, stream.ready, stream.payload)
            cycle += 1
            if valid and ready:
                found.append((cycle, payload))
    return bench


def check(config, wanted, found):
    """Each codeword is whole, has its own data, and those of a channel are in their order."""
    size, each = config.beats_per_codeword, config.lane_channels
    left = {channel: list(codewords) for channel, codewords in enumerate(wanted)}
    for at in range(0, len(found), size):
        beats = [beat for _, beat in found[at : at + size]]
        name, error, words = left[beats[0].tag.slot].pop(0)
        assert {(beat.tag.slot, beat.tag.place, beat.error) for beat in beats} == {(*name, error)}
        assert [beat.last for beat in beats] == [0] * (size - 1) + [1]
        assert [beat.data for beat in beats] == [
            sum(word << 64 * i for i, word in enumerate(words[b * each : (b + 1) * each])) for b in range(size)]
    assert not any(left.values())


@pytest.mark.parametrize("channels", CONFIGS)
@pytest.mark.parametrize("stalls", [False, True])
def test_codewords_are_gathered(channels, stalls):
    config, found = CONFIGS[channels], []
    dut = CodewordGather(config)
    wanted = [codewords_of(config, channel, 9 - channel) for channel in range(channels)]
    benches = [offer(dut.words[channel], words_of(codewords), random.Random(channel) if stalls else None)
               for channel, codewords in enumerate(wanted)]
    count = sum(map(len, wanted)) * config.beats_per_codeword
    simulate(dut, *benches, collect(dut.beats, found, count, random.Random(9) if stalls else None))
    check(config, wanted, found)


@pytest.mark.parametrize("channels", CONFIGS)
def test_all_channels_at_full_rate(channels):
    """A word a cycle of each channel is a beat a cycle, but for the wait until the first codewords are whole."""
    config, found = CONFIGS[channels], []
    dut = CodewordGather(config)
    wanted = [codewords_of(config, channel, 12) for channel in range(channels)]
    benches = [offer(dut.words[channel], words_of(codewords)) for channel, codewords in enumerate(wanted)]
    count = 12 * channels * config.beats_per_codeword
    simulate(dut, *benches, collect(dut.beats, found, count))
    check(config, wanted, found)
    assert found[-1][0] - found[0][0] <= count + channels
    assert found[0][0] <= config.words_per_codeword + channels + 3


def test_a_lane_that_waits_holds_its_channels_back_and_loses_nothing():
    config, found, taken = CONFIGS[2], [], []
    dut = CodewordGather(config)
    codewords = codewords_of(config, 0, CODEWORDS + 3)

    async def scenario(ctx):
        cycles = 0
        payloads = words_of(codewords)
        ctx.set(dut.words[0].valid, 1)
        while len(taken) < len(payloads):
            ctx.set(dut.words[0].payload, payloads[len(taken)])
            if cycles == 3000:
                assert len(taken) <= (CODEWORDS + 1) * config.words_per_codeword
                ctx.set(dut.beats.ready, 1)
            _, _, ready = await ctx.tick().sample(dut.words[0].ready)
            taken.extend([0] * ready)
            cycles += 1
        ctx.set(dut.words[0].valid, 0)

    async def take(ctx):
        while len(found) < len(codewords) * config.beats_per_codeword:
            _, _, valid, ready, payload = await ctx.tick().sample(dut.beats.valid, dut.beats.ready, dut.beats.payload)
            if valid and ready:
                found.append((0, payload))

    simulate(dut, scenario, take)
    check(config, [codewords], found)


def request(channel, page, *, dram=0):
    return {"tag": {"place": page}, "page": page, "codeword": 1, "dram": dram, "of_lane": channel}


def test_requests_reach_their_channels_past_one_that_is_busy():
    config = CONFIGS[4]
    dut, found, tails = LaneCrossing(config), [[] for _ in range(4)], []
    wanted = [request(0, page) for page in range(REQUESTS)] + [
        request(page % 3 + 1, 100 + page, dram=page % 5 == 0) for page in range(60)]
    of = [[r["page"] for r in wanted if r["of_lane"] == channel and not r["dram"]] for channel in range(4)]

    async def scenario(ctx):
        # Channel 0 takes nothing until the others have all of theirs.
        for channel in (1, 2, 3):
            ctx.set(dut.channel_requests[channel].ready, 1)
        ctx.set(dut.tails.ready, 1)
        for _ in range(600):
            if all(len(found[channel]) == len(of[channel]) for channel in (1, 2, 3)):
                ctx.set(dut.channel_requests[0].ready, 1)
            streams = [*dut.channel_requests, dut.tails]
            _, _, *sampled = await ctx.tick().sample(*(v for s in streams for v in (s.valid, s.ready, s.payload)))
            for into, at in zip([*found, tails], range(0, len(sampled), 3), strict=True):
                if sampled[at] and sampled[at + 1]:
                    into.append(sampled[at + 2].page)

    simulate(dut, offer(dut.requests, wanted), scenario)
    assert found == of
    assert tails == [r["page"] for r in wanted if r["dram"]]
