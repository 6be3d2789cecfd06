"""Stages that repeat: which folder a reference means in which round, and a whole run of rounds with late labels."""

import json
import signal
from pathlib import Path

import pytest

from rlhf_fast.algorithms.launch import all_stages
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.signals import Stopped
from rlhf_fast.training.config import read_yaml
from rlhf_fast.training.entries import FromStage
from rlhf_fast.training.folder import written_rows
from rlhf_fast.training.run import Run
from tests.training.interruptions import contents
from tests.training.test_run import go
from tests.training.tiny_runs import folder, values_of, write_jsonl

BASE = {"algorithm": "sft", "model": "m", "data": "d"}


def stages_of(*entries, **values):
    return all_stages({"stages": list(entries), **values}, {})


def places(stage):
    """What its model and its data are: names of stages, or paths."""
    found = []
    for value in (stage.config.model, stage.config.data):
        values = value if isinstance(value, list) else [value]
        found.append([v.stage if isinstance(v, FromStage) else v for v in values])
    return found


def policy(model, data, **rest):
    return {"algorithm": "dpo", "name": "policy", "model": model, "data": data, **rest}


LABEL = {
    "algorithm": "label",
    "model": {"from": "policy", "first": "sft"},
    "data": "prompts",
    "judge": {"form": "compare"},
}


def test_a_reference_is_of_this_round_or_of_the_one_before_and_first_stands_for_the_one_before_the_first():
    block = {"repeat": 3, "stages": [LABEL, policy({"from": "policy", "first": "sft"}, {"from": "label"})]}
    after = policy({"from": "policy"}, "pairs", name="last")
    stages = stages_of(BASE, block, after)
    assert [stage.name for stage in stages] == [
        "sft", *(f"round-{r}/{name}" for r in (1, 2, 3) for name in ("label", "policy")), "last"
    ]  # fmt: skip
    assert [places(stage) for stage in stages[1:]] == [
        [["sft"], ["prompts"]], [["sft"], ["round-1/label"]],
        [["round-1/policy"], ["prompts"]], [["round-1/policy"], ["round-2/label"]],
        [["round-2/policy"], ["prompts"]], [["round-2/policy"], ["round-3/label"]],
        [["round-3/policy"], ["pairs"]],
    ]  # fmt: skip


def test_the_data_of_all_rounds_so_far_and_other_files_are_read_together():
    data = ["late.jsonl", {"from": "label", "rounds": "all"}]
    block = {"repeat": 2, "stages": [LABEL, policy({"from": "policy", "first": "base/folder"}, data)]}
    stages = stages_of(BASE, block)
    first, second = stages[2], stages[4]
    assert places(first) == [["base/folder"], ["late.jsonl", "round-1/label"]]
    assert places(second) == [["round-1/policy"], ["late.jsonl", "round-1/label", "round-2/label"]]


def test_every_round_draws_other_examples_but_the_same_held_out_ones():
    held_by_seed, with_eval = policy("m", "d", name="one"), policy("m", "d", name="two", eval_data="e")
    stages = stages_of({"repeat": 2, "stages": [held_by_seed, with_eval, {**LABEL, "model": "m"}]}, seed=5)
    seeds = [(stage.config.seed, stage.config.order_seed) for stage in stages]
    assert seeds == [(5, 5), (5, 5), (5, 5), (6, 5), (6, 6), (6, 6)]


@pytest.mark.parametrize(("stages", "message"), [
    ([{"repeat": 0, "stages": [BASE]}], "repeat must be a whole number from 1, got 0"),
    ([{"repeat": 2, "stages": [{"repeat": 2, "stages": [BASE]}]}], "stages that repeat cannot hold others that repeat"),
    ([{"repeat": 2, "stages": [BASE], "seed": 3}], "an entry with repeat has stages beside it and nothing else, got "),
    ([{"repeat": 2, "stages": []}], "stages must be a list of mappings"),
    ([BASE, {"repeat": 2, "stages": [BASE]}], "stages need different names, got sft, sft"),
    ([BASE, {"repeat": 2, "stages": [policy({"from": "policy"}, "d")]}],
     "stage policy: from: policy is no earlier stage; in the first round there is none: say `first`"),
    ([BASE, {"repeat": 2, "stages": [policy({"from": "sft", "rounds": "all"}, "d")]}],
     "stage policy: model from sft: rounds: all is for data"),
    ([BASE, policy("m", {"from": "sft"})], r"stage policy: data: \{from: sft\} makes no data"),
], ids=str)  # fmt: skip
def test_rounds_that_make_no_sense_are_one_line(stages, message):
    with pytest.raises(UserError, match=message):
        stages_of(*stages)


