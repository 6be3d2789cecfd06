"""Right, wrong, too slow and unusable answers of every kind, and the processes that judge them."""

import json
import os
import threading
import time

import pytest

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Rewards, Source, Verifier
from rlhf_fast.rewards.checks import answered
from rlhf_fast.rewards.sandbox import check_sandbox
from rlhf_fast.training.entries import VerifyConfig

OPTIONS = {"extract": None, "normalize": True, "choices": "ABCDE"}
SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}

CASES = [
    ("exact", " Paris.\n", "paris", True), ("exact", "paris, France", "Paris", False), ("exact", "7", 7, True),
    ("exact", "two", ["2", "two"], True), ("exact", "", "x", False),
    ("choice", "B", "B", True), ("choice", "(C) since it is green", 2, True),
    ("choice", "A, no: the answer is D.", "D", True), ("choice", "The answer is **E**", "E", True),
    ("choice", r"so \boxed{A}", "a", True), ("choice", "A cat is B", "B", False),
    ("choice", "I would take C", "C", True), ("choice", "B or C", "B", False), ("choice", "none", "A", False),
    ("regex", "call 555-0199", r"\d{3}-\d{4}", True), ("regex", "call me", r"\d", False),
    ("json_schema", '{"age": 3}', SCHEMA, True), ("json_schema", '{"age": "3"}', json.dumps(SCHEMA), False),
    ("json_schema", 'Here:\n```json\n{"age": 3}\n```\n', SCHEMA, True), ("json_schema", "age: 3", SCHEMA, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "completion", "gold", "right"), CASES)
def test_what_is_right(kind, completion, gold, right):
    assert answered(kind, completion, gold, OPTIONS) == {"right": right}


@pytest.mark.parametrize(("completion", "gold", "right"), [
    (r"so it is $\frac{3}{4}$", "0.75", True), (r"\boxed{x = 3}", "3", True), ("The answer is 12", 12, True),
    ("The answer is 13", 12, False), ("I do not know", "12", False), (r"$(x+1)^2$", "x^2+2x+1", True),
    (r"$\sqrt{8}$", r"2\sqrt{2}", True), ("2", r"2\sqrt{2}", False), ("12 apples", "12 apples", True),
    (r"$\{1, 2\}$", r"$\{2, 1\}$", True),
])  # fmt: skip
def test_what_is_right_as_mathematics(completion, gold, right):
    pytest.importorskip("math_verify")
    assert answered("math", completion, gold, OPTIONS) == {"right": right}


@pytest.mark.parametrize(("extract", "completion", "right"), [
    (r"\A\s*(.*)", "\n 7 \nand so on", True), (r"\d+", "first 3, then 7", True), (r"#### (.+)", "#### 7", True),
    (r"#### (.+)", "7", False),
])  # fmt: skip
def test_the_last_match_of_extract_is_the_answer(extract, completion, right):
    assert answered("exact", completion, "7", OPTIONS | {"extract": extract}) == {"right": right}


def test_without_normalize_case_counts():
    assert answered("exact", "Paris ", "paris", OPTIONS | {"normalize": False}) == {"right": False}


def verifier(kind="exact", **options):
    return Verifier(VerifyConfig(kind=kind, **options))


