"""What answers cost: on the golden device, on hardware (whose completions say it), and on several drives."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from tests.host.driver.slow_device import SlowDevice

import kvattic
from kvattic.array import open_array
from kvattic.driver.accounts import JobAccount, Passage, Tally, attend_cost, cycles_of
from kvattic.driver.device import Device
from kvattic.driver.results import AttendResult
from kvattic.errors import RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.golden.queues import Queue
from kvattic.spec.commands import Completion, Kind
from kvattic.spec.config import BOARD, TINY
from kvattic.timing.cost import KINDS, Cost, beside
from kvattic.timing.record import Counts

SPARSE = {"sparse": True, "centroids": 8, "codes": True, "sinks": 6}
MODES = ({}, {"mode": "sparf", "features": 4, "top_units": 16}, {"mode": "fetched", "features": 4, "top_units": 4},
         {"mode": "centroid", "top_units": 4, "unit_tokens": 8}, {"mode": "codes", "top_units": 16})


def tokens_of(kv_heads, tokens, config=TINY, seed=0):
    return np.random.default_rng(seed).standard_normal((2, kv_heads, tokens, config.head_dim)).astype(np.float16)


def filled(device, heads=2, tokens=300, **options):
    sequence = device.create_sequence(heads, capacity_tokens=tokens + 100, **options)
    sequence.prefill(*tokens_of(heads, tokens, device.config))
    return sequence


def query_of(device, heads=2, seed=1):
    return np.random.default_rng(seed).standard_normal((heads, 1, device.config.head_dim)).astype(np.float16)


class Clocked(SlowDevice):
    """A device with a clock, as hardware has one: its completions say the cycle and the beats; it notes nothing."""

    take_record = None
    cycle = 0

    def _post(self, ending):
        queue = ending.queue
        Clocked.cycle += 1000
        post = queue.post

        def timed(*arguments):
            address, entry = post(*arguments)
            entry = bytearray(entry)
            entry[16:24] = Clocked.cycle.to_bytes(8, "little")
            entry[24:32] = self._registers["BEATS"].to_bytes(8, "little")
            return address, bytes(entry)

        self._registers["CYCLES"] = Clocked.cycle
        queue.post = timed
        try:
            super()._post(ending)
        finally:
            queue.post = post


@pytest.fixture
def clocked(monkeypatch):
    """A `Device` over `Clocked`, whose queues have no slots, so that their `post` can be replaced."""

    class Loose(Queue):
        pass

    monkeypatch.setattr("kvattic.golden.device.Queue", Loose)
    monkeypatch.setattr("kvattic.golden.queues.Queue", Loose)
    monkeypatch.setattr(Clocked, "cycle", 0)
    with Device(Clocked(TINY, kernel="numpy")) as device:
        yield device


# The golden device.


@pytest.mark.parametrize("options", MODES, ids=lambda o: o.get("mode", "dense"))
def test_an_answer_knows_its_bytes_and_a_modelled_time(options):
    with kvattic.open("model", TINY) as device:
        sequence = filled(device, **SPARSE)
        before, traffic = device.statistics(), device.transport.traffic
        flash, dram, pages = dict(traffic.flash), dict(traffic.dram), traffic.page_reads
        cost = sequence.attend(query_of(device), **options).cost
        size = TINY.codeword_bytes
        for kind, name in zip(Kind, KINDS, strict=True):
            assert cost.flash_bytes[name] == size * (traffic.flash[kind] - flash[kind])
            assert cost.dram_bytes[name] == size * (traffic.dram[kind] - dram[kind])
        assert cost.page_reads == traffic.page_reads - pages
        assert cost.modelled and cost.cycles > TINY.cycles(TINY.part.t_r)
        assert cost.seconds == pytest.approx(cost.cycles / TINY.clock_mhz / 1e6)
        assert 0 < cost.joules.low < cost.joules.typical < cost.joules.high
        assert "modelled" in str(cost)
        since = device.statistics() - before
        assert since == cost
        assert sequence.statistics().cycles >= cost.cycles


def test_the_time_is_the_same_each_time():
    def costs():
        with kvattic.open("model", TINY) as device:
            sequence = filled(device, **SPARSE)
            results = [sequence.attend(query_of(device), **options) for options in MODES]
            return [result.cost for result in results], sequence.statistics(), device.statistics()

    assert costs() == costs()


def test_an_answer_and_its_cost_can_be_pickled():
    with kvattic.open("model", TINY) as device:
        result = filled(device).attend(query_of(device))
    assert pickle.loads(pickle.dumps(result)).cost == result.cost


def test_answers_of_one_doorbell_share_its_time():
    with kvattic.open("model", TINY) as device:
        sequences = [filled(device) for _ in range(3)]
        before = device.statistics()
        plans = [sequence.plan(query_of(device)) for sequence in sequences]
        together = [result.cost for result in device.attend_many(plans)]
        whole = device.statistics() - before
        alone = sequences[0].attend(query_of(device)).cost
    assert [cost.cycles for cost in together] == sorted(cost.cycles for cost in together)
    assert together[0].cycles < together[-1].cycles == whole.cycles
    assert whole.cycles < 3 * alone.cycles
    assert sum(cost.page_reads for cost in together) == whole.page_reads == 3 * alone.page_reads


def test_writing_costs_programs_and_bytes():
    with kvattic.open("model", TINY) as device:
        sequence = device.create_sequence(2, capacity_tokens=400)
        full = 256
        sequence.prefill(*tokens_of(2, full))
        cost = sequence.statistics()
        pages = 2 * 2 * full // TINY.tokens_per_page
        assert cost.page_programs == pages == sequence.counters()["PAGE_PROGRAMS"]
        assert cost.written_bytes == cost.link_bytes == cost.programmed_bytes == pages * TINY.page_bytes
        assert cost.cycles > TINY.cycles(TINY.part.t_prog)
        sequence.append(*tokens_of(2, 3))
        tail = (sequence.statistics() - cost)
        assert tail.page_programs == tail.cycles == 0
        assert tail.written_bytes > 0
        whole = device.statistics()
        assert (whole.page_programs, whole.written_bytes) == (pages, cost.written_bytes + tail.written_bytes)
        sequence.free()
        erased = device.statistics() - whole
        assert erased.block_erases > 0 and erased.cycles >= TINY.cycles(TINY.part.t_bers)


def test_statistics_of_nothing_are_zero():
    with kvattic.open("model", TINY) as device:
        sequence = device.create_sequence(2, capacity_tokens=100)
        assert sequence.statistics() == Cost(config=TINY, modelled=True)
        assert sequence.statistics().joules == (0, 0, 0)
        sequence.prefill(*tokens_of(2, 64))
        device.reset()
        assert device.statistics() == Cost(config=TINY, modelled=True)


def test_a_device_that_notes_nothing_knows_no_time():
    with kvattic.open("model", TINY, timed=False) as device:
        sequence = filled(device, tokens=256)
        cost = sequence.attend(query_of(device)).cost
        assert cost.cycles is cost.seconds is cost.joules is None
        assert not cost.modelled
        assert cost.flash_bytes["key"] == cost.flash_bytes["value"] == 2 * 256 * TINY.token_bytes
        assert cost.page_reads == 2 * 2 * 256 // TINY.tokens_per_page
        assert device.statistics().cycles is sequence.statistics().cycles is None
        assert "unknown time" in str(cost)


def test_large_loads_are_sampled():
    with kvattic.open("model", BOARD) as device:
        sequence = filled(device, heads=4, tokens=512)
        plans = [sequence.plan(query_of(device, 4, seed)) for seed in range(40)]
        sampled = device.attend_many(plans)[-1].cost
        few = device.attend_many(plans[:10])[-1].cost
    assert sampled.cycles == pytest.approx(4 * few.cycles, rel=0.1)


def test_a_result_of_no_device_has_no_cost():
    result = AttendResult(output=np.zeros((1, 1, 32), np.float32), maximum=np.zeros((1, 1), np.int64),
                          denominator=np.zeros((1, 1), np.uint64), completions=[])
    with pytest.raises(RequestError, match="no device has computed it"):
        result.cost  # noqa: B018


# Hardware.


@pytest.mark.parametrize("options", MODES, ids=lambda o: o.get("mode", "dense"))
def test_hardware_gives_the_same_bytes_from_tables_and_beats(clocked, options):
    with kvattic.open("model", TINY) as golden:
        wanted = filled(golden, **SPARSE).attend(query_of(golden), **options).cost
    sequence = filled(clocked, **SPARSE)
    found = sequence.attend(query_of(clocked), **options).cost
    assert (found.flash_bytes, found.dram_bytes) == (wanted.flash_bytes, wanted.dram_bytes)
    assert (found.macs, found.link_bytes) == (wanted.macs, wanted.link_bytes)
    assert found.page_reads == (wanted.page_reads if not options else None)
    assert found.cycles == 2 * 1000 and not found.modelled
    assert (found.joules is None) == bool(options)
    assert ("measured" in str(found)) and (not options or "? page reads" in str(found))


def test_hardware_counts_cycles_and_pages_over_all(clocked):
    before = clocked.statistics()
    sequence = filled(clocked, **SPARSE)
    sequence.attend(query_of(clocked), **MODES[1])
    since = clocked.statistics() - before
    assert since.page_reads > 0 and since.page_programs == sequence.counters()["PAGE_PROGRAMS"]
    assert since.cycles > 0 and not since.modelled
    assert since.joules.low > 0
    assert sequence.statistics().page_reads is None


# Sums.


def test_cycles_of_several_commands():
    assert cycles_of([]) == 0
    assert cycles_of([Passage(0, 100, 500, 0, None), Passage(0, 200, 700, 0, None)]) == 600
    assert cycles_of([Passage(0, 100, 500, 0, None), Passage(0, 0, 0, 0, None)]) is None
    assert cycles_of([Passage(0, 100, 500, 0, None), Passage(1, 9000, 9300, 0, None)]) == 400


def account(drive, began, completed):
    counts = Counts((2, 2, 0, 0, 0), (0,) * 5, 4)
    return JobAccount(TINY, Passage(drive, began, completed, 0, None), counts, 2, 640)


def test_drives_work_side_by_side():
    cost = attend_cost([account(0, 0, 500), account(1, 0, 900), account(0, 0, 600)])
    assert (cost.cycles, cost.drives, cost.page_reads, cost.link_bytes) == (900, 2, 12, 1920)
    assert cost.flash_bytes["key"] == 6 * TINY.codeword_bytes
    assert cost.macs == 3 * 2 * 4 * TINY.codeword_bytes // 2
    one = replace(cost, drives=1)
    assert cost.energy.parts["static"].typical == pytest.approx(2 * one.energy.parts["static"].typical)
    assert cost.energy.parts["bus"] == one.energy.parts["bus"]
    with pytest.raises(RequestError, match="at least one drive"):
        beside([])


def test_a_tally_without_time_has_none():
    tally = Tally(TINY)
    tally.add_attend([account(0, 0, 500)])
    assert tally.total().cycles == 500
    tally.add_attend([account(0, 0, 0)])
    assert tally.total().cycles is None


def test_costs_of_different_drives_do_not_add():
    with pytest.raises(RequestError, match="different configurations cannot be added"):
        Cost(config=TINY) + Cost(config=BOARD)
    with pytest.raises(RequestError, match="different configurations cannot be subtracted"):
        Cost(config=TINY) - Cost(config=BOARD)


@pytest.mark.parametrize("split", ["heads", "context"])
def test_an_array_costs_the_longest_time_and_all_energy(split):
    with open_array(["model", "model"], TINY) as array:
        sequence = array.create_sequence(4, capacity_tokens=512, split=split)
        sequence.prefill(*tokens_of(4, 512))
        result = sequence.attend(query_of(array, 4))
        cost, sums, whole = result.cost, sequence.statistics(), array.statistics()
        each = [device.statistics() for device in array.devices]
    with kvattic.open("model", TINY) as device:
        one = filled(device, heads=4, tokens=512)
        alone = one.attend(query_of(device, 4)).cost
    assert cost.drives == 2 and cost.page_reads == alone.page_reads
    assert cost.cycles < alone.cycles
    assert sums.page_programs == whole.page_programs == sum(drive.page_programs for drive in each)
    assert whole.cycles == max(drive.cycles for drive in each)
    assert whole.drives == 2


def test_completions_of_the_golden_device_stay_without_time():
    with Device(GoldenDevice(TINY)) as device:
        result = filled(device).attend(query_of(device))
        completion: Completion = result.completions[0]
        assert completion.cycle == completion.beats == completion.idle == 0
