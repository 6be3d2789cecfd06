"""The exact KL to the reference as a term of the loss: its gradient, what it does in a run, and what it may hold."""

import dataclasses

import pytest
import torch

from rlhf_fast.algorithms import grpo, ppo
from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.ops.head import tiles
from rlhf_fast.testing.memory import peak_bytes
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.on_policy import micro_batches
from rlhf_fast.training.optim import accumulate
from tests.training.test_experience import trained
from tests.training.tiny_runs import assert_close, config_of, gradients, job_of, values_of

PARTS = (torch.tensor([2, 0, 3]), torch.tensor([1]))


def experience_of(job, config):
    torch.manual_seed(5)
    return collect(job, config, prompts_of_step(job, config, 0))


def divergences(job, batch, temperature, variant):
    """(B, T), in float64, of all logits of both models: the sum over the vocabulary."""
    logs = []
    for role in ("policy", "reference"):
        with torch.set_grad_enabled(role == "policy"), job.backbone.using(role):
            logits = job.backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logs.append((logits.double() / temperature).log_softmax(-1)[:, :-1])
    policy, reference = logs
    terms = {"exact": policy.exp() * (policy - reference), "exact_forward": reference.exp() * (reference - policy)}
    return torch.nn.functional.pad(terms[variant].sum(-1), (1, 0)) * batch.mask


@pytest.mark.parametrize("variant", ["exact", "exact_forward"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_its_gradient_is_that_of_the_sum_over_the_vocabulary(algorithm, variant):
    objective = {"kl_coef": 0.3, "kl_variant": variant, "aggregation": "seq_mean_token_mean"}
    config = config_of(algorithm, objective=objective, kl_coef=0.0, kl_target=None, temperature=0.7)
    job = job_of(config)
    e = experience_of(job, config)
    nothing = torch.zeros_like(e.batch.mask, dtype=torch.float32)
    if algorithm == "grpo":
        loss = grpo.loss_of(config, nothing)
    else:  # returns that are the values leave the critic where it is
        values = ppo.critic_values(job, config, e.scores.values) * e.batch.mask
        loss = ppo.loss_of(job, config, ppo.Estimates(nothing, values, values))
    found = accumulate(loss, micro_batches(job, config, e, PARTS))
    ours = {name: x for name, x in gradients(job).items() if name.startswith("policy")}
    kl, lengths = divergences(job, e.batch, 0.7, variant), e.batch.mask.sum(1)
    mean = (kl.sum(1) / lengths).mean()
    (0.3 * mean).backward()
    parameters = job.backbone.named_parameters_of("policy")
    assert_close(ours, {f"policy {name}": p.grad for name, p in parameters.items()})
    assert float(mean.detach()) > 0.01
    assert float(found["kl_to_ref"]) == pytest.approx(float(kl.detach().sum() / lengths.sum()), rel=1e-4)
    if algorithm == "grpo":
        assert float(found["loss"]) == pytest.approx(0.3 * float(mean.detach()), rel=1e-4)


def test_the_rest_of_the_loss_is_what_it_is_without_it():
    config = config_of("grpo", objective={"kl_coef": 0.0, "entropy_coef": 0.1})
    job = job_of(config)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])

    def found(**objective):
        changed = config.model_copy(update={"objective": dataclasses.replace(config.objective, **objective)})
        e = experience_of(job, changed)
        accumulate(grpo.loss_of(changed, advantages), micro_batches(job, changed, e, PARTS))
        return e, gradients(job)

    e, without = found()
    _, both = found(kl_coef=0.3, kl_variant="exact")
    mean = divergences(job, e.batch, 1.0, "exact").sum() / e.batch.mask.sum()
    (0.3 * mean).backward()
    parameters = job.backbone.named_parameters_of("policy")
    assert_close(both, {f"policy {name}": without[f"policy {name}"] + p.grad for name, p in parameters.items()})


@pytest.mark.parametrize("variant", ["exact", "exact_forward"])
def test_it_pulls_the_policy_back_to_its_reference(variant, tmp_path):
    (tmp_path / "flat.py").write_text("def score(completions):\n    return [0.0] * len(completions)\n")
    changes = {"reward": f"{tmp_path}/flat.py:score", "reference_refresh_every": None, "batch_size": 16}
    objective = {"kl_coef": 1.0, "kl_variant": variant}
    _, metrics = trained("grpo", 24, objective=objective, learning_rate=0.01, **changes)
    assert metrics[0]["kl_to_ref"] > 0.05
    last = sum(row["kl_to_ref"] for row in metrics[-3:]) / 3  # sixteen completions leave noise
    assert last < 0.5 * metrics[0]["kl_to_ref"]


def test_a_preset_keeps_its_weight_of_the_kl_and_takes_the_exact_one():
    config = single_stage(values_of("grpo", objective={"kl_variant": "exact"})).config
    assert (config.objective.kl_coef, config.loss_kl) == (0.04, "reverse")
    for algorithm in ("ppo", "dr_grpo", "rloo", "online_dpo"):
        assert single_stage({**values_of("grpo"), "algorithm": algorithm, "objective": {}}).config.loss_kl is None


def test_of_the_hidden_states_the_reference_s_alone_are_kept():
    config = config_of("ppo", objective={"kl_coef": 0.3, "kl_variant": "exact"}, kl_coef=0.0, kl_target=None)
    job = job_of(config)
    batch = experience_of(job, config).batch
    kept = job.backbone.score(batch.input_ids, batch.attention_mask, batch.mask, ref_hidden=True).ref_hidden
    expected = job.backbone.hidden(batch.input_ids, batch.attention_mask, ["reference"])["reference"]
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    assert kept.untyped_storage().nbytes() == expected.nbytes


def test_no_more_than_a_tile_of_logits_exists_at_a_time(monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 1 << 20)
    config = config_of("grpo", objective={"kl_coef": 0.3, "kl_variant": "exact"})
    backbone, vocabulary = job_of(config).backbone, 16_384
    wide, (batch, time, width) = torch.randn(vocabulary, 32), (4, 100, 32)  # 26 MB of logits, as many of the reference
    monkeypatch.setattr(type(backbone), "lm_head_weight", wide)
    ids = torch.randint(0, vocabulary, (batch, time))
    hidden, reference = torch.randn(batch, time, width, requires_grad=True), torch.randn(batch, time, width)

    def step():
        found = backbone.divergence(hidden, reference, ids, torch.ones_like(ids), return_entropy=True)
        (found.kl.sum() + found.logprobs.sum()).backward()

    assert 1 << 19 < peak_bytes(step) < (1 << 20) + 12 * hidden.nbytes
