import json

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import ppo, reward_model
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.training.critic import critic_values
from rlhf_fast.training.experience import collect, move_reference, prompts_of_step
from rlhf_fast.training.on_policy import improve, micro_batches
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.supervised import padded
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, folder, job_of, values_of


@pytest.fixture(scope="module")
def reward_adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "rm"
    values = values_of("reward_model", output_dir=str(path), steps=3)
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    return path


def experience_of(job, config):
    torch.manual_seed(5)
    return collect(job, config, prompts_of_step(job, config, 0))


def test_kl_coefficient_follows_the_controller():
    _, (first, second) = trained("ppo", 2, kl_coef=0.1, kl_target=2.0, kl_horizon=40, batch_size=4)
    errors = [min(0.2, max(-0.2, metrics["kl"] / 2.0 - 1)) for metrics in (first, second)]
    assert first["kl_coef"] == pytest.approx(0.1 * (1 + errors[0] * 4 / 40))
    assert second["kl_coef"] == pytest.approx(first["kl_coef"] * (1 + errors[1] * 4 / 40))
    _, metrics = trained("ppo", 2, kl_coef=0.1, kl_target=None)
    assert [m["kl_coef"] for m in metrics] == [0.1, 0.1]


def test_the_reward_of_a_token_is_its_kl_and_at_the_end_the_score():
    config = config_of("ppo", kl_coef=0.5, gamma=1.0, lam=1.0, whiten_advantages=False)
    job = job_of(config)
    experience = experience_of(job, config)
    advantages, returns, values = ppo.estimate(job, config, experience)
    mask = experience.batch.mask
    # With gamma = lam = 1 the return of a row's first token is the sum of all its rewards.
    first = mask.argmax(1, keepdim=True)
    expected = experience.rewards - 0.5 * experience.kl.sum(1)
    torch.testing.assert_close(returns.gather(1, first).squeeze(1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantages, (returns - values) * mask, rtol=1e-4, atol=1e-5)


def test_steps_are_paid_at_their_ends_and_the_rest_at_the_last_token(tmp_path):
    (tmp_path / "steps.py").write_text(
        "def score(completions):\n    return [[(1, 9.0), (len(c), 0.5)] if len(c) > 2 else 0.25 for c in completions]\n"
    )
    changes = {"gamma": 0.9, "lam": 1.0, "kl_coef": 0.5, "reward_clip": 3.0, "missing_eos_penalty": 1.0}
    config = config_of("ppo", reward=f"{tmp_path}/steps.py:score", whiten_advantages=False, **changes)
    job = job_of(config)
    experience = experience_of(job, config)
    returns, paid = ppo.estimate(job, config, experience).returns, []
    for row, completion in enumerate(experience.rollout.completions):
        mask = experience.batch.mask[row].bool()
        rewards = (-0.5 * experience.kl[row])[mask].double()
        last = 0.0 if experience.rollout.finished[row] else -1.0
        if len(completion) > 2:
            ids = experience.batch.input_ids[row][mask]
            text = [job.encoder.tokenizer.decode(ids[: t + 1], skip_special_tokens=True) for t in range(len(ids))]
            rewards[[t.startswith(completion[:1]) for t in text].index(True)] += 3.0
            rewards[[t.startswith(completion) for t in text].index(True)] += 0.5
        else:
            last += 0.25
        rewards[-1] += last
        paid.append(len(completion) > 2)
        expected = [sum(0.9**k * float(r) for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        assert returns[row][mask].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(paid)


def test_an_unfinished_completion_pays_the_penalty():
    config = config_of("ppo", missing_eos_penalty=3.0)
    job = job_of(config)
    with_penalty = experience_of(job, config)
    without = experience_of(job, config.model_copy(update={"missing_eos_penalty": 0.0}))
    expected = without.rewards - 3.0 * (~with_penalty.rollout.finished).float()
    assert not with_penalty.rollout.finished.all()
    torch.testing.assert_close(with_penalty.rewards, expected)


def test_the_critic_starts_as_the_reward_role_on_the_scale_that_ppo_is_paid_in(reward_adapter):
    config = config_of("ppo", reward=str(reward_adapter))
    job = ppo.prepare(config)
    experience = experience_of(job, config)
    batch = experience.batch
    hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, ["critic"])["critic"]
    last = job.backbone.scores("critic", hidden, batch.attention_mask)
    torch.testing.assert_close(critic_values(job, config, last).detach(), experience.rewards, rtol=1e-4, atol=1e-5)


def test_scores_of_a_reward_adapter_have_mean_zero_and_spread_one_on_its_training_pairs(reward_adapter):
    config = config_of("reward_model", model=str(folder() / "model"))
    ppo_config = config_of("ppo", reward=str(reward_adapter))
    job = ppo.prepare(ppo_config)
    pairs = reward_model.prepare(config).train
    batch = padded(job, pairs)
    with torch.no_grad():
        hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, ["reward"])["reward"]
        scores = critic_values(job, ppo_config, job.backbone.scores("reward", hidden, batch.attention_mask))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scores.std()) == pytest.approx(1.0, abs=1e-3)


