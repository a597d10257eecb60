"""Predicts the cycles of the drive without its RTL: an event model of channels, dies and jobs (docs/timing.md)."""

from kvattic.timing.estimate import Estimate, JobTimes, estimate, seconds
from kvattic.timing.loads import Layer, in_turn
from kvattic.timing.work import Job, Operation, Read, Stripe, attend_job, job_of_reads

__all__ = [
    "Estimate",
    "Job",
    "JobTimes",
    "Layer",
    "Operation",
    "Read",
    "Stripe",
    "attend_job",
    "estimate",
    "in_turn",
    "job_of_reads",
    "seconds",
]