@pytest.fixture
def rounds(tmp_path):
    """Two rounds of: answers of the newest policy, labelled by a gold reward; DPO on the pairs so far and late ones."""
    gold = f"{folder() / 'reward.py'}:score"
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": p, "chosen": "good", "rejected": "b"} for p in ("qa", "qb")])
    (tmp_path / "late.jsonl").write_text("")
    keys = {key: values_of("dpo")[key] for key in ("device", "batch_size", "learning_rate", "lora_rank", "seed")}
    label = {"algorithm": "label", "model": {"from": "dpo", "first": str(folder() / "model")}, "reward": gold,
             "data": str(folder() / "prompts.jsonl"), "write": "pairs", "steps": 2, "num_generations": 4,
             "batch_size": 8}  # fmt: skip
    dpo = {"algorithm": "dpo", "model": {"from": "dpo", "first": str(folder() / "model")}, "steps": 2, "reward": gold,
           "data": [str(tmp_path / "late.jsonl"), {"from": "label", "rounds": "all"}],
           "eval_data": str(tmp_path / "held_out.jsonl")}  # fmt: skip
    values = {**keys, "max_new_tokens": 5, "output_dir": str(tmp_path / "run"), "repeat": 2, "stages": [label, dpo]}
    (tmp_path / "rounds.yaml").write_text(json.dumps(values))
    return tmp_path


def test_rounds_hand_on_adapters_merge_late_labels_and_are_evaluated_alike(rounds, monkeypatch, capsys):
    path, run = str(rounds / "rounds.yaml"), rounds / "run"
    go(path, dry_run=True)
    assert "round-2/dpo: the examples of round-1/label, round-2/label" in capsys.readouterr().out
    assert not run.exists()
    log = Run.log

    def logged(self, step, metrics, **rest):
        log(self, step, metrics, **rest)
        if self.folder == run / "round-1" / "dpo" and step == 1:
            late = {"prompt": "late", "chosen": "x", "rejected": "y", "gap": 0.5, "tag": 0}
            write_jsonl(rounds / "late.jsonl", [late] * 3)
        if self.folder == run / "round-2" / "label" and step == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", logged)
    with pytest.raises(Stopped):
        go(path)
    go(path, resume="auto")
    out = capsys.readouterr().out
    assert "round-1/dpo: finished before" in out
    assert "dpo: held-out data after each round" in out
    assert read_yaml(run / "round-2" / "label" / "config.yaml")["model"] == str(run / "round-1" / "dpo")
    lines = read_jsonl(run / "rounds.jsonl")
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        summary = json.loads((run / f"round-{line['round']}" / "dpo" / "summary.json").read_text())
        assert line["dpo"] == summary["metrics"]
        assert {sample["prompt"] for sample in summary["samples"]} == {"qa", "qb"}
    counts = [len(written_rows(run / f"round-{r}" / "label")) for r in (1, 2)]
    assert all(counts)
    assert _examples(run / "round-2" / "dpo") == 3 + sum(counts)
    before = contents(run / "round-2" / "dpo")
    monkeypatch.setattr(Run, "log", log)
    write_jsonl(rounds / "late.jsonl", [])
    go(path, overwrite=True)
    assert contents(run / "round-2" / "dpo") != before, "the late labels were learnt from"
    assert "left in" not in capsys.readouterr().err
    go(path, {"repeat": 3}, resume="auto")
    assert [line["round"] for line in read_jsonl(run / "rounds.jsonl")] == [1, 2, 3]


def _examples(folder: Path) -> int:
    """How many examples the stage's data has, as its config names it."""
    places = map(Path, read_yaml(folder / "config.yaml")["data"])
    files = [file for place in places for file in (sorted(place.glob("*.jsonl")) if place.is_dir() else [place])]
    return sum(len(read_jsonl(file)) for file in files)
