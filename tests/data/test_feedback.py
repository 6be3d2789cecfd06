"""Feedback of several forms in one file: what each algorithm reads of it, with annotator and time."""

import json

import pytest

from rlhf_fast.data.feedback import answers, as_read, critiques, forms_of, likes, pairs
from rlhf_fast.data.notes import forget
from rlhf_fast.data.reading import Row, read_jsonl
from rlhf_fast.errors import UserError
from tests.training.interruptions import run
from tests.training.tiny_runs import values_of, write_jsonl

BY = {"annotator": "ann", "time": "2026-11-01T10:00"}
MIXED = [
    {"prompt": "p", "chosen": "good", "rejected": "bad", "preference": 0.75, **BY},
    {"prompt": "p", "completions": ["second", "best", "second too", "none"], "ranks": [2, 1, 2, None], **BY},
    {"prompt": "p", "original": "badd", "edited": "bad", "critique": "spelling", **BY},
    {"prompt": "p", "completion": "three", "rating": 3, **BY},
    {"prompt": "p", "completion": "five", "ratings": {"help": 4, "harm": 6}, **BY},
    {"prompt": "p", "completion": "one", "rating": 1, "annotator": "bob", "time": None},
    {"prompt": "p", "completion": "nice", "label": True, **BY},
    {"prompt": "p", "completion": "nasty", "label": False, "critique": "rude", **BY},
    {"prompt": "q", "completion": "cold", "label": False, **BY},
]


def rows(values=MIXED):
    return [Row(f"f:{i + 1}", value) for i, value in enumerate(values)]


def test_every_form_is_known_by_its_columns_and_a_row_may_have_two():
    assert [forms_of(value) for value in MIXED] == [
        ["pair"], ["ranking"], ["edit", "critique"], ["rating"], ["rating"], ["rating"], ["like"], ["like", "critique"],
        ["like"],
    ]  # fmt: skip
    assert forms_of({"prompt": "p", "completion": "c"}) == []


def test_pairs_come_of_every_form_that_orders_two_answers_and_keep_who_said_so_and_when():
    found = [row.values for row in pairs(rows())]
    said = [(value["chosen"], value["rejected"]) for value in found]
    # Ties and what has no rank make no pair; ratings of two annotators are not compared; q has no liked answer.
    assert said == [("good", "bad"), ("best", "second"), ("best", "second too"), ("bad", "badd"), ("five", "three"),
                    ("nice", "nasty")]  # fmt: skip
    assert all({name: value[name] for name in BY} == BY for value in found)
    assert all(set(value) <= {"prompt", "chosen", "rejected", "preference", *BY} for value in found)


def test_scores_order_as_ranks_do_the_other_way_round():
    (pair,) = pairs(rows([{"prompt": "p", "completions": ["low", "high"], "scores": [-1, 2.5]}]))
    assert (pair.values["chosen"], pair.values["rejected"]) == ("high", "low")


def test_liked_and_disliked_answers_come_of_all_but_ratings():
    found = [(row.values["completion"], row.values["label"]) for row in likes(rows())]
    assert found == [("good", True), ("bad", False), ("best", True), ("second too", False), ("bad", True),
                     ("badd", False), ("nice", True), ("nasty", False), ("cold", False)]  # fmt: skip
    assert list(likes(rows([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}]))) == []


def test_answers_to_imitate_are_the_good_ones():
    assert [row.values["completion"] for row in answers(rows())] == ["good", "best", "bad", "nice", "five", "one"]


def test_critiques_stand_beside_what_they_criticise():
    found = [(row.values["completion"], row.values["critique"], row.values["time"]) for row in critiques(rows())]
    assert found == [("badd", "spelling", BY["time"]), ("nasty", "rude", BY["time"])]
    assert as_read(rows(), "distillation", "f") == list(critiques(rows()))


def test_mixed_rows_become_uniform_and_it_is_said(capsys):
    forget()
    found = as_read(rows(), "dpo", "mine.jsonl")
    assert {tuple(row.values) for row in found} == {("prompt", *BY, "chosen", "rejected", "preference")}
    assert [row.values["preference"] for row in found] == [0.75] + [1.0] * 5
    out = capsys.readouterr().out
    assert out == "mine.jsonl: 1 pair, 1 ranking, 1 edit, 2 critiques, 3 ratings, 3 likes -> pairs: 6\n"


@pytest.mark.parametrize("family", ["dpo", "reward_model", "kto", "sft", "ppo"])
def test_rows_of_one_form_are_left_to_the_layouts(family):
    same = rows([value for value in MIXED if "rating" in value])
    assert as_read(same, family, "f") == same
    plain = rows([{"prompt": "p", "completion": "c"}, MIXED[0]])
    assert as_read(plain, family, "f") == plain


def test_edits_alone_are_pairs_and_answers_too():
    edits = rows([MIXED[2]])
    assert [row.values["chosen"] for row in as_read(edits, "reward_model", "f")] == ["bad"]
    assert [row.values["label"] for row in as_read(edits, "kto", "f")] == [True, False]
    assert [row.values["completion"] for row in as_read(edits, "sft", "f")] == ["bad"]


@pytest.mark.parametrize(("bad", "message"), [
    ({"completions": ["a", "b"], "ranks": [1]}, r"f:2: completions and their ranks or scores must be lists of one len"),
    ({"completions": ["a", "b"], "scores": [None, None]}, "f:2: none of the completions has a rank or a score"),
    ({"completion": "a", "rating": "high"}, "f:2: a rating, rank or score must be a number, got str 'high'"),
    ({"completion": "a", "ratings": {}}, "f:2: ratings are empty"),
    ({"completion": "a", "label": "yes"}, "f:2: label must be true or false, got str 'yes'"),
], ids=str)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_row(bad, message):
    with pytest.raises(UserError, match=message):
        as_read(rows([MIXED[0], {"prompt": "p", **bad}, {"prompt": "p", **bad}]), "dpo", "f")


def test_feedback_that_has_nothing_for_an_algorithm_is_an_error():
    only = rows([{"prompt": "p", "completion": "a", "rating": 1}, {"prompt": "q", "completion": "b", "label": False}])
    with pytest.raises(UserError, match="f: 1 rating, 1 like make no pairs"):
        as_read(only, "dpo", "f")


@pytest.mark.parametrize("algorithm", ["dpo", "reward_model", "sft"])
def test_a_run_learns_from_a_file_of_mixed_feedback(algorithm, tmp_path):
    write_jsonl(
        tmp_path / "mixed.jsonl", [{**value, "prompt": f"{value['prompt']}{i}"} for i in range(3) for value in MIXED]
    )
    values = values_of(algorithm, data=str(tmp_path / "mixed.jsonl"), steps=2, eval_size=4)
    run({**values, "output_dir": str(tmp_path / "run")})
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2
    json.loads((tmp_path / "run" / "summary.json").read_text())
