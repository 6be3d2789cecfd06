"""The protocol of engines: prompts and a rule go in, completions come out as they end, and every one is counted."""

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone


class Ask(NamedTuple):
    """A completion that is wanted. ids: the prompt's. row: its number among all that are sampled with one seed."""

    ids: Sequence[int]
    row: int


@dataclass(frozen=True)
class Rule:
    """How tokens are sampled. top_k: 0 for all. stops: the tokens that end a completion. seed: with the row's number it
    decides the draws. logprobs: whether the sampler's log-probabilities are needed."""

    max_new_tokens: int
    stops: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logprobs: bool = False

    @property
    def truncates(self) -> bool:
        return self.top_k != 0 or self.top_p < 1


class Sampled(NamedTuple):
    """A completion: its tokens, the one that stopped it included, and the sampler's log-probabilities of them, nats, at
    the temperature; logprobs before top_k and top_p, drawn behind them, NaN where they are not told. Both are empty
    where the rule needs none."""

    ids: list[int]
    logprobs: list[float]
    drawn: list[float]


Coming = Generator[tuple[int, Sampled], None, None]


class Engine(Protocol):
    """What samples. name: as messages say it."""

    name: str

    def sample(self, backbone: Backbone, role: str | None, asked: Sequence[Ask], rule: Rule) -> Coming:
        """(place in `asked`, completion) as they end, by the adapter of `role`; None is the base model.

        Raises UserError where a completion stays out.
        """
        ...


Kept = list[tuple[list[int], list[float], list[float]]]


def sample_all(
    engine: Engine,
    backbone: Backbone,
    role: str | None,
    asked: Sequence[Ask],
    rule: Rule,
    *,
    keep: Callable[[str, Callable[[], Kept]], Kept] = lambda what, make: make(),
    ended: Callable[[int, list[int]], None] | None = None,
) -> list[Sampled]:
    """The completion of each of `asked`. Raises UserError for one that stays out or that breaks the rule.

    keep: is given a name and what makes the completions of one prompt, in the order of the prompts; gives what that
    gives, or gave before: what had come when an engine was lost is not sampled again. ended: is told of each that is
    not kept as it ends.
    """
    found: dict[int, Sampled] = {}
    coming: Coming | None = None
    first = 0  # those before were kept

    def of_prompt(places: list[int]) -> Kept:
        nonlocal coming, first
        if coming is None:
            first = places[0]
            coming = stack.enter_context(closing(engine.sample(backbone, role, asked[first:], rule)))
        while not found.keys() >= set(places):
            place, one = next(coming, (-1, None))
            if one is None:
                raise UserError(f"{engine.name} gave {len(found)} of {len(asked) - first} completions")
            place += first
            fault = fault_of(one, rule, backbone.vocabulary)
            if fault is not None:
                raise UserError(f"{engine.name}, completion {place + 1} of {len(asked)}: {fault}")
            found[place] = one
            if ended is not None:
                ended(place, one.ids)
        return [(one.ids, one.logprobs, one.drawn) for one in map(found.__getitem__, places)]

    sampled: Kept = []
    with ExitStack() as stack:
        for _, group in groupby(range(len(asked)), key=lambda place: asked[place].ids):
            places = list(group)
            name = hashlib.sha256(repr([asked[place] for place in places]).encode()).hexdigest()
            sampled += keep(f"engine {name}", partial(of_prompt, places))
    return [Sampled(*one) for one in sampled]


def fault_of(one: Sampled, rule: Rule, vocabulary: int) -> str | None:
    """Why a completion is not one that the rule gives; None for one that it may give."""
    ids, count = one.ids, len(one.ids)
    if not count:
        return "it has no token"
    strange = next((token for token in ids if not 0 <= token < vocabulary), None)
    if strange is not None:
        return f"token {strange} is none of the model's {vocabulary}"
    end = next((i + 1 for i, token in enumerate(ids) if token in rule.stops), None)
    if end is None and count < rule.max_new_tokens:
        return f"it ends after {count} of {rule.max_new_tokens} tokens without a stop token"
    if (end or 0) not in (0, count) or count > rule.max_new_tokens:
        return f"it has {count} tokens and should have ended after {min(end or count, rule.max_new_tokens)}"
    if rule.logprobs and not len(one.logprobs) == len(one.drawn) == count:
        return f"it has {len(one.logprobs)} log-probabilities for {count} tokens"
    bad = next((value for value in one.logprobs if not (math.isfinite(value) and -1000 < value < 1e-3)), None)
    return None if bad is None else f"{bad} is no log-probability of a token that was sampled"
