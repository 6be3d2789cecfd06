"""Feedback in several forms at once, as people give it, made into the one form that an algorithm reads.

    pair       chosen, rejected                      ranking    completions, ranks or scores
    edit       original, edited                      rating     completion, rating or ratings
    like       completion, label                     critique   completion or original, critique

Each row has a `prompt` and what else it says: the annotator and the time stay with it. A row may have two forms, such
as an edit with a critique of what it replaces. Data of one form that an algorithm reads by itself is left as it is.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rlhf_fast.data.layouts import prompt_key
from rlhf_fast.data.notes import say
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError

Values = dict[str, Any]
_SAID = {
    "chosen", "rejected", "completion", "completions", "ranks", "scores", "original", "edited", "rating", "ratings",
    "label", "critique", "preference", "margin",
}  # fmt: skip


def forms_of(values: Values) -> list[str]:
    """The forms of feedback that a row has."""
    found = {
        "pair": {"chosen", "rejected"} <= values.keys(),
        "edit": {"original", "edited"} <= values.keys(),
        "ranking": "completions" in values and bool({"ranks", "scores"} & values.keys()),
        "rating": "completion" in values and bool({"rating", "ratings"} & values.keys()),
        "like": {"completion", "label"} <= values.keys(),
        "critique": "critique" in values and bool({"completion", "original"} & values.keys()),
    }
    return [form for form, has in found.items() if has]


def as_read(rows: Sequence[Row], family: str, data: str) -> list[Row]:
    """The rows as the algorithms of a family read them, where they are of several forms or edits, which is said.

    What a form has nothing of for that family is left out: a critique is no pair.
    """
    forms = [forms_of(row.values) for row in rows]
    kinds = {form for found in forms for form in found} - ({"critique"} if family != "distillation" else set())
    alike = all(found == forms[0] for found in forms)  # then the algorithm chooses among the forms of a row
    if family not in CONVERSIONS or not all(forms) or (alike and kinds != {"edit"}):
        return list(rows)
    what, convert = CONVERSIONS[family]
    found = _unified(list(convert(rows)))
    counts = Counter(form for of_row in forms for form in of_row)
    if not found:
        raise UserError(f"{data}: {_listed(counts)} make no {what}")
    say(f"{data}: {_listed(counts)} -> {what}: {len(found)}")
    return found


class Unlike(UserError):
    """Rows of several forms, which are made into one together."""


def check_alike(rows: Sequence[Row], family: str) -> None:
    """Unlike where a row has other forms than the first: rows that are read one by one cannot be made into another
    form together."""
    forms = forms_of(rows[0].values)
    other = next((row for row in rows if forms_of(row.values) not in (forms, [])), None)
    if forms and family in CONVERSIONS and other is not None:
        raise Unlike(f"{other.where} has {' and '.join(forms_of(other.values))}, {rows[0].where} has "
                     f"{' and '.join(forms)}: a file of several forms must fit into memory; split it")  # fmt: skip


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {form}{'s' * (count > 1)}" for form, count in counts.items())


def pairs(rows: Sequence[Row]) -> Iterator[Row]:
    """Pairs as they are, the edited text over the original, every two ranks that differ, and of one prompt, by one
    annotator, every two ratings that differ and every liked answer over every disliked one."""
    for row in rows:
        values = row.values
        for form in forms_of(values):
            if form == "pair":
                kept = {name: values[name] for name in ("preference", "margin") if values.get(name) is not None}
                yield _pair(row, values["chosen"], values["rejected"], kept)
            elif form == "edit":
                yield _pair(row, values["edited"], values["original"])
            elif form == "ranking":
                for (better, high), (worse, low) in combinations(_ordered(row), 2):
                    if high > low:
                        yield _pair(row, better, worse)
    for group in _by_prompt(rows, "rating"):
        for one, other in combinations(sorted(group, key=_rating, reverse=True), 2):
            if _rating(one) > _rating(other):
                yield _pair(one, one.values["completion"], other.values["completion"])
    for group in _by_prompt(rows, "like"):
        for liked in (row for row in group if _likes(row)):
            for disliked in (row for row in group if not _likes(row)):
                yield _pair(liked, liked.values["completion"], disliked.values["completion"])


def likes(rows: Sequence[Row]) -> Iterator[Row]:
    """Likes as they are; chosen, edited and best answers are liked, rejected, original and worst ones are not. A rating
    says no more than that another one is higher, and is left out."""
    for row in rows:
        values = row.values
        for form in forms_of(values):
            if form == "like":
                yield _answer(row, values["completion"], label=_likes(row))
            elif form in ("pair", "edit"):
                good, bad = ("chosen", "rejected") if form == "pair" else ("edited", "original")
                yield _answer(row, values[good], label=True)
                yield _answer(row, values[bad], label=False)
            elif form == "ranking":
                (best, high), *_, (worst, low) = [*_ordered(row), *_ordered(row)[-1:]]
                if high > low:
                    yield _answer(row, best, label=True)
                    yield _answer(row, worst, label=False)


def answers(rows: Sequence[Row]) -> Iterator[Row]:
    """What is worth imitating: chosen, edited, liked and best answers, of ratings the highest of each prompt."""
    for row in rows:
        values = row.values
        for form in forms_of(values):
            if form in ("pair", "edit"):
                yield _answer(row, values["chosen" if form == "pair" else "edited"])
            elif form == "ranking":
                yield _answer(row, _ordered(row)[0][0])
            elif form == "like" and _likes(row):
                yield _answer(row, values["completion"])
    for group in _by_prompt(rows, "rating"):
        best = max(group, key=_rating)
        yield _answer(best, best.values["completion"])


def critiques(rows: Sequence[Row]) -> Iterator[Row]:
    """Answers with what somebody said of them in words; of an edit it is the original that is criticised."""
    for row in rows:
        if "critique" in forms_of(row.values):
            criticised = row.values["completion" if "completion" in row.values else "original"]
            yield _answer(row, criticised, critique=row.values["critique"])


# family of algorithms -> (what it reads, how rows become that).
CONVERSIONS: dict[str, tuple[str, Callable[[Sequence[Row]], Iterator[Row]]]] = {
    "dpo": ("pairs", pairs), "reward_model": ("pairs", pairs), "kto": ("liked and disliked answers", likes),
    "sft": ("answers", answers), "distillation": ("critiques", critiques),
}  # fmt: skip


def _kept(row: Row) -> Values:
    return {name: value for name, value in row.values.items() if name not in _SAID}


def _pair(row: Row, chosen: Any, rejected: Any, said: Values | None = None) -> Row:
    return Row(row.where, {**_kept(row), "chosen": chosen, "rejected": rejected, **(said or {})})


def _answer(row: Row, completion: Any, **said: Any) -> Row:
    return Row(row.where, {**_kept(row), "completion": completion, **said})


def _ordered(row: Row) -> list[tuple[Any, float]]:
    """(completion, height) from the best to the worst, without those that have no rank."""
    completions, values = row.values["completions"], row.values
    numbers = values["ranks"] if values.get("ranks") is not None else values.get("scores")
    if not isinstance(numbers, list) or not isinstance(completions, list) or len(numbers) != len(completions):
        raise UserError(f"{row.where}: completions and their ranks or scores must be lists of one length, got "
                        f"{shown(completions)} and {shown(numbers)}")  # fmt: skip
    sign = -1.0 if values.get("ranks") is not None else 1.0
    found = [(text, sign * _number(row, number)) for text, number in zip(completions, numbers, strict=True)
             if number is not None]  # fmt: skip
    if not found:
        raise UserError(f"{row.where}: none of the completions has a rank or a score")
    return sorted(found, key=lambda pair: -pair[1])


def _rating(row: Row) -> float:
    """The rating, or the mean of those by criterion."""
    values = row.values
    numbers = [values["rating"]] if "rating" in values else list(dict(values["ratings"]).values())
    if not numbers:
        raise UserError(f"{row.where}: ratings are empty")
    return sum(_number(row, number) for number in numbers) / len(numbers)


def _number(row: Row, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{row.where}: a rating, rank or score must be a number, got {shown(value)}") from None


def _likes(row: Row) -> bool:
    label = row.values["label"]
    if label not in (True, False, 0, 1):
        raise UserError(f"{row.where}: label must be true or false, got {shown(label)}")
    return bool(label)


def _by_prompt(rows: Iterable[Row], form: str) -> list[list[Row]]:
    """The rows of a form that ask the same, and that one annotator judged."""
    groups: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in rows:
        if form in forms_of(row.values):
            groups[prompt_key(row), row.values.get("annotator")].append(row)
    return list(groups.values())


def _unified(rows: list[Row]) -> list[Row]:
    """Rows with the same columns: one without a preference is sure where another has one; a margin must be in all; what
    only some rows have besides is null in the others."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    some = "preference" in names
    if some or any("margin" not in row.values for row in rows):
        names.pop("margin", None)
    default = {"preference": 1.0}
    return [Row(row.where, {name: row.values.get(name, default.get(name)) for name in names}) for row in rows]
