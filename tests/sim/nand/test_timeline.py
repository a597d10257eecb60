"""The timeline: what the NAND models leave is read, written for Perfetto, drawn, and summed up."""

import json

import pytest

from kvattic.spec.config import TINY
from kvattic_sim.nand import timeline
from kvattic_sim.nand.timeline import Event, Kind

LINES = {
    0: "0 10 0 -1 command -1\n10 60 0 1 read 5\n70 100 0 1 out 5\n",
    1: "5 25 1 -1 command -1\n40 60 1 0 in 7\n60 90 1 0 program 7\n",
}


@pytest.fixture
def events(tmp_path):
    for channel, text in LINES.items():
        (tmp_path / f"nand{channel}.trace").write_text(text)
    return timeline.read(tmp_path, TINY)


def test_events_are_read_in_the_order_of_their_beginning(events):
    assert [event.start for event in events] == [0, 5, 10, 40, 60, 70]
    assert events[2] == Event(channel=0, die=0, plane=1, start=10, end=60, kind=Kind.READ, page=5)


def test_bus_use_counts_data_inside_of_the_window(events):
    assert timeline.bus_use(events, 0, 100, TINY.channels) == (30 + 20) / 200
    assert timeline.bus_use(events, 50, 80, TINY.channels) == (10 + 10) / 60


def test_perfetto_has_a_track_for_each_bus_and_die(events, tmp_path):
    path = tmp_path / "new" / "trace.json"
    timeline.write_perfetto(events, TINY, path)
    records = json.loads(path.read_text())["traceEvents"]
    names = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["name"] == "thread_name"}
    assert names == {(c, t): "bus" if t == 0 else f"die {t - 1}"
                     for c in range(TINY.channels) for t in range(TINY.dies + 1)}
    spans = [r for r in records if r["ph"] == "X"]
    assert [(s["pid"], s["tid"], s["name"]) for s in spans] == [
        (0, 0, "command"), (1, 0, "command"), (0, 1, "read"), (1, 0, "data_in"), (1, 2, "program"), (0, 0, "data_out")]
    assert spans[2]["dur"] == pytest.approx(50 / TINY.clock_mhz, abs=1e-4)


def test_a_picture_is_drawn(events, tmp_path):
    path = tmp_path / "trace.png"
    timeline.draw(events, TINY, path, first=0, last=100, title="a test")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_channel_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        timeline.read(tmp_path, TINY)
