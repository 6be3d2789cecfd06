"""Distillation: losses and gradients beside formulas on the logits of both models, what a teacher reads, a resume."""

import dataclasses

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import distillation
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training import on_policy
from rlhf_fast.training.divergence import divergence_of, parts_of
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.teachers import demonstrations, mixed, shown
from tests.training.interruptions import assert_resumes
from tests.training.tiny_runs import folder, gradients, job_of, values_of, write_jsonl

PLAIN = {"objective": None, "reference_refresh_every": None, "num_generations": None, "reward": None}


def values_of_row(name, **changes):
    values = {key: value for key, value in values_of("grpo").items() if key not in PLAIN}
    values |= {"ppo_epochs": 1, "num_minibatches": 1, "steps": 3}
    if name == "sdpo":
        values |= {"num_generations": 2, "reward": f"{folder()}/reward.py:even"}
    else:
        values |= {"teacher": f"{folder()}/teacher", "num_generations": 1}
    if name == "gkd":
        values["data"] = f"{folder()}/sft.jsonl"
    return {**values, "algorithm": name, **changes}


def prepared(name, **changes):
    config = single_stage(values_of_row(name, **changes)).config
    job = job_of(config)
    torch.manual_seed(5)
    return job, config, collect(job, config, prompts_of_step(job, config, 0))


def rows_of(batch):
    for ids, attention, mask in zip(batch.input_ids, batch.attention_mask, batch.mask, strict=True):
        length = int(attention.sum())
        yield ids[:length], mask[:length].bool()


