"""A host that keeps some commands with the drive, in the timing model."""

import pytest

from kvattic.errors import RequestError
from kvattic.spec.config import TINY
from kvattic.timing import Layer, estimate
from kvattic_sim.reports.benches import latency
from kvattic_sim.reports.in_flight import HOST_US, in_flight, latencies, quantiles

HOST = HOST_US * TINY.clock_mhz


def jobs(count=24):
    return list(Layer(TINY, count, 64).attend())


def test_a_command_at_a_time_takes_as_long_as_alone():
    alone = [latencies(estimate(TINY, [job]))[0] for job in jobs(4)]
    found, submitted = in_flight(TINY, jobs(4), 1)
    assert latencies(found) == pytest.approx(alone, rel=0.1)
    ends = [job.completed for job in found.jobs]
    assert submitted[0] == 0
    assert submitted[1:] == pytest.approx([end + HOST for end in ends[:-1]], rel=0.02)


def test_enough_in_flight_cost_nothing():
    at_once, _ = in_flight(TINY, jobs(), 0)
    many, submitted = in_flight(TINY, jobs(), 16)
    assert many.cycles == at_once.cycles
    # The 17th waits until the host knows of the first one's end.
    assert submitted[:16] == [0.0] * 16
    assert submitted[16] == pytest.approx(many.jobs[0].completed + HOST)
    # From the doorbell on they take longer than from their fetch on.
    assert all(a <= b for a, b in zip(latencies(many), latencies(many, submitted), strict=True))


def test_fewer_in_flight_are_slower():
    cycles = [in_flight(TINY, jobs(), limit)[0].cycles for limit in (1, 2, 4, 16)]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > 1.5 * cycles[-1]


def test_the_same_again_says_the_same():
    assert in_flight(TINY, jobs(), 2)[1] == in_flight(TINY, jobs(), 2)[1]


def test_quantiles_are_values_that_were_there():
    assert quantiles([]) == {}
    assert quantiles([3.0]) == {"p50": 3.0, "p99": 3.0, "p999": 3.0}
    thousand = [float(i) for i in range(1, 1001)]
    assert quantiles(thousand) == {"p50": 500.0, "p99": 990.0, "p999": 999.0}


def test_bad_input_is_refused():
    with pytest.raises(RequestError, match=r"limit must be 0 \(no limit\) or more, not -1"):
        in_flight(TINY, jobs(2), -1)


def test_the_bench_has_enough_commands_for_its_quantiles():
    assert latency.BATCH * latency.HEADS >= 1000
    assert {"latency.p50_us", "latency.p99_us", "latency.p999_us"} <= {
        key for bench in latency.BENCHES for key in bench.keys}
