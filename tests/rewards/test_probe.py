"""The probes measure what they are named after, on scores whose faults are known."""

import json

import pytest
import torch
from typer.testing import CliRunner

from rlhf_fast.cli import app
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rewards import write_stats
from rlhf_fast.rewards.probe import EDITS, Question, built_in, probe, questions_of
from rlhf_fast.training.setup import Backbone
from tests.training.tiny_runs import write_jsonl

QUESTIONS = [Question(f"q{i}", f"wrong{i}! q{i}", f"right{i}.", f"wrong{i}.") for i in range(4)]


def flatterer(prompts, completions):
    """1 for what is right, 3 for what the prompt says."""
    return torch.tensor([float("right" in c) + 3.0 * (c[:5] in p) for p, c in zip(prompts, completions, strict=True)])


def judge_of_form(prompts, completions):
    """1 for what is right, and 0.25 for a line break, whatever was asked."""
    return torch.tensor([float("right" in c) + 0.25 * c.endswith("\n") for c in completions])


def test_a_model_that_agrees_with_the_user_is_found_and_a_fair_one_is_not():
    spread = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).std().item()
    told = probe(flatterer, QUESTIONS, [])["sycophancy"]
    assert (told["wrong answer preferred"], told["wrong answer preferred with the opinion"]) == (0.0, 1.0)
    assert told["mean"] == pytest.approx(3 / spread)
    assert told["mean_se"] == 0.0
    told = probe(judge_of_form, QUESTIONS, [])["sycophancy"]
    assert (told["wrong answer preferred with the opinion"], told["mean"]) == (0.0, 0.0)


def test_a_change_of_form_is_measured_by_its_edit_and_meaning_is_left_alone():
    spread = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).std().item()
    told = probe(judge_of_form, QUESTIONS, [("p", "right", "right\n"), ("p", "right", "wrong")])["paraphrase"]
    assert told["with a line break behind"]["mean"] == pytest.approx(0.25 / spread)
    assert told["with a line break behind"]["number"] == 8
    assert told["as a list"]["mean_size"] == 0.0
    assert told["of the file"]["mean"] == pytest.approx((0.25 - 1) / 2 / spread)
    assert told["of the file"]["greatest_size"] == pytest.approx(1 / spread)
    assert "contracted or spelled out" not in told, "an edit that changes nothing is none"


def test_orders_that_an_edit_turns_round_are_counted_among_those_that_were_right():
    def hates_lists(prompts, completions):
        return torch.tensor([float("right" in c) - 2.0 * (c.startswith("- right0")) for c in completions])

    told = probe(hates_lists, QUESTIONS, [])["paraphrase"]
    assert told["as a list"]["orders turned round"] == 0.25
    assert told["without the last stop"]["orders turned round"] == 0.0


def test_the_built_in_questions_state_the_wrong_answer_and_every_edit_keeps_the_fact():
    for question in built_in():
        assert question.wrong in question.opinionated
        assert question.opinionated.endswith(question.prompt)
        assert question.right != question.wrong
        fact = next(word for word in question.right.split() if word not in question.wrong.split()).strip(".")
        assert all(fact in edit(question.right) for edit in EDITS.values())
        assert fact in question.reworded[0]
    assert EDITS["contracted or spelled out"]("It is not. It doesn't.") == "It's not. It doesn't."
    assert EDITS["contracted or spelled out"]("They don't.") == "They do not."


def test_a_model_without_an_opinion_of_its_own_cannot_be_probed():
    with pytest.raises(UserError, match="gives every probed answer the same score"):
        probe(lambda prompts, completions: torch.ones(len(prompts)), QUESTIONS, [])


def test_rows_are_questions_or_rewordings():
    user = {"role": "user", "content": "Why?"}
    questions, rewordings = questions_of([
        Row("d:1", {"prompt": "Why?", "chosen": "a", "rejected": "b", "opinion": "I say b. "}),
        Row("d:2", {"prompt": [user], "chosen": "a", "rejected": "b"}),
        Row("d:3", {"prompt": "Why?", "completion": "a", "paraphrase": "A"}),
    ])  # fmt: skip
    assert questions[0].opinionated == "I say b. Why?"
    assert questions[1].opinionated == [{"role": "user", "content": "I am quite sure that this is right: b\n\nWhy?"}]
    assert rewordings == [("Why?", "a", "A")]
    with pytest.raises(UserError, match=r"d:4: needs the texts prompt, chosen and rejected, or .*; found: prompt"):
        questions_of([Row("d:4", {"prompt": "x"})])


def test_the_command_prints_a_table_and_writes_the_report(tmp_path):
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    backbone = Backbone(model)
    backbone.add_adapter("reward", rank=2, seed=1)
    backbone.add_head("reward", seed=1)
    save_adapter(backbone, "reward", tmp_path / "rm")
    write_stats(tmp_path / "rm", 0.0, 1.0, form="pairs")
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Why?", "completion": "So.", "paraphrase": "Because."}])
    words = ["probe", str(tmp_path / "rm"), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "p.json"),
             "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("wrong opinion", "as a list", "of the file"))
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["sycophancy"]["number"] == len(built_in())
    ids = torch.tensor([[257, *b"Why?So.", 258]])
    other = torch.tensor([[257, *b"Why?Because.", 258]])
    with torch.no_grad():
        real = [torch.ones_like(x) for x in (ids, other)]
        states = [backbone.hidden(x, mask, ["reward"])["reward"] for x, mask in zip((ids, other), real, strict=True)]
        scores = [float(backbone.scores("reward", x, mask)) for x, mask in zip(states, real, strict=True)]
    told = report["paraphrase"]["of the file"]["mean"] * report["spread"]
    assert told == pytest.approx(scores[1] - scores[0], abs=1e-5)


def test_what_is_no_reward_model_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["probe", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no reward model" in result.output
