"""Who is scored after a rollout: the policy only where the update does not make its log-probabilities itself."""

import pytest
import torch

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Example
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rewards import Payment
from rlhf_fast.rollout import Rollout
from rlhf_fast.training import on_policy
from rlhf_fast.training.experience import collect, placed, prompts_of_step
from rlhf_fast.training.optim import accumulate
from tests.training.tiny_runs import config_of, job_of

ONE_MINIBATCH = {"num_minibatches": 1, "micro_batch_size": 3}


def rollout_of(job, texts):
    """What would have been sampled had the policy written the texts, each with its end."""
    prompts = [job.train[i] for i in range(len(texts))]
    completions = [[*job.encoder.tokenizer.encode(text, add_special_tokens=False), 258] for text in texts]
    batch = pad_batch([Example(p.ids + c, len(p.ids)) for p, c in zip(prompts, completions, strict=True)], 256)
    return Rollout(prompts, batch, list(texts), torch.ones(len(texts), dtype=torch.bool))


def test_payments_stand_at_the_tokens_that_complete_their_steps():
    job = job_of(config_of("ppo"))
    rollout = rollout_of(job, ["a\nbé\nc", "xyz"])  # a token for each byte: two for the é, and the end
    steps = [Payment(1.0, end=2), Payment(0.0, end=5), Payment(4.0, end=6), Payment(0.5, end=6)]
    rewards, ends = placed(job, rollout, [steps, [Payment(0.1, token=t) for t in range(4)]])
    sampled = [row[mask.bool()].tolist() for row, mask in zip(rewards, rollout.batch.mask, strict=True)]
    assert sampled[0] == [0, 1.0, 0, 0, 0, 0, 4.5, 0]
    assert sampled[1] == pytest.approx([0.1] * 4)
    assert rewards.sum().item() == pytest.approx(5.9)
    assert ends[0][rollout.batch.mask[0].bool()].tolist() == [t in (1, 5, 6) for t in range(8)]
    assert ends[1].sum() == 4


class Log:
    """A run that keeps the metrics of every step."""

    def __init__(self, steps):
        self.count, self.start, self.metrics = steps, 0, []

    def steps(self):
        return range(self.count)

    def log(self, step, metrics, *, tokens):
        self.metrics.append(metrics)

    def samples(self, step, samples):
        pass


def trained(algorithm, steps, **changes):
    """(job, metrics of every step) after `steps` steps."""
    config = config_of(algorithm, steps=steps, **changes)
    job, log = job_of(config), Log(steps)
    load_algorithm(algorithm).train(job, config, log)
    return job, log.metrics


@pytest.mark.parametrize(("algorithm", "changes", "sampler", "passes"), [
    ("grpo", {"ppo_epochs": 1}, False, ["reference", "policy"]),
    ("grpo", {"ppo_epochs": 2}, False, ["reference", "policy", "policy"]),
    ("grpo", {"ppo_epochs": 1, "num_minibatches": 2}, False, ["policy reference", "policy", "policy"]),
    ("grpo", {"ppo_epochs": 1, "num_minibatches": 2}, True, ["reference", "policy", "policy"]),
    ("grpo", {"advantage": "optimal_token_baseline"}, True, ["policy reference", "policy"]),
    ("grpo", {"ppo_epochs": 1, "kl_coef": 0.1}, False, ["policy reference", "policy"]),
    ("grpo", {"ppo_epochs": 1, "kl_coef": 0.1}, True, ["reference", "policy"]),
    ("ppo", {"ppo_epochs": 1, "kl_coef": 0.0}, False, ["reference critic", "policy", "critic"]),
    ("ppo", {"ppo_epochs": 1}, False, ["policy reference critic", "policy", "critic"]),
    ("ppo", {"ppo_epochs": 1}, True, ["reference critic", "policy", "critic"]),
], ids=str)  # fmt: skip
def test_the_policy_is_scored_only_where_nothing_else_tells_in_time(algorithm, changes, sampler, passes, monkeypatch):
    """Neither the first minibatch nor a sampler that is found to be the scorer."""
    config = config_of(algorithm, **{"num_minibatches": 1, "ppo_epochs": 1} | changes)
    job, traversals, hidden = job_of(config), [], Backbone.hidden
    assert job.sampler_scores
    job.sampler_scores = sampler

    def counted(self, input_ids, attention_mask, roles, **options):
        traversals.append(" ".join(roles))
        return hidden(self, input_ids, attention_mask, roles, **options)

    log = Log(1)
    monkeypatch.setattr(log, "steps", lambda: [1])  # the first one scores the policy for what its sampler says
    monkeypatch.setattr(Backbone, "hidden", counted)
    load_algorithm(algorithm).train(job, config, log)
    assert traversals == passes


