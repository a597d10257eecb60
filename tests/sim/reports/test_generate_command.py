"""The command of benches/generate.py; what it measures is tested in test_transformers.py."""

import pytest

generate = pytest.importorskip("kvattic_sim.reports.benches.generate", exc_type=ImportError)


@pytest.mark.parametrize("arguments, seeds", [([], 4), (["200"], 200)])
def test_the_number_of_seeds(monkeypatch, capsys, arguments, seeds):
    monkeypatch.setattr(generate, "match", lambda seeds: {"llama": seeds})
    generate.main(arguments)
    assert capsys.readouterr().out == f'{{"llama": {seeds}}}\n'


def test_a_wrong_number(capsys):
    with pytest.raises(SystemExit):
        generate.main(["0"])
    assert "seeds must be at least 1, not 0" in capsys.readouterr().err
