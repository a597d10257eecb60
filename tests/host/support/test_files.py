"""Files are whole or not there, and errors name them."""

import errno
import os

import pytest

from kvattic.support.files import named, whole, write_whole


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "some" / "rows.csv"
    write_whole(path, "one\n")
    write_whole(path, b"two\n")
    assert path.read_bytes() == b"two\n"
    with whole(path) as aside:
        assert aside.parent == path.parent and aside.suffix == ".csv"
        aside.write_text("three\n")
        assert path.read_bytes() == b"two\n"
    assert path.read_text() == "three\n"
    assert os.listdir(path.parent) == ["rows.csv"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_left_early_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "rows.csv"
    path.write_text("before\n")

    def broken():
        with whole(path) as aside:
            aside.write_text("half a fi")
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_text() == "before\n"
    assert os.listdir(tmp_path) == ["rows.csv"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_with_the_path(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("before\n")

    def full():
        with whole(path) as aside:
            aside.symlink_to("/dev/full")
            aside.write_text("x" * 10_000)

    with pytest.raises(OSError, match=r"No space left on device: '.*/rows\.csv'$"):
        full()
    assert path.read_text() == "before\n"
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_an_error_keeps_the_name_that_it_has(tmp_path):
    with pytest.raises(FileNotFoundError, match="'/nowhere/at/all'"), named(tmp_path):
        os.stat("/nowhere/at/all")
    with pytest.raises(OSError, match=f"'{tmp_path}'"), named(tmp_path):
        full_disk()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "rows.csv"
    with pytest.raises(OSError, match=r"/file'"):
        write_whole(path, "x")


@pytest.mark.parametrize("name", ["csv", "json", "plot", "figures", "perfetto"])
def test_results_are_whole_or_as_before(tmp_path, monkeypatch, name):
    """Every writer of results, on a disk that is full."""
    pytest.importorskip("kvattic_sim.reports.sweep", reason="pip install 'kvattic[sim]'")
    from pathlib import Path

    import matplotlib.figure

    from kvattic import TINY
    from kvattic_sim.nand import timeline
    from kvattic_sim.reports import figures, sweep

    path = tmp_path / {"csv": "a.csv", "plot": "a.png"}.get(name, "a.json")
    before = b"{}"
    path.write_bytes(before)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full_disk)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **o: full_disk() if "w" in mode else opened(
        self, mode, **o))
    monkeypatch.setattr(figures, "PATH", path)
    rows = [sweep.Row(number=0, point=point, figures={"cycles": 3}) for point in sweep.grid(TINY, {}, [(1, 16)])]
    write = {
        "csv": lambda: sweep.save(rows, path), "json": lambda: sweep.save(rows, path),
        "plot": lambda: sweep.plot(rows, path), "figures": lambda: figures.record({"x": 1}),
        "perfetto": lambda: timeline.write_perfetto([], TINY, path),
    }[name]
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'$"):
        write()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
