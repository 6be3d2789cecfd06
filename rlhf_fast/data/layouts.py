"""What the columns of a data set mean: names that the user maps, layouts that people know, and what may be learnt.

A layout is one entry of LAYOUTS: the columns that tell it, a function that adds the columns which the algorithms read,
and the algorithms that may use them. Nothing is inferred that the columns do not say: a set with labels, ratings,
steps or a message tree is named and refused where an algorithm would look past them.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.data.messages import check_text_or_messages, spelled_out, split_pair, trimmed
from rlhf_fast.data.notes import say, tell
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError

Values = dict[str, Any]
PAIRS = ("dpo", "reward_model", "kto")
PROMPTS = ("ppo", "grpo")
# Columns of text or messages that the algorithms read; the others are kept for reward functions.
READ = ("prompt", "completion", "chosen", "rejected", "messages", "text")
# The forms of what people say of answers, and the columns of each; the first that a row has is read.
JUDGEMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "rankings": (("prompt", "completions", "ranks"), ("prompt", "completions", "scores")),
    "steps": (("prompt", "completions", "labels"),),
    "ratings": (("prompt", "completion", "ratings"), ("prompt", "completion", "rating")),
    "likes": (("prompt", "completion", "label"),),
}
# Columns that say whether an answer is a good one. Those of the first line must not be looked past.
_LABELS = ("label", "labels", "kto_tag")
_SCORES = ("score", "scores", "rating", "ratings", "rank", "ranks", "reward", "rewards", "quality", "helpfulness")


# Columns that are asked something where there is no `prompt` before answers of plain text.
_ASKING = ("question", "instruction", "query", "input", "problem", "context", "history", "system")


@dataclass(frozen=True)
class Layout:
    """A known set of columns.

    name: as people call it. columns: what the first row must have, `fits` what their values must look like.
    algorithms: those that may use it; `needs` says which method the others would have to be.
    gives: the columns that `convert` makes of a row. inferred: the algorithm where none is named.
    """

    name: str
    columns: tuple[str, ...]
    algorithms: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    convert: Callable[[Row], Values] = lambda row: row.values
    fits: Callable[[Values], bool] = lambda values: True
    inferred: str | None = None
    needs: str = ""


def _user(text: str) -> Values:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Values:
    return {"role": "assistant", "content": text}


def _text(row: Row, column: str) -> str:
    check_text_or_messages(row, column, messages=False)
    return str(row.values[column])


def _hh(row: Row) -> Values:
    """Anthropic HH: `chosen` and `rejected` are transcripts of turns that begin with "\\n\\nHuman:" or
    "\\n\\nAssistant:". https://huggingface.co/datasets/Anthropic/hh-rlhf"""
    pair = {column: _transcript(row, column) for column in ("chosen", "rejected")}
    return split_pair(Row(row.where, {**row.values, **pair}))


