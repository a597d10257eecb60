"""A host that keeps a number of commands with the drive, in the timing model; and how long commands take."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from kvattic.errors import RequestError
from kvattic.spec.config import Config
from kvattic.timing import Estimate, Job, estimate

__all__ = ["HOST_US", "QUANTILES", "in_flight", "latencies", "quantiles"]

HOST_US = 5.0
"""From an interrupt until the host has rung for the next commands; a Linux host with an NVMe drive needs 3 to 6 us from
interrupt to submission (benches/host.py)."""
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""Of the time that commands take."""


def in_flight(config: Config, jobs: Iterable[Job], limit: int) -> tuple[Estimate, list[float]]:
    """Model commands of which a host keeps a number with the drive.

    Submissions follow from completions and these from submissions, so both are worked out in rounds. What happens never
    depends on what is submitted later, so each round settles at least the next `limit` commands: it takes long where
    the limit is small beside the number of jobs.

    Args:
        config: of the drive.
        jobs: in order; their `submitted` is not heeded.
        limit: commands that the drive has at a time; 0: all of them.

    Returns:
        What they cost, and when each was submitted, in cycles from the first doorbell.

    Raises:
        RequestError: the limit is negative.
    """
    if limit < 0:
        raise RequestError(f"limit must be 0 (no limit) or more, not {limit}")
    jobs = [replace(job, submitted=0.0) for job in jobs]
    found = estimate(config, jobs)
    submitted = [0.0] * len(jobs)
    while limit:
        again = _submissions(found, limit)
        # Where each command is there before the drive wants it, it makes no difference when it came.
        early = not any(submitted) and all(at <= wanted for at, wanted in zip(again, _wanted(found), strict=True))
        if again == submitted or early:
            return found, again
        submitted = again
        found = estimate(config, [replace(job, submitted=at) for job, at in zip(jobs, submitted, strict=True)])
    return found, submitted


def _wanted(found: Estimate) -> Iterable[float]:
    """When the drive began to fetch each command, at the earliest: when it requested the one before it."""
    fetched = [job.fetched for job in found.jobs]
    return [0.0, *fetched[:-1]]


def _submissions(found: Estimate, limit: int) -> list[float]:
    """When the host submits each command, if they are completed so."""
    completed = [job.completed for job in found.jobs]
    total, now, taken = len(completed), 0.0, 0
    submitted = [0.0] * min(limit, total)
    while len(submitted) < total:
        now = max(now, completed[taken]) + HOST_US * found.config.clock_mhz
        while taken < total and completed[taken] <= now:
            taken += 1
        room = min(taken + limit, total) - len(submitted)
        submitted += [now] * room
    return submitted


def latencies(found: Estimate, submitted: Sequence[float] | None = None) -> list[float]:
    """Microseconds that each command takes until its completion is written.

    Args:
        found: what was modelled.
        submitted: from when on, in cycles; None: from when the drive requested it.
    """
    begin = [float(job.fetched) for job in found.jobs] if submitted is None else submitted
    return [(job.completed - at) / found.config.clock_mhz for job, at in zip(found.jobs, begin, strict=True)]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`QUANTILES` of some values: the least value that so large a share does not exceed; nothing of nothing."""
    if not values:
        return {}
    return {name: float(np.quantile(values, share, method="inverted_cdf")) for name, share in QUANTILES.items()}
