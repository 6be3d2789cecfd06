"""`verify` as the reward of a run: its keys, its place among the rewards, and what a policy learns from it."""

import re

import pytest
import torch

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.data import rows, sources
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rewards import Verifier
from rlhf_fast.rollout.decoder import Decoder
from rlhf_fast.training.config import parse_overrides
from rlhf_fast.training.entries import VerifyConfig
from rlhf_fast.training.experience import collect, evaluate_policy, prompts_of_step
from rlhf_fast.training.job import seed_everything
from rlhf_fast.training.setup import all_rows, check_answers
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, folder, job_of, values_of, write_jsonl

VOWEL = {"kind": "regex", "pattern": r"\A[aeiou]"}


def config_with(verify, words=(), **changes):
    return single_stage(values_of("grpo", reward=None, verify=verify, **changes), parse_overrides(list(words))).config


@pytest.mark.parametrize(("verify", "words", "expected"), [
    ("math", [], {"kind": "math"}),
    ({"kind": "exact", "answer": "gold"}, [], {"kind": "exact", "answer": "gold"}),
    ("math", ["--verify.timeout", "3"], {"kind": "math", "timeout": 3.0}),
    ({"kind": "exact", "normalize": False}, ["--verify", "choice"], {"kind": "choice"}),
    ({"kind": "exact", "normalize": False}, ["verify.answer=a"], {"kind": "exact", "normalize": False, "answer": "a"}),
], ids=str)  # fmt: skip
def test_verify_is_a_name_or_a_mapping_and_its_entries_are_flags(verify, words, expected):
    assert config_with(verify, words).verify == VerifyConfig(**expected)


@pytest.mark.parametrize(("verify", "message"), [
    ("exactly", "verify.kind: Input should be 'exact', 'math'"),
    ({"answer": "a"}, "missing key 'verify.kind' (of the answer)"),
    ({"kind": "math", "normalize": False}, "verify.normalize is of kind exact, got False for math"),
    ({"kind": "exact", "extract": "("}, "verify.extract '(' is no regular expression"),
    ({"kind": "code", "extract": "x"}, "verify.extract: of code, the last fenced block counts, got 'x'"),
    ({"kind": "exact", "tests": "t"}, "unknown key 'verify.tests'"), ({"kind": "math", "timeout": 0}, "verify.timeout"),
], ids=str)  # fmt: skip
def test_what_verify_cannot_mean_is_one_line(verify, message):
    with pytest.raises(UserError) as error:
        config_with(verify)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_run_without_any_reward_is_refused():
    with pytest.raises(UserError, match=r"missing key 'reward' .*, 'verify' or 'judge'"):
        config_with(None)


def test_answers_of_many_rows_are_looked_at_once(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "gold.jsonl", [{"prompt": f"p{i}", "answer": str(i % 6)} for i in range(20)])
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    monkeypatch.setattr(rows, "CHUNK", 4)
    calls, problem = [], Verifier._problem
    monkeypatch.setattr(Verifier, "_problem", lambda self, gold: calls.append(gold) or problem(self, gold))
    counts = []
    for verify in ("exact", "exact", {"kind": "exact", "normalize": False}):
        config = config_with(verify, data=str(tmp_path / "gold.jsonl"), data_cache=str(tmp_path / "cache"))
        calls.clear()
        check_answers(config, Verifier(config.verify), all_rows(config, [("prompt",)]))
        counts.append(len(calls))
    assert counts == [6, 0, 6]


def test_an_answer_that_cannot_be_used_fails_before_the_run():
    write_jsonl(folder() / "gold.jsonl", [{"prompt": "p" * i, "answer": None if i == 5 else "x"} for i in range(1, 9)])
    config = config_with("exact", data=str(folder() / "gold.jsonl"))
    with pytest.raises(UserError, match=r"gold.jsonl:5: answer 'None' is no text, number or list of them"):
        load_algorithm("grpo").prepare(config)


def test_its_weight_stands_behind_those_of_the_rewards():
    reward = f"{folder() / 'reward.py'}:score"
    config = config_of("grpo", reward=reward, verify=VOWEL, reward_weights=[0.5, 2.0])
    job = job_of(config)
    assert [(s.name, s.weight) for s in job.rewards.sources] == [(reward, 0.5), ("verify_regex", 2.0)]
    metrics = evaluate_policy(job, config, job.held_out)["metrics"]
    total = 0.5 * metrics[f"reward/{reward}"] + 2.0 * metrics["reward/verify_regex"]
    assert metrics["reward"] == pytest.approx(total)
    with pytest.raises(UserError, match="reward_weights has 1 entries for 2 rewards"):
        job_of(config_of("grpo", reward=reward, verify=VOWEL, reward_weights=[0.5]))


def test_a_rollout_is_paid_what_is_right():
    config = config_of("grpo", reward=None, verify={"kind": "regex", "pattern": "[a-m]"}, batch_size=16)
    job = job_of(config)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    expected = [float(re.search("[a-m]", text) is not None) for text in experience.rollout.completions]
    assert experience.rewards.tolist() == expected
    assert 0 < sum(expected) < 16


def test_finished_rows_are_judged_while_others_are_generated(monkeypatch):
    config = config_of("grpo", reward=None, verify=VOWEL, batch_size=16, max_new_tokens=24)
    job, eos = job_of(config), 258
    likely = job.backbone.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits + 5.0 * (torch.arange(logits.shape[-1]) == eos)
    )
    generating, begun = [], []
    run, submit = Decoder.run, Verifier.submit

    def generated(self, *arguments):
        generating.append(True)
        try:
            run(self, *arguments)
        finally:
            generating.clear()

    def submitted(self, completion, columns):
        begun.append((completion, bool(generating)))
        return submit(self, completion, columns)

    monkeypatch.setattr(Decoder, "run", generated)
    monkeypatch.setattr(Verifier, "submit", submitted)
    seed_everything(0)
    rollout = collect(job, config, prompts_of_step(job, config, 0)).rollout
    likely.remove()
    early = [completion for completion, while_generating in begun if while_generating]
    done = [text for text, finished in zip(rollout.completions, rollout.finished.tolist(), strict=True) if finished]
    assert len(done) > 4
    assert sorted(early) == sorted(done)
    assert [completion for completion, while_generating in begun if not while_generating] == 2 * rollout.completions


def test_a_policy_learns_what_is_right(tmp_path):
    """13 of 259 tokens are right at first."""
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # few dimensions bend near-uniform logits hardly at all
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, metrics = trained(
        "grpo", 20, model=str(tmp_path), reward=None, verify={"kind": "regex", "pattern": r"\A[a-m]"}, max_new_tokens=2,
        batch_size=64, num_generations=16, num_minibatches=1, ppo_epochs=1, objective="ppo_clip",
        reference_refresh_every=None,
    )  # fmt: skip
    rewards = [step["reward"] for step in metrics]
    assert sum(rewards[:4]) / 4 < 0.2
    assert sum(rewards[-4:]) / 4 > 0.4
