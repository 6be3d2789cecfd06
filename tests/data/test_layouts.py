"""Rows as the data sets have them (their cards are cited in rlhf_fast/data/layouts.py), and what may be learnt."""

import pytest

from rlhf_fast.algorithms import ALGORITHMS
from rlhf_fast.data import layouts, notes
from rlhf_fast.data.layouts import (
    JUDGEMENTS,
    LAYOUTS,
    infer_algorithm,
    prompt_key,
    recognise,
    rename_columns,
    require_columns,
    with_known_columns,
)
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rows(*values):
    return [Row(f"d.jsonl:{i}", v) for i, v in enumerate(values, start=1)]


ULTRAFEEDBACK = {
    "prompt": "Why?", "prompt_id": "1", "chosen": [user("Why? "), assistant("So.")],
    "rejected": [user("Why?"), assistant("No.")], "messages": [user("Why?"), assistant("So.")],
    "score_chosen": 8.0, "score_rejected": 2.0,
}  # fmt: skip
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Yes:\n\n1. green",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: No.",
}
KTO = {"prompt": [user("Tea?")], "completion": [assistant("Yes.")], "label": True}
GSM8K = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
ALPACA = {"instruction": "Add.", "input": "1, 1", "output": "2", "text": "Below is ..."}
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
HELPSTEER = {"prompt": "Tea?", "response": "Yes.", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1,
             "verbosity": 1}  # fmt: skip
