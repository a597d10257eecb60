"""What answers cost on the RTL, beside what the golden device says of the same ones.

``python -m tests.cosim.test_cost`` prints the cycles of both.
"""

import pytest
from tests.host.driver.test_cost import MODES, SPARSE, filled, query_of

import kvattic
from kvattic.spec.config import TINY


def costs(target):
    """Costs of an answer in each mode, what the drive has counted for it, and when its jobs moved; costs of writing."""
    found = []
    with kvattic.open(target, TINY) as device:
        sequence = filled(device, **SPARSE)
        written = sequence.statistics()
        for options in MODES:
            before = device.statistics()
            result = sequence.attend(query_of(device), **options)
            found.append((result.cost, device.statistics() - before, result.times))
        total = sequence.statistics() - written
    return written, found, total


def check_times(times, cost):
    """Jobs are fetched and end in order and move beats in between; they cost from before the first fetch on."""
    assert [time.fetched for time in times] == sorted({time.fetched for time in times})
    assert [time.completed for time in times] == sorted({time.completed for time in times})
    for time in times:
        assert time.fetched < time.first_beat < time.last_beat < time.completed
    assert 0 < times[-1].completed - times[0].fetched < cost.cycles


def test_the_rtl_moves_the_bytes_that_the_golden_device_says():
    written, found, total = costs("sim:verilator")
    golden_written, golden, golden_total = costs("model")
    assert written.page_programs == golden_written.page_programs
    assert written.written_bytes == golden_written.written_bytes
    assert not written.modelled and golden_written.modelled
    assert written.cycles == pytest.approx(golden_written.cycles, rel=0.15)
    for (cost, counted, times), (expected, _, modelled_times) in zip(found, golden, strict=True):
        check_times(times, cost)
        assert modelled_times is None
        assert (cost.flash_bytes, cost.dram_bytes) == (expected.flash_bytes, expected.dram_bytes)
        assert (cost.macs, cost.link_bytes) == (expected.macs, expected.link_bytes)
        assert cost.page_reads in (None, expected.page_reads)
        assert expected.page_reads <= counted.page_reads <= expected.page_reads + 2     # some are read ahead
        # COUNTERS takes time, too; the part of `tiny` is so fast that the model is of little use there.
        assert cost.cycles < counted.cycles < cost.cycles + 1000
        assert cost.cycles == pytest.approx(expected.cycles, rel=0.25)
    assert total.flash_bytes == golden_total.flash_bytes
    assert total.cycles == sum(cost.cycles for cost, _, _ in found)


def main():
    for target in ("sim:verilator", "model"):
        written, found, _ = costs(target)
        modes = {options.get("mode", "dense"): cost.cycles for options, (cost, _, _) in zip(MODES, found, strict=True)}
        print(target, {"writing": written.cycles} | modes)


if __name__ == "__main__":
    main()
