"""ILQL: its losses and gradients beside formulas on transformers' own states, its targets, its samples, a resume."""

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import ilql
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout import roll_out
from rlhf_fast.training import supervised
from rlhf_fast.training.optim import accumulate
from tests.training.interruptions import assert_resumes
from tests.training.tiny_runs import folder, gradients, job_of, values_of, write_jsonl

NUMBERS = {"gamma": 0.9, "tau": 0.8, "cql_scale": 0.3, "awac_scale": 0.7, "awac_beta": 0.5}


def values_of_row(**changes):
    return {**values_of("sft"), "algorithm": "ilql", "data": f"{folder()}/judged.jsonl", **changes}


def states(job, role, ids):
    """(T, D) fp64: what the head is given, from the model's own forward pass."""
    seen = []
    hook = job.backbone.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with job.backbone.using(role):
        job.backbone.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return seen[0][0].double()


def expected_loss(job, config, examples):
    head, value_head = job.backbone.lm_head_weight.double(), job.backbone.head("value").weight
    sums, count = {"q": 0.0, "v": 0.0, "cql": 0.0, "awac": 0.0}, 0
    for example in examples:
        ids, first = example.ids, example.start
        tokens = torch.tensor(ids[first:])[:, None]
        hidden = {role: states(job, role, ids)[first - 1 : -1] for role in ("policy", "q", "q_2")}
        with torch.no_grad():
            still = {role: states(job, role, ids)[first - 1 : -1] for role in ("target_q", "target_q_2", None)}
        values = (hidden["q"] @ value_head.double().T).squeeze(1)
        goal = config.gamma * torch.cat([values[1:].detach(), torch.zeros(1, dtype=torch.float64)])
        goal[-1] += example.reward
        for role in ("q", "q_2"):
            table = (hidden[role] - still[None]) @ head.T
            q = table.gather(1, tokens).squeeze(1)
            sums["q"] = sums["q"] + (q - goal).square().sum()
            sums["cql"] = sums["cql"] - table.log_softmax(1).gather(1, tokens).sum()
        targets = [((still[role] - still[None]) @ head.T).gather(1, tokens) for role in ("target_q", "target_q_2")]
        above = torch.minimum(*targets).squeeze(1) - values
        sums["v"] = sums["v"] + ((config.tau - (above < 0).double()).abs() * above.square()).sum()
        weight = (config.awac_beta * above.detach()).exp()
        logprobs = (hidden["policy"] @ head.T).log_softmax(1).gather(1, tokens).squeeze(1)
        sums["awac"] = sums["awac"] - (weight * logprobs).sum()
        count += len(tokens)
    return (sums["q"] + sums["v"] + config.cql_scale * sums["cql"] + config.awac_scale * sums["awac"]) / count


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_loss_and_its_gradients_are_the_formulas(micro_batch_size):
    config = single_stage(values_of_row(micro_batch_size=micro_batch_size, **NUMBERS)).config
    job = job_of(config)
    indices = [4, 0, 7]
    expected = expected_loss(job, config, [job.train[i] for i in indices])
    expected.backward()
    theirs = gradients(job)
    loss = ilql.loss_of(job, config, job.train)
    found = accumulate(loss, supervised.micro_batches(job, job.train, indices, micro_batch_size))
    assert float(found["loss"]) == pytest.approx(float(expected.detach()), rel=1e-3)
    for name, value in gradients(job).items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-3, atol=3e-4 * float(theirs[name].abs().max()))


def test_q_and_v_start_at_zero():
    config = single_stage(values_of_row()).config
    job = job_of(config, scrambled=False)
    (rows,) = supervised.micro_batches(job, job.train, range(4), None)
    loss, metrics = ilql.loss_of(job, config, job.train)(rows)
    squares = sum(job.train[i].reward ** 2 for i in range(4))
    assert float(metrics["q_loss"].detach()) == pytest.approx(2 * squares / rows.tokens, rel=1e-4)
    assert float(metrics["v_loss"]) == float(metrics["value"]) == 0.0
    assert torch.isfinite(loss)


