"""Closed and broken streams, and what a long run says where no terminal shows it."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvattic.errors import RequestError
from kvattic.support import terminal
from kvattic.support.terminal import Telling, run_command

ENTRY_POINTS = ["kvattic", "kvattic_hdl", "kvattic_sim.reports.drive", "kvattic_sim.reports.bench",
                "kvattic_sim.reports.synth", "kvattic_sim.reports.reference"]


def shell(command: str, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    return subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                          text=True, check=False, **options)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_closed_streams_are_no_error(module, closed):
    if module.startswith("kvattic_"):
        pytest.importorskip(module.partition(".")[0] + ".console" if "sim" in module else module)
    done = shell(f"{sys.executable} -m {module} --help {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_command_works_with_a_closed_output(tmp_path):
    done = shell(f"{sys.executable} -m kvattic --json selftest model >&- 2> {tmp_path / 'errors'}")
    assert done.returncode == 0
    assert "Error" not in (tmp_path / "errors").read_text()


def test_the_next_file_does_not_become_the_output(tmp_path):
    """Its descriptor would be 1, and whatever a child prints would go into it."""
    program = (f"from kvattic.support.terminal import run_command\nimport subprocess\n"
               f"def main():\n    file = open({str(tmp_path / 'file')!r}, 'w')\n"
               f"    subprocess.run(['echo', 'a child speaks'])\n    print('so does this')\n    file.write('content')\n"
               f"raise SystemExit(run_command(main, 'x'))\n")
    (tmp_path / "program.py").write_text(program)
    done = shell(f"{sys.executable} {tmp_path / 'program.py'} <&- >&- 2> {tmp_path / 'errors'}")
    assert (done.returncode, (tmp_path / "errors").read_text()) == (0, "")
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("module", ["kvattic info", "kvattic_hdl --help", "kvattic_sim.reports.drive --help"])
def test_who_reads_no_further_ends_it_quietly(module):
    pytest.importorskip("kvattic_sim.reports.console", reason="pip install 'kvattic[sim]'")
    done = shell(f"{sys.executable} -m {module} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() in ("141", "0")      # 0: all was written before the reader ended
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_output_that_is_full_is_said():
    done = shell(f"{sys.executable} -m kvattic info > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "kvattic: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(("error", "code", "text"), [
    (RequestError("wrong"), 2, "x: wrong\n"), (SystemExit("why"), 2, "x: why\n"), (SystemExit(1), 1, ""),
    (SystemExit(None), 0, ""), (KeyboardInterrupt(), 130, "interrupted\n"),
    (FileNotFoundError(2, "No such file or directory", "a"), 2, "x: [Errno 2] No such file or directory: 'a'\n"),
])
def test_exit_codes(capsys, error, code, text):
    def work():
        raise error

    assert run_command(work, "x") == code
    assert capsys.readouterr().err == text


def test_other_errors_are_no_answers():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0, "x")


def test_streams_that_are_open_stay(monkeypatch):
    before = sys.stdin, sys.stdout, sys.stderr
    terminal.mend_streams()
    assert before == (sys.stdin, sys.stdout, sys.stderr)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    terminal.mend_streams()
    assert not sys.stdout.closed
    sys.stdout.close()


# ---------------------------------------------------------------- phases


class Heard(io.StringIO):
    """A stream that says when it has so many lines."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted, self.enough = wanted, threading.Event()

    def write(self, text: str) -> int:
        size = super().write(text)
        if self.getvalue().count("\n") >= self.wanted:
            self.enough.set()
        return size


def test_a_phase_is_said_at_its_beginning_and_while_it_lasts():
    stream = Heard(4)
    with Telling(stream=stream, every_s=0.01).phase("compiling") as note:
        assert stream.getvalue().startswith("compiling ...\n")
        note("3 of 7")
        assert stream.enough.wait(300)
    lines = stream.getvalue().splitlines()
    assert all(re.fullmatch(r"compiling: (3 of 7, )?\d+ s", line) for line in lines[1:])
    assert lines[-1].startswith("compiling: 3 of 7, ")
    assert terminal.EVERY_S <= 30


def test_a_terminal_is_told_nothing(capsys):
    with Telling(quiet=True, every_s=0.001).phase("compiling") as note:
        note("x")
    assert capsys.readouterr() == ("", "")


def test_a_phase_does_not_mind_a_stream_that_is_gone():
    stream = io.StringIO()
    stream.close()
    with Telling(stream=stream).phase("compiling"):
        pass
