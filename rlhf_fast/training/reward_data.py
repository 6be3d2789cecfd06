"""What people said of answers, in every form that a reward model learns from, as rows of tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_fast.data.encoded import Encoded, encode_rows
from rlhf_fast.data.encoding import Encoder, Example, TooLong
from rlhf_fast.data.layouts import JUDGEMENTS
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError
from rlhf_fast.training.pairs import take_apart
from rlhf_fast.training.setup import load_rows, rows_of


@dataclass(frozen=True)
class Judgement:
    """Answers that are learnt from together, and what was said of them.

    form: a name of data/layouts.JUDGEMENTS.
    rows: their tokens, a row for each answer; the mask marks the ends.
    ends: (row, column) of the tokens where scores are read: the last one of each answer, or of each step.
    targets: of pairs (margin, chance that the first answer is the better one); of rankings the rank of each answer, 1
    the best; of ratings a number for each criterion; of likes 1 or 0; of steps a label in [0, 1] for each.
    lengths: tokens of each answer. annotator: who said it.
    """

    form: str
    rows: tuple[Example, ...]
    ends: tuple[tuple[int, int], ...]
    targets: tuple[float, ...]
    lengths: tuple[int, ...]
    annotator: str | None = None

    @property
    def comparisons(self) -> list[tuple[int, int]]:
        """(better, worse) of the answers that were told apart: the first of a pair is the better one."""
        ranks = {"pairs": (1.0, 2.0), "rankings": self.targets}.get(self.form, ())
        return [(i, j) for i, one in enumerate(ranks) for j, other in enumerate(ranks) if one < other]


def marked(length: int, places: Sequence[int]) -> list[int]:
    """1 at the places, 0 elsewhere."""
    return [int(place in places) for place in range(length)]


def places_of(judged: Sequence[Judgement]) -> tuple[list[int], list[int]]:
    """Rows and columns where the scores of a batch are read, which has all rows of `judged` in order, padded on the
    right."""
    rows: list[int] = []
    columns: list[int] = []
    first = 0
    for one in judged:
        rows += [first + row for row, _ in one.ends]
        columns += [column for _, column in one.ends]
        first += len(one.rows)
    return rows, columns


@dataclass(frozen=True)
class JudgementData:
    """references: the answers whose scores have mean 0. outputs: what the scores tell, of ratings the criteria.
    scales: (mean, std) of each criterion's training ratings, whose standardised values are the targets."""

    train: Encoded[Judgement]
    held_out: Encoded[Judgement]
    references: Encoded[Judgement]
    outputs: list[str]
    scales: list[tuple[float, float]]


def load_judged(config: Any, encoder: Encoder) -> JudgementData:
    """The judgements of config.data in the form config.form, and those held out."""
    forms = [form for form in JUDGEMENTS if config.form in ("auto", form)]
    layouts = [names for form in forms for names in JUDGEMENTS[form]]

    def prepare(rows: list[Row]) -> list[Row]:
        skip = config.bad_rows == "skip"
        return take_apart(rows, skip=skip) if form_of(rows[0], forms) == "pairs" else rows

    train_rows, held_out_rows = load_rows(config, layouts, prepare)
    form = form_of(train_rows[0], forms)
    if form != form_of(held_out_rows[0], forms):
        raise UserError(f"{held_out_rows[0].where} has {form_of(held_out_rows[0], forms)}, the training data {form}")
    if config.bound and form not in ("pairs", "rankings"):
        raise UserError(f"bound: true is for pairs and rankings, and {config.data} has {form}")
    criteria = criteria_of(train_rows[0]) if form == "ratings" else []
    read = Reading(config.step_separator, tuple(criteria))
    train = encode_judged(encoder, train_rows, form, read, "data")
    held_out = encode_judged(encoder, held_out_rows, form, read, "held-out data")
    scales: list[tuple[float, float]] = []
    if form == "ratings":
        train, held_out = (weighed(x, criteria, config.criterion_weights) for x in (train, held_out))
        scales = scales_of(train.numbers("ratings", lambda one: one.targets))
        train, held_out = (standardised(x, scales) for x in (train, held_out))
        criteria = ["weighted sum"] if config.criterion_weights else criteria
    references = {"train": train, "held_out": held_out}.get(config.center_on)
    if references is None:
        rows = rows_of(config, config.center_on, [("prompt", "completion")])
        references = encode_rows(encoder, rows, _reference, "center_on")
    return JudgementData(train, held_out, references, criteria or ["reward"], scales)


