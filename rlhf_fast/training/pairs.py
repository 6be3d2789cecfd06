"""Preference pairs: a prompt with a chosen and a rejected completion, or two conversations that differ in the last."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.layouts import JUDGEMENTS, changed_rows
from rlhf_fast.data.messages import split_pair, trimmed
from rlhf_fast.data.notes import tell
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import Config
from rlhf_fast.training.setup import load_rows


@dataclass(frozen=True)
class Pair:
    """margin: by how much chosen is better. preference: the chance in [0, 1] that it is. None: no such column."""

    chosen: Example
    rejected: Example
    margin: float | None = None
    preference: float | None = None


def load_pair_rows(config: Config) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held-out) rows whose conversations are taken apart into the prompt and two answers."""
    return load_rows(config, JUDGEMENTS["pairs"], partial(take_apart, skip=config.bad_rows == "skip"))


def take_apart(rows: list[Row], *, skip: bool) -> list[Row]:
    """The rows with whole conversations taken apart; pairs of equal answers are counted and said."""
    pairs = changed_rows(rows, split_pair, skip=skip)
    same = [(row, row.where) for row in pairs if _plain(row.values["chosen"]) == _plain(row.values["rejected"])]
    tell("chosen and rejected are the same in {found} of {rows} pairs, first in {first}", same, pairs)
    return pairs


def _plain(answer: Any) -> Any:
    return answer.strip() if isinstance(answer, str) else trimmed(answer)


def encode_pair(encoder: Encoder, row: Row) -> Pair:
    """The pair of a row, with its `margin` and `preference` where it has these columns."""
    margin, preference = (number(row, name) for name in ("margin", "preference"))
    if preference is not None and not 0 <= preference <= 1:
        raise UserError(f"{row.where}: preference must be in [0, 1], got {preference}")
    return Pair(*encoder.pair(row), margin=margin, preference=preference)


def number(row: Row, column: str) -> float | None:
    if column not in row.values:
        return None
    value = row.values[column]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{row.where}: {column} must be a finite number, got {shown(value)}")
    return float(value)
