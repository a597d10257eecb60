"""WriteBack: lines of READs between results and completions; what of it ends with an error."""

import random
from collections import deque

import pytest
from tests.hdl.bench import simulate

from kvattic.spec.commands import Completion, Status, result_row_bytes
from kvattic.spec.config import TINY
from kvattic_hdl.reduce.write_back import WriteBack

RESULTS, TARGETS, RING = 0x1_0000, 0x10_0000, 0x80_0000
ROW_LINES = result_row_bytes(TINY.head_dim) // 64


def some_work(rng, count):
    """Jobs: (READ or not, status, addresses of its lines); and addresses that answer with an error."""
    jobs, bad = [], set()
    for number in range(count):
        read = rng.random() < 0.6
        status = Status.OK if rng.random() < 0.8 else Status.UNREADABLE_KEY
        own = [TARGETS + 0x1000 * number + 64 * line for line in range(rng.randint(0, 9))] if read else [
            RESULTS + 0x1000 * number + 64 * line for line in range(ROW_LINES)]
        if rng.random() < 0.4 and own:
            bad |= {address for address in own if rng.random() < 0.5}
        jobs.append((read, status, own))
    return jobs, bad


class Bench:
    """Hands jobs over in their order, offers lines of READs up to `ahead` jobs before, and is the host memory."""

    def __init__(self, seed, *, stall):
        self.rng, self.stall = random.Random(seed), stall
        self.jobs, self.bad = some_work(self.rng, 40)
        self.dut = WriteBack(TINY)
        self.handed = 0
        self.offered = set()        # addresses whose lines are taken by WriteBack
        self.memory, self.completions, self.answered = {}, [], set()

    def chance(self):
        return self.rng.random() >= self.stall

    async def copier(self, ctx):
        """Lines of the READs of some jobs, mixed; those of one come before it is handed over."""
        dut, slots = self.dut, TINY.jobs_in_flight
        left = [(number, address) for number, (read, _, own) in enumerate(self.jobs) if read for address in own]
        while left:
            near = [line for line in left if line[0] < self.handed + slots]
            if not near or not self.chance():
                await ctx.tick()
                continue
            number, address = self.rng.choice(near)
            left.remove((number, address))
            ctx.set(dut.copies_slot, number % slots)
            for word in range(8):
                ctx.set(dut.copies.payload, {"address": address, "data": address + word, "last": word == 7})
                ctx.set(dut.copies.valid, 1)
                await ctx.tick().until(dut.copies.ready)
            ctx.set(dut.copies.valid, 0)
            self.offered.add(address)

    async def host(self, ctx):
        """The memory: takes lines, answers them late and in order."""
        axi, rng = self.dut.axi, self.rng
        addresses, words, waiting = deque(), [], deque()
        while True:
            ctx.set(axi.awready, self.chance())
            ctx.set(axi.wready, self.chance())
            answers = bool(waiting) and rng.random() < 0.3
            ctx.set(axi.bvalid, answers)
            if answers:
                ctx.set(axi.bresp, 2 if waiting[0] in self.bad else 0)
            _, _, aw, awready, awaddr, w, wready, wdata, wlast = await ctx.tick().sample(
                axi.awvalid, axi.awready, axi.awaddr, axi.wvalid, axi.wready, axi.wdata, axi.wlast)
            if answers:
                self.answered.add(waiting.popleft())
            if aw and awready:
                addresses.append(awaddr)
            if w and wready:
                words.append(wdata)
                assert wlast == (len(words) % 8 == 0)
            while addresses and len(words) >= 8:
                address, line = addresses.popleft(), words[:8]
                del words[:8]
                waiting.append(address)
                if address >= RING:
                    data = b"".join(word.to_bytes(8, "little") for word in line)
                    self.completions.append(Completion.unpack(data))
                    number = self.completions[-1].identifier
                    read, status, own = self.jobs[number]
                    if read or status is Status.OK:
                        assert self.answered >= set(own), "a completion comes behind all lines of its job"
                else:
                    assert address not in self.memory
                    self.memory[address] = line

    async def finisher(self, ctx):
        """Hands the jobs over, each when all lines of it have been offered."""
        dut, slots = self.dut, TINY.jobs_in_flight
        ctx.set(dut.post_line, RING // 64)
        for number, (read, status, own) in enumerate(self.jobs):
            while not ctx.get(dut.idle) or (read and not self.offered >= set(own)) or not self.chance():
                await ctx.tick()
            ctx.set(dut.job, {"slot": number % slots, "lanes": 1, "read": read, "rows": 1, "status": 0,
                              "result": RESULTS + 0x1000 * number})
            ctx.set(dut.entry, {"status": status, "identifier": number})
            ctx.set(dut.hand_over, 1)
            await ctx.tick()
            ctx.set(dut.hand_over, 0)
            self.handed = number + 1
        while len(self.completions) < len(self.jobs) or not ctx.get(dut.quiet):
            await ctx.tick()


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_lines_of_reads_between_jobs(stall):
    seen = set()
    for seed in range(4):
        bench = Bench(seed, stall=stall)
        simulate(bench.dut, bench.finisher, background=[bench.copier, bench.host])
        assert [c.identifier for c in bench.completions] == list(range(len(bench.jobs)))
        expected = {address for read, status, own in bench.jobs if read or status is Status.OK for address in own}
        assert set(bench.memory) == expected
        for completion, (read, status, own) in zip(bench.completions, bench.jobs, strict=True):
            lost = bench.bad & set(own) and (read or status is Status.OK)
            assert completion.status is (Status.BUS_ERROR if lost else status), (read, status, own)
            seen.add((read, completion.status))
            if read:
                assert all(bench.memory[address] == [address + word for word in range(8)] for address in own)
    assert seen == {(read, status) for read in (False, True)
                    for status in (Status.OK, Status.BUS_ERROR, Status.UNREADABLE_KEY)}