def log_softmax(model, ids, mask, temperature):
    """(K, V) fp64: what predicts the K tokens that count, from the logits that transformers itself gives."""
    return (model(input_ids=ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)[mask[1:]]


def expected_divergence(job, config, batch, teacher, of):
    total, count = 0.0, 0
    for ids, mask in rows_of(batch):
        with torch.no_grad():
            theirs = log_softmax(teacher, ids, mask, config.temperature)
        with job.backbone.using("policy"):
            total = total + of(log_softmax(job.backbone.model, ids, mask, config.temperature), theirs).sum()
        count += int(mask.sum())
    return total / count


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def jsd(beta):
    """Agarwal et al. 2024, section 2: beta KL(teacher || m) + (1 - beta) KL(student || m)."""

    def of(student, teacher):
        mean = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        return beta * kl(teacher, mean) + (1 - beta) * kl(student, mean)

    return of


@pytest.mark.parametrize(("js_weight", "of"), [
    (0.0, lambda student, teacher: kl(teacher, student)), (0.3, jsd(0.3)), (0.5, jsd(0.5)), (1.0, kl),
], ids=["0", "0.3", "0.5", "1"])  # fmt: skip
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_loss_is_the_mean_divergence_from_another_model(js_weight, of, micro_batch_size):
    """The teacher has another width and depth; beta = 0.5 is gkd's."""
    job, config, e = prepared("gkd", js_weight=js_weight, micro_batch_size=micro_batch_size)
    teacher = load_model(folder() / "teacher", dtype=torch.float32)
    assert teacher.config.hidden_size != job.backbone.model.config.hidden_size
    expected = expected_divergence(job, config, e.batch, teacher, of)
    expected.backward()
    theirs = gradients(job)
    taught, read = shown(job, config, e)
    parts = torch.randperm(4).split(micro_batch_size or 4)
    metrics = accumulate(divergence_of(job, config), parts_of(job, config, taught, parts, read=read))
    assert float(metrics["loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, value in gradients(job).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


def test_an_adapter_on_the_same_model_is_a_teacher_and_no_second_model_is_loaded(tmp_path):
    first, *_ = prepared("on_policy_distillation")
    save_adapter(first.backbone, "policy", tmp_path / "adapter")
    config = single_stage(values_of_row("on_policy_distillation", teacher=str(tmp_path / "adapter"))).config
    job = job_of(config, scrambled=False)  # a policy that is the base model
    assert job.teacher.backbone is job.backbone
    e = collect(job, config, prompts_of_step(job, config, 0))
    taught, read = shown(job, config, e)
    found = accumulate(divergence_of(job, config), parts_of(job, config, taught, (torch.arange(4),), read=read))["loss"]
    with first.backbone.using("policy"):
        expected = expected_divergence(job, config, e.batch, first.backbone.model, kl)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(found) > 0.01


def test_the_advantage_form_has_the_gradient_of_the_sampled_reverse_kl():
    """E[(log pi - log teacher) grad log pi] at the sampled tokens, token by token."""
    job, config, e = prepared("policy_gradient_distillation", temperature=0.8)
    assert config.objective.aggregation == "token_mean"
    teacher, surrogate, count = load_model(folder() / "teacher", dtype=torch.float32), 0.0, 0
    for ids, mask in rows_of(e.batch):
        tokens = ids[mask][:, None]
        with job.backbone.using("policy"):
            own = log_softmax(job.backbone.model, ids, mask, 0.8).gather(1, tokens)
        with torch.no_grad():
            theirs = log_softmax(teacher, ids, mask, 0.8).gather(1, tokens)
        surrogate = surrogate + ((own.detach() - theirs) * own).sum()
        count += len(tokens)
    (surrogate / count).backward()
    expected = gradients(job)
    advantages = distillation.advantages_of(job, config, *shown(job, config, e))
    rows = on_policy.micro_batches(job, config, e, torch.arange(4).split(3))
    accumulate(lambda rows: distillation.surprise(config, advantages, rows), rows)
    for name, value in gradients(job).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4 * float(expected[name].abs().max()))


def test_sdpos_teacher_is_shown_a_sibling_that_succeeded_and_else_feedback(tmp_path):
    rows = [{"prompt": "2 + 2 =", "hint": "count"}, {"prompt": "3 + 3 =", "hint": "think"}, {"prompt": "x", "hint": ""}]
    write_jsonl(tmp_path / "data.jsonl", rows)
    job, config, e = prepared(
        "sdpo",
        data=str(tmp_path / "data.jsonl"),
        eval_data=str(tmp_path / "data.jsonl"),
        feedback="hint",
        num_generations=3,
        batch_size=9,
        feedback_template="\nFeedback:\n{feedback}\n",
    )
    texts = [prompt.text for prompt in e.rollout.prompts]
    first = texts.index("2 + 2 =")
    failing, silent = texts.index("3 + 3 ="), texts.index("x")
    rewards = torch.zeros(9)
    rewards[first + 1] = 1.0
    completions = [f"<{i}>" for i in range(9)]
    e = dataclasses.replace(e, rewards=rewards, rollout=dataclasses.replace(e.rollout, completions=completions))
    found = [None if prompt is None else prompt.text for prompt in demonstrations(job, config, e)]
    end = "\n\nCorrectly solve the original question.\n"
    with_solution = f"2 + 2 =\nCorrect solution:\n\n<{first + 1}>\n\n{end}"
    assert found[first] == found[first + 2] == with_solution
    assert found[first + 1] == f"2 + 2 =\nFeedback:\ncount\n{end}", "its own success is not shown to itself"
    assert found[failing : failing + 3] == [f"3 + 3 =\nFeedback:\nthink\n{end}"] * 3
    assert found[silent : silent + 3] == [None] * 3
    taught, read = shown(job, config, e)
    assert len(taught.rewards) == len(read) == 6
    ids = taught.rollout.completion_ids()
    for row, (tokens, mask) in enumerate(rows_of(read)):
        assert tokens[mask].tolist() == ids[row]
        asked = job.encoder.tokenizer.decode(tokens[~mask], skip_special_tokens=True)
        assert asked in found


def test_sdpo_is_the_reverse_kl_to_what_the_teacher_says_behind_its_own_prompt_with_a_bounded_weight():
    job, config, e = prepared("sdpo", is_clip=1.1)
    e = dataclasses.replace(e, rewards=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    old = e.scores.logprobs - 0.05 * torch.arange(e.batch.mask.shape[1])  # the policy has moved since
    e = dataclasses.replace(e, scores=dataclasses.replace(e.scores, logprobs=old * e.batch.mask))
    taught, read = shown(job, config, e)
    assert len(taught.rewards) == 1
    ((ids, mask),), ((theirs, their_mask),) = rows_of(taught.batch), rows_of(read)
    assert len(theirs) > len(ids)
    with job.backbone.using("teacher"), torch.no_grad():
        teacher = log_softmax(job.backbone.model, theirs, their_mask, 1.0)
    with job.backbone.using("policy"):
        policy = log_softmax(job.backbone.model, ids, mask, 1.0)
    ratio = (
        policy.detach().gather(1, ids[mask][:, None]).squeeze(1) - taught.scores.logprobs[0][: len(ids)][mask]
    ).exp()
    assert (ratio > 1.1).any()
    expected = (ratio.clamp(max=1.1) * kl(policy, teacher)).mean()
    found = accumulate(divergence_of(job, config), parts_of(job, config, taught, (torch.arange(1),), read=read))["loss"]
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_gkd_learns_the_datas_completions_in_its_share_of_the_steps():
    job, config, _ = prepared("gkd")
    prompts, tokenizer = prompts_of_step(job, config, 0), job.encoder.tokenizer
    torch.manual_seed(0)
    given = 0
    for _ in range(12):
        e = mixed(job, config, prompts, score_policy=True)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in e.rollout.completion_ids()]
        given += texts == [prompt.columns["completion"] for prompt in prompts]
        assert e.scores.logprobs is not None
    assert 2 <= given <= 10


def test_the_average_follows_the_policy_by_its_share():
    job, config, _ = prepared("sdpo", teacher_ema=0.25, steps=1)
    before = {role: job.backbone.snapshot(role) for role in ("policy", "teacher")}
    job.backbone.lerp_adapter("teacher", "policy", config.teacher_ema)
    for name, value in job.backbone.snapshot("teacher").items():
        torch.testing.assert_close(value, 0.75 * before["teacher"][name] + 0.25 * before["policy"][name])
    assert "teacher" in job.changing_adapters()


@pytest.mark.parametrize("name", ["gkd", "sdpo"])
def test_a_killed_run_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    values = values_of_row(name, save_every=1, eval_every=1, teacher_ema=0.5, steps=4, lora_dropout=0.3)
    assert_resumes(values, tmp_path, monkeypatch, step=2)
    assert (tmp_path / "whole" / "teacher").is_dir() == (name == "sdpo")


def test_the_policy_comes_to_its_teacher(tmp_path):
    """An adapter of the same rank can be met."""
    first, *_ = prepared("on_policy_distillation")
    save_adapter(first.backbone, "policy", tmp_path / "adapter")
    values = values_of_row(
        "on_policy_distillation", steps=20, output_dir=str(tmp_path / "run"), teacher=str(tmp_path / "adapter")
    )
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    assert after["loss"] < 0.7 * before["loss"]
    assert "reward" not in after


@pytest.mark.parametrize(("changes", "message"), [
    ({"feedback": "hint"}, "feedback 'hint' is of teacher: self"),
    ({"teacher": "self", "reward": "x.py:f"}, "num_generations is 1, needs 2, or feedback a column"),
    ({"teacher": "self", "num_generations": 2}, "missing key 'reward'"),
    ({"early_stop_kl": 0.1}, "early_stop_kl is of learn: advantage, got 0.1"),
    ({"js_weight": 1.5}, "js_weight: .*less than or equal to 1, got 1.5"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        single_stage(values_of_row("on_policy_distillation", **changes))


def test_a_teacher_that_does_not_fit_and_data_that_lacks_answers_are_said(tmp_path):
    model, tokenizer = tiny(0, hidden_size=32, layers=1, heads=2, max_length=128)
    model.save_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "other")
    stage = single_stage(values_of_row("on_policy_distillation", teacher=str(tmp_path / "other")))
    with pytest.raises(UserError, match="has another tokenizer than"):
        stage.module.prepare(stage.config)
    stage = single_stage(values_of_row("gkd", data=f"{folder()}/prompts.jsonl"))
    with pytest.raises(UserError, match="on_policy below 1 needs the text column 'completion'; found: prompt, tag"):
        stage.module.prepare(stage.config)
    stage = single_stage(values_of_row("sdpo", feedback="hint"))
    with pytest.raises(UserError, match=r"feedback 'hint' is no column \(prompt, tag\)"):
        stage.module.prepare(stage.config)
