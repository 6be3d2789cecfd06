import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.data.messages import spelled_out, split_pair
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "kettle"}]}
TOOL = {"role": "tool", "content": "hot"}
X, Y = assistant("x"), assistant("y")


def pair(chosen, rejected, **others):
    return split_pair(Row("d.jsonl:7", {"chosen": chosen, "rejected": rejected, **others}))


@pytest.mark.parametrize(
    ("before", "answers"),
    [
        ([user("Tea?")], ([assistant("Yes.")], [assistant("No.")])),
        ([SYSTEM, user("a"), assistant("b"), user("c")], ([assistant("d")], [assistant("e")])),
        ([user("Tea?"), CALL, TOOL], ([assistant("Yes.")], [assistant("No.")])),
        ([user("Tea?")], ([CALL, TOOL, assistant("Yes.")], [assistant("No.")])),
        ([user("Tea?")], ([assistant("Yes.")], [assistant("Yes.")])),
        ([user("Tea?")], ([{"role": "model", "content": "Yes."}], [{"role": "model", "content": "No."}])),
    ],
)
def test_a_pair_of_conversations_is_taken_apart_where_the_answers_begin(before, answers):
    values = pair(before + answers[0], before + answers[1], n=1)
    assert values == {"prompt": before, "chosen": answers[0], "rejected": answers[1], "n": 1}


@pytest.mark.parametrize(
    "prompt",
    ["Tea?", " Tea?\n", "Hi", "", [user("Hi")], [user("Hi "), assistant("Hello."), user("Tea?")], [SYSTEM, user("Hi")]],
)
def test_white_space_makes_no_difference_between_a_prompt_and_its_conversations(prompt):
    before = [SYSTEM, user("Hi"), assistant("Hello."), user(" Tea?\n")]
    other = [SYSTEM, user("Hi"), assistant("Hello. "), user("Tea?")]
    values = pair([*before, assistant("Yes.")], [*other, assistant("No.")], prompt=prompt)
    assert values == {"prompt": before, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}


@pytest.mark.parametrize(
    ("chosen", "rejected", "others", "message"),
    [
        ([user("a"), X], [user("b"), X], {}, "they differ in message 1 already"),
        ([user("a"), X, user("b"), Y], [user("a"), Y, user("b"), Y], {}, "they differ in message 2 already"),
        ([user("a"), X], [user("a"), X, user("b"), Y], {}, "they differ in message 2 already"),
        ([user("a"), CALL, TOOL, assistant("x")], [user("a"), CALL, {**TOOL, "content": "cold"}, assistant("x")], {},
         "they differ in message 3 already"),
        ([user("a")], [user("a")], {}, "the last message of chosen must be an answer, but its role is 'user'"),
        ([user("a"), assistant("x")], [user("a"), SYSTEM], {}, "the last message of rejected must be an answer"),
        ([user("a"), X], [user("a"), Y], {"prompt": "b"}, "the prompt is no part of: str 'b'"),
        ([user("a"), X], [user("a"), Y], {"prompt": [user("b")]}, "the prompt is no part of"),
        ([user("a"), X], [user("a"), Y], {"prompt": 3}, "column 'prompt' must be text or .*, got int 3"),
        ([user("a"), X], [user("a"), Y], {"prompt": None}, "column 'prompt' is null"),
        ([assistant("x")], [assistant("y")], {}, "begin with an answer, and there is no prompt before it"),
        ([assistant("x")], [user("a"), assistant("y")], {"prompt": "a"}, "they differ in message 1 already"),
        ("x", [assistant("y")], {"prompt": "a"}, "one of chosen and rejected is text, the other a list of messages"),
        (None, "y", {}, "column 'chosen' is null"),
    ],
)  # fmt: skip
def test_a_pair_that_is_none_is_named(chosen, rejected, others, message):
    with pytest.raises(UserError, match=rf"d\.jsonl:7: .*{message}"):
        pair(chosen, rejected, **others)


def test_answers_alone_and_texts_stay_as_they_are():
    for values in (
        {"prompt": [user("a")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"chosen": "a x", "rejected": "a y"},
    ):
        assert split_pair(Row("d", values)) == values


message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"]),
                                 "content": st.sampled_from(["a", " a", "b", None])})  # fmt: skip


@given(st.lists(message, max_size=4), st.lists(message, max_size=4), st.one_of(st.text(max_size=2), st.lists(message)))
def test_any_two_conversations_are_a_pair_or_one_line(chosen, rejected, prompt):
    try:
        values = pair(chosen, rejected, prompt=prompt)
    except UserError as error:
        assert str(error).startswith("d.jsonl:7: ")  # noqa: PT017 - either outcome is right, a third is not
    else:
        assert all(answer[0]["role"] == "assistant" or answer is given for answer, given in
                   ((values["chosen"], chosen), (values["rejected"], rejected)))  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"from": "human", "value": "a"}, {"from": "GPT", "value": "b"}], [user("a"), assistant("b")]),
        ({"from": "gpt", "value": "b"}, [assistant("b")]),
        (assistant("b"), [assistant("b")]),
        ({"role": ["user", "assistant"], "content": ["a", "b"]}, [user("a"), assistant("b")]),
        ({"role": ["user"], "content": []}, {"role": ["user"], "content": []}),
        ([user("a")], [user("a")]),
        ("a", "a"),
        (None, None),
        ([], []),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_messages_are_spelled_with_role_and_content(value, expected):
    assert spelled_out(value, "d") == expected
