"""The command of benches/generate.py; what it measures is tested in test_transformers.py."""

import pytest

generate = pytest.importorskip("kvattic_sim.reports.benches.generate", exc_type=ImportError)


@pytest.mark.parametrize("arguments, seeds", [([], 4), (["200"], 200)])
def test_the_number_of_seeds(monkeypatch, capsys, arguments, seeds):
    monkeypatch.setattr(generate, "match", lambda seeds: {"llama": seeds})
    generate.main(arguments)
    assert capsys.readouterr().out == f'{{"llama": {seeds}}}\n'


def test_sampled_answers(monkeypatch, capsys):
    found = iter([generate.Sampled("a", 0, None, 1e-6, None), generate.Sampled("b", 0, 7, 2e-3, 5e-4)])
    monkeypatch.setattr(generate, "ARCHITECTURES", dict.fromkeys("ab"))
    monkeypatch.setattr(generate, "sampled", lambda name, seed: next(found))
    generate.main(["1", "--sampled"])
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 answers of 200 tokens differ; logits differ by at most 2.0e-03",
        "b, seed 0: token 7, logits 2.0e-03, gap 5.0e-04"]


def test_a_wrong_number(capsys):
    with pytest.raises(SystemExit):
        generate.main(["0"])
    assert "seeds must be at least 1, not 0" in capsys.readouterr().err
