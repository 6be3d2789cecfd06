"""The key `judge`: what it may hold, whose weights judge, and a run that it pays."""

import pytest
import torch

from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.training.config import SamplingConfig, merged, parse
from rlhf_fast.training.judging import lines_of
from tests.training.interruptions import assert_resumes, run
from tests.training.tiny_runs import config_of, folder, job_of, values_of

LEAST = {"algorithm": "grpo", "model": "m", "data": "d"}
SHORT = {"prompt": "{completion}", "scale": "1-3"}


@pytest.mark.parametrize(("judge", "message"), [
    ({"byy": "x"}, "unknown key 'judge.byy'; did you mean 'judge.by'?"),
    ({"scale": "10"}, "judge.scale must be two whole numbers such as 1-10, got '10'"),
    ({"scale": "3-1"}, "judge.scale must be two whole numbers such as 1-10, got '3-1'"),
    ({"by": "http://x/v1"}, "judge.by http://x/v1 is an endpoint: judge.model must name its model"),
    ({"by": "folder", "adapter": "a"}, "judge.adapter a is one of the backbone; judge.by is folder"),
    ({"debate": 2}, "judge.debate is for form: compare, got 2"),
    ({"clamp": 0.5}, "judge.clamp: Input should be less than 0.5, got 0.5"),
    ("yes", "judge: Input should be a valid dictionary or instance of JudgeConfig, got 'yes'"),
], ids=str)  # fmt: skip
def test_a_bad_entry_is_one_line_with_its_value(judge, message):
    with pytest.raises(UserError) as error:
        parse(SamplingConfig, {**LEAST, "judge": judge})
    assert str(error.value) == message


def test_an_entry_from_a_flag_stands_above_the_file_and_the_others_stay():
    values, _ = merged(SamplingConfig, "grpo", LEAST, {"judge": {"by": "f", "scale": "1-5"}}, {"judge.scale": "0-3"})
    judge = parse(SamplingConfig, values).judge
    assert (judge.by, judge.scale) == ("f", "0-3")
    assert single_stage({**LEAST, "judge": {"labels": [1, 2]}}).config.judge.labels == ["1", "2"]


def test_a_run_without_any_reward_is_told_what_it_may_have():
    with pytest.raises(UserError, match=r"missing key 'reward' \(pkg.mod:function.*\), 'verify' or 'judge'"):
        single_stage(values_of("grpo", reward=None))


def test_principles_are_a_list_or_the_lines_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("One.\n\n Two. \n")
    assert lines_of(str(tmp_path / "p.txt"), "judge.principles") == ["One.", "Two."]
    with pytest.raises(UserError, match=r"judge\.principles 'One\.' is neither a list nor a file"):
        lines_of("One.", "judge.principles")


def test_the_base_an_adapter_the_policy_itself_and_another_folder_judge(tmp_path):
    """The same question to each; a folder gives what the same weights on the backbone give."""
    plain = job_of(config_of("grpo", reward=None, judge=SHORT))
    save_adapter(plain.backbone, "policy", str(tmp_path / "adapter"))
    plain.encoder.tokenizer.save_pretrained(tmp_path / "adapter")
    changes = {
        "base": {}, "adapter": {"adapter": str(tmp_path / "adapter")}, "policy": {"adapter": "policy"},
        "folder": {"by": str(tmp_path / "adapter")}, "base folder": {"by": str(folder() / "model")},
    }  # fmt: skip
    found = {}
    for name, change in changes.items():
        job = job_of(config_of("grpo", reward=None, judge={**SHORT, **change}), scrambled=False)
        job.backbone.restore("policy", plain.backbone.snapshot("policy"))
        found[name] = job.rewards.judge.rewards(["p"] * 2, ["ab", "cd"], {})
        unique = {id(p) for p in job.backbone.model.parameters()}
        assert ({id(p) for p in job.rewards.judge.speaker.backbone.model.parameters()} == unique) == (
            "folder" not in name
        )
    torch.testing.assert_close(found["adapter"], found["policy"])
    torch.testing.assert_close(found["folder"], found["policy"])
    torch.testing.assert_close(found["base"], found["base folder"])
    assert (found["base"] - found["policy"]).abs().min() > 1e-4


def test_a_judge_weighs_behind_the_rewards_and_reports_what_it_could_not_read(tmp_path):
    values = values_of("grpo", judge={**SHORT, "form": "compare", "prompt": "Answer 1: {first} Answer 2: {second}"},
                       reward_weights=[0.0, 2.0], steps=2, output_dir=str(tmp_path / "run"))  # fmt: skip
    run(values)
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert row["reward"] == pytest.approx(2 * row["reward/judge"], abs=1e-6)
        assert row["judge_unreadable"] == 0
        assert 0 <= row["judge_inconsistent"] <= 1
    evaluated = read_jsonl(tmp_path / "run" / "eval.jsonl")[-1]["metrics"]
    assert f"reward/{folder()}/reward.py:score" in evaluated


def test_a_run_that_a_judge_pays_resumes_bit_for_bit(tmp_path, monkeypatch):
    judge = {**SHORT, "adapter": "policy", "thought_tokens": 3}
    values = values_of("grpo", reward=None, judge=judge, save_every=2, steps=4)
    assert_resumes(values, tmp_path, monkeypatch, step=2)
