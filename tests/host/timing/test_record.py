"""What is noted of commands, and the times that are modelled from it: batches, samples, bounds of memory."""

import numpy as np
import pytest

from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import PAPER, TINY
from kvattic.timing import Layer, estimate, in_turn
from kvattic.timing.record import Batch, KeepsRecords, Recorder, Sampler


def note_dense(recorder, layer, head):
    """A dense job of a layer, as the golden device reads it."""
    config, table = layer.config, layer.table(head)
    tokens = [0] * config.channels
    for stripe in table:
        tokens[stripe.channel] += stripe.tokens
    recorder.begin_job(Mode.DENSE, config.rows, tokens, 1)
    for kind, first in ((Kind.KEY, 1), (Kind.VALUE, 2)):
        for stripe in table:
            used = -(-stripe.tokens // config.tokens_per_codeword)
            for page in range(-(-used // config.codewords_per_page)):
                here = min(used - page * config.codewords_per_page, config.codewords_per_page)
                recorder.read(kind, stripe.channel, stripe[first] + page, np.arange(here), dram=False)
    return recorder.end_command()


def test_noted_jobs_take_as_long_as_planned_ones():
    layer, recorder = Layer(PAPER, 4, 1024), Recorder(PAPER)
    records = [note_dense(recorder, layer, head) for head in range(4)]
    planned = estimate(PAPER, layer.attend())
    assert records[-1].batch.cycles == planned.cycles
    assert [record.completed for record in records] == [job.completed for job in planned.jobs]
    assert records[0].counts.page_reads == sum(layer.pages * 2 for _ in layer.table(0))
    recorder.end_batch()
    assert recorder.cycles() == planned.cycles


def test_noted_operations_take_as_long_as_planned_ones():
    layer, recorder = Layer(TINY, 4, 512), Recorder(TINY)
    records = []
    for operation in layer.prefill():
        recorder.operation(operation.channel, operation.page, program=True)
        records.append(recorder.end_command())
    planned = estimate(TINY, (), layer.prefill())
    assert [record.completed for record in records] == list(planned.operations)
    assert all(record.counts is None for record in records)
    assert in_turn(TINY, layer.runs, program=True) == layer.prefill()


def test_batches_come_one_after_the_other():
    layer, recorder = Layer(TINY, 2, 256), Recorder(TINY)
    first = note_dense(recorder, layer, 0)
    recorder.end_batch()
    second = note_dense(recorder, layer, 0)
    assert first.batch is not second.batch
    assert recorder.cycles() == 2 * first.completed == 2 * second.completed
    recorder.reset()
    assert recorder.cycles() == 0


def test_many_jobs_are_sampled():
    layer, recorder = Layer(TINY, 4, 128), Recorder(TINY)
    records = [note_dense(recorder, layer, number % 4) for number in range(200)]
    batch = records[0].batch
    assert batch.weight == 200 * records[0].counts.flash[Kind.KEY] * 2
    assert batch.kept <= 64 * 16
    ends = [record.completed for record in records]
    assert ends == sorted(ends) and ends[-1] == batch.cycles
    whole = estimate(TINY, [job for _ in range(50) for job in layer.attend()])
    assert batch.cycles == pytest.approx(whole.cycles, rel=0.03)


def test_many_operations_are_sampled(monkeypatch):
    monkeypatch.setattr("kvattic.timing.record.SAMPLED_OPERATIONS", 64)
    layer, batch = Layer(TINY, 8, 512), Batch(TINY)
    operations = layer.prefill()
    for operation in operations:
        batch.add_operation(operation)
    assert batch.kept == 64 < len(operations) == batch.weight
    whole = estimate(TINY, (), operations)
    assert batch.cycles == pytest.approx(whole.cycles, rel=0.1)
    assert batch.operation_completed(len(operations) - 1) == batch.cycles


def test_an_inactive_recorder_notes_nothing():
    recorder = Recorder(TINY, active=False)
    assert note_dense(recorder, Layer(TINY, 1, 64), 0) is None
    recorder.operation(0, 0, program=True)
    assert recorder.end_command() is None
    assert recorder.cycles() == 0


def test_completions_that_nobody_takes_are_forgotten(monkeypatch):
    monkeypatch.setattr("kvattic.timing.record.UNTAKEN", 2)
    layer, recorder = Layer(TINY, 1, 64), Recorder(TINY)
    for number in range(3):
        recorder.posted(1, number, note_dense(recorder, layer, 0))
    assert recorder.take(1, 0) is None
    assert recorder.take(1, 2) is not None and recorder.take(1, 2) is None
    recorder.posted(1, 1, None)
    assert recorder.take(1, 1) is None


def test_a_sampler_keeps_a_bounded_number_of_pages(monkeypatch):
    monkeypatch.setattr("kvattic.timing.record.SAMPLED_READS", 10)
    asked = []

    def cycles(number):
        asked.append(number)
        return 7

    sampler = Sampler(cycles)
    for number in range(1000):
        sampler.add(1, 1, number)
    assert sampler.total() == 7000
    assert len(asked) <= 40
    sampler.add(3, 1, 1000)
    assert sampler.total() == 7007
    assert sampler.total() == 7007


def test_what_keeps_records():
    class Other:
        take_record = None

    assert not isinstance(Other(), KeepsRecords)