@pytest.mark.parametrize(("kind", "gold", "reason"), [
    ("exact", None, "is no text, number or list"), ("choice", "F", "is neither one of ABCDE"),
    ("choice", 5, "nor its number"),
    ("regex", "(", "is no regular expression: missing )"), ("json_schema", "{", "is no JSON schema"),
    ("json_schema", {"type": "objct"}, "is no JSON schema"), ("math", "hello there", "is no mathematics"),
    ("math", "", "is no mathematics"),
])  # fmt: skip
def test_an_answer_of_the_data_that_cannot_be_used_is_an_error_with_its_row(kind, gold, reason):
    if kind == "math":
        pytest.importorskip("math_verify")
    good = {"choice": "A", "json_schema": SCHEMA}.get(kind, "1")
    rows = [Row("d.jsonl:1", {"answer": good}), Row("d.jsonl:2", {"answer": gold}), Row("d.jsonl:3", {"answer": gold})]
    with pytest.raises(UserError) as error:
        verifier(kind).check_rows(rows)
    assert str(error.value).startswith("d.jsonl:2: answer ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_data_without_the_column_is_refused():
    with pytest.raises(UserError, match="verify exact needs the column 'solution'; the data has prompt, answer"):
        verifier(answer="solution").check_rows([Row("d:1", {"prompt": "p", "answer": "a"})])


def test_a_pattern_for_all_rows_needs_no_column():
    check = verifier("regex", pattern=r"\A\d+\Z")
    check.check_rows([Row("d:1", {"prompt": "p"})])
    assert check(["p", "p"], ["12", "a"]).tolist() == [1.0, 0.0]


def test_a_schema_for_all_rows_is_read_from_its_file(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    check = verifier("json_schema", schema_file=str(tmp_path / "schema.json"))
    assert check(["p", "p"], ['{"age": 1}', "{}"]).tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match=r"verify.schema_file .*none.json cannot be read"):
        verifier("json_schema", schema_file=str(tmp_path / "none.json"))


def test_a_schema_fetches_nothing_from_elsewhere():
    reply = answered("json_schema", "{}", {"$ref": "http://127.0.0.1:9/schema.json"}, OPTIONS)
    assert reply["right"] is False
    assert reply["raised"].startswith("_WrappedReferencingError")


def test_a_check_that_never_ends_counts_as_wrong_and_the_others_as_they_are(capfd):
    """C code that no exception interrupts, in a thread that is not the main one; the process goes, another comes."""
    check = verifier("regex", timeout=0.5)
    scores = []
    evil = "a" * 40 + "!"
    golds = ["(a+)+$", "(a+)+$", "!", "b"]
    thread = threading.Thread(target=lambda: scores.append(check(["p"] * 4, [evil, "aaa", evil, evil], answer=golds)))
    thread.start()
    thread.join(60)
    assert [s.tolist() for s in scores] == [[0.0, 1.0, 1.0, 0.0]]
    assert "verify_regex: a completion took longer than 0.5 s to check" in capfd.readouterr().out


def test_mathematics_that_never_ends_counts_as_wrong():
    pytest.importorskip("math_verify")
    check = verifier("math", timeout=3)
    assert check(["p"] * 2, ["$9^{9^{9^{9}}}$", "$4$"], answer=["4", "4"]).tolist() == [0.0, 1.0]


def test_an_answer_that_takes_too_long_to_read_is_an_error_with_its_row():
    pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=r"d:1: answer '0.5' takes longer than 0.001 s to read"):
        verifier("math", timeout=0.001).check_rows([Row("d:1", {"answer": "0.5"})])


def test_a_completion_is_checked_once_however_often_it_is_there(monkeypatch):
    check, asked = verifier(), []
    ask = Verifier._ask
    monkeypatch.setattr(Verifier, "_ask", lambda self, *given: asked.append(given) or ask(self, *given))
    check.submit("yes", {"answer": "yes"})
    assert check(["p"] * 4, ["yes", "no", "yes", "yes"], answer=["yes", "yes", "yes", "no"]).tolist() == [1, 0, 1, 0]
    assert sorted(asked) == [("no", "yes"), ("yes", "no"), ("yes", "yes")]


def test_a_ctrl_c_does_not_reach_the_processes():
    check = verifier()
    assert check(["p"], ["a"], answer=["a"]).tolist() == [1.0]
    process = check._pool.submit(lambda: check._of_thread.process).result()
    assert os.getpgid(process.pid) != os.getpgrp()


def test_programs_are_judged_by_their_tests():
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    tests = ["assert f(2) == 4", "assert f(3) == 9"]
    programs = [
        "Here:\n```python\ndef f(x): return x * x\n```\n",
        "def f(x): return x * 2",
        "import os; os._exit(0)",
        "```",
    ]
    columns = {"tests": [tests] * 4}
    assert verifier("code")(["p"] * 4, programs, **columns).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert verifier("code", partial=True)(["p"] * 4, programs, **columns).tolist() == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(UserError, match=r"d:1: tests .* is no assertion"):
        verifier("code").check_rows([Row("d:1", {"tests": ["f(2)"]})])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("rlhf_fast.rewards.verify.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"verify math needs math_verify: pip install 'rlhf_fast\[verify\]'"):
        verifier("math")


def test_a_verifier_is_one_of_the_weighted_rewards():
    rewards = Rewards([Source("length", 0.5, lambda completions: [len(c) for c in completions]),
                       Source("verify_exact", 2.0, verifier())])  # fmt: skip
    total, parts, _ = rewards(["p", "p"], ["ab", "abcd"], {"answer": ["ab", "x"]})
    assert total.tolist() == [3.0, 2.0]
    assert {name: scores.tolist() for name, scores in parts.items()} == {"length": [2, 4], "verify_exact": [1, 0]}


def test_a_reward_function_that_hangs_is_an_error_with_its_row():
    def hangs(completions):
        if "slow" in completions:
            time.sleep(30)
        return [0.0] * len(completions)

    rewards = Rewards([Source("hangs", 1.0, hangs)], timeout=0.2)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        rewards(["p"] * 3, ["a", "slow", "b"], {})
    assert str(error.value) == (
        "reward hangs raised TimeoutError: no answer in 0.2 s (reward_timeout) (example 1: completion 'slow')"
    )
    assert time.monotonic() - start < 10
    time.sleep(0.3)  # and no alarm is left to ring
