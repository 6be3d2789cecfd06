"""Several answers to one prompt: sampled or given, judged, and written as rows that others learn from."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Example, Prompt
from rlhf_fast.data.layouts import READ
from rlhf_fast.data.reading import shown
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rollout import roll_out
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.engine import engine_of
from rlhf_fast.training.job import Job
from rlhf_fast.training.kept import keep

Row = dict[str, Any]


def kept_columns(columns: Row, answers: Sequence[str] = ()) -> Row:
    """The prompt's columns, less those that hold answers."""
    gone = {*READ, "completions", *answers} - {"prompt"}
    return {name: value for name, value in columns.items() if name not in gone}


def compared_rows(
    job: Job, kind: str, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], keep: Sequence[Row]
) -> list[Row]:
    """What the judge makes of every two answers to a prompt: a pair each, or one ranking by the share of wins."""
    assert job.rewards is not None
    assert job.rewards.judge is not None
    pairs = pairs_of_comparisons(job.rewards.judge, [prompt.columns for prompt in prompts], answers, keep)
    if kind == "pairs":
        return [row for of_prompt in pairs for row in of_prompt]
    shares = zip(answers, pairs, keep, strict=True)
    return [row for texts, won, kept in shares for row in _rows(kind, texts, win_shares(texts, won), [], kept)]


def scored_rows(
    kind: str, answers: Sequence[Sequence[str]], scores: Tensor, criteria: Sequence[str], keep: Sequence[Row]
) -> list[Row]:
    """scores: (N, C), of all answers in a row, a number for each criterion, or one in all where there are none."""
    numbers = iter(scores.tolist())
    return [
        row for texts, kept in zip(answers, keep, strict=True)
        for row in _rows(kind, texts, [next(numbers) for _ in texts], criteria, kept)
    ]  # fmt: skip


def pairs_of_comparisons(
    judge: Judge, columns: Sequence[Row], answers: Sequence[Sequence[str]], keep: Sequence[Row]
) -> list[list[Row]]:
    """For each prompt every two of its answers that differ, the likelier one first, with `preference`, the probability
    that it is the better; those without a verdict are left out.

    columns: what the judge may read of each prompt. keep: what the rows keep of it.
    """
    games = [
        (i, a, b) for i, texts in enumerate(answers) for a, b in combinations(range(len(texts)), 2)
        if texts[a] != texts[b]
    ]  # fmt: skip
    rows: list[list[Row]] = [[] for _ in answers]
    if not games:
        return rows
    asked = [columns[i] for i, _, _ in games]
    names = [name for name in columns[0] if name != "prompt"]
    compared = judge.compare(
        [row["prompt"] for row in asked], [answers[i][a] for i, a, _ in games], [answers[i][b] for i, _, b in games],
        {name: [row.get(name) for row in asked] for name in names},
    )  # fmt: skip
    for (i, a, b), p, principle in zip(games, compared.probability.tolist(), compared.principles, strict=True):
        if math.isnan(p):
            continue
        better, worse = (a, b) if p >= 0.5 else (b, a)
        row = {**keep[i], "chosen": answers[i][better], "rejected": answers[i][worse], "preference": max(p, 1 - p)}
        rows[i].append({**row, "annotator": judge.name} | ({"principle": principle} if principle else {}))
    return rows


