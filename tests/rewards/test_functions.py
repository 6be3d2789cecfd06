import numpy
import pytest
import torch

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import Payment, call, check_rows, load_function


def ask(function, completions=("a", "bb"), columns=None):
    return call("fn", function, ["p"] * len(completions), list(completions), columns or {})


def test_a_function_gets_the_columns_that_it_names():
    def score(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    columns = {"answer": ["a", "b"], "other": [1, 2]}
    torch.testing.assert_close(ask(score, columns=columns).scores, torch.tensor([1.0, 0.0]))


def test_a_function_with_keywords_gets_every_column():
    seen = {}

    def score(prompts, completions, **columns):
        seen.update(columns)
        return [0] * len(prompts)

    ask(score, columns={"x": [1, 2]})
    assert seen == {"x": [1, 2]}


@pytest.mark.parametrize("values", [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5]), numpy.array([1, 2.5])])
def test_numbers_may_come_as_list_tuple_tensor_or_array(values):
    torch.testing.assert_close(ask(lambda completions: values).scores, torch.tensor([1.0, 2.5]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], "fn returned nan for example 1"),
        ([float("-inf"), 1.0], "fn returned -inf for example 0"),
        ([1.0, None], "fn returned None for example 1"),
        ([1.0, "x"], "fn returned 'x' for example 1"),
        ([1.0], "fn returned 1 values for 2 completions"),
        (None, "fn must return a list of 2 numbers, got NoneType"),
        (3.0, "fn must return a list of 2 numbers, got float"),
    ],
)
def test_a_bad_answer_is_named_with_its_example(values, message):
    with pytest.raises(UserError, match=message):
        ask(lambda completions: values)


def test_a_completion_may_be_paid_as_a_whole_by_tokens_or_by_steps():
    def score(completions, completion_ids):
        return [2, [0.5 * t for t in range(len(completion_ids[1]))], [(1, 0.25), [3, -1.0]], []]

    completions, ids = ["a", "bb", "c\nd", ""], [[1], [2, 2, 9], [3, 4, 5], [9]]
    scores, payments = ask(score, completions, {"completion_ids": ids})
    assert scores.tolist() == [2.0, 1.5, -0.75, 0.0]
    assert payments[0] == payments[3] == []
    assert payments[1] == [Payment(0.0, token=0), Payment(0.5, token=1), Payment(1.0, token=2)]
    assert payments[2] == [Payment(0.25, end=1), Payment(-1.0, end=3)]
    assert ask(lambda completions: [1, 2]).payments is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, 2.0], "fn returned 2 numbers for example 0, which has 3 tokens; a step is a pair of its end"),
        ([(3, 1.0)], "fn ends a step of example 0 at character 3 of 2"),
        ([("a", 1.0)], "fn ends a step of example 0 at character 'a' of 2"),
        ([(1, float("nan"))], "fn returned nan for example 0"),
        ([1.0, None, 2.0], "fn returned None for example 0"),
    ],
    ids=str,
)
def test_steps_and_tokens_that_do_not_fit_are_named(row, message):
    with pytest.raises(UserError, match=message):
        ask(lambda completions: [row], ["ab"], {"completion_ids": [[1, 2, 3]]})


def test_an_exception_is_reported_with_the_example_that_raises_alone():
    def score(completions):
        return [1 / (len(c) - 2) for c in completions]

    with pytest.raises(UserError, match=r"fn raised ZeroDivisionError: .*\(example 1: completion 'bb'\)") as error:
        ask(score)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_every_row_must_have_the_columns_of_required_parameters():
    rows = [Row("d:1", {"prompt": "p", "answer": "a"}), Row("d:2", {"prompt": "q", "answer": None})]
    check_rows("fn", lambda completions, answer, scale=2.0: None, rows)
    lacking = Row("d:3", {"prompt": "r"})
    with pytest.raises(UserError, match=r"fn needs 'answer', which d:3 lacks \(prompt\)"):
        check_rows("fn", lambda completions, answer: None, [*rows, lacking])
    with pytest.raises(UserError, match=r"fn needs 'answer', which is no column of the data \(prompt\)"):
        check_rows("fn", lambda completions, answer: None, [lacking])


def test_functions_load_from_a_file_and_from_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions):\n    return [7.0] * len(completions)\n")
    assert ask(load_function(f"{tmp_path}/mine.py:score")).scores.tolist() == [7.0, 7.0]
    assert load_function("statistics:mean").__name__ == "mean"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py:f", "none.py does not exist"),
        ("no_such_module_here:f", "could not be imported: ModuleNotFoundError"),
        ("statistics:nothing", "statistics has no function 'nothing'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        load_function(spec)