SHP = {"post_id": "x", "history": "Tea?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 0, "score_A": 1}
SUMMARIES = {
    "info": {"id": "t3", "post": "Long.", "title": "T", "subreddit": "tea", "site": None, "article": None},
    "summaries": [{"text": " Bad.", "policy": "sup1"}, {"text": " Good.", "policy": "ref"}], "choice": 1,
    "worker": "w", "batch": "batch3", "split": "train",
}  # fmt: skip
PRM800K = {"labeler": "x", "question": {"problem": "1 + 1?"}, "label": {"finish_reason": "found_error", "steps": [
    {"completions": [{"text": "Two", "rating": 1}], "human_completion": None, "chosen_completion": 0},
    {"completions": [{"text": "No", "rating": -1}, {"text": "So", "rating": 0}], "chosen_completion": 1},
    {"completions": [{"text": "3", "rating": -1}], "human_completion": None, "chosen_completion": None},
    {"completions": [{"text": "never read", "rating": 1}], "chosen_completion": 0},
]}}  # fmt: skip
MATH_SHEPHERD = {"input": "1 + 1? Step 1: 2 ки\nStep 2: So 3 ки", "label": "1 + 1? Step 1: 2 +\nStep 2: So 3 -",
                 "task": "GSM8K"}  # fmt: skip
STEPWISE = {"prompt": "1 + 1?", "completions": ["It is", "2."], "labels": [True, True]}
TREE = {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter", "message_tree_id": "a"}
CLASSES = {"text": "good film", "label": 1}

KNOWN = {
    "UltraFeedback pairs": ULTRAFEEDBACK, "Anthropic HH pairs": HH, "unpaired labels (KTO)": KTO,
    "GSM8K questions": GSM8K, "Alpaca instructions": ALPACA, "ShareGPT conversations": SHAREGPT,
    "HelpSteer ratings": HELPSTEER, "SHP pairs": SHP, "OpenAI's comparisons of summaries": SUMMARIES,
    "PRM800K step ratings": PRM800K, "Math-Shepherd step labels": MATH_SHEPHERD, "stepwise supervision": STEPWISE,
    "a message tree, one message a row (OpenAssistant)": TREE, "texts with a class": CLASSES,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_said():
    notes.forget()


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_layout_is_recognised(name):
    assert recognise(rows(KNOWN[name])).name == name


def test_other_columns_are_no_known_layout():
    for values in (
        {"prompt": "a", "completion": "b"}, {"chosen": "a", "rejected": "b"}, {"question": "a", "answer": "b"},
        {"messages": []}, {"text": "a"}, {"prompt": "a", "answer": "#### 2"},
    ):  # fmt: skip
        assert recognise(rows(values)) is None


@pytest.mark.parametrize(
    ("values", "algorithm", "expected"),
    [
        (ULTRAFEEDBACK, "dpo", {"prompt": [user("Why? ")], "chosen": [assistant("So.")],
                                "rejected": [assistant("No.")]}),
        (HH, "dpo", {"prompt": [user("Hi"), assistant("Hello."), user("Tea?")],
                     "chosen": [assistant("Yes:\n\n1. green")], "rejected": [assistant("No.")]}),
        (HH, "grpo", {"prompt": [user("Hi"), assistant("Hello."), user("Tea?")]}),
        (KTO, "ppo", {"prompt": [user("Tea?")]}),
        (GSM8K, "sft", {"prompt": [user("1 + 1?")], "completion": [assistant(GSM8K["answer"])]}),
        (GSM8K, "grpo", {"prompt": [user("1 + 1?")], "answer": GSM8K["answer"]}),
        (ALPACA, "sft", {"prompt": [user("Add.\n\n1, 1")], "completion": [assistant("2")]}),
        ({**ALPACA, "input": "", "system": "Be brief.", "history": [["Hi", "Hello."]]}, "sft",
         {"prompt": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user("Add.")]}),
        (SHAREGPT, "sft", {"messages": [user("Hi"), assistant("Hello.")]}),
        ({**SHAREGPT, "system": "Be brief."}, "sft",
         {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello.")]}),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello."},
          "rejected": {"from": "gpt", "value": "Go."}}, "dpo",
         {"prompt": [user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("Go.")]}),
        (SHP, "dpo", {"prompt": [user("Tea?")], "chosen": [assistant("No.")], "rejected": [assistant("Yes.")]}),
        ({**SHP, "labels": "1"}, "dpo", {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}),
        (SUMMARIES, "reward_model", {"prompt": "SUBREDDIT: r/tea\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:",
                                     "chosen": " Good.", "rejected": " Bad."}),
        ({**SUMMARIES, "info": {"post": None, "article": "News."}}, "dpo", {"prompt": "News.\n\nTL;DR:"}),
        (STEPWISE, "grpo", {"prompt": "1 + 1?"}), (STEPWISE, "reward_model", STEPWISE),
        (PRM800K, "reward_model", {"prompt": "1 + 1?", "completions": ["Two", "So", "3"],
                                   "labels": [True, True, False]}),
        (MATH_SHEPHERD, "reward_model", {"prompt": "1 + 1?", "completions": ["Step 1: 2", "Step 2: So 3"],
                                         "labels": [True, False]}),
        (HELPSTEER, "reward_model", {"completion": "Yes.", "ratings": {"helpfulness": 3, "correctness": 4,
                                     "coherence": 4, "complexity": 1, "verbosity": 1}}),
    ],
)  # fmt: skip
def test_a_known_layout_becomes_the_columns_that_the_algorithm_reads(values, algorithm, expected):
    (row,) = with_known_columns(rows(values), algorithm, "d.jsonl")
    assert {name: row.values[name] for name in expected} == expected
    assert values.keys() <= row.values.keys()  # for reward functions


def test_what_a_layout_was_taken_for_is_said_once(capsys):
    for _ in range(2):
        with_known_columns(rows(ULTRAFEEDBACK), "dpo", "data.jsonl")
    assert capsys.readouterr().out == "data.jsonl: UltraFeedback pairs -> prompt, chosen, rejected\n"


@pytest.mark.parametrize(
    "steps", [5, "x", [5], [{"completions": {}}], [{"completions": [5]}], [{"human_completion": {"text": 5}}], [{}]]
)
def test_step_ratings_of_another_form_are_one_line(steps):
    strange = {**PRM800K, "label": {"steps": steps}}
    with pytest.raises(UserError, match=r"d\.jsonl:1: must have question\.problem and at least one step"):
        with_known_columns(rows(strange), "process_reward_model", "d.jsonl", family="reward_model")


@pytest.mark.parametrize(
    ("values", "algorithms", "message"),
    [
        (KTO, ("sft", "dpo"), r"d\.jsonl:1: unpaired labels \(KTO\); .*: they need KTO, BCO or a reward model"),
        (HELPSTEER, ("sft", "dpo"), "HelpSteer ratings; .*: they need a reward model of ratings"),
        (PRM800K, ("sft", "dpo", "grpo"), "PRM800K step ratings; .*: they need a process reward model"),
        (MATH_SHEPHERD, ("sft", "dpo", "ppo"), "Math-Shepherd step labels; .*: they need a process reward model"),
        (STEPWISE, ("sft", "dpo"), "stepwise supervision; .*: it needs a process reward model"),
        (TREE, ALGORITHMS, r"a message tree, one message a row \(OpenAssistant\); .*: join each path"),
        ({"message_tree_id": "a", "prompt": {}}, ALGORITHMS, "a message tree"),
        (CLASSES, ALGORITHMS, "texts with a class; .*: they need a classifier"),
        (HH, ("sft",), "Anthropic HH pairs; they are for dpo, reward_model, kto, ppo, grpo, not sft"),
        (SHAREGPT, ("dpo", "grpo"), "ShareGPT conversations; they are for sft, not"),
    ],
)  # fmt: skip
def test_an_algorithm_that_cannot_learn_from_a_layout_refuses_it(values, algorithms, message):
    for algorithm in algorithms:
        with pytest.raises(UserError, match=message):
            with_known_columns(rows(values), algorithm, "d.jsonl")


@pytest.mark.parametrize(
    ("values", "algorithm"),
    [
        ({"chosen": "a", "rejected": "b"}, "dpo"), ({"prompt": "a", "completion": "b"}, "sft"),
        ({"messages": []}, "sft"),
        ({"text": "a"}, "sft"), (ULTRAFEEDBACK, "dpo"), (HH, "dpo"), (SHP, "dpo"), (SUMMARIES, "dpo"), (ALPACA, "sft"),
        (SHAREGPT, "sft"), ({"prompt": "a", "completion": "b", "tag": 1}, "sft"), (HELPSTEER, "reward_model"),
        (PRM800K, "reward_model"), (MATH_SHEPHERD, "reward_model"), (STEPWISE, "reward_model"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, "reward_model"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [0.5, None]}, "reward_model"),
        ({"prompt": "a", "completion": "b", "rating": 3}, "reward_model"),
        ({"prompt": "a", "completion": "b", "ratings": {"help": 3}}, "reward_model"),
    ],
)  # fmt: skip
def test_columns_decide_the_algorithm_where_they_can(values, algorithm):
    assert infer_algorithm(rows(values), "d.jsonl") == algorithm


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a"}, "has only prompts: choose algorithm ppo or grpo"),
        (KTO, "has unpaired labels .*: choose algorithm kto or reward_model or ppo or grpo .*KTO, BCO"),
        ({"prompt": "a", "completion": "b", "label": "1"}, "unpaired labels"),
        (GSM8K, "GSM8K questions: choose algorithm sft or ppo or grpo"),
        (TREE, "has a message tree.*, which no algorithm here learns from: join"),
        (CLASSES, "texts with a class, which no algorithm here learns from"),
        ({"chosen": "a", "rejected": "b", "prompt": "c", "completions": ["a"], "ranks": [1]},
         "has pairs and rankings: choose the algorithm"),
        ({"prompt": "a", "completion": "b", "score": 1}, "has a column 'score' that sft would not look at"),
        ({"messages": [], "kto_tag": True}, "has a column 'kto_tag'"),
        ({"chosen": "a", "rejected": "b", "label": 0}, "has a column 'label' that dpo would not look at"),
        ({"text": "a", "labels": [1]}, "has a column 'labels'"),
        ({"question": "a", "solution": "b"}, "the columns question, solution name no algorithm; .*`columns`"),
        ({"instruction": "a"}, "name no algorithm"),
        ({}, "the columns none name no algorithm"),
    ],
)  # fmt: skip
def test_nothing_is_inferred_that_the_columns_do_not_say(values, message):
    with pytest.raises(UserError, match=message):
        infer_algorithm(rows(values), "d.jsonl")


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward_model"])
def test_a_label_is_never_looked_past(algorithm, capsys):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [], "label": 1}
    with pytest.raises(
        UserError, match=f"{algorithm} would not look at the column 'label'; .*columns: {{kind: label}}"
    ):
        with_known_columns(rows(pair), algorithm, "d")
    with_known_columns(rename_columns(rows(pair), {"kind": "label"}), algorithm, "d")
    assert capsys.readouterr().out == ""
    with_known_columns(rows({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}), algorithm, "d")
    assert capsys.readouterr().out == f"{algorithm} does not look at the column 'score'\n"


