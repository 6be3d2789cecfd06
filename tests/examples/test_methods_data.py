"""The judgements of the methods' examples: what their script writes, every form whole, and every row reads them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from rlhf_fast.algorithms import ALGORITHMS
from rlhf_fast.algorithms.launch import all_stages, single_stage
from rlhf_fast.data.layouts import JUDGEMENTS
from rlhf_fast.training.config import read_yaml

FOLDER = Path(__file__).parents[2] / "examples" / "methods"
ROWS = [json.loads(line) for line in (FOLDER / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("script", "files"), [("make_judgements", ["judgements"]), ("make_lessons", ["lessons", "bad_pairs", "rated"])]
)
def test_the_script_writes_the_committed_files(script, files, tmp_path):
    before = list(sys.path)
    try:
        main = runpy.run_path(str(FOLDER / f"{script}.py"))["main"]
        main.__globals__["FOLDER"] = tmp_path
        main()
    finally:
        sys.path[:] = before
        for name in ("make_data", "word_reward"):
            sys.modules.pop(name, None)
    for name in files:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


def test_every_row_has_every_form_and_answers_that_are_told_apart():
    columns = {name for form in JUDGEMENTS.values() for name in form[0]} - {"ratings"} | {"rating"}
    for row in ROWS:
        assert columns <= row.keys()
        assert len({rank for rank in row["ranks"] if rank is not None}) > 1
        assert len(row["completions"]) == len(row["ranks"]) == len(row["labels"])
    assert any(None in row["ranks"] for row in ROWS)
    assert any(len(set(row["ranks"])) < 4 for row in ROWS)


@pytest.mark.parametrize("name", [name for name, preset in ALGORITHMS.items() if preset.module == "reward_model"])
def test_the_example_is_a_run_of_every_row(name):
    values = {**read_yaml(FOLDER / "reward_model.yaml"), "algorithm": name}
    assert single_stage(values).config.form == ALGORITHMS[name].defaults.get("form", "auto")


def test_the_policy_of_the_ensemble_example_is_paid_less_for_what_its_members_disagree_on():
    models, policy = all_stages(read_yaml(FOLDER / "reward_ensemble.yaml"), {})
    assert models.config.ensemble == 3
    assert policy.config.reward_combine == "uwo"
