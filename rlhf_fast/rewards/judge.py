"""A language model as the judge: ratings and comparisons of answers, as a reward and as labels of pairs.

score    the expected rating, sum_i i P(i), over the numbers of the scale (d-RLAIF of Lee et al. 2023, 2309.00267;
         scaled to [-1, 1] as a reward, which rests on memory of that paper)
compare  P(the first is better), from the probabilities of two labels. A model prefers a place as well as an answer, so
         both orders are asked and averaged; how often they contradict each other is reported.

One principle of a list is drawn for each comparison, as in Constitutional AI (Bai et al. 2022, 2212.08073), by a hash
of what is judged: the same question is asked again after a resume, and its answer is in the cache.
"""

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import check_column
from rlhf_fast.rewards.speakers import Question, Speaker

Columns = dict[str, list[Any]]

SCORE = """Question:
{prompt}

Answer:
{completion}

Rate the answer from {low} to {high}, {high} being the best. {criterion}{principle}{instruction}"""
COMPARE = """Question:
{prompt}

Answer {a}:
{first}

Answer {b}:
{second}

{debate}Which answer is better? {criterion}{principle}{instruction}"""
ARGUE = """Question:
{prompt}

Answer {a}:
{first}

Answer {b}:
{second}

{debate}Argue in a few sentences that answer {side} is the better one."""
OURS = (
    "prompt",
    "completion",
    "first",
    "second",
    "a",
    "b",
    "low",
    "high",
    "criterion",
    "principle",
    "instruction",
    "debate",
)


class Comparison(NamedTuple):
    """probability: (N,) fp64, that the first is better; NaN where no verdict could be read. principles: those drawn."""

    probability: Tensor
    principles: list[str | None]


