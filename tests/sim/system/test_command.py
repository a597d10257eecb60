"""`kvattic system`: table, files, pictures, and what makes no sense."""

import csv
import json
import subprocess
import sys

import pytest

from kvattic import cli

pytest.importorskip("kvattic_sim.reports.system")

SMALL = ("system", "--batch", "2", "--context", "512", "--new", "256", "--drives", "1,2", "--mode", "dense")
"""OPT-13B with little to model."""


def call(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_table_says_that_it_is_modelled(capsys):
    code, out, _ = call(capsys, *SMALL)
    assert code == 0
    assert "OPT-13B on A6000, decoding, modelled" in out and "Nothing here is measured" in out
    assert "kvattic, dense" in out and "FlexGen (SSD)" in out and "tokens/s" in out


def test_rows_are_printed_and_written(capsys, tmp_path):
    code, out, _ = call(capsys, *SMALL, "--csv", str(tmp_path / "a.csv"), "--json")
    rows = json.loads(out)
    assert code == 0
    assert {row["drives"] for row in rows if row["system"] == "kvattic"} == {1, 2}
    with (tmp_path / "a.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [float(row["tokens_per_second"]) for row in kept] == [row["tokens_per_second"] for row in rows]


def test_what_does_not_fit_is_said_below_the_table(capsys):
    code, out, _ = call(capsys, *SMALL, "--dram", "0.1")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("- DRAM, CPU attention, ")]
    assert "DeepSpeed (DRAM)" in line and "K and V of 2 sequences of 512 tokens of OPT-13B take" in line


@pytest.mark.parametrize("axes", [
    ("--drives", "1,2"), ("--drives", "1", "--batch", "2,4"), ("--drives", "1", "--context", "512,768"),
    ("--drives", "1"), ("--batch", "2,4", "--context", "512,768")])
def test_a_picture_is_drawn(capsys, tmp_path, axes):
    pytest.importorskip("matplotlib")
    file = tmp_path / "deep" / "a.png"
    code, _, err = call(capsys, *SMALL, *axes, "--plot", str(file))
    assert code == 0 and "a.png: tokens/s" in err
    assert file.read_bytes().startswith(b"\x89PNG")


def test_too_many_panels_are_refused(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = call(capsys, *SMALL, "--batch", "1,2,3,4,5,6,7", "--plot", str(tmp_path / "a.png"))
    assert code == 2 and "at most 6 panels, not 7" in err


def test_without_matplotlib_it_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, *SMALL, "--plot", str(tmp_path / "a.png"))
    assert code == 2 and "kvattic[figures]" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (("--drives", "0"), "drives must be positive whole numbers, such as 1,4,20, not '0'"),
    (("--batch", "-1"), "batch must be positive whole numbers, such as 1,4,20, not '-1'"),
    (("--context", "many"), "context must be positive whole numbers"),
    (("--context", "100"), "new must be less than context"),
    (("--model", "gpt-9"), "there is no model 'gpt-9'; models are opt-13b,"),
    (("--mode", "fast"), "there is no mode 'fast'; modes are dense, sparf, fetched, centroid"),
    (("--gpu", "voodoo"), "there is no GPU 'voodoo'; GPUs are a6000, a100, h100"),
    (("--gpus", "0"), "gpus must be at least 1, not 0"),
    (("--dram", "-1"), "the host's DRAM must be a positive number of GB, not -1"),
    (("--dram", "nan"), "the host's DRAM must be a positive number of GB, not nan"),
    (("--host", "none"), "there is no host 'none'; hosts are direct, paper"),
    (("--part", "tape"), "there is no NAND part 'tape'"),
    (("--unit-tokens", "3"), "unit_tokens must be a power of two"),
    (("--model", "opt-30b"), "the weights of OPT-30B take 59.9 GB, 1 x A6000 has 48 GB"),
])
def test_what_makes_no_sense_is_two(capsys, arguments, message):
    code, out, err = call(capsys, *SMALL[:1], *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_it_needs_numpy_alone():
    program = ("import sys, kvattic_sim.reports.system\n"
               "tops = {name.partition('.')[0] for name in sys.modules}\n"
               "print(sorted(tops & {'rich', 'cocotb', 'matplotlib', 'amaranth', 'torch', 'transformers'}))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
