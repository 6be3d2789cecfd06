"""HPO: its loss and both gradients against the formula in float64, its value network, and the rewards of the data."""

import math

import pytest
import torch

from rlhf_fast.algorithms import hpo
from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.errors import UserError
from rlhf_fast.training import supervised
from rlhf_fast.training.optim import accumulate
from tests.training.tiny_runs import config_of, gradients, job_of, values_of, write_jsonl


def logits_of(job, role, example):
    with job.backbone.using(role):
        output = job.backbone.model(input_ids=torch.tensor([example.ids]), output_hidden_states=True)
    return output.logits[0].double(), output.hidden_states[-1][0].double()


def test_loss_and_gradients_are_those_of_the_formula():
    numbers = {"beta": 0.3, "auxiliary_weight": 0.5, "auxiliary_temperature": 0.7}
    config = config_of("hpo", objective=numbers, expectile=0.8, micro_batch_size=3)
    job = job_of(config)
    pairs = job.train[:4]
    head = job.backbone.heads["critic"].weight[0]

    def logprob(role, example):
        tokens, place = torch.tensor(example.ids[example.start :]), example.start - 1
        return logits_of(job, role, example)[0].log_softmax(-1)[place:-1].gather(-1, tokens[:, None]).sum()

    def surprise(pair, text):
        completion, example = pair.columns[text], getattr(pair, text)
        reward = len(completion) % 11 / 5.0 + 0.1 * sum(x in "aeiou" for x in completion)  # tiny_runs.REWARD
        return reward - logits_of(job, "critic", example)[1][example.start - 1] @ head.double()

    weights = [
        math.exp(float(surprise(pair, text).detach()) / 0.7) for pair in pairs for text in ("chosen", "rejected")
    ]
    bound = sorted(weights)[4] * 0.99
    config = config.model_copy(update={"max_weight": bound})
    capped = sum(weight > bound for weight in weights)
    loss = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        gap = 0.0
        for text, sign in (("chosen", 1), ("rejected", -1)):
            example, off = getattr(pair, text), surprise(pair, text)
            with torch.no_grad():
                base = logprob(None, example)
            logp = logprob("policy", example)
            loss = loss - 0.5 * min(math.exp(float(off.detach()) / 0.7), bound) * logp
            loss = loss + (0.2 if off < 0 else 0.8) * off**2 / 2
            gap = gap + sign * 0.3 * (logp - base)
        loss = loss - torch.nn.functional.logsigmoid(gap)
    (loss / 4).backward()
    expected = gradients(job)
    references, rewards = hpo.reference_logprobs(job, config, pairs), hpo.rewards_of(job, config, pairs)
    rows = supervised.micro_batches(job, job.train, range(4), 3)
    metrics = accumulate(hpo.loss_of(job, config, references, rewards), rows)
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()) / 4, rel=1e-3)
    assert float(metrics["capped_weights"]) == pytest.approx(capped / 8)
    assert 0 < capped < 8
    found = gradients(job)
    assert {name.split()[0] for name in found} == {"policy", "critic"}
    for name, value in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-4 * scale)


def test_the_value_of_a_prompt_goes_to_the_expectile_of_its_rewards(tmp_path):
    """Two rewards, 0 and 1, one each: the 0.8-expectile of both is 0.8, by 0.2 v = 0.8 (1 - v)."""
    (tmp_path / "reward.py").write_text("def score(completions):\n    return [float('g' in c) for c in completions]\n")
    rows = [{"prompt": "q", "chosen": "go", "rejected": "no"}] * 6
    write_jsonl(tmp_path / "data.jsonl", rows)
    config = config_of("hpo", data=str(tmp_path / "data.jsonl"), reward=f"{tmp_path}/reward.py:score", expectile=0.8,
                       eval_size=1, learning_rate=1e-4, critic_learning_rate=0.02)  # fmt: skip
    job = job_of(config, scrambled=False)
    references, rewards = hpo.reference_logprobs(job, config, job.train), hpo.rewards_of(job, config, job.train)
    assert rewards.tolist() == [[1.0, 0.0]] * len(job.train)
    loss = hpo.loss_of(job, config, references, rewards)
    for _ in range(60):
        accumulate(loss, supervised.micro_batches(job, job.train, range(4), None))
        job.optimizers["critic"].param_groups[0]["lr"] = 0.05
        job.optimizers["critic"].step()
        job.optimizers["critic"].zero_grad()
    _, hidden = logits_of(job, "critic", job.train[0].chosen)
    value = hidden[job.train[0].chosen.start - 1] @ job.backbone.heads["critic"].weight[0].double()
    assert float(value.detach()) == pytest.approx(0.8, abs=0.03)


def test_hpo_needs_a_reward_and_its_own_objective():
    values = values_of("hpo")
    del values["reward"]
    with pytest.raises(UserError, match="missing key 'reward'"):
        job_of(single_stage(values).config)
    with pytest.raises(UserError, match="objective must be hpo for algorithm hpo, got ipo"):
        single_stage(values_of("hpo", objective="ipo"))
