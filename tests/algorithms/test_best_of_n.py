"""Rejection-sampling fine-tuning: what is kept by each rule, that it is learnt by likelihood, hints, and a resume."""

import dataclasses

import numpy
import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import best_of_n
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.rollout.decoder import Decoder
from rlhf_fast.training import on_policy
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.optim import accumulate
from tests.training.interruptions import assert_resumes
from tests.training.test_experience import Log
from tests.training.tiny_runs import folder, gradients, job_of, save_supple_model, values_of, write_jsonl


def values_of_row(name, **changes):
    values = values_of("grpo")
    del values["objective"], values["reference_refresh_every"]
    return {**values, "algorithm": name, "num_generations": 4, "batch_size": 8, "steps": 3, **changes}


def prepared(name, rewards=None, **changes):
    """(job, config, an experience of two prompts, paid as given)"""
    config = single_stage(values_of_row(name, **changes)).config
    job = job_of(config)
    torch.manual_seed(5)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    if rewards is not None:
        experience = dataclasses.replace(experience, rewards=torch.tensor(rewards))
    return job, config, experience


def ids_of(experience):
    return [(p.where, tuple(ids)) for p, ids in zip(experience.rollout.prompts, experience.rollout.completion_ids(),
                                                   strict=True)]  # fmt: skip


def test_raft_keeps_the_best_of_each_prompt():
    job, config, experience = prepared("raft", [0.0, 3.0, 1.0, 3.0, -1.0, -2.0, -0.5, -3.0])
    (kept,) = best_of_n.kept(job, config, experience)
    assert ids_of(kept) == [ids_of(experience)[1], ids_of(experience)[6]]
    assert kept.rewards.tolist() == [3.0, -0.5]


def test_the_percentiles_rise_from_pass_to_pass_and_the_lowest_is_never_kept():
    rewards = [0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0]
    job, config, experience = prepared("rft", rewards, percentile=0.3, last_percentile=0.9, improve_steps=3)
    passes = best_of_n.kept(job, config, experience)
    for part, percentile in zip(passes, (0.3, 0.6, 0.9), strict=True):
        threshold = numpy.quantile(numpy.array(rewards[:4]), percentile)
        assert part.rewards.tolist() == [r for r in rewards[:4] if r >= threshold]
    assert [len(part.rewards) for part in passes] == [3, 2, 1]


def test_the_same_completion_of_a_prompt_is_learnt_once():
    job, config, experience = prepared("star", [1.0, 1.0, 0.0, 1.0, 0.5, 2.0, 0.0, 0.0])
    batch = experience.batch
    for tensor in (batch.input_ids, batch.attention_mask, batch.mask):  # the fourth says what the first did
        tensor[3] = tensor[0]
    (kept,) = best_of_n.kept(job, config, experience)
    assert kept.rewards.tolist() == [1.0, 1.0, 2.0]
    assert ids_of(kept) == [ids_of(experience)[row] for row in (0, 1, 5)]


def test_what_is_compared_is_less_the_kl():
    job, config, experience = prepared("raft", [0.0] * 8, kl_coef=0.5)
    paid = (-0.5 * experience.kl.sum(1)).view(2, 4)
    assert (paid.std(1) > 0).all()
    (kept,) = best_of_n.kept(job, config, experience)
    assert ids_of(kept) == [ids_of(experience)[int(paid[p].argmax()) + 4 * p] for p in (0, 1)]


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_what_is_kept_is_learnt_by_its_mean_log_probability(micro_batch_size):
    job, config, experience = prepared(
        "star", [1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0], micro_batch_size=micro_batch_size
    )
    (kept,) = best_of_n.kept(job, config, experience)
    total, count = 0.0, 0
    for prompt, ids in zip(kept.rollout.prompts, kept.rollout.completion_ids(), strict=True):
        with job.backbone.using("policy"):
            logits = job.backbone.model(input_ids=torch.tensor([prompt.ids + ids])).logits[0].double()
        logprobs = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)
        total = total - logprobs.gather(1, torch.tensor(ids)[:, None]).sum()
        count += len(ids)
    (total / count).backward()
    expected = gradients(job)
    parts = torch.arange(3).split(micro_batch_size or 3)
    metrics = accumulate(best_of_n.likelihood(config), on_policy.micro_batches(job, config, kept, parts))
    assert float(metrics["loss"]) == pytest.approx(float((total / count).detach()), rel=1e-4)
    for name, value in gradients(job).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))