def _transcript(row: Row, column: str) -> list[Values]:
    before, *turns = re.split(r"\n\n(Human|Assistant):", _text(row, column))
    if before.strip() or not turns:
        raise UserError(
            f"{row.where}: {column} must begin with '\\n\\nHuman:', as the first row's does: {shown(before)}"
        )
    makers = {"Human": _user, "Assistant": _assistant}
    return [makers[who](said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _ultrafeedback(row: Row) -> Values:
    """UltraFeedback: whole conversations, and once more as text the `prompt` that they begin with.
    https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized"""
    return split_pair(row)


def _shp(row: Row) -> Values:
    """Stanford Human Preferences: `labels` is 1 where human_ref_A is preferred, 0 where human_ref_B is.
    https://huggingface.co/datasets/stanfordnlp/SHP"""
    label = str(row.values["labels"])
    if label not in ("0", "1"):
        raise UserError(f"{row.where}: labels must be 0 or 1, got {shown(row.values['labels'])}")
    first, second = (_text(row, f"human_ref_{name}") for name in ("AB" if label == "1" else "BA"))
    return {"prompt": [_user(_text(row, "history"))], "chosen": [_assistant(first)], "rejected": [_assistant(second)]}


def _summaries(row: Row) -> Values:
    """OpenAI's comparisons of summaries: `choice` is the index of the better of two `summaries`; the query is that of
    Stiennon et al. 2020 (2009.01325), a Reddit post with its subreddit and title, or the news article alone.
    https://huggingface.co/datasets/openai/summarize_from_feedback"""
    info, summaries, choice = (row.values[column] for column in ("info", "summaries", "choice"))
    texts = [s.get("text") for s in summaries if isinstance(s, dict)] if isinstance(summaries, list) else []
    post = next((info[key] for key in ("post", "article") if info.get(key)), None) if isinstance(info, dict) else None
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts) or choice not in (0, 1) or post is None:
        raise UserError(f"{row.where}: must have two summaries with a text, a choice of 0 or 1, and a post or article")
    head = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: " if info.get("post") else ""
    better, worse = (f" {text.strip()}" for text in (texts[choice], texts[1 - choice]))
    return {"prompt": f"{head}{post}\n\nTL;DR:", "chosen": better, "rejected": worse}


def _sharegpt(row: Row) -> Values:
    """ShareGPT: `conversations` of {from, value}; a `system` text beside them comes first, and `chosen` and `rejected`
    beside them are the two answers that follow. https://huggingface.co/datasets/llamafactory/DPO-En-Zh-20k"""
    column = "conversations" if "conversations" in row.values else "conversation"
    messages = spelled_out(row.values[column], row.where)
    check_text_or_messages(Row(row.where, {column: messages}), column, text=False)
    if row.values.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    return {"prompt" if "chosen" in row.values else "messages": messages}


def _alpaca(row: Row) -> Values:
    """Alpaca: an `instruction`, perhaps an `input`, and the `output`, here as a conversation.
    https://huggingface.co/datasets/tatsu-lab/alpaca; `system` and `history` are LlamaFactory's additions."""
    earlier = row.values.get("history") or []
    system = [{"role": "system", "content": _text(row, "system")}] if row.values.get("system") else []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise UserError(f"{row.where}: history must be a list of [instruction, output], got {shown(earlier)}")
    turns = [make(text) for turn in earlier for make, text in zip((_user, _assistant), turn, strict=True)]
    question = _text(row, "instruction")
    if row.values.get("input"):
        question += "\n\n" + _text(row, "input")
    return {"prompt": [*system, *turns, _user(question)], "completion": [_assistant(_text(row, "output"))]}


def _gsm8k(row: Row) -> Values:
    """GSM8K: the `answer` is a derivation that ends in "#### " and a number.
    https://huggingface.co/datasets/openai/gsm8k"""
    return {"prompt": [_user(_text(row, "question"))], "completion": [_assistant(_text(row, "answer"))]}


def _helpsteer(row: Row) -> Values:
    """HelpSteer: a `response` with a rating from 0 to 4 for each of five criteria.
    https://huggingface.co/datasets/nvidia/HelpSteer2"""
    criteria = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"completion": row.values["response"], "ratings": {name: row.values.get(name) for name in criteria}}


def _prm800k(row: Row) -> Values:
    """PRM800K: of each step the completion that the solution goes on with, rated -1, 0 or 1; neutral counts as right,
    and the first wrong step is the last one. https://github.com/openai/prm800k (Lightman et al. 2023, 2305.20050)"""
    question, label = row.values["question"], row.values["label"]
    try:
        texts, labels = _rated_steps(label["steps"])
        problem = question["problem"]
    except (AttributeError, IndexError, KeyError, TypeError):
        texts, labels, problem = [], [], None
    if not isinstance(problem, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.where}: must have question.problem and at least one step in label.steps")
    return {"prompt": problem, "completions": texts, "labels": labels}


def _rated_steps(steps: list[Values]) -> tuple[list[str], list[bool]]:
    """The text of each step up to the first wrong one, and whether it is right."""
    texts, labels = [], []
    for step in steps:
        made, place = step.get("completions") or [], step.get("chosen_completion")
        chosen = step.get("human_completion") or (made[place or 0] if (place or 0) < len(made) else None)
        if chosen is None:
            break
        texts.append(chosen["text"])
        labels.append(chosen.get("rating") != -1)
        if not labels[-1]:
            break
    return texts, labels


def _math_shepherd(row: Row) -> Values:
    """Math-Shepherd: `input` is the problem and its steps, each closed by "ки"; in `label` a "+" or "-" stands there.
    https://huggingface.co/datasets/peiyi9979/Math-Shepherd"""
    parts = _text(row, "input").split("ки")
    problem, first, step = parts[0].partition("Step 1:")
    texts = [f"{first}{step}", *parts[1:-1]]
    place, labels, label = 0, [], _text(row, "label")
    for part in parts[:-1]:
        place += len(part)
        labels.append(label[place : place + 1])
        place += 1
    if not first or not all(mark in ("+", "-") for mark in labels):
        raise UserError(f"{row.where}: label must be the input with + or - in the place of each ки")
    return {"prompt": problem.strip(), "completions": [text.strip() for text in texts],
            "labels": [mark == "+" for mark in labels]}  # fmt: skip


