"""What must hold for every algorithm, whatever its loss."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.batches import Batch
from rlhf_fast.models.backbone import Scores
from rlhf_fast.models.loading import load_model
from rlhf_fast.training import on_policy, supervised
from rlhf_fast.training.ensemble import all_scores
from rlhf_fast.training.experience import Experience, collect, prompts_of_step
from rlhf_fast.training.job import Job
from rlhf_fast.training.optim import accumulate
from tests.training.tiny_runs import ALGORITHMS, DEVICE, assert_close, config_of, folder, gradients, job_of, values_of

ROLLOUTS = ("ppo", "grpo")


def one_backward(job: Job, config) -> dict[str, torch.Tensor]:
    """The losses of one batch of the first data (for rollouts: one minibatch of all rows), after backward."""
    module = load_algorithm(config.algorithm)
    if config.algorithm in ROLLOUTS:
        return rollout_backward(job, config, experience_of(job, config))
    if config.algorithm == "online_dpo":
        duels = module.duels_of(job, config, experience_of(job, config))
        parts = duels.pairs.split(config.micro_batch_size or len(duels.pairs))
        rows = on_policy.micro_batches(job, config, duels.everyone, tuple(part.T.flatten() for part in parts))
        return accumulate(module.loss_of(config, duels), rows)
    rows = supervised.micro_batches(job, job.train, range(4), config.micro_batch_size)
    return accumulate(module.loss_of(job, config, *given_of(module, job, config)), rows)


def given_of(module, job: Job, config) -> list:
    """What the loss of given answers is told of them and of their reference."""
    if config.algorithm == "dpo":
        return [job.train, module.references_of(job, config, job.train[:4])]
    if config.algorithm == "kto":
        return [job.train, module.reference_logprobs(job, config, job.train[:4]), range(4)]
    if config.algorithm == "hpo":
        pairs = job.train[:4]
        return [module.reference_logprobs(job, config, pairs), module.rewards_of(job, config, pairs)]
    return []


def experience_of(job: Job, config) -> Experience:
    torch.manual_seed(7)
    return collect(job, config, prompts_of_step(job, config, 0))


def rollout_backward(job: Job, config, experience: Experience) -> dict[str, torch.Tensor]:
    module = load_algorithm(config.algorithm)
    parts = torch.arange(config.batch_size).split(config.micro_batch_size or config.batch_size)
    if config.algorithm == "grpo":
        loss = module.loss_of(config, torch.tensor([1.0, -1.0, 0.5, 2.0], device=DEVICE))
    else:
        loss = module.loss_of(job, config, module.estimate(job, config, experience))
    return accumulate(loss, on_policy.micro_batches(job, config, experience, parts))


@pytest.mark.parametrize("algorithm", ROLLOUTS)
def test_the_first_minibatch_has_ratio_one_and_no_kl(algorithm):
    config = config_of(algorithm, temperature=0.7)
    job = job_of(config)
    metrics = one_backward(job, config)
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["ratio_max"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-9)
    assert float(metrics["clip_fraction"]) == 0.0


@pytest.mark.parametrize("algorithm", ROLLOUTS)
@pytest.mark.parametrize("top_layers", [None, 1])
def test_reference_logprobs_are_those_of_the_base_model(algorithm, top_layers):
    config = config_of(
        algorithm, temperature=0.7, top_layers=top_layers, reference_ema=None, reference_refresh_every=None
    )
    job = job_of(config)
    experience = experience_of(job, config)
    batch = experience.batch
    base = load_model(folder() / "model", dtype=torch.float32).requires_grad_(False).to(DEVICE)
    logits = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / 0.7
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    expected = torch.nn.functional.pad(expected, (1, 0)) * batch.mask
    torch.testing.assert_close(experience.scores.ref_logprobs, expected, rtol=1e-4, atol=1e-5)
    assert (experience.scores.logprobs - expected).abs().max() > 0.01, "the policy must differ for this to say anything"


def test_dpo_reference_logprobs_are_those_of_the_base_model():
    config = config_of("dpo")
    job = job_of(config)
    module = load_algorithm("dpo")
    ours = module.references_of(job, config, job.train)
    base = load_model(folder() / "model", dtype=torch.float32).requires_grad_(False).to(DEVICE)
    for (chosen, rejected), pair in zip(ours.tolist(), job.train, strict=True):
        for found, example in ((chosen, pair.chosen), (rejected, pair.rejected)):
            ids = torch.tensor([example.ids], device=DEVICE)
            logprobs = base(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            assert found == pytest.approx(logprobs[example.start - 1 :].sum().item(), rel=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_give_the_gradients_of_the_whole_batch(algorithm):
    whole = config_of(algorithm)
    split = config_of(algorithm, micro_batch_size=1)
    job = job_of(whole)
    losses = one_backward(job, whole)
    expected = gradients(job)
    split_losses = one_backward(job, split)
    assert_close(gradients(job), expected)
    for name in losses:
        assert float(split_losses[name]) == pytest.approx(float(losses[name]), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_activation_checkpointing_gives_the_same_gradients(algorithm):
    config = config_of(algorithm)
    job = job_of(config)
    one_backward(job, config)
    expected = gradients(job)
    job.backbone.enable_checkpointing()
    one_backward(job, config)
    assert_close(gradients(job), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dropout_is_in_the_passes_that_train_and_in_no_other(algorithm):
    config, plain = config_of(algorithm, lora_dropout=0.5), config_of(algorithm)
    job, without = job_of(config), job_of(plain)
    module = load_algorithm(algorithm)
    assert module.evaluate(job, config)["metrics"] == module.evaluate(without, plain)["metrics"]
    if algorithm in ROLLOUTS:
        ours, theirs = experience_of(job, config).scores, experience_of(without, plain).scores
        assert torch.equal(ours.logprobs, theirs.logprobs)
        assert torch.equal(ours.ref_logprobs, theirs.ref_logprobs)
    assert "passes" not in job.counters
    one_backward(without, plain)
    expected, passes = gradients(without), job.counters.get("passes", 0)
    one_backward(job, config)
    dropped = gradients(job)
    assert job.counters["passes"] == passes + 1
    assert any(not torch.allclose(dropped[name], expected[name], rtol=1e-2) for name in expected)
    one_backward(job, config)
    assert any(not torch.equal(value, dropped[name]) for name, value in gradients(job).items()), "a mask for each pass"
    job.counters["passes"] = passes
    one_backward(job, config)
    assert all(torch.equal(value, dropped[name]) for name, value in gradients(job).items())


def test_a_critic_that_starts_from_a_reward_adapter_with_dropout_of_its_own_takes_that_of_the_run(tmp_path):
    values = {"lora_dropout": 0.1, "output_dir": str(tmp_path / "rm"), "steps": 1}
    run_stage(Console(quiet=True), single_stage(values_of("reward_model", **values)), resume=None, overwrite=False)
    assert json.loads((tmp_path / "rm" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    config = config_of("ppo", reward=str(tmp_path / "rm"), model=str(tmp_path / "rm"), lora_dropout=0.25)
    job = job_of(config)
    one_backward(job, config)
    for role in ("policy", "critic"):
        assert {pair.shape.dropout for pair in job.backbone.adapters[role].values()} == {0.25}


def wider(x: torch.Tensor, fill: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 5), value=fill)


@pytest.mark.parametrize("algorithm", ROLLOUTS)
def test_padding_changes_no_gradient_of_a_rollout_whatever_stands_behind_the_mask(algorithm):
    config = config_of(algorithm)
    job = job_of(config)
    experience = experience_of(job, config)
    losses = rollout_backward(job, config, experience)
    expected = gradients(job)
    old = experience.batch
    batch = Batch(wider(old.input_ids, 65), wider(old.attention_mask, 0), wider(old.mask, 0), old.counts)
    scores = experience.scores
    values = None if scores.values is None else wider(scores.values, 1e6)
    padded = Experience(
        dataclasses.replace(experience.rollout, batch=batch),
        None,
        Scores(wider(scores.logprobs, 0.0), wider(scores.ref_logprobs, 0.0), values, None),
        experience.rewards,
        experience.parts,
    )
    padded_losses = rollout_backward(job, config, padded)
    assert_close(gradients(job), expected)
    for name in losses:
        assert float(padded_losses[name]) == pytest.approx(float(losses[name]), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("algorithm", ["sft", "reward_model", "dpo", "kto"])
def test_a_longer_neighbour_changes_nothing_for_the_others(algorithm):
    config = config_of(algorithm)
    job = job_of(config)
    module = load_algorithm(algorithm)
    short, longest = job.train[0], max(job.train, key=_length)
    assert _length(longest) > _length(short) + 5
    with torch.no_grad():
        if algorithm == "sft":
            alone, beside = (
                supervised.logprobs_of(job, config, "policy", supervised.padded(job, rows)).sum(1)[:1]
                for rows in ([short], [short, longest])
            )
        elif algorithm in ("dpo", "kto"):
            score = module.references_of if algorithm == "dpo" else module.reference_logprobs
            alone, beside = (score(job, config, rows)[0] for rows in ([short], [short, longest]))
        else:
            alone, beside = (all_scores(job, config, rows)[:2] for rows in ([short], [short, longest]))
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


def _length(example) -> int:
    return max(len(sequence.ids) for sequence in supervised.sequences_of([example]))
