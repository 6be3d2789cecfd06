"""Our loop against transformers' generate: the same draws, so the same tokens."""

import pytest
import torch

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import roll_out
from rlhf_fast.rollout.cache import why_no_slots
from tests.models.tiny_models import CONFIGS, make_model
from tests.training.tiny_runs import scramble

LENGTHS = (3, 9, 1, 9, 5, 14, 2, 3, 7, 4, 11)


def prompts_of(vocabulary: int, *, repeated: int = 1) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]
    return [Prompt("", row, "") for row in ids for _ in range(repeated)]


def sampled(backbone, tokenizer, prompts, **options):
    torch.manual_seed(0)
    return roll_out(backbone, tokenizer, prompts, keep_logprobs=True, **options)


def check_against_generate(backbone, tokenizer, *, max_new_tokens):
    asked = prompts_of(min(backbone.vocabulary, 60))
    rules = {"max_new_tokens": max_new_tokens, "temperature": 0.7, "rows_per_pass": 3}
    ours, theirs = (sampled(backbone, tokenizer, asked, engine=engine, **rules) for engine in ("local", "transformers"))
    assert ours.completion_ids() == theirs.completion_ids()
    torch.testing.assert_close(ours.sampler.logprobs, theirs.sampler.logprobs, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny(0, hidden_size=32, layers=1, heads=2)[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gets_the_tokens_of_transformers_generate(family, tokenizer):
    """Prompts of all lengths in three slots, so that rows come and go at any column."""
    model = make_model(family)
    assert why_no_slots(model) is None
    check_against_generate(Backbone(model), tokenizer, max_new_tokens=6)


@pytest.fixture(scope="module")
def roles():
    """(backbone, tokenizer): policy and reference differ."""
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    model.generation_config.eos_token_id = list(range(0, 250, 12))  # so that rows end anywhere
    backbone = Backbone(model)
    for name in ("policy", "reference"):
        backbone.add_adapter(name, rank=4)
    with torch.no_grad():
        scramble(backbone)
    return backbone, tokenizer


@pytest.mark.parametrize("slots", [1, 2, 5, 64])
@pytest.mark.parametrize("mixture", [0.0, 0.4])
def test_no_number_of_slots_changes_what_is_sampled(mixture, slots, roles):
    """Answers to one prompt begin at different times; short prompts are followed by longer ones; rows end early."""
    backbone, tokenizer = roles
    rules = {"max_new_tokens": 24, "temperature": 1.3, "mixture": mixture}
    asked = prompts_of(250, repeated=3)
    whole = sampled(backbone, tokenizer, asked, engine="transformers", **rules)
    assert len(set(whole.batch.counts.tolist())) > 3
    parts = sampled(backbone, tokenizer, asked, rows_per_pass=slots, **rules)
    assert parts.completion_ids() == whole.completion_ids()
    assert parts.finished.tolist() == whole.finished.tolist()
    torch.testing.assert_close(parts.sampler.logprobs, whole.sampler.logprobs, rtol=1e-3, atol=1e-4)


def test_a_prompt_goes_through_the_model_once_for_all_of_its_answers(roles):
    backbone, tokenizer = roles
    seen, forward = [], backbone.model.forward

    def watched(input_ids, **rest):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    backbone.model.forward = watched
    try:
        sampled(backbone, tokenizer, prompts_of(250, repeated=4)[:8], max_new_tokens=9, rows_per_pass=3)
    finally:
        backbone.model.forward = forward
    assert sum(rows for rows, tokens in seen if tokens > 1) == 2