@dataclass
class Judge:
    """Judges answers by asking `speaker`.

    form: score or compare. scale: the lowest and the highest rating. labels: what stands for the first and the second
    answer. template: the question, with fields {prompt}, {completion} or {first} and {second}, and any column, also one
    that the policy does not see; None: SCORE or COMPARE. ending: what stands before the verdict.
    criteria: each is asked by itself. thought_tokens: tokens to think aloud before the verdict. clamp: probabilities
    are kept in [clamp, 1 - clamp] (Constitutional AI's 40 to 60 per cent for verdicts after thinking, from memory).
    debate: how many turns two advocates argue, one for each answer, before the judge reads them and compares.
    against: the column of the answer that a completion is compared with; None: the other completions of its prompt.
    """

    speaker: Speaker
    form: str = "score"
    scale: tuple[int, int] = (1, 10)
    labels: tuple[str, str] = ("1", "2")
    template: str | None = None
    ending: str | None = None
    principles: Sequence[str] = ()
    criteria: Sequence[str] = ()
    thought_tokens: int = 0
    clamp: float = 0.0
    debate: int = 0
    argument_tokens: int = 96
    against: str | None = None
    seed: int = 0
    name: str = "judge"
    asked: int = field(default=0, init=False)
    unreadable: int = field(default=0, init=False)
    compared: int = field(default=0, init=False)
    inconsistent: int = field(default=0, init=False)
    answered: bool = field(default=False, init=False)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """UserError where the template, or `against`, asks for what a row does not have."""
        wanted = [name for _, name, _, _ in string.Formatter().parse(self._template) if name is not None]
        wanted += [self.against] if self.against is not None else []
        for name in wanted:
            if name not in OURS:
                check_column("judge asks for", name, rows)

    def rewards(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> Tensor:
        """(N,) fp32 in [-1, 1]: the expected rating, or twice the mean probability to win less 1.

        A verdict that cannot be read counts as the middle, 0, and so does a completion that has nothing to be compared
        with; `metrics` tells how many could not be read.
        """
        if self.form == "score":
            low, high = self.scale
            scaled = 2 * (self.scores(prompts, completions, columns) - low) / (high - low) - 1
            return scaled.nan_to_num(0.0).mean(1).float()
        rivals = _rivals(prompts) if self.against is None else [(i, None) for i in range(len(prompts))]
        if not rivals:
            return torch.zeros(len(prompts))
        firsts = [completions[i] for i, _ in rivals]
        seconds = [columns[self.against][i] if j is None else completions[j] for i, j in rivals]  # type: ignore[index]
        won = self.compare([prompts[i] for i, _ in rivals], firsts, seconds, _rows(columns, [i for i, _ in rivals]))
        share, games = torch.zeros(len(prompts), dtype=torch.float64), torch.zeros(len(prompts))
        for (i, j), p in zip(rivals, won.probability.nan_to_num(0.5).tolist(), strict=True):
            for index, points in ((i, p), (j, 1 - p)):
                if index is not None:
                    share[index] += points
                    games[index] += 1
        return torch.where(games > 0, 2 * share / games.clamp(min=1) - 1, 0.0).float()

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> Tensor:
        """(N, C) fp64: the expected rating on the scale by each criterion (one column where there are none); NaN where
        no verdict could be read."""
        low, high = self.scale
        labels = [str(number) for number in range(low, high + 1)]
        found = []
        for criterion in self.criteria or [""]:
            fields = [
                {**row, "prompt": prompt, "completion": completion, "criterion": criterion,
                 "principle": self._drawn(prompt, completion)}
                for prompt, completion, row in zip(prompts, completions, _each(columns, len(prompts)), strict=True)
            ]  # fmt: skip
            probabilities = self._verdicts(fields, labels)
            found.append(probabilities @ torch.arange(low, high + 1, dtype=torch.float64))
        return torch.stack(found, dim=1)

    def compare(
        self, prompts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str], columns: Columns
    ) -> Comparison:
        """The mean over both orders, and over the criteria where there are several."""
        rows = _each(columns, len(prompts))
        drawn = [self._drawn(*texts) for texts in zip(prompts, firsts, seconds, strict=True)]
        found = []
        for criterion in self.criteria or [""]:
            straight, swapped = (
                [{**row, "prompt": p, "first": a, "second": b, "criterion": criterion, "principle": principle}
                 for p, a, b, row, principle in zip(prompts, one, two, rows, drawn, strict=True)]
                for one, two in ((firsts, seconds), (seconds, firsts))
            )  # fmt: skip
            first, second = self._verdicts(self._argued([*straight, *swapped]), self.labels)[:, 0].chunk(2)
            orders = torch.stack([first, 1 - second])
            self.compared += int(orders.isfinite().all(0).sum())
            self.inconsistent += int(((orders[0] - 0.5) * (orders[1] - 0.5) < 0).sum())
            found.append(orders.nanmean(0))
        probability = torch.stack(found).nanmean(0)
        return Comparison(probability.clamp(self.clamp, 1 - self.clamp), drawn)

    def metrics(self) -> dict[str, float]:
        """Since the last call: the shares of verdicts that could not be read, and of comparisons whose two orders
        contradict each other; and the requests that this run sent so far."""
        found = {"judge_unreadable": self.unreadable / max(1, self.asked), "judge_calls": float(self.speaker.calls)}
        if self.form == "compare":
            found["judge_inconsistent"] = self.inconsistent / max(1, self.compared)
        self.asked = self.unreadable = self.compared = self.inconsistent = 0
        return found

    @property
    def _template(self) -> str:
        return self.template or {"score": SCORE, "compare": COMPARE}[self.form]

    @property
    def _ending(self) -> str:
        return self.ending or {"score": "Rating:", "compare": "Better answer:"}[self.form]

    def _verdicts(self, fields: Sequence[dict[str, Any]], labels: Sequence[str]) -> Tensor:
        """(N, L); UserError where the speaker has never given a verdict that could be read."""
        questions = [Question(self._filled(self._template, row), self._ending) for row in fields]
        found = self.speaker.verdicts(questions, labels, self.thought_tokens)
        bad = found.isnan().any(1)
        self.asked, self.unreadable = self.asked + len(bad), self.unreadable + int(bad.sum())
        self.answered = self.answered or not bool(bad.all())
        if not self.answered:
            raise UserError(f"{self.name} gave no verdict of {', '.join(labels)} to any of {len(bad)} questions; "
                            "say in judge.prompt what it must answer")  # fmt: skip
        return found

    def _argued(self, fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the transcript of the debate; each answer's advocate speaks `debate` times, in turns."""
        for turn in range(2 * self.debate):
            side = self.labels[turn % 2]
            said = self.speaker.write([self._filled(ARGUE, {**row, "side": side}) for row in fields],
                                      self.argument_tokens)  # fmt: skip
            fields = [
                {**row, "debate": f"{row.get('debate') or ''}For answer {side}: {words}\n\n"}
                for row, words in zip(fields, said, strict=True)
            ]
        return fields

    def _filled(self, template: str, row: dict[str, Any]) -> str:
        (low, high), (a, b) = self.scale, self.labels
        wanted = f"a number from {low} to {high}" if self.form == "score" else f"{a} or {b}"
        last = f"write '{self._ending}' and then {wanted}." if self.thought_tokens else f"answer with {wanted} alone."
        given = {"a": a, "b": b, "low": low, "high": high, "debate": "", **{k: transcript(v) for k, v in row.items()}}
        for name, opening in (("criterion", "Look at this alone"), ("principle", "Go by this principle")):
            given[name] = f"{opening}: {row[name]}. ".replace("..", ".") if row.get(name) else ""
        given["instruction"] = f"Think step by step, then {last}" if self.thought_tokens else last.capitalize()
        return template.format_map(given)

    def _drawn(self, *content: Any) -> str | None:
        """One of the principles, by a hash of the seed and what is judged."""
        if not self.principles:
            return None
        digest = hashlib.sha256("\0".join(map(transcript, (self.seed, *content))).encode()).digest()
        return self.principles[int.from_bytes(digest[:8], "big") % len(self.principles)]


def transcript(value: Any) -> str:
    """A value of a row as a judge reads it: messages line by line, nothing for null."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in value)
    return "" if value is None else str(value)


def _rivals(prompts: Sequence[Any]) -> list[tuple[int, int | None]]:
    """All pairs of completions with the same prompt."""
    asked = [transcript(prompt) for prompt in prompts]
    return [(i, j) for i in range(len(asked)) for j in range(i + 1, len(asked)) if asked[i] == asked[j]]


def _each(columns: Columns, size: int) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in columns.items()} for i in range(size)]


def _rows(columns: Columns, indices: Sequence[int]) -> Columns:
    return {name: [values[i] for i in indices] for name, values in columns.items()}
