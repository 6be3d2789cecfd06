"""What a critic reads, what it learns by, and whom its gradient reaches."""

import json

import pytest
import torch

from rlhf_fast.algorithms import ppo
from rlhf_fast.models.peft_io import load_adapter
from rlhf_fast.training.critic import critic_term, critic_values
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.on_policy import micro_batches
from rlhf_fast.training.optim import accumulate
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, job_of


def critic_gradients(job, config, rows_per_pass=4, **options):
    """Of the value loss by itself, on returns of its own, by role and name; without those that are zero or missing."""
    torch.manual_seed(5)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    returns = torch.linspace(-2, 3, experience.batch.mask.numel()).view(experience.batch.mask.shape)

    def loss(rows):
        old = torch.zeros_like(returns)[rows.indices]
        return critic_term(job, config, rows, old, returns[rows.indices], **options)

    found = accumulate(loss, micro_batches(job, config, experience, torch.arange(4).split(rows_per_pass)))
    named = {(role, n): p for role in job.optimizers for n, p in job.backbone.named_parameters_of(role).items()}
    kept = {name: p.grad.clone() for name, p in named.items() if p.grad is not None and bool(p.grad.any())}
    for p in named.values():
        p.grad = None
    return kept, found, experience, returns


def test_a_shared_critic_reaches_the_policy_as_far_as_the_config_says():
    config = config_of("ppo", critic="shared", value_clip_eps=None, vf_coef=0.5)
    job = job_of(config)
    assert "critic" not in job.backbone.adapters
    whole, found, experience, returns = critic_gradients(job, config)
    batch, mask = experience.batch, experience.batch.mask.bool()
    hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, ["policy"])["policy"].double()
    weight = job.backbone.head("critic").weight.double()
    values = torch.cat([torch.zeros_like(hidden[:, :1, 0]), (hidden[:, :-1] @ weight.T)[..., 0]], 1)
    expected = 0.5 * (values - returns)[mask].square().mean().detach()
    assert float(found["value_loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(found["loss"]) == pytest.approx(0.5 * float(expected), rel=1e-4)
    torch.testing.assert_close(experience.scores.values[mask].double(), values[mask].detach(), rtol=1e-4, atol=1e-5)
    assert {role for role, _ in whole} == {"policy", "critic"}
    split, *_ = critic_gradients(job, config, rows_per_pass=1)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    quarter, *_ = critic_gradients(job, config.model_copy(update={"critic_gradient": 0.25}))
    for (role, name), gradient in whole.items():
        share = 0.25 if role == "policy" else 1.0
        torch.testing.assert_close(quarter[role, name], share * gradient, rtol=1e-4, atol=1e-6)
    for alone in (critic_gradients(job, config, alone=True)[0],
                  critic_gradients(job, config.model_copy(update={"critic_gradient": 0.0}))[0]):  # fmt: skip
        assert set(alone) == {("critic", "score.weight")}
        torch.testing.assert_close(alone["critic", "score.weight"], whole["critic", "score.weight"])


def test_a_shared_critic_is_saved_with_the_adapter_that_it_reads(tmp_path):
    config = config_of("ppo", critic="shared")
    job = job_of(config)
    policy, head = job.backbone.snapshot("policy"), job.backbone.head("critic").weight.detach().clone()
    ppo.save(job, config, tmp_path)
    assert json.loads((tmp_path / "critic" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = job_of(config_of("ppo"), scrambled=False)
    again.backbone.remove_adapter("critic")
    load_adapter(again.backbone, "critic", tmp_path / "critic", trainable=False)
    loaded = again.backbone.snapshot("critic")
    assert torch.equal(loaded.pop("score.weight"), head)
    assert loaded.keys() == policy.keys()
    assert all(torch.equal(loaded[name], policy[name]) for name in policy)


def test_a_distributional_critic_learns_a_histogram_whose_mean_is_the_value():
    config = config_of("ppo", critic_loss="distributional", value_bins=5, value_min=-1.0, value_max=1.5)
    job = job_of(config)
    whole, found, experience, returns = critic_gradients(job, config)
    split, *_ = critic_gradients(job, config, rows_per_pass=1)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    logits, mask = experience.scores.values.double(), experience.batch.mask.bool()
    assert logits.shape == (*mask.shape, 5)
    centres = torch.tensor([-0.75, -0.25, 0.25, 0.75, 1.25], dtype=torch.float64)
    values = critic_values(job, config, experience.scores.values)
    torch.testing.assert_close(values.double(), logits.softmax(-1) @ centres, rtol=1e-5, atol=1e-6)
    edges = torch.linspace(-1, 1.5, 6, dtype=torch.float64)
    normal = torch.distributions.Normal(returns.double().clamp(-1, 1.5)[..., None], 0.75 * 0.5)
    cumulative = normal.cdf(edges)
    target = cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])
    expected = -(target * logits.log_softmax(-1)).sum(-1)[mask].mean()
    assert float(found["value_loss"]) == pytest.approx(float(expected), rel=1e-4)
    outside = ((returns < -1) | (returns > 1.5))[mask].float().mean()
    assert float(found["returns_outside_bins"]) == pytest.approx(float(outside))


def test_in_its_warm_up_the_critic_alone_moves():
    changes = {"critic_warmup_steps": 2, "ptx_data": None, "kl_coef": 0.1, "policy_ema": 0.5, "reference_ema": None}
    config = config_of("ppo", steps=3, **changes)
    before = job_of(config).backbone
    job, metrics = trained("ppo", 3, **changes)
    assert [m["grad_norm_policy"] == 0 for m in metrics] == [True, True, False]
    assert all(m["grad_norm_critic"] > 0 for m in metrics)
    assert [m["kl_coef"] == 0.1 for m in metrics] == [True, True, False], "no controller follows a policy that stands"
    policy = {name: p.detach() for name, p in job.backbone.named_parameters_of("policy").items()}
    start, average = before.snapshot("policy"), job.backbone.snapshot("ema")
    assert any(not torch.equal(policy[name], start[name]) for name in policy)
    # The average of job_of's scrambling differs from the policy; one step has moved it half way.
    first = before.snapshot("ema")
    for name, value in average.items():
        torch.testing.assert_close(value, 0.5 * first[name] + 0.5 * policy[name])


@pytest.mark.parametrize(("changes", "message"), [
    ({"value_min": 2.0, "value_max": 1.0}, r"value_min must be below value_max, got 2\.0 and 1\.0"),
    ({"critic_warmup_steps": 5}, "critic_warmup_steps 5 leave the policy none of 5 steps"),
], ids=str)  # fmt: skip
def test_a_critic_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("ppo", **changes)
