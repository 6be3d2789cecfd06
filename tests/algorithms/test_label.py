"""Labels made by machine: what is written of which judgements, for whom, and that a resumed run writes the same."""

import json

import pytest
import torch

from rlhf_fast.algorithms import label
from rlhf_fast.algorithms.launch import launch, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.training import labels
from rlhf_fast.training.folder import written_rows
from tests.rewards.test_judge import Scripted, likes_long_and_first
from tests.training.interruptions import assert_resumes, run
from tests.training.tiny_runs import folder, job_of, scramble, values_of, write_jsonl

COMPARE = {"form": "compare", "prompt": "Answer 1: {first} Answer 2: {second} tag {tag}"}


def label_values(tmp_path, **changes):
    grpo = values_of("grpo")
    keys = ("model", "device", "report_to", "seed", "data", "batch_size", "max_new_tokens")
    return {"algorithm": "label", **{key: grpo[key] for key in keys}, "judge": COMPARE,
            "output_dir": str(tmp_path / "run"), **changes}  # fmt: skip


def prepared(tmp_path, **changes):
    """A job whose judge likes long answers, and a little the first one."""
    config = single_stage(label_values(tmp_path, **changes)).config
    job = job_of(config, scrambled=False)
    if job.rewards.judge is not None:
        job.rewards.judge.speaker, job.rewards.judge.template = Scripted(likes_long_and_first), None
    return config, job


def test_every_two_answers_become_a_pair_with_a_soft_label_and_what_the_row_had_besides(tmp_path, monkeypatch):
    config, job = prepared(tmp_path, num_generations=3)
    monkeypatch.setattr(labels, "sampled_answers", lambda *rest: [["aaa", "a", "a"], ["b", "b", "b"]])
    rows, metrics = label.labelled(job, config, job.train[:2])
    kept = {"prompt": "a", "tag": 0, "annotator": "judge backbone"}
    # The place cancels out of (0.9 + 0.7) / 2; answers that are the same are no pair.
    assert [{**row, "preference": round(row["preference"], 6)} for row in rows] == [
        {**kept, "chosen": "aaa", "rejected": "a", "preference": 0.8}
    ] * 2
    assert metrics["judge_inconsistent"] == 0.0


def test_comparisons_can_be_written_as_rankings_by_the_share_of_wins(tmp_path, monkeypatch):
    config, job = prepared(tmp_path, num_generations=3, write="rankings")
    monkeypatch.setattr(labels, "sampled_answers", lambda *rest: [["aa", "aaa", "a"]])
    (row,), _ = label.labelled(job, config, job.train[:1])
    assert row["completions"] == ["aa", "aaa", "a"]
    assert row["scores"] == pytest.approx([0.5, 0.8, 0.2])


def test_a_judge_that_rates_writes_ratings_on_its_scale_by_criterion(tmp_path, monkeypatch):
    judge = {"scale": "1-3", "prompt": "{completion}", "criteria": ["honest", "short"]}
    config, job = prepared(tmp_path, judge=judge)
    job.rewards.judge.speaker.answer = lambda text: [0.5, 0.0, 0.5] if "x" in text else [torch.nan] * 3
    job.rewards.judge.template = "{completion}"
    monkeypatch.setattr(labels, "sampled_answers", lambda *rest: [["x", "y"]])
    rows, metrics = label.labelled(job, config, job.train[:1])
    assert rows == [{"prompt": "a", "tag": 0, "completion": "x", "ratings": {"honest": 2.0, "short": 2.0}}]
    assert metrics["judge_unreadable"] == 0.5


