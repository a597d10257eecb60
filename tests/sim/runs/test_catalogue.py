"""`kvattic run`: what it lists, prints and refuses."""

import json

import pytest

from kvattic import RequestError, cli
from kvattic_sim.runs import catalogue
from kvattic_sim.runs.catalogue import WORKLOADS
from kvattic_sim.runs.outcome import How, Outcome, Request, Run

RUN = Run(what="slice", how=How.MODELLED, cycles=10, bytes=2000, seconds=1e-3, limit="nothing")
GOOD = Outcome(name="opt-13b", target="model", geometry={"layers": 2}, source="a page", slice="a head",
               reference="float64", error=1e-8, bit_exact=None, runs=(RUN,), figures={"modelled_x": 1.5},
               notes=("so be it",))
BAD = Outcome(name="opt-13b", target="model", geometry={}, source="", slice="", reference="", error=1e-3,
              bit_exact=True, runs=())


def test_workloads_are_listed(capsys):
    assert cli.main(["run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WORKLOADS)
    assert cli.main(["run", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(WORKLOADS)


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing"], "there is no workload 'nothing'; workloads are opt-13b, "),
    (["opt-13b", "--target", "sim:icarus"],
     "workload opt-13b has no target 'sim:icarus'; its targets are model, sim:verilator"),
    (["opt-13b", "--drives", "41"], "--drives of opt-13b must be 1 to 40"),
    (["opt-13b", "--output", "x.npz"], "workload opt-13b has nothing to write to x.npz; --output is for koala"),
])
def test_what_cannot_be_run_is_two(capsys, arguments, message):
    assert cli.main(["run", *arguments]) == 2
    done = capsys.readouterr()
    assert done.out == "" and message in done.err


def test_a_workload_of_one_drive_takes_no_more(monkeypatch):
    alone = catalogue.Workload(name="alone", summary="", module="decode", function="run_opt")
    monkeypatch.setitem(WORKLOADS, "alone", alone)
    with pytest.raises(RequestError, match="workload alone runs on one drive, not on 2; --drives is for opt-13b, "):
        catalogue.run("alone", Request(drives=2))


def test_the_folder_of_an_output_must_exist(monkeypatch, tmp_path):
    one = catalogue.Workload(name="one", summary="", module="decode", function="run_opt", exports=True)
    monkeypatch.setitem(WORKLOADS, "one", one)
    with pytest.raises(RequestError, match=r"the folder of .*/none/x\.npz must exist"):
        catalogue.run("one", Request(output=tmp_path / "none" / "x.npz"))


def test_every_workload_can_be_found():
    for workload in WORKLOADS.values():
        assert workload.targets[0] == "model" and workload.summary


@pytest.mark.parametrize(("outcome", "code"), [(GOOD, 0), (BAD, 1)])
def test_the_exit_code_is_that_of_the_error(capsys, monkeypatch, outcome, code):
    monkeypatch.setattr(catalogue, "run", lambda name, request: outcome)
    assert cli.main(["run", "opt-13b", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["good"] is (code == 0) and found["bound"] == 1e-5 and found["error"] == outcome.error


def test_what_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "run", lambda name, request: GOOD)
    assert cli.main(["run", "opt-13b"]) == 0
    out = capsys.readouterr().out
    for text in ("opt-13b on model", "1.0e-08 (at most 1e-05)", "not compared", "modelled x", "- slice: nothing",
                 "- so be it"):
        assert text in out