def _is_hh(values: Values) -> bool:
    pair = (values["chosen"], values["rejected"])
    return all(isinstance(text, str) and text.startswith(("\n\nHuman:", "\n\nAssistant:")) for text in pair)


# The first that fits is it.
LAYOUTS = (
    # https://huggingface.co/datasets/OpenAssistant/oasst1
    Layout("a message tree, one message a row (OpenAssistant)", ("message_id", "parent_id", "role"),
           needs="join each path from a root to an answer into one row of `messages`"),
    Layout("a message tree (OpenAssistant)", ("message_tree_id",),
           needs="join each path from a root to an answer into one row of `messages`"),
    Layout("PRM800K step ratings", ("question", "label"), ("reward_model",), ("prompt", "completions", "labels"),
           _prm800k, lambda values: isinstance(values["label"], dict) and "steps" in values["label"],
           inferred="reward_model", needs="they need a process reward model"),
    Layout("Math-Shepherd step labels", ("input", "label"), ("reward_model",), ("prompt", "completions", "labels"),
           _math_shepherd, lambda values: "ки" in str(values["input"]), inferred="reward_model",
           needs="they need a process reward model"),
    # https://huggingface.co/docs/trl/dataset_formats
    Layout("stepwise supervision", ("prompt", "completions", "labels"), ("reward_model", *PROMPTS),
           ("prompt", "completions", "labels"), inferred="reward_model", needs="it needs a process reward model"),
    # https://huggingface.co/datasets/trl-lib/kto-mix-14k
    Layout("unpaired labels (KTO)", ("prompt", "completion", "label"), ("kto", "reward_model", *PROMPTS),
           ("prompt", "completion", "label"),
           needs="they need KTO, BCO or a reward model; keep the good rows and drop `label` to imitate them"),
    Layout("HelpSteer ratings", ("prompt", "response", "helpfulness"), ("reward_model", *PROMPTS),
           ("prompt", "completion", "ratings"), _helpsteer, inferred="reward_model",
           needs="they need a reward model of ratings; `columns: {completion: response}` imitates every response"),
    Layout("SHP pairs", ("history", "human_ref_A", "human_ref_B", "labels"), (*PAIRS, *PROMPTS),
           ("prompt", "chosen", "rejected"), _shp, inferred="dpo"),
    Layout("OpenAI's comparisons of summaries", ("info", "summaries", "choice"), (*PAIRS, *PROMPTS),
           ("prompt", "chosen", "rejected"), _summaries, inferred="dpo"),
    Layout("Anthropic HH pairs", ("chosen", "rejected"), (*PAIRS, *PROMPTS), ("prompt", "chosen", "rejected"), _hh,
           _is_hh, inferred="dpo"),
    Layout("UltraFeedback pairs", ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
           (*PAIRS, *PROMPTS, "sft"), ("prompt", "chosen", "rejected"), _ultrafeedback, inferred="dpo"),
    Layout("ShareGPT pairs", ("conversations", "chosen", "rejected"), (*PAIRS, *PROMPTS),
           ("prompt", "chosen", "rejected"), _sharegpt, inferred="dpo"),
    Layout("ShareGPT conversations", ("conversations",), ("sft",), ("messages",), _sharegpt, inferred="sft"),
    # https://huggingface.co/datasets/lmsys/lmsys-chat-1m
    Layout("conversations", ("conversation",), ("sft",), ("messages",), _sharegpt, inferred="sft"),
    Layout("Alpaca instructions", ("instruction", "output"), ("sft", *PROMPTS), ("prompt", "completion"), _alpaca,
           inferred="sft"),
    Layout("GSM8K questions", ("question", "answer"), ("sft", *PROMPTS), ("prompt", "completion"), _gsm8k,
           fits=lambda values: "####" in str(values["answer"])),
    Layout("texts with a class", ("text", "label"),
           needs="they need a classifier; `columns: {kind: label}` imitates every text"),
)  # fmt: skip


