"""The gradient of PPO-ptx, and what it takes in which order."""

import pytest
import torch

from rlhf_fast.algorithms import ppo
from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.errors import UserError
from rlhf_fast.training import on_policy
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.on_policy import improve, micro_batches
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.ptx import ptx_term
from tests.training.tiny_runs import config_of, folder, gradients, job_of


def language_model_gradient(job, examples):
    """d (mean -log p of the learnt tokens) / d policy, from the model's own logits, a row at a time."""
    total, tokens = 0.0, sum(sum(example.learnt[1:]) for example in examples)
    with job.backbone.using("policy"):
        for example in examples:
            ids = torch.tensor([example.ids])
            logprobs = job.backbone.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            own = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
            total = total - (own * torch.tensor(example.learnt[1:])).sum() / tokens
    named = job.backbone.named_parameters_of("policy")
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True)), float(total)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_one_optimizer_step_has_the_policys_gradient_plus_gamma_times_the_texts(micro_batch_size, monkeypatch):
    changes = {"ptx_data": str(folder() / "sft.jsonl"), "ptx_coef": 5.0, "ptx_batch_size": 3}
    config = config_of("ppo", num_minibatches=1, ppo_epochs=1, micro_batch_size=micro_batch_size, **changes)
    job = job_of(config)
    torch.manual_seed(7)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    loss = ppo.loss_of(job, config, ppo.estimate(job, config, experience))
    parts = torch.arange(4).split(micro_batch_size or 4)
    accumulate(loss, micro_batches(job, config, experience, parts))
    alone = gradients(job)
    job.counters["ptx_examples"] = 8  # the last of the first pass over the 9, and the first of the second
    order = [*shuffled_indices(9, config.seed, 0, 9)[8:], *shuffled_indices(9, config.seed, 9, 2)]
    texts, mean = language_model_gradient(job, [job.pretraining[i] for i in order])
    seen = []

    def update(job, config, total):
        seen.append(gradients(job))
        return {}

    monkeypatch.setattr(on_policy, "update", update)
    metrics = improve(job, config, experience, loss, beside=lambda rows: ptx_term(job, config, rows))
    (found,) = seen
    assert metrics["ptx_loss"] == pytest.approx(mean, rel=1e-4)
    assert job.counters["ptx_examples"] == 11
    for name, gradient in found.items():
        role, parameter = name.split(" ", 1)
        expected = alone[name] + (5.0 * texts[parameter] if role == "policy" else 0.0)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_weight_without_texts_is_refused():
    with pytest.raises(UserError, match=r"ptx_coef 27\.8 is the weight of ptx_data, which is missing"):
        job_of(config_of("ppo", ptx_coef=27.8))