def test_actor_and_critic_gradients_do_not_touch_each_other():
    config = config_of("ppo")
    job = job_of(config)
    experience = experience_of(job, config)
    estimates, parts = ppo.estimate(job, config, experience), (torch.arange(4),)
    accumulate(ppo.loss_of(job, config, estimates), micro_batches(job, config, experience, parts))
    policy = [p.grad.clone() for p in job.backbone.parameters_of("policy")]
    for role in job.optimizers.values():
        role.zero_grad()
    estimates = estimates._replace(returns=estimates.returns * 5)
    accumulate(ppo.loss_of(job, config, estimates), micro_batches(job, config, experience, parts))
    for before, parameter in zip(policy, job.backbone.parameters_of("policy"), strict=True):
        torch.testing.assert_close(parameter.grad, before)


def test_updates_end_early_when_the_policy_has_moved_too_far():
    config = config_of("ppo", ppo_epochs=4, num_minibatches=1, learning_rate=0.5)

    def moved(limit):
        job = job_of(config)
        experience = experience_of(job, config)
        changed = config.model_copy(update={"early_stop_kl": limit})
        improve(job, changed, experience, ppo.loss_of(job, changed, ppo.estimate(job, changed, experience)))
        return job.optimizers["policy"].state_dict()["state"][0]["step"].item()

    assert moved(None) == 4
    # The first epoch starts where the samples came from; the second sees the distance.
    assert moved(1e-6) == 2


def test_the_reference_moves_as_the_config_says():
    config = config_of("ppo", reference_ema=0.75, reference_refresh_every=3)
    job = job_of(config)
    policy, old = job.backbone.snapshot("policy"), job.backbone.snapshot("reference")
    move_reference(job, config, step=0)
    for key, value in job.backbone.snapshot("reference").items():
        torch.testing.assert_close(value, 0.75 * old[key] + 0.25 * policy[key])
    move_reference(job, config, step=2)
    for key, value in job.backbone.snapshot("reference").items():
        torch.testing.assert_close(value, policy[key])


def test_a_policy_that_starts_from_an_adapter_keeps_a_frozen_copy_as_reference(tmp_path):
    values = values_of("sft", output_dir=str(tmp_path / "sft"), steps=2)
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    config = config_of("ppo", model=str(tmp_path / "sft"), reference_ema=None)
    job = ppo.prepare(config)
    assert not any(p.requires_grad for p in job.backbone.parameters_of("reference"))
    experience = experience_of(job, config)
    torch.testing.assert_close(experience.scores.logprobs, experience.scores.ref_logprobs)
    batch = experience.batch
    hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, [None])[None]
    base = job.backbone.logprobs(hidden, batch.input_ids, batch.mask)
    assert (base - experience.scores.ref_logprobs).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_a_run_trains_and_saves_adapters_of_the_kind_that_the_config_names(kind, tmp_path):
    values = values_of("ppo", output_dir=str(tmp_path / "run"), steps=1, **{kind: True})
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    for role in ("", "critic"):
        assert json.loads((tmp_path / "run" / role / "adapter_config.json").read_text())[kind] is True
