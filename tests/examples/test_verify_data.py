"""The problems of the verifiable run: what their script writes, right by other means of working them out, disjoint."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "verify"
FILES = ("problems_train.jsonl", "problems_heldout.jsonl")


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch, capsys):
    shutil.copy(FOLDER / "make_problems.py", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_problems.py"])
    runpy.run_path(str(tmp_path / "make_problems.py"), run_name="__main__")
    assert [(tmp_path / name).read_bytes() for name in FILES] == [(FOLDER / name).read_bytes() for name in FILES]


def test_no_question_is_there_twice_or_both_learnt_and_held_out():
    prompts = [row["prompt"] for name in FILES for row in rows(name)]
    assert len(set(prompts)) == len(prompts) == 840


WORKED_OUT = {
    "add": lambda numbers, words: str(sum(numbers)),
    "subtract": lambda numbers, words: str(numbers[0] - numbers[1]),
    "larger": lambda numbers, words: str(sorted(numbers)[-1]),
    "compare": lambda numbers, words: ["no", "yes"][numbers[0] > numbers[1]],
    "first": lambda numbers, words: words.split(" ")[0],
    "count": lambda numbers, words: str(words.count(",") + 1),
}


@pytest.mark.parametrize("family", WORKED_OUT)
def test_the_answers_are_right(family):
    of_family = [row for name in FILES for row in rows(name) if row["family"] == family]
    assert len(of_family) == 140
    for row in of_family:
        question = re.fullmatch(r"Question: (.*)\nAnswer:", row["prompt"]).group(1)
        numbers, words = [int(n) for n in re.findall(r"\d+", question)], question.rpartition(": ")[2].rstrip("?")
        assert row["answer"] == WORKED_OUT[family](numbers, words)