def rename_columns(rows: Sequence[Row], columns: dict[str, str] | None) -> list[Row]:
    """The rows with the columns that `columns` (our name -> theirs) maps under our names.

    UserError for a name that is no column, one that is mapped twice, and one of ours that is there already.
    """
    if not columns:
        return list(rows)
    ours = {theirs: name for name, theirs in columns.items()}
    present = rows[0].values
    for name, theirs in columns.items():
        if theirs not in present:
            near = difflib.get_close_matches(theirs, list(present), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(present)}"
            if name in present:
                hint = f"; the other way round, {{{theirs}: {name}}}, {name} becomes {theirs}"
            raise UserError(f"columns: there is no column {theirs!r} to become {name!r}{hint}")
        if ours[theirs] != name:
            raise UserError(f"columns: {theirs!r} cannot become both {name!r} and {ours[theirs]!r}")
        if name in present and name not in ours:
            raise UserError(f"columns: {theirs!r} cannot become {name!r}, which is a column already; "
                            f"map that one to another name, such as old_{name}: {name}")  # fmt: skip
    for row in rows:
        missing = next((theirs for theirs in ours if theirs not in row.values), None)
        if missing is not None:
            raise UserError(f"{row.where}: has no column {missing!r}, which columns maps to {ours[missing]!r}")
        taken = next((name for name in columns if name in row.values and name not in ours), None)
        if taken is not None:
            raise UserError(f"{row.where}: has a column {taken!r} already, which columns maps {columns[taken]!r} to")
    return [Row(row.where, {ours.get(name, name): value for name, value in row.values.items()}) for row in rows]


def recognise(rows: Sequence[Row]) -> Layout | None:
    """The known layout of the first row, whose columns every other row must have."""
    first = rows[0].values
    return next((lay for lay in LAYOUTS if set(lay.columns) <= first.keys() and lay.fits(first)), None)


def infer_algorithm(rows: Sequence[Row], data: str) -> str:
    """The algorithm that the columns allow without doubt. UserError says what to choose from where there is doubt."""
    layout, columns = recognise(rows), rows[0].values.keys()
    if layout is not None:
        if layout.inferred is not None:
            return layout.inferred
        if layout.algorithms:
            raise UserError(f"{data} has {layout.name}: choose algorithm {' or '.join(layout.algorithms)}"
                            + f" (for all else {layout.needs})" * bool(layout.needs))  # fmt: skip
        raise UserError(f"{data} has {layout.name}, which no algorithm here learns from: {layout.needs}")
    judged = [name for name in (*_LABELS, *_SCORES) if name in columns]
    forms = [form for form, sets in JUDGEMENTS.items() if any(set(names) <= columns for names in sets)]
    if len(forms) > 1:
        raise UserError(f"{data} has {' and '.join(forms)}: choose the algorithm")
    if forms and forms[0] in ("rankings", "ratings"):
        return "reward_model"
    if {"chosen", "rejected"} <= columns:
        found = "dpo"
    elif "messages" in columns or "text" in columns or {"prompt", "completion"} <= columns:
        found = "sft"
    elif "prompt" in columns:
        raise UserError(f"{data} has only prompts: choose algorithm ppo or grpo")
    else:
        raise UserError(f"{data}: the columns {', '.join(columns) or 'none'} name no algorithm; choose one and map "
                        "its columns to them with `columns`")  # fmt: skip
    if judged:
        raise UserError(f"{data} has a column {judged[0]!r} that {found} would not look at: choose the algorithm")
    return found


def changed_rows(rows: Sequence[Row], change: Callable[[Row], Values], *, skip: bool) -> list[Row]:
    """Every row with the values that `change` makes of it. Where it raises UserError, so does this, or with `skip` the
    row is left out; how many were is said."""
    changed, errors = [], []
    for row in rows:
        try:
            changed.append(Row(row.where, change(row)))
        except UserError as error:
            errors.append((row, error))
            if not skip:
                raise
    if errors and not changed:
        raise UserError(f"all {len(rows)} rows are bad, the first: {errors[0][1]}")
    tell("{found} of {rows} rows are left out, the first: {first}", [(row, str(error)) for row, error in errors], rows)
    return changed