def form_of(row: Row, forms: Sequence[str]) -> str:
    """The first of `forms` whose columns the row has."""
    return next(form for form in forms if any(set(names) <= row.values.keys() for names in JUDGEMENTS[form]))


def encode_judged(encoder: Encoder, rows: Sequence[Row], form: str, read: "Reading", what: str) -> Encoded[Judgement]:
    """The rows in the form `form`; what was left out or changed is said."""

    def encode(encoder: Encoder, row: Row) -> Judgement:
        who = row.values.get("annotator")
        return replace(READERS[form](encoder, row, read), annotator=None if who is None else str(who))

    return encode_rows(encoder, rows, encode, what)


def weighed(
    judged: Encoded[Judgement], criteria: Sequence[str], weights: Mapping[str, float] | None
) -> Encoded[Judgement]:
    """With the weighted sum of the ratings as the one rating, where there are weights."""
    if weights is None:
        return judged
    if set(weights) != set(criteria):
        raise UserError(f"criterion_weights must have {', '.join(criteria)}, got {', '.join(weights)}")
    order = [weights[name] for name in criteria]
    return judged.map(lambda x: replace(x, targets=(sum(w * y for w, y in zip(order, x.targets, strict=True)),)))


def scales_of(ratings: NDArray[np.float64]) -> list[tuple[float, float]]:
    """(mean, std) of each criterion; UserError for one whose ratings are all the same."""
    columns = torch.from_numpy(ratings)
    if bool((columns.std(0, correction=0) == 0).any()):
        raise UserError(f"a criterion has the same rating in all {len(ratings)} rows: there is nothing to learn")
    return list(zip(columns.mean(0).tolist(), columns.std(0, correction=0).tolist(), strict=True))


def standardised(judged: Encoded[Judgement], scales: Sequence[tuple[float, float]]) -> Encoded[Judgement]:
    def change(x: Judgement) -> Judgement:
        return replace(x, targets=tuple((y - mean) / std for y, (mean, std) in zip(x.targets, scales, strict=True)))

    return judged.map(change)


def targets_of(judged: Sequence[Judgement], like: Tensor) -> Tensor:
    """(len(judged), numbers): the targets of judgements that have as many numbers each, on the device of `like`."""
    return torch.tensor([one.targets for one in judged], device=like.device)


class Reading(NamedTuple):
    """step_separator: what closes every step. criteria: those of `ratings`, in order."""

    step_separator: str
    criteria: tuple[str, ...]


def criteria_of(row: Row) -> list[str]:
    """The criteria of the row's `ratings`; one without a name where there is a `rating`."""
    ratings = row.values.get("ratings")
    if ratings is None:
        return ["rating"]
    if not isinstance(ratings, dict) or not ratings:
        raise UserError(f"{row.where}: ratings must map criteria to numbers, got {shown(ratings)}")
    return list(ratings)


def _answers(form: str, answers: Sequence[Example], targets: Sequence[float]) -> Judgement:
    """Whole answers: a score at the last token of each, behind the end of its turn."""
    ends = [(number, len(answer.ids) - 1) for number, answer in enumerate(answers)]
    lengths = [len(answer.ids) - answer.start for answer in answers]
    rows = [
        replace(answer, mask=marked(len(answer.ids), [end])) for answer, (_, end) in zip(answers, ends, strict=True)
    ]
    return Judgement(form, tuple(rows), tuple(ends), tuple(targets), tuple(lengths))


def _reference(encoder: Encoder, row: Row) -> Judgement:
    return _answers("", [encoder.completion(row)], ())