def test_a_reward_orders_answers_and_ties_are_no_pair(tmp_path):
    write_jsonl(
        tmp_path / "two.jsonl", [{"prompt": "p", "one": "aa", "two": "b"}, {"prompt": "q", "one": "c", "two": "d"}]
    )
    (tmp_path / "long.py").write_text("def long(completions):\n    return [float(len(c)) for c in completions]\n")
    values = label_values(tmp_path, judge=None, reward=f"{tmp_path}/long.py:long", data=str(tmp_path / "two.jsonl"),
                          answers=["one", "two"], write="pairs")  # fmt: skip
    run(values)
    assert written_rows(tmp_path / "run") == [{"prompt": "p", "chosen": "aa", "rejected": "b", "gap": 1.0}]
    run({**values, "write": "best", "output_dir": str(tmp_path / "best")})
    rows = sorted(written_rows(tmp_path / "best"), key=lambda row: row["prompt"])
    assert rows == [{"prompt": "p", "completion": "aa"}, {"prompt": "q", "completion": "c"}]


def test_a_pass_labels_every_prompt_once_and_a_resumed_run_writes_the_same(tmp_path, monkeypatch):
    values = label_values(tmp_path, save_every=2)
    assert_resumes(values, tmp_path, monkeypatch, step=2)
    rows = written_rows(tmp_path / "whole")
    assert sorted({row["tag"] for row in rows}) == list(range(9))
    assert len(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == 5, "two prompts a step, the last step one"
    assert written_rows(tmp_path / "killed") == rows


def test_an_adapter_samples_what_is_labelled(tmp_path):
    from rlhf_fast.models.peft_io import save_adapter

    config, job = prepared(tmp_path)
    job.backbone.add_adapter("policy", rank=2, seed=0)
    scramble(job.backbone)
    save_adapter(job.backbone, "policy", str(tmp_path / "adapter"))
    job.encoder.tokenizer.save_pretrained(tmp_path / "adapter")
    config, other = prepared(tmp_path, model=str(tmp_path / "adapter"))
    torch.manual_seed(0)
    expected = labels.sampled_answers(job, config, job.train[:2], 2)
    torch.manual_seed(0)
    assert labels.sampled_answers(other, config, other.train[:2], 2) == expected
    job.backbone.remove_adapter("policy")
    torch.manual_seed(0)
    assert labels.sampled_answers(job, config, job.train[:2], 2) != expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"judge": None}, "label needs a judge, a reward or verify"),
    ({"reward": "r.py:f"}, "judge.form compare gives no number to one answer: leave out reward r.py:f"),
    ({"write": "ratings"}, "judge.form compare gives no number to one answer: leave out write: ratings"),
    ({"answers": "tag"}, r"prompts.jsonl:1: answers must be two or more texts, got list \[0\]"),
    ({"judge": {**COMPARE, "prompt": "{facts}"}}, "judge asks for 'facts', which is no column of the data"),
], ids=str)  # fmt: skip
def test_what_cannot_be_labelled_is_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(label_values(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_later_stage_learns_from_the_labels(tmp_path, capsys):
    shared = {key: values_of("dpo")[key] for key in ("batch_size", "learning_rate", "report_to", "seed", "device")}
    labelling = {key: value for key, value in label_values(tmp_path).items() if key not in (*shared, "output_dir")}
    learning = {"steps": 2, "data": {"from": "label"}, "model": str(folder() / "model"), "eval_size": 2}
    stages = [labelling, {"algorithm": "dpo", **learning}, {"algorithm": "reward_model", **learning}]
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps({**shared, "output_dir": str(tmp_path / "run"), "stages": stages}))
    launch(str(path), {}, dry_run=True, resume=None, overwrite=False)
    assert "dpo: the examples of label" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    launch(str(path), {}, dry_run=False, resume=None, overwrite=False)
    assert len(read_jsonl(tmp_path / "run" / "dpo" / "metrics.jsonl")) == 2
    with pytest.raises(UserError, match=r"stage dpo: model: \{from: label\} makes no model"):
        launch(str(path), {"dpo.model": {"from": "label"}}, dry_run=True, resume=None, overwrite=False)
    launch(str(path), {}, dry_run=False, resume=None, overwrite=True)
