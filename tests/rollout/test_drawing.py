"""Sampling from the geometric mixture of policy and reference."""

import pytest
import torch

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import roll_out
from tests.training.tiny_runs import scramble

PROMPTS = [[5, 6, 7], [8]]


@pytest.fixture(scope="module")
def roles():
    torch.manual_seed(0)
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    with torch.no_grad():  # few tokens are likely, so that many rows begin with the same one
        model.get_input_embeddings().weight.mul_(8)
    backbone = Backbone(model)
    for name in ("policy", "reference"):
        backbone.add_adapter(name, rank=4)
    scramble(backbone)
    return backbone, tokenizer


def next_logprobs(backbone, role, ids):
    with torch.no_grad(), backbone.using(role):
        return backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_tokens_are_drawn_from_the_mixture_of_both_models(mixture, roles):
    """Second tokens, behind whatever came first, of prompts of two lengths: frequencies of the ten likeliest."""
    backbone, tokenizer = roles
    torch.manual_seed(1)
    count = 2000
    prompts = [Prompt("", ids, "") for ids in PROMPTS for _ in range(count)]
    rollout = roll_out(backbone, tokenizer, prompts, max_new_tokens=2, temperature=0.7, mixture=mixture)
    sampled = rollout.completion_ids()
    for place, ids in enumerate(PROMPTS):
        rows = sampled[place * count : (place + 1) * count]
        policy, reference = (next_logprobs(backbone, role, ids) for role in ("policy", "reference"))
        expected = (((1 - mixture) * policy + mixture * reference) / 0.7).softmax(-1)
        _close(torch.tensor([row[0] for row in rows]), expected)
        first = int(torch.tensor([row[0] for row in rows]).mode().values)
        assert sum(row[0] == first for row in rows) > 200
        behind = torch.tensor([row[1] for row in rows if row[0] == first and len(row) > 1])
        policy, reference = (next_logprobs(backbone, role, [*ids, first]) for role in ("policy", "reference"))
        _close(behind, (((1 - mixture) * policy + mixture * reference) / 0.7).softmax(-1))


def _close(tokens, expected):
    found = torch.bincount(tokens, minlength=len(expected)).double() / len(tokens)
    likeliest = expected.topk(10).indices
    spread = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread)[likeliest].all()


def test_the_mixture_is_neither_of_both(roles):
    """Otherwise the test above would say nothing."""
    backbone, _ = roles
    policy, reference = (next_logprobs(backbone, role, PROMPTS[0]) for role in ("policy", "reference"))
    mixed = (0.7 * policy + 0.3 * reference).softmax(-1)
    assert min((mixed - policy.exp()).abs().sum(), (mixed - reference.exp()).abs().sum()) > 0.1