def _rows(
    kind: str, texts: Sequence[str], scores: Sequence[Sequence[float]], criteria: Sequence[str], keep: Row
) -> list[Row]:
    """The answers to one prompt with their scores, one number for each criterion (or one in all), as

    ratings     a row for each answer, with `rating`, or `ratings` by criterion
    best        the best answer alone, for sft
    rankings    one row with `completions` and `scores`, the mean over the criteria
    pairs       the best over the worst with the `gap` between them, nothing where all are as good; no loss looks at it
                unless `columns: {margin: gap}` makes it a margin
    An answer whose score is NaN, without a verdict, is left out.
    """
    read = [(text, numbers) for text, numbers in zip(texts, scores, strict=True) if not any(map(math.isnan, numbers))]
    if kind == "ratings":
        return [
            {**keep, "completion": text, "ratings": dict(zip(criteria, numbers, strict=True))} if criteria
            else {**keep, "completion": text, "rating": numbers[0]} for text, numbers in read
        ]  # fmt: skip
    means = [(sum(numbers) / len(numbers), text) for text, numbers in read]
    if kind == "best":
        return [{**keep, "completion": max(means, key=_first)[1]}] if means else []
    if len(means) < 2:
        return []
    if kind == "rankings":
        return [{**keep, "completions": [text for _, text in means], "scores": [score for score, _ in means]}]
    (low, worst), (high, best) = min(means, key=_first), max(means, key=_first)
    same = low == high or worst == best
    return [] if same else [{**keep, "chosen": best, "rejected": worst, "gap": high - low}]


def _first(pair: tuple[float, str]) -> float:
    return pair[0]


def win_shares(texts: Sequence[str], pairs: Sequence[Row]) -> list[list[float]]:
    """Of each answer the mean probability to win its comparisons; NaN where it had none."""
    points: dict[str, list[float]] = {text: [] for text in texts}
    for pair in pairs:
        points[pair["chosen"]].append(pair["preference"])
        points[pair["rejected"]].append(1 - pair["preference"])
    return [[sum(points[text]) / len(points[text]) if points[text] else math.nan] for text in texts]


def sampled_answers(job: Job, config: SamplingConfig, prompts: Sequence[Prompt], count: int) -> list[list[str]]:
    """`count` answers to each prompt, by the policy."""
    texts = roll_out(
        job.backbone, job.encoder.tokenizer, [prompt for prompt in prompts for _ in range(count)],
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        rows_per_pass=config.micro_batch_size, chunk=config.rollout_chunk, keep=partial(keep, job),
        engine=engine_of(job, config),
    ).completions  # fmt: skip
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def given_answers(prompts: Sequence[Prompt], names: Sequence[str]) -> list[list[str]]:
    """Those of the columns `names`, each of which holds a text or a list of them."""
    found: list[list[str]] = []
    for prompt in prompts:
        values = [prompt.columns.get(name) for name in names]
        texts: list[Any] = [text for value in values for text in (value if isinstance(value, list) else [value])]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{prompt.where}: answers must be two or more texts, got {shown(texts)}")
        found.append(texts)
    return found


def scores_of(job: Job, config: SamplingConfig, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Tensor:
    """(N, C) fp64 for all answers in a row: the ratings of a judge alone, on its scale by criterion, else rewards."""
    asked = [prompt for prompt, texts in zip(prompts, answers, strict=True) for _ in texts]
    texts = [text for of_prompt in answers for text in of_prompt]
    values = [p.columns["prompt"] for p in asked]
    columns = {name: [p.columns.get(name) for p in asked] for name in asked[0].columns if name != "prompt"}
    assert job.rewards is not None
    if job.rewards.judge is not None and config.judge_alone:
        return job.rewards.judge.scores(values, texts, columns)
    states = _adapter_states(job, config, asked, texts) if job.rewards.adapter is not None else (None, None)
    return job.rewards(values, texts, columns, *states).total.double()[:, None]


@torch.no_grad()
def _adapter_states(
    job: Job, config: SamplingConfig, prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Raw scores of the reward adapter's roles, each at the end of a closed turn, and what the first one's head is
    given."""
    ids = [
        job.encoder.scored(prompt.columns["prompt"], text, prompt.columns.get("tools"))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    size = config.micro_batch_size or len(ids)
    found = []
    for start in range(0, len(ids), size):
        examples = [Example(row, len(row)) for row in ids[start : start + size]]
        batch = pad_batch(examples, job.encoder.pad_id).to(job.device)
        found.append(job.backbone.score(batch.input_ids, batch.attention_mask, batch.mask, mask_count=0, policy=False))
    scores = [part.scores for part in found if part.scores is not None]
    features = [part.features for part in found if part.features is not None]
    return torch.cat(scores) if scores else None, torch.cat(features) if features else None
