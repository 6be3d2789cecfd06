"""Rows that become tokens when they are asked for; the number of calls stands for the time."""

from collections import Counter

import pytest

from rlhf_fast.data import encoded, notes
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, TooLong
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training.answers import encode_answer
from rlhf_fast.training.pairs import encode_pair
from rlhf_fast.training.rankings import encode_ranking

ROWS = [Row(f"x:{i}", {"prompt": f"ask {i} ", "completion": "yes " * (i % 7)}) for i in range(100)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A hundred rows are many."""
    monkeypatch.setattr(encoded, "KEPT", 20)
    monkeypatch.setattr(encoded, "LOOKED_AT", 5)
    notes.forget()


def encoder(**settings):
    return Encoder(tiny(0, layers=1)[1], **{"max_prompt_tokens": 64, "max_tokens": 128, **settings})


@pytest.fixture
def calls(monkeypatch):
    """How often the text of each row was encoded."""
    seen, fitted = Counter(), Encoder._fitted

    def counted(self, exchange, name):
        seen[exchange.row.where] += 1
        return fitted(self, exchange, name)

    monkeypatch.setattr(Encoder, "_fitted", counted)
    return seen


def test_of_many_rows_the_first_and_the_longest_are_encoded_at_the_start_and_others_when_asked_for(calls):
    one = encoder()
    rows = encode_rows(one, ROWS, Encoder.completion, "data")
    longest = [f"x:{i}" for i in range(100) if i % 7 == 6][:5]
    assert set(calls) >= {"x:0", "x:1", "x:2", "x:3", "x:4"}
    assert len(calls) <= 10
    assert len(set(calls) & {f"x:{i}" for i in range(100) if i % 7 == 6}) == len(longest)
    assert len(rows) == 100
    assert set(calls.values()) == {1}
    assert [rows[50], rows[50], rows[-1]] == [one.completion(ROWS[50])] * 2 + [one.completion(ROWS[99])]
    assert calls["x:50"] == 2  # once for the line above


def test_no_more_than_the_last_rows_stay_in_memory(calls):
    rows = encode_rows(encoder(), ROWS, Encoder.completion, "data")
    calls.clear()
    first = [rows[i] for i in range(10, 40)]
    assert [rows[i] for i in range(20, 40)] == first[10:]
    assert max(calls.values()) == 1
    assert rows[10] == first[0]
    assert calls["x:10"] == 2


def test_few_rows_are_encoded_at_the_start_once(calls):
    rows = encode_rows(encoder(), ROWS[:20], Encoder.completion, "data")
    assert [*rows] == [*rows]
    assert list(calls.values()) == [1] * 20


@pytest.mark.parametrize("rule", [{"too_long": "skip", "max_tokens": 9}, {"bad_rows": "skip"}])
def test_rules_that_leave_rows_out_know_at_the_start_which(rule, capsys):
    bad = Row("x:bad", {"prompt": "ask", "completion": [{"role": "user", "content": "no answer"}]})
    rows = ROWS if "too_long" in rule else [*ROWS[:50], bad, *ROWS[50:]]
    one = encoder(**rule)
    kept = encode_rows(one, rows, Encoder.completion, "data")
    expected = []
    for row in rows:
        try:
            expected.append(one.completion(row))
        except UserError:
            continue
    assert 0 < len(kept) < len(rows)
    assert [*kept] == expected
    assert f"data: {len(rows) - len(kept)} of {len(rows)} rows" in capsys.readouterr().out


def test_a_row_over_budget_that_was_not_looked_at_is_named_when_it_is_asked_for():
    """The longest in characters are not always the longest in tokens."""
    rare = Row("x:rare", {"prompt": "ask ", "completion": "\u2603" * 13})
    common = [Row(f"x:{i}", {"prompt": "ask ", "completion": "yes", "note": "-" * 50}) for i in range(99)]
    rows = encode_rows(encoder(max_tokens=30), [*common, rare], Encoder.completion, "data")
    with pytest.raises(TooLong, match="x:rare: completion has"):
        rows[99]


def test_a_row_that_is_longest_is_refused_at_the_start():
    with pytest.raises(TooLong, match="x:90: completion has"):
        encode_rows(
            encoder(max_tokens=60), [*ROWS[:90], Row("x:90", {"prompt": "ask", "completion": "no " * 99})],
            Encoder.completion, "data",
        )  # fmt: skip


PAIR = {"prompt": "ask", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("encode", "good", "bad", "message"),
    [
        (Encoder.completion, {"prompt": "a", "completion": "b"}, {"completion": [{"role": "user", "content": "b"}]},
         "the last message must be an answer"),
        (Encoder.prompt, {"prompt": "a"}, {"prompt": [{"role": "user", "content": 5}]}, "messages with text"),
        (Encoder.prompt, {"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}], "tools": "{"}, "is not JSON"),
        (encode_pair, {**PAIR, "preference": 1.0}, {"preference": 2.0}, "preference must be in"),
        (encode_pair, PAIR, {"chosen": [{"role": "user", "content": "b"}]}, "one of chosen and rejected is text"),
        (encode_answer, {"prompt": "a", "completion": "b", "label": True}, {"label": "maybe"}, "label must be true"),
        (encode_ranking, {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, {"ranks": [1, 1]}, "no two"),
    ],
)  # fmt: skip
def test_every_row_is_checked_at_the_start_but_for_its_tokens(encode, good, bad, message):
    rows = [Row(f"x:{i}", {**good, "note": "-" * 50}) for i in range(60)]
    rows[40] = Row("x:40", {**good, **bad})
    with pytest.raises(UserError, match=f"x:40: .*{message}"):
        encode_rows(encoder(), rows, encode, "data")


def test_what_is_done_to_a_row_is_said_once_when_it_was_not_said_at_the_start(capsys):
    rows = [Row(f"x:{i}", {"prompt": "ask " * (20 if i in (60, 61) else 1), "note": "-" * 200}) for i in range(100)]
    rows[60:62] = [Row(row.where, {"prompt": row.values["prompt"]}) for row in rows[60:62]]
    prompts = encode_rows(encoder(max_prompt_tokens=8, too_long="truncate"), rows, Encoder.prompt, "data")
    assert "cut" not in capsys.readouterr().out
    assert len([*prompts]) == 100
    assert capsys.readouterr().out.splitlines() == ["data: a row is longer than the budget, and cut to it (x:60)"]


def test_rows_that_differ_in_text_or_settings_have_another_key():
    rows, others = ROWS[:20], [*ROWS[:19], ROWS[20]]
    keys = [
        encode_rows(encoder(), rows, Encoder.completion, "data").key,
        encode_rows(encoder(), others, Encoder.completion, "data").key,
        encode_rows(encoder(max_tokens=100), rows, Encoder.completion, "data").key,
        encode_rows(encoder(too_long="truncate"), rows, Encoder.completion, "data").key,
    ]
    other_template = encoder()
    other_template.tokenizer.chat_template = "{{ messages }}"
    keys.append(encode_rows(other_template, rows, Encoder.completion, "data").key)
    assert len(set(keys)) == 5
    assert encode_rows(encoder(), rows, Encoder.completion, "data").key == keys[0]
