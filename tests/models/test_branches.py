"""Answers that share their prompt in one row: what each gives alone, for less work; and who cannot."""

import re

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from tests.models.causal_models import make_causal

PROMPT, ANSWERS = [257, 65, 66, 67, 68, 69], ([70, 71, 258], [72, 258], [70, 73, 74, 75, 258])


def adapted(**options) -> Backbone:
    backbone = Backbone(tiny(0, hidden_size=32, layers=3, heads=2)[0])
    for seed, name in enumerate(("reward", "reward_1")):
        backbone.add_adapter(name, rank=4, seed=seed, **options)
        backbone.add_head(name, seed=seed)
        with torch.no_grad():
            for parameter in backbone.parameters_of(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return backbone


def packed(padding: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, branches) of a row with every answer, padded on the right."""
    ids = [*PROMPT, *(token for answer in ANSWERS for token in answer)]
    branches = [0] * len(PROMPT) + [k for k, answer in enumerate(ANSWERS, start=1) for _ in answer]
    real = F.pad(torch.ones(1, len(ids), dtype=torch.int64), (0, padding))
    return F.pad(torch.tensor([ids]), (0, padding), value=256), real, F.pad(torch.tensor([branches]), (0, padding))


def alone(backbone: Backbone, answer: list[int], roles) -> dict:
    ids = torch.tensor([[*PROMPT, *answer]])
    return backbone.hidden(ids, torch.ones_like(ids), roles)


@pytest.mark.parametrize("options", [{}, {"top_layers": 1}, {"use_dora": True}])
@pytest.mark.parametrize("recompute", [False, True])
def test_answers_that_share_their_prompt_have_the_states_and_gradients_of_separate_rows(options, recompute):
    backbone = adapted(**options)
    backbone.enable_checkpointing(recompute)
    roles = ["reward", "reward_1"]
    ids, real, branches = packed()
    shared = backbone.hidden(ids, real, roles, branches=branches)
    weights = torch.randn(len(ANSWERS), 32, generator=torch.Generator().manual_seed(1))
    ends = [int((branches[0] == k).nonzero().max()) for k in range(1, len(ANSWERS) + 1)]
    separate = [alone(backbone, answer, roles) for answer in ANSWERS]
    for role in roles:
        parameters = [p for name, p in backbone.named_parameters_of(role).items() if name != "score.weight"]
        last = torch.stack([hidden[role][0, -1] for hidden in separate])
        torch.testing.assert_close(shared[role][0, ends], last, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad((shared[role][0, ends] * weights).sum(), parameters, retain_graph=True)
        theirs = torch.autograd.grad((last * weights).sum(), parameters, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_prompts_tokens_are_computed_once():
    backbone = adapted()
    seen = []
    backbone.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ids, real, branches = packed(padding=0)
    backbone.hidden(ids, real, ["reward"], branches=branches)
    assert [part.numel() for part in seen] == [len(PROMPT) + sum(map(len, ANSWERS))]


def test_half_precision_and_eager_attention_share_too():
    backbone = Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0].bfloat16())
    assert backbone.why_not_shared(100) is None
    eager = tiny(0, hidden_size=32, layers=2, heads=2)[0]
    eager.set_attn_implementation("eager")
    assert Backbone(eager).why_not_shared(100) is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma"])
def test_models_of_attention_share(name):
    assert Backbone(make_causal(name)).why_not_shared(8) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "counts positions"), ("bloom", "counts positions"), ("lfm2_moe", "takes no mask|differ"),
        ("jamba", "takes no mask|differ"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_share_says_why(name, reason):
    assert re.search(reason, Backbone(make_causal(name)).why_not_shared(4))


def test_rows_longer_than_a_sliding_window_do_not_share():
    backbone = Backbone(make_causal("llama"))
    backbone.model.config.sliding_window = 64
    assert backbone.why_not_shared(64) is None
    assert backbone.why_not_shared(65) == "its attention reaches 64 tokens back, and the longest row has 65"