def test_a_reward_model_reads_the_labels_of_its_forms_and_no_others(capsys):
    ranked = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "scores": [1, 2]}
    assert with_known_columns(rows(ranked), "reward_model", "d") == rows(ranked)
    with pytest.raises(UserError, match="would not look at the column 'label'"):
        with_known_columns(rows({**ranked, "label": 1}), "reward_model", "d")
    with_known_columns(rows({**ranked, "label": 1, "completion": "b"}), "reward_model", "d")
    assert "does not look at" not in capsys.readouterr().out


def test_a_reward_function_may_have_any_label():
    assert with_known_columns(rows({"prompt": "a", "label": 1}), "grpo", "d") == rows({"prompt": "a", "label": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([HH, {**HH, "chosen": "Hello"}], r"d\.jsonl:2: chosen must begin with"),
        ([HH, {**HH, "rejected": "\n\nHuman: Bye\n\nAssistant: No."}], r"d\.jsonl:2: .*differ in message 1 already"),
        ([HH, {**HH, "chosen": "\n\nHuman: Hi"}], r"d\.jsonl:2: the last message of chosen must be an answer"),
        ([HH, {**HH, "chosen": None}], r"d\.jsonl:2: column 'chosen' is null"),
        ([HH, {"chosen": HH["chosen"]}], r"d\.jsonl:2 lacks the column 'rejected', which d\.jsonl:1 has"),
        ([SHP, {**SHP, "labels": 2}], r"d\.jsonl:2: labels must be 0 or 1, got int 2"),
        ([SHP, {**SHP, "history": 3}], r"d\.jsonl:2: column 'history' must be text, got int 3"),
        ([SUMMARIES, {**SUMMARIES, "choice": 2}], r"d\.jsonl:2: must have two summaries"),
        ([SUMMARIES, {**SUMMARIES, "info": None}], r"d\.jsonl:2: must have two summaries"),
        ([SUMMARIES, {**SUMMARIES, "summaries": [1, 2]}], r"d\.jsonl:2: must have two summaries"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_as_the_first_one_is_named(values, message):
    with pytest.raises(UserError, match=message):
        with_known_columns(rows(*values), "dpo", "d.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**SHAREGPT, "conversations": [{"from": "robot", "value": "x"}]}, r"from 'robot'; known: human, user"),
        ({**SHAREGPT, "conversations": "Hi"}, "column 'conversations' must be a list of messages, got str 'Hi'"),
        ({**SHAREGPT, "conversations": []}, r"must be a list of messages, got list \[\]"),
        ({**ALPACA, "output": None}, "column 'output' is null"),
        ({**ALPACA, "history": ["x"]}, r"history must be a list of \[instruction, output\]"),
        ({**GSM8K, "question": ["x"]}, "column 'question' must be text"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(values, message):
    with pytest.raises(UserError, match=message):
        with_known_columns(rows(values), "sft", "d.jsonl")


def test_every_row_must_have_the_columns_of_the_first():
    with pytest.raises(UserError, match=r"d\.jsonl:2 has the column 'label', which d\.jsonl:1 lacks"):
        with_known_columns(rows({"prompt": "a", "completion": "b"}, KTO), "sft", "d")
    with pytest.raises(UserError, match=r"d\.jsonl:2 has the column 'prompt', which"):
        with_known_columns(
            rows({"chosen": "a", "rejected": "b"}, {"prompt": "", "chosen": "a", "rejected": "b"}), "dpo", "d"
        )
    with_known_columns(rows({"prompt": "a", "tag": 1}, {"prompt": "b", "other": 2}), "grpo", "d")


def test_columns_are_mapped_and_the_others_kept():
    (row,) = rename_columns(
        rows({"question": "q", "answer": "a", "n": 1}), {"prompt": "question", "completion": "answer"}
    )
    assert row.values == {"prompt": "q", "completion": "a", "n": 1}
    (row,) = rename_columns(rows({"chosen": "a", "rejected": "b"}), {"chosen": "rejected", "rejected": "chosen"})
    assert row.values == {"chosen": "b", "rejected": "a"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "qestion"}, "there is no column 'qestion' to become 'prompt'; did you mean 'question'"),
        ({"prompt": "xyz"}, "there is no column 'xyz' to become 'prompt'; there are: question, text"),
        ({"question": "prompt"}, "the other way round, {prompt: question}, question becomes prompt"),
        ({"prompt": "question", "completion": "question"}, "'question' cannot become both 'prompt' and 'completion'"),
        ({"text": "question"}, "'question' cannot become 'text', which is a column already"),
    ],
)
def test_a_mapping_that_cannot_be_is_one_line(columns, message):
    with pytest.raises(UserError, match=message):
        rename_columns(rows({"question": "q", "text": "t"}), columns)


def test_a_mapping_must_hold_for_every_row():
    with pytest.raises(UserError, match=r"d\.jsonl:2: has no column 'q'"):
        rename_columns(rows({"q": "a"}, {"p": "a"}), {"prompt": "q"})
    with pytest.raises(UserError, match=r"d\.jsonl:2: has a column 'prompt' already"):
        rename_columns(rows({"q": "a"}, {"q": "a", "prompt": "b"}), {"prompt": "q"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "column 'prompt' is null"),
        (3, "column 'prompt' must be text or a list of messages, got int 3"),
        ([], r"column 'prompt' must be text or a list of messages, got list \[\]"),
        ({"content": "x"}, "must be text or a list of messages, got dict"),
        ([{"content": "x"}], r"must be a list of \{role, content\} messages; number 1 is dict"),
        ([user("x"), "y"], "number 2 is str 'y'"),
        ('[{"role": "user", "content": "x"}]', "holds a conversation written as text"),
    ],
)
def test_every_value_of_a_needed_column_is_checked(value, message):
    given = rows({"prompt": "a"}, {"prompt": value}, {"prompt": [user("b")]})
    with pytest.raises(UserError, match=rf"d\.jsonl:2: .*{message}"):
        require_columns(given, [("prompt",)], "ppo")
    assert require_columns(given, [("prompt",)], "ppo", skip=True) == (("prompt",), [given[0], given[2]])


def test_missing_columns_are_named_with_those_that_are_there():
    with pytest.raises(UserError, match="dpo needs the columns prompt/chosen or chosen; found: prompt"):
        require_columns(rows({"prompt": "a"}), [("prompt", "chosen"), ("chosen",)], "dpo")
    with pytest.raises(UserError, match="column 'messages' must be a list of messages, got str"):
        require_columns(rows({"messages": "a"}), [("messages",)], "sft")
    with pytest.raises(UserError, match="column 'text' must be text, got list"):
        require_columns(rows({"text": [user("a")]}), [("text",)], "sft")


@pytest.mark.parametrize("name", ["question", "instruction", "system"])
def test_answers_without_a_prompt_are_not_learnt_past_what_was_asked(name):
    pair = {"chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=f"would not look at the column '{name}'; .*columns.prompt={name}"):
        require_columns(rows({name: "q", **pair}), [("prompt", "chosen", "rejected"), ("chosen", "rejected")], "dpo")
    require_columns(rows({"tag": "q", **pair}), [("chosen", "rejected")], "dpo")
    require_columns(rows({name: "q", "text": "a"}), [("text",)], "sft")


def test_messages_in_the_spellings_of_others_are_brought_to_one():
    columnar = {"role": ["user", "assistant"], "content": ["a", "b"]}
    (row,) = with_known_columns(rows({"messages": columnar}), "sft", "d")
    assert row.values["messages"] == [user("a"), assistant("b")]
    given = {"prompt": [{"from": "human", "value": "a"}], "completion": assistant("b")}
    (row,) = with_known_columns(rows(given), "sft", "d")
    assert (row.values["prompt"], row.values["completion"]) == ([user("a")], [assistant("b")])


def test_rows_that_are_bad_can_be_left_out_and_are_counted(capsys):
    bad = {**HH, "rejected": "\n\nHuman: Bye\n\nAssistant: No."}
    found = with_known_columns(rows(HH, bad, HH, bad), "dpo", "d", skip=True)
    assert [row.where for row in found] == ["d.jsonl:1", "d.jsonl:3"]
    assert "2 of 4 rows are left out, the first: d.jsonl:2: chosen and rejected must differ" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"all 2 rows are bad, the first: d\.jsonl:1"):
        with_known_columns(rows(bad, bad), "dpo", "d", skip=True)


def test_two_rows_ask_the_same_where_their_prompts_are():
    key = prompt_key
    (a, b, c) = rows({"prompt": "x "}, {"prompt": "x", "n": 2}, {"prompt": "y"})
    assert key(a) == key(b) != key(c)
    (a, b, c) = rows(*({"messages": [user(q), assistant(text)]} for q, text in (("x", "1"), ("x ", "2"), ("y", "1"))))
    assert key(a) == key(b) != key(c)


def test_the_table_of_layouts_is_whole():
    readers = {"sft", "reward_model", "ppo", "grpo", "dpo", "kto"}
    assert {name for layout in LAYOUTS for name in layout.algorithms} == readers
    for layout in LAYOUTS:
        assert layout.inferred is None or layout.inferred in layout.algorithms, layout.name
        read = {*layouts.READ, *(name for sets in JUDGEMENTS.values() for names in sets for name in names)}
        assert set(layout.gives) <= read, layout.name
        assert layout.gives or layout.needs, layout.name