def _pair(encoder: Encoder, row: Row, reading: Reading) -> Judgement:
    """The likelier one first: a chance below a half turns the pair round."""
    margin = _number(row, "margin", row.values.get("margin"), 0.0)
    chance = _number(row, "preference", row.values.get("preference"), 1.0)
    if not 0 <= chance <= 1:
        raise UserError(f"{row.where}: preference must be in [0, 1], got {chance}")
    answers = encoder.pair(row)
    if chance < 0.5:
        answers, margin, chance = answers[::-1], -margin, 1 - chance
    return _answers("pairs", answers, (margin, chance))


def _ranking(encoder: Encoder, row: Row, reading: Reading) -> Judgement:
    """Those without a rank are left out."""
    answers, column = _list(row, "completions"), "ranks" if "ranks" in row.values else "scores"
    said = [None if x is None else _number(row, column, x) for x in _list(row, column, len(answers))]
    ranked = [number for number, rank in enumerate(said) if rank is not None]
    ranks = [said[number] for number in ranked]
    if column == "scores":
        ranks = [1.0 + sum(other > score for other in ranks) for score in ranks]  # type: ignore[operator]
    if len(set(ranks)) < 2:
        raise UserError(f"{row.where}: {column} {shown(row.values[column])} tell no two answers apart")
    examples = encoder.answers(Row(row.where, {**row.values, "completions": [answers[i] for i in ranked]}))
    return _answers("rankings", examples, ranks)  # type: ignore[arg-type]


def _rating(encoder: Encoder, row: Row, reading: Reading) -> Judgement:
    ratings = row.values.get("ratings", {"rating": row.values.get("rating")})
    if not isinstance(ratings, dict) or set(ratings) != set(reading.criteria):
        raise UserError(f"{row.where}: ratings must have {', '.join(reading.criteria)}, got {shown(ratings)}")
    numbers = [_number(row, name, ratings[name]) for name in reading.criteria]
    return _answers("ratings", [encoder.completion(row)], numbers)


def _like(encoder: Encoder, row: Row, reading: Reading) -> Judgement:
    label = {"true": 1.0, "false": 0.0}.get(str(row.values["label"]).strip().lower(), row.values["label"])
    if (liked := _number(row, "label", label)) not in (0, 1):
        raise UserError(f"{row.where}: label must be true or false, got {shown(label)}")
    return _answers("likes", [encoder.completion(row)], [liked])


def _steps(encoder: Encoder, row: Row, reading: Reading) -> Judgement:
    """A score at the last token of each step; where the budget ends, so do the steps."""
    steps = _list(row, "completions")
    labels = [_number(row, "labels", label) for label in _list(row, "labels", len(steps))]
    if not all(0 <= label <= 1 for label in labels):
        raise UserError(f"{row.where}: labels must be in [0, 1], got {shown(row.values['labels'])}")
    start, ids, ends = encoder.steps(row, reading.step_separator)
    budget = encoder.max_tokens
    if len(ids) > budget and encoder.too_long != "truncate":
        raise TooLong(f"{row.where}: prompt and steps have more tokens than the budget, {budget}")
    whole = [end for end in ends if end < budget]
    if not whole:
        raise TooLong(f"{row.where}: not even the first step ends within {budget} tokens")
    if len(whole) < len(ends):
        encoder.note("longer than the budget: the last steps are left out", row.where)
    ids = ids[: whole[-1] + 1]
    example = Example(ids, start, marked(len(ids), whole))
    places = tuple((0, end) for end in whole)
    return Judgement("steps", (example,), places, tuple(labels[: len(whole)]), (len(ids) - start,))


READERS: dict[str, Callable[[Encoder, Row, Reading], Judgement]] = {
    "pairs": _pair, "rankings": _ranking, "steps": _steps, "ratings": _rating, "likes": _like,
}  # fmt: skip


def _number(row: Row, name: str, value: Any, default: float | None = None) -> float:
    """A finite number, or one as the text that CSV has."""
    if value in (None, "") and default is not None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{row.where}: {name} must be a number, got {shown(value)}")
    return number


def _list(row: Row, name: str, length: int | None = None) -> list[Any]:
    value = row.values[name]
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: {name} must be a list, got {shown(value)}")
    if length is not None and len(value) != length:
        raise UserError(f"{row.where}: {name} has {len(value)} entries for {length} completions")
    return value