def test_what_the_sampler_tells_is_what_a_scoring_pass_finds():
    """Also under a temperature and truncation."""
    config = config_of("grpo", temperature=0.7, top_p=0.8, max_new_tokens=12)
    job, found = job_of(config), []
    for job.sampler_scores in (True, False):
        torch.manual_seed(7)
        found.append(collect(job, config, prompts_of_step(job, config, 0)))
    ours, theirs = found
    assert ours.rollout.completions == theirs.rollout.completions
    torch.testing.assert_close(ours.scores.logprobs, theirs.scores.logprobs, rtol=0, atol=1e-4)
    assert ours.scores.collisions is None
    assert theirs.scores.collisions is not None


@pytest.mark.parametrize(("algorithm", "changes"), [
    ("grpo", {"ppo_epochs": 1}), ("grpo", {"ppo_epochs": 3}), ("grpo", {"advantage": "rloo", "top_layers": 1}),
    ("ppo", {"kl_coef": 0.0}),
], ids=str)  # fmt: skip
def test_a_run_without_scoring_the_policy_is_the_run_with_it(algorithm, changes, monkeypatch):
    job, metrics = trained(algorithm, 4, **ONE_MINIBATCH, **changes)
    monkeypatch.setattr(on_policy, "collect", lambda *a, **options: collect(*a, **{**options, "score_policy": True}))
    scored_job, scored_metrics = trained(algorithm, 4, **ONE_MINIBATCH, **changes)
    for found, expected in zip(metrics, scored_metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for role in job.optimizers:
        expected = scored_job.backbone.snapshot(role)
        torch.testing.assert_close(job.backbone.snapshot(role), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_logprobs_that_the_update_kept_are_those_of_a_scoring_pass(algorithm):
    config = config_of(algorithm, **ONE_MINIBATCH, kl_coef=0.0)
    job = job_of(config)
    experiences = []
    for score_policy in (True, False):
        torch.manual_seed(7)
        experiences.append(collect(job, config, prompts_of_step(job, config, 0), score_policy=score_policy))
    scored, kept = experiences
    rows = on_policy.micro_batches(job, config, kept, (torch.tensor([2, 0, 3]), torch.tensor([1])))
    accumulate(lambda part: (part.logprobs.sum(), {}), rows)
    torch.testing.assert_close(kept.scores.logprobs, scored.scores.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.kl, scored.kl, rtol=1e-4, atol=1e-5)
    assert scored.kl.abs().max() > 0.01


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_samplers_own_logprobs_correct_the_loss_where_the_config_asks_for_it(algorithm):
    corrected = {"sampler_correction": True, "objective": {"correction_high": 0.5}}
    _, (plain,) = trained(algorithm, 1, kl_coef=0.0)
    _, (metrics,) = trained(algorithm, 1, kl_coef=0.0, **corrected)
    assert "correction_mean" not in plain
    # The sampler is the policy: ratios of 1, all of them above this bound, so half of the policy's loss is left.
    assert metrics["sampler_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["correction_mean"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["correction_fraction"] == pytest.approx(1.0, rel=1e-5)


def test_a_first_minibatch_of_some_rows_cannot_make_the_old_logprobs():
    config = config_of("grpo")
    job = job_of(config)
    experience = collect(job, config, prompts_of_step(job, config, 0), score_policy=False)
    with pytest.raises(ValueError, match="the first minibatch has 2 rows, not all 4"):
        list(on_policy.micro_batches(job, config, experience, (torch.tensor([0, 1]),)))
