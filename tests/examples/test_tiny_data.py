"""The data of the tiny run: parses, is what its script writes, and holds nothing twice."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "tiny"


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def word_score():
    return runpy.run_path(str(FOLDER / "word_reward.py"))["word_score"]


@pytest.mark.parametrize(
    ("name", "columns", "at_least"),
    [
        ("sft.jsonl", ("prompt", "completion"), 800),
        ("preferences.jsonl", ("prompt", "chosen", "rejected"), 500),
        ("prompts_train.jsonl", ("prompt",), 150),
        ("prompts_heldout.jsonl", ("prompt",), 40),
    ],
)
def test_every_file_has_its_columns_and_no_duplicate(name, columns, at_least):
    table = rows(name)
    assert len(table) >= at_least
    assert all(tuple(row) == columns for row in table)
    assert len({tuple(row.values()) for row in table}) == len(table)


def test_held_out_prompts_appear_in_no_training_file():
    held_out = {row["prompt"] for row in rows("prompts_heldout.jsonl")}
    for name in ("sft.jsonl", "preferences.jsonl", "prompts_train.jsonl"):
        assert held_out.isdisjoint(row["prompt"] for row in rows(name))


def test_completions_are_short_enough_for_a_quick_run():
    texts = [row["completion"] for row in rows("sft.jsonl")]
    texts += [row[column] for row in rows("preferences.jsonl") for column in ("chosen", "rejected")]
    assert max(len(text.encode("utf-8")) for text in texts) <= 24


def test_sft_shows_both_sentiments_equally(word_score):
    table = rows("sft.jsonl")
    scores = word_score(prompts=[row["prompt"] for row in table], completions=[row["completion"] for row in table])
    assert abs(sum(scores) / len(scores)) < 0.1
    assert sum(score > 0 for score in scores) > len(scores) / 3
    assert sum(score < 0 for score in scores) > len(scores) / 3


def test_every_chosen_completion_is_kinder_than_its_rejected_one(word_score):
    for row in rows("preferences.jsonl"):
        chosen, rejected = word_score(prompts=[row["prompt"]] * 2, completions=[row["chosen"], row["rejected"]])
        assert chosen > rejected, row


def test_word_score_counts_whole_words(word_score):
    completions = [" good and great.", " Bad!", " good but bad.", " goodness.", ""]
    assert word_score(prompts=["x"] * 5, completions=completions) == [2.0, -1.0, 0.0, 0.0, 0.0]


def test_the_script_writes_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "make_data.py"))
    script["write"].__globals__["FOLDER"] = tmp_path
    script["main"]()
    sys.modules.pop("word_reward", None)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == 4