def test_rewards_are_standardised_by_the_training_data_and_may_come_from_a_function(tmp_path, monkeypatch):
    """For a function the model is asked in the trial of two completions alone."""
    asked, score = [], Backbone.score
    monkeypatch.setattr(
        Backbone, "score", lambda self, ids, *a, **k: asked.append(len(ids)) or score(self, ids, *a, **k)
    )
    rows = [{"prompt": "p" * (1 + i % 3), "completion": "ab" * (i % 5)} for i in range(12)]
    write_jsonl(tmp_path / "plain.jsonl", rows)
    write_jsonl(tmp_path / "scored.jsonl", [{**row, "rating": len(row["completion"])} for row in rows])
    (tmp_path / "reward.py").write_text("def score(completions):\n    return [len(c) for c in completions]\n")
    jobs = []
    for data, reward in (("scored", None), ("plain", f"{tmp_path}/reward.py:score")):
        values = values_of_row(data=f"{tmp_path}/{data}.jsonl", reward=reward, max_new_tokens=4)
        jobs.append(job_of(single_stage(values).config))
    assert asked == [2]
    for job in jobs:
        lengths = torch.tensor([float(len(e.ids) - e.start - 1) for e in job.train], dtype=torch.float64)
        expected = (lengths - lengths.mean()) / lengths.std(correction=0)
        torch.testing.assert_close(torch.tensor([e.reward for e in job.train], dtype=torch.float64), expected)
    write_jsonl(tmp_path / "same.jsonl", [{**row, "rating": 2.0} for row in rows])
    for data, message in (
        ("plain", "ilql needs a column rating, or a reward"), ("same", "all 8 answers are paid 2"),
    ):  # fmt: skip
        stage = single_stage(values_of_row(data=f"{tmp_path}/{data}.jsonl"))
        with pytest.raises(UserError, match=message):
            stage.module.prepare(stage.config)


def test_samples_are_steered_by_the_lesser_q():
    """Of what generation is told of each role, and greedily: the token of the largest log policy + beta min Q."""
    config = single_stage(values_of_row(decode_beta=3.0, top_k=0, temperature=1e-4)).config
    job = job_of(config)
    ids = job.train[0].prompt.ids
    rollout = roll_out(
        job.backbone, job.encoder.tokenizer, [job.train[0].prompt], max_new_tokens=4,
        drawing=ilql.Steered(job.backbone, config, 3.0),
    )  # fmt: skip
    drawn = rollout.completion_ids()[0]
    head, plain = job.backbone.lm_head_weight.double(), []
    with torch.no_grad():
        for place, token in enumerate(drawn):
            h = {role: states(job, role, [*ids, *drawn[:place]])[-1] for role in ("policy", None, "q", "q_2")}
            qs = [(h[role] - h[None]) @ head.T for role in ("q", "q_2")]
            policy = (h["policy"] @ head.T).log_softmax(0)
            assert token == int((policy + 3.0 * torch.minimum(*qs)).argmax())
            plain.append(int(policy.argmax()))
    assert plain != drawn


def test_the_targets_follow_by_their_share_every_so_many_steps(tmp_path):
    values = values_of_row(steps=3, target_every=2, target_share=0.25, output_dir=str(tmp_path / "run"))
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    # The targets are 0 up to the second step's end, and so is what V is drawn to.
    assert rows[0]["v_loss"] == rows[1]["v_loss"] == 0.0
    assert rows[2]["v_loss"] > 0


def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    values = values_of_row(
        save_every=1, eval_every=1, target_every=1, target_share=0.5, lora_dropout=0.3, max_new_tokens=6,
        reward=f"{folder()}/reward.py:score",
    )  # fmt: skip
    assert_resumes(values, tmp_path, monkeypatch, step=2)
    assert "reward" in read_jsonl(tmp_path / "whole" / "eval.jsonl")[-1]["metrics"]
