"""What a run trains on, what it holds out, and the device that it runs on."""

import json

import pytest

from rlhf_fast.data import notes
from rlhf_fast.errors import UserError
from rlhf_fast.training.pairs import load_pair_rows
from rlhf_fast.training.setup import load_rows, prepare_rollouts, usable_device
from tests.training.tiny_runs import config_of, write_jsonl


@pytest.fixture(autouse=True)
def _nothing_said():
    notes.forget()


def config(tmp_path, rows, algorithm="sft", **changes):
    write_jsonl(tmp_path / "d.jsonl", rows)
    return config_of(algorithm, **{"data": str(tmp_path / "d.jsonl"), "eval_size": None, **changes})


def numbers(rows):
    return [row.values["n"] for row in rows]


def test_held_out_rows_are_drawn_by_the_seed_of_the_data(tmp_path):
    rows = [{"text": f"t{i}", "n": i} for i in range(50)]
    draws = []
    for changes in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "data_seed": 2}):
        train, held_out = load_rows(config(tmp_path, rows, **changes), [("text",)])
        assert len(held_out) == 5
        assert sorted(numbers(train) + numbers(held_out)) == list(range(50))
        draws.append(numbers(held_out))
    assert draws[0] == draws[1] != draws[2] == draws[3]
    assert draws[0] != list(range(45, 50))


def test_rows_that_ask_the_same_are_on_one_side(tmp_path):
    rows = [{"prompt": f"p{i // 3}" + " " * (i % 2), "completion": "c", "n": i} for i in range(30)]
    train, held_out = load_rows(config(tmp_path, rows, eval_size=6), [("prompt", "completion")])
    assert len(held_out) == 6
    assert not {row.values["prompt"].strip() for row in train} & {row.values["prompt"].strip() for row in held_out}


def test_one_prompt_alone_is_on_both_sides_and_this_is_said(tmp_path, capsys):
    rows = [{"prompt": "p", "n": i} for i in range(20)]
    train, held_out = load_rows(config(tmp_path, rows, "grpo"), [("prompt",)])
    assert (len(train), len(held_out)) == (18, 2)
    assert capsys.readouterr().out == "all 20 rows ask the same, the held-out ones too\n"


def test_rows_of_eval_data_are_drawn_too_and_shared_prompts_are_counted(tmp_path, capsys):
    write_jsonl(tmp_path / "e.jsonl", [{"text": f"t{i}", "n": i} for i in range(5, 25)])
    rows = [{"text": f"t{i}", "n": i} for i in range(10)]
    changed = {"eval_data": str(tmp_path / "e.jsonl")}
    train, held_out = load_rows(config(tmp_path, rows, **changed), [("text",)])
    assert numbers(train) == list(range(10))
    assert numbers(held_out) == list(range(5, 25))
    assert f"5 of the 20 rows of {tmp_path}/e.jsonl ask what {tmp_path}/d.jsonl asks too" in capsys.readouterr().out
    _, held_out = load_rows(config(tmp_path, rows, eval_size=4, **changed), [("text",)])
    assert len(held_out) == 4
    assert numbers(held_out) != [5, 6, 7, 8]


def test_holding_out_all_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 rows; holding out 2"):
        load_rows(config(tmp_path, [{"text": "a"}, {"text": "b"}], eval_size=2), [("text",)])


def test_columns_are_mapped_in_both_sources(tmp_path):
    write_jsonl(tmp_path / "e.jsonl", [{"q": "e", "a": "f"}])
    changes = {"columns": {"prompt": "q", "completion": "a"}, "eval_data": str(tmp_path / "e.jsonl")}
    train, held_out = load_rows(config(tmp_path, [{"q": "x", "a": "y"}], **changes), [("prompt", "completion")])
    assert [row.values for row in train + held_out] == [
        {"prompt": "x", "completion": "y"},
        {"prompt": "e", "completion": "f"},
    ]


def test_what_is_read_and_what_is_not_is_said_where_rows_have_both(tmp_path, capsys):
    rows = [{"prompt": f"{i}", "completion": "b", "text": "c"} for i in range(3)]
    load_rows(config(tmp_path, rows), [("prompt", "completion"), ("text",)])
    assert capsys.readouterr().out == f"{tmp_path}/d.jsonl: sft reads prompt, completion, not text\n"


def test_pairs_that_differ_too_early_are_an_error_or_left_out(tmp_path, capsys):
    def said(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]

    rows = [{"chosen": said(f"q{i}", "a"), "rejected": said(f"q{i}", "b"), "n": i} for i in range(6)]
    rows[3]["rejected"] = said("q", "b")
    with pytest.raises(UserError, match=r"d\.jsonl:4: .* differ in message 1 already; bad_rows: skip"):
        load_pair_rows(config(tmp_path, rows, "dpo"))
    train, held_out = load_pair_rows(config(tmp_path, rows, "dpo", bad_rows="skip"))
    assert sorted(numbers(train) + numbers(held_out)) == [0, 1, 2, 4, 5]
    assert "1 of 6 rows are left out, the first: d.jsonl:4: " in capsys.readouterr().out


def test_empty_answers_and_equal_pairs_are_counted_once(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(6)]
    rows[2]["rejected"] = " a\n"
    rows[3]["rejected"] = ""
    rows[4] = {**rows[4], "chosen": " ", "rejected": ""}
    load_pair_rows(config(tmp_path, rows, "dpo"))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/d.jsonl: chosen is empty in 1 of 6 rows, first in d.jsonl:5",
        f"{tmp_path}/d.jsonl: rejected is empty in 2 of 6 rows, first in d.jsonl:4",
        "chosen and rejected are the same in 2 of 6 pairs, first in d.jsonl:3",
    ]


def test_pairs_of_conversations_share_their_prompt_when_rows_are_held_out(tmp_path):
    def conversation(i, text):
        return [{"role": "user", "content": f"q{i // 2}"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": conversation(i, f"a{i}"), "rejected": conversation(i, "b"), "n": i} for i in range(20)]
    train, held_out = load_pair_rows(config(tmp_path, rows, "reward_model", eval_size=4))
    asked = [{json.dumps(row.values["prompt"]) for row in side} for side in (train, held_out)]
    assert len(held_out) == 4
    assert not asked[0] & asked[1]
    assert held_out[0].values["chosen"] == [{"role": "assistant", "content": f"a{held_out[0].values['n']}"}]


@pytest.mark.parametrize("key", ["reward", "cost"])
def test_a_column_that_any_row_lacks_is_missed_before_the_run_starts(key, tmp_path):
    (tmp_path / "needs.py").write_text("def score(completions, tag):\n    return [0.0] * len(completions)\n")
    rows = [{"prompt": f"p{i}", "tag": i} for i in range(9)]
    del rows[6]["tag"]
    changes = {key: f"{tmp_path / 'needs.py'}:score"} | ({"cost_limit": 0.0} if key == "cost" else {})
    with pytest.raises(UserError, match=r"score needs 'tag', which d\.jsonl:7 lacks \(prompt\)"):
        prepare_rollouts(config(tmp_path, rows, "grpo", **changes))


@pytest.mark.parametrize("name", ["meta", "hpu", "xla", "privateuseone", "cuda:-1", "cpu:99999999999", "gpu", ""])
def test_a_device_that_cannot_compute_is_refused_in_a_short_line(name):
    with pytest.raises(UserError) as error:
        usable_device(name)
    assert str(error.value).startswith(f"device {name!r} cannot be used: ")
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)
