import json

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import ppo
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.training.critic import critic_values
from rlhf_fast.training.experience import collect, move_reference, prompts_of_step
from rlhf_fast.training.on_policy import improve, micro_batches
from rlhf_fast.training.optim import accumulate, build_optimizer
from rlhf_fast.training.pairs import encode_pair, load_pair_rows
from rlhf_fast.training.reward_scale import follow_rewards
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


def scanned(rewards, values, gamma, lam):
    """GAE of one sequence, its definition in Python's floats."""
    advantages, after, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        after = reward + gamma * following - value + gamma * lam * after
        advantages.insert(0, after)
        following = value
    return advantages


def test_exact_kl_is_over_the_vocabulary_and_a_tokens_own_stays_sampled():
    changes = {"kl_coef": 0.5, "gamma": 0.9, "temperature": 0.7, "whiten_advantages": False}
    config = config_of("ppo", kl_variant="exact", lam=0.8, critic_lam=0.6, **changes)
    job = job_of(config)
    torch.manual_seed(5)
    experience = collect(job, config, prompts_of_step(job, config, 0), exact_kl=True)
    batch, logprobs = experience.batch, []
    for role in ("policy", "reference"):
        with torch.no_grad(), job.backbone.using(role):
            logits = job.backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logprobs.append((logits.double() / 0.7).log_softmax(-1)[:, :-1])
    policy, reference = logprobs
    exact = torch.nn.functional.pad((policy.exp() * (policy - reference)).sum(-1), (1, 0)) * batch.mask
    ids = batch.input_ids[:, 1:, None]
    sampled = torch.nn.functional.pad((policy - reference).gather(-1, ids)[..., 0], (1, 0)) * batch.mask
    torch.testing.assert_close(experience.kl.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experience.kl_by("k1").double(), sampled, rtol=1e-4, atol=1e-4)
    assert (exact - sampled).abs().max() > 0.1
    found = ppo.estimate(job, config, experience)
    first = accumulate(ppo.loss_of(job, config, found), micro_batches(job, config, experience, (torch.arange(4),)))
    assert [float(first[name]) for name in ("ratio_min", "ratio_max")] == pytest.approx([1.0, 1.0], abs=1e-5)
    for row, mask in enumerate(batch.mask.bool()):
        kl, own, values = (x[row][mask].tolist() for x in (exact, sampled, found.values))
        rewards = [-0.5 * k for k in kl]
        rewards[-1] += float(experience.rewards[row])
        expected = [a - 0.5 * (o - k) for a, o, k in zip(scanned(rewards, values, 0.9, 0.8), own, kl, strict=True)]
        assert found.advantages[row][mask].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        returns = [a + v for a, v in zip(scanned(rewards, values, 0.9, 0.6), values, strict=True)]
        assert found.returns[row][mask].tolist() == pytest.approx(returns, rel=1e-3, abs=1e-4)


def test_lambda_grows_with_the_length_and_rewards_are_scaled_clipped_and_whitened():
    changes = {"kl_coef": 0.0, "kl_target": None, "whiten_advantages": False, "normalize_rewards": "standardize"}
    config = config_of("ppo", length_adaptive_alpha=0.4, reward_clip=0.3, whiten_rewards=True, **changes)
    job = job_of(config)
    experience = experience_of(job, config)
    earlier = torch.tensor([0.5, 0.75, 0.25])
    follow_rewards(job, earlier)
    follow_rewards(job, experience.rewards)
    known = torch.cat([earlier, experience.rewards]).double()
    scores = ((experience.rewards - known.mean()) / known.std()).clamp(-0.3, 0.3)
    assert scores.abs().max() == pytest.approx(0.3)
    mask = experience.batch.mask.bool()
    paid = torch.zeros(mask.shape, dtype=torch.float64)
    for row, last in enumerate(mask.shape[1] - 1 - mask.flip(1).int().argmax(1)):
        paid[row, last] = scores[row]
    paid = (paid - paid[mask].mean()) / (paid[mask].var() + 1e-8).sqrt() + paid[mask].mean()
    found = ppo.estimate(job, config, experience)
    for row, counts in enumerate(mask):
        length = int(counts.sum())
        lam = 1 - 1 / max(1.0, 0.4 * length)
        values = found.values[row][counts].tolist()
        expected = scanned(paid[row][counts].tolist(), values, 1.0, lam)
        assert found.advantages[row][counts].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a2c_is_one_rmsprop_step_per_rollout_without_a_ratio():
    config = single_stage({**values_of("ppo"), "algorithm": "a2c", "ppo_epochs": 1, "num_minibatches": 1}).config
    assert (config.objective.variant, config.lam, config.vf_coef, config.max_grad_norm) == ("a2c", 1.0, 0.5, 0.5)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer([parameter], config)
    parameter.grad = torch.tensor([0.5, 1e-5])
    optimizer.step()
    squares = [0.01 * 0.25, 0.01 * 1e-10]
    expected = [w - 0.02 * g / (s**0.5 + 1e-5) for w, g, s in zip([1.0, -2.0], [0.5, 1e-5], squares, strict=True)]
    assert parameter.tolist() == pytest.approx(expected, rel=1e-6)


def test_whitened_rewards_and_an_estimate_that_stays_out_of_its_own_advantage_exclude_each_other():
    with pytest.raises(ValueError, match="whiten_rewards is for kl_variant k1, got exact"):
        config_of("ppo", whiten_rewards=True, kl_variant="exact")


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
    pairs = [encode_pair(job.encoder, row) for row in load_pair_rows(config)[0]]
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