REWARD = """
SEEN = []


def score(prompts, completions, tag):
    SEEN.append(list(prompts))
    return [0.0 if len(SEEN) < {calls} else float(i % 2) for i in range(len(completions))]
"""


def test_a_hint_is_asked_with_and_learnt_without(tmp_path, monkeypatch):
    """Where nothing was right the prompt is asked again; what is right then is an answer to the plain prompt."""
    (tmp_path / "reward.py").write_text(REWARD.format(calls=3))  # the trial and the rollout are never right
    job, config, experience = prepared("star", hint="{prompt} Say {tag}!", reward=f"{tmp_path}/reward.py:score")
    assert experience.rewards.sum() == 0
    asked = []
    sample = Decoder.run

    def watched(self, rows, tokens):
        asked.append([job.encoder.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows])
        sample(self, rows, tokens)

    monkeypatch.setattr(Decoder, "run", watched)
    (kept,) = best_of_n.kept(job, config, experience)
    plain = [prompt.text for prompt in experience.rollout.prompts]
    tags = [prompt.columns["tag"] for prompt in experience.rollout.prompts]
    assert asked == [[f"{text} Say {tag}!" for text, tag in zip(plain, tags, strict=True)]]
    assert [prompt.text for prompt in kept.rollout.prompts] == plain[1::2]
    assert kept.rewards.tolist() == [1.0] * 4
    for row, prompt in enumerate(kept.rollout.prompts):
        assert kept.batch.input_ids[row, : len(prompt.ids)].tolist() == prompt.ids
        assert int(kept.batch.mask[row].argmax()) == len(prompt.ids)


def test_a_row_raises_the_reward_and_reports_the_curve(tmp_path):
    save_supple_model(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def score(completions):\n    return [sum(not ' ' <= x <= '~' for x in c) / 8 for c in completions]\n"
    )
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "ab"}] * 20)
    values = values_of_row(
        "raft", model=str(tmp_path / "model"), reward=f"{tmp_path}/reward.py:score", steps=8, batch_size=32,
        max_new_tokens=8, learning_rate=0.02, eval_data=str(tmp_path / "held_out.jsonl"), eval_size=20,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    noise = (before["reward_se"] ** 2 + after["reward_se"] ** 2) ** 0.5
    assert after["reward"] - before["reward"] > 4 * noise
    assert before["best_of_1"] < before["best_of_2"] < before["best_of_4"]
    assert before["kl_bound"] == pytest.approx(0.6363, abs=1e-4)  # log 4 - 3/4
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["kept"] == 0.25


def test_the_best_of_n_of_the_reference_is_not_the_policys(monkeypatch):
    """Cold samples are greedy: every completion that is learnt is the base model's, whatever the policy would say."""
    config = single_stage(values_of_row("best_of_n_distillation", temperature=1e-4, steps=1)).config
    job, learnt = job_of(config), []
    monkeypatch.setattr(best_of_n, "improve", lambda job, config, part, loss: learnt.append(part) or {})
    with pytest.raises(UserError, match="kept no completion"):  # nothing was updated
        best_of_n.train(job, config, Log(1))
    (part,) = learnt

    def greedy(role, prompt, count):
        with job.backbone.using(role):
            ids = torch.tensor([prompt.ids])
            for _ in range(count):
                ids = torch.cat([ids, job.backbone.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids[0, len(prompt.ids) :].tolist()

    for prompt, ids in zip(part.rollout.prompts, part.rollout.completion_ids(), strict=True):
        assert ids == greedy(None, prompt, len(ids))
        assert ids != greedy("policy", prompt, len(ids))


def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    values = values_of_row("rft", save_every=1, lora_dropout=0.3)
    values["reward"] = f"{folder()}/reward.py:score"
    assert_resumes(values, tmp_path, monkeypatch, step=1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"percentile": 0.99}, "percentile 0.99 is above last_percentile 0.95"),
    ({"hint": "x"}, "hint 'x' is of keep: correct, got best"),
    ({"keep": "worst"}, "keep: Input should be .*, got 'worst'"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        single_stage(values_of_row("raft", **changes))


def test_a_hint_with_an_unknown_column_and_a_run_that_keeps_nothing_are_said(tmp_path):
    stage = single_stage(values_of_row("star", hint="{prompt} {answer}"))
    with pytest.raises(UserError, match=r"needs 'answer', which is no column \(prompt, tag\)"):
        stage.module.prepare(stage.config)
    values = values_of_row("star", correct_at=99.0, steps=1, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="keep correct kept no completion in 1 steps"):
        run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
