"""`DriveCache.report`: what generating has cost, prefill apart, dense beside sparse."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic import TINY, RequestError
from kvattic.array import open_array
from kvattic.integrations.transformers import DriveCache, config_for

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8)
SPARF = {"mode": "sparf", "features": 4, "top_units": 8}
ROWS, PROMPT, NEW = 2, 300, 12


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, attn_implementation="kvattic")).eval()


def generated(device, llama, **options):
    """The report of `NEW` tokens behind a prompt, in `ROWS` rows."""
    prompt = torch.randint(2, 256, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    with DriveCache(device, llama.config, held_tokens=0, **options) as cache, torch.no_grad():
        with pytest.raises(RequestError, match="nothing to report"):
            cache.report()
        llama.generate(prompt, cache=cache, max_new_tokens=NEW, do_sample=False)
        first, again = cache.report(), cache.report()
        assert first == again
        return first


@pytest.fixture(scope="module")
def reports():
    """Dense and sparse."""
    llama = model()
    with kvattic.open("model", config_for(llama, ROOMY)) as device:
        return [generated(device, llama, **options) for options in ({}, SPARF)]


def test_the_prompt_is_apart(reports):
    for report in reports:
        assert (report.rows, report.layers) == (ROWS, 2)
        assert report.prompt_tokens == ROWS * PROMPT
        assert (report.steps, report.tokens) == (NEW - 1, ROWS * (NEW - 1))     # the prompt gives the first one
        kinds = 3 if report.mode == "sparf" else 2
        size = TINY.group_tokens if report.mode == "sparf" else TINY.tokens_per_page
        pages = 2 * ROWS * 2 * kinds * (PROMPT // size * size // TINY.tokens_per_page)
        assert report.prefill.page_programs == pages
        assert report.prefill.modelled and report.prefill.cycles > 0
        assert report.prefill.page_reads == 0
        assert report.append.written_bytes > 0


def test_a_token_costs_time_bytes_and_energy(reports):
    for report in reports:
        both = report.attend + report.append
        assert report.milliseconds_per_token == pytest.approx(1e3 * both.seconds / report.tokens)
        joules = report.joules_per_token
        assert 0 < joules.low < joules.typical < joules.high
        assert report.attend.page_reads > 0 and report.attend.modelled


def test_dense_stands_beside_sparse(reports):
    dense, sparse = reports
    assert dense.dense is None
    assert sparse.dense.modelled
    assert sum(sparse.attend.flash_bytes.values()) < 0.5 * sum(sparse.dense.flash_bytes.values())
    assert sparse.dense.cycles > 0
    # Stripes of both are of another size, so more of the tokens lie in DRAM in one of them, but all are read.
    read = [sum(cost.flash_bytes.values()) + sum(cost.dram_bytes.values()) for cost in (dense.attend, sparse.dense)]
    assert read[0] == read[1]
    assert sparse.dense.macs == dense.attend.macs


def test_it_prints_as_a_table(reports):
    dense, sparse = (str(report).splitlines() for report in reports)
    assert dense[0].startswith("dense, 2 rows, 2 layers: 600 tokens of prompt, then 22 in 11 steps")
    assert len({len(line) for line in sparse[1:]}) == 1
    assert "attend dense/token" in sparse[1] and "attend dense/token" not in dense[1]
    assert "modelled" in sparse[3]


def test_several_drives_and_a_prompt_alone():
    llama = model()
    with open_array(["model", "model"], config_for(llama, ROOMY)) as array:
        report = generated(array, llama, **SPARF)
        assert report.attend.drives == report.dense.drives == 2
        with DriveCache(array, llama.config) as cache, torch.no_grad():
            llama(torch.randint(2, 256, (1, 40)), past_key_values=cache)
            alone = cache.report()
    assert (alone.tokens, alone.milliseconds_per_token, alone.joules_per_token) == (0, None, None)
    assert "token" not in str(alone).splitlines()[1]