def with_known_columns(
    rows: Sequence[Row], algorithm: str, data: str, *, family: str | None = None,
    skip: bool = False,
) -> list[Row]:  # fmt: skip
    """The rows with what `algorithm` reads under its own names, where they have a known layout, which is said.

    family: the algorithm of LAYOUTS that reads the same; default: algorithm.
    Raises UserError for a layout that the algorithm cannot use, for labels that it would look past, and, unless `skip`
    leaves it out, for a row that is not as the layout has it.
    """
    layout, columns, family = recognise(rows), rows[0].values.keys(), family or algorithm
    if layout is not None and family not in layout.algorithms:
        raise UserError(f"{rows[0].where}: {layout.name}; {algorithm} cannot learn from them: {layout.needs}"
                        if layout.needs else f"{rows[0].where}: {layout.name}; they are for "
                        f"{', '.join(layout.algorithms)}, not {algorithm}")  # fmt: skip
    used = {*(layout.columns if layout is not None else ())}
    forms = {"reward_model": tuple(JUDGEMENTS), "dpo_ranking": ("rankings",)}
    if algorithm in forms or family in forms:
        sets = [names for form in forms.get(algorithm, forms.get(family, ())) for names in JUDGEMENTS[form]]
        used |= {name for names in sets if set(names) <= columns for name in names}
    _check_uniform(rows, {*READ, *_LABELS, "margin", "preference", *used})
    if family not in PROMPTS:
        _check_judgements([name for name in columns if name not in used], algorithm, rows[0].where)
    if layout is not None:
        say(f"{data}: {layout.name} -> {', '.join(layout.gives)}")
    convert = layout.convert if layout is not None else lambda row: row.values

    def change(row: Row) -> Values:
        spelled = {name: spelled_out(v, row.where) if name in READ else v for name, v in row.values.items()}
        return {**spelled, **convert(Row(row.where, spelled))}

    return changed_rows(rows, change, skip=skip)


def _check_uniform(rows: Sequence[Row], names: set[str]) -> None:
    """What the first row is taken for holds for all: each has the same ones of `names`."""
    expected = names & rows[0].values.keys()
    for row in rows:
        found = names & row.values.keys()
        if found != expected:
            name = min(found ^ expected)
            has, lacks = ("lacks", "has") if name in expected else ("has", "lacks")
            raise UserError(f"{row.where} {has} the column {name!r}, which {rows[0].where} {lacks}")


def _check_judgements(columns: Sequence[str], algorithm: str, where: str) -> None:
    label = next((name for name in columns if name in _LABELS), None)
    if label is not None:
        raise UserError(f"{where}: {algorithm} would not look at the column {label!r}; where it says nothing about the "
                        f"answers, give it another name: columns: {{kind: {label}}}")  # fmt: skip
    score = next((name for name in columns if name in _SCORES), None)
    if score is not None:
        say(f"{algorithm} does not look at the column {score!r}")


def require_columns(
    rows: Sequence[Row], layouts: Sequence[Sequence[str]], algorithm: str, *, skip: bool = False
) -> tuple[Sequence[str], list[Row]]:
    """The first of `layouts` (sets of columns) that the first row has, and the rows, all of which must have it with
    values of the right types, unless `skip` leaves the others out."""
    first = rows[0]
    layout = next((names for names in layouts if set(names) <= set(first.values)), None)
    if layout is None:
        wanted = " or ".join("/".join(names) for names in layouts)
        have = ", ".join(first.values) or "none"
        raise UserError(f"{first.where}: {algorithm} needs the columns {wanted}; found: {have}")
    asking = next((name for name in _ASKING if first.values.get(name)), None)
    if layout[0] == "chosen" and isinstance(first.values["chosen"], str) and asking is not None:
        raise UserError(f"{first.where}: {algorithm} would not look at the column {asking!r}; where it is what was "
                        f"asked, say columns.prompt={asking}, else give it another name")  # fmt: skip

    def checked(row: Row) -> Values:
        for name in set(layout) & set(READ):
            check_text_or_messages(row, name, text=name != "messages", messages=name != "text")
        return row.values

    return layout, changed_rows(rows, checked, skip=skip)


def prompt_key(row: Row) -> str:
    """What two rows have in common that ask the same: their prompt, or all before the last message, or their text."""
    values = row.values
    asked = next((values[name] for name in ("prompt", "messages", "text", "chosen") if values.get(name)), "")
    if "prompt" not in values and isinstance(asked, list):
        asked = asked[:-1] or asked
    if isinstance(asked, str):
        return asked.strip()
    return json.dumps(trimmed(asked), sort_keys=True, default=str)
