"""One completion for each of many prompts, in chunks that a run can keep."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast import signals
from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Prompt, pad_id
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import embedding_rows
from rlhf_fast.rollout.completions import Rollout, SamplerView, example, placed, policy_of, stop_ids, text_of
from rlhf_fast.rollout.drawing import Drawing, Mixing
from rlhf_fast.rollout.engines import sample_rows, why_not_local
from rlhf_fast.rollout.engines.protocol import Ask, Engine, Rule, sample_all
from rlhf_fast.rollout.rows import Row

Keep = Callable[..., Any]


@torch.no_grad()
def roll_out(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rows_per_pass: int | None = None,
    chunk: int | None = None,
    keep: "Keep" = lambda what, make, **how: make(),
    keep_logprobs: bool = False,
    on_finished: Callable[[int, str, list[int]], None] | None = None,
    mixture: float = 0.0,
    role: str | None = "policy",
    drawing: Drawing | None = None,
    row_ids: Sequence[int] | None = None,
    engine: str | Engine = "local",
) -> Rollout:
    """One completion of at most max_new_tokens tokens (at least one) for each prompt, by `role` (None: the base model).

    mixture: the weight of the reference: tokens are drawn from softmax((1 - mixture) log policy + mixture log
    reference), both at a cost of their own; 1 is the reference alone. drawing: what draws the tokens instead.

    A number from torch's global random state, the row and the place of a token decide how that is drawn: not what other
    rows there are. row_ids: the numbers of the prompts among all that are sampled, where these are a part; default:
    from 0. rows_per_pass: rows that are sampled at a time, which bounds the memory of keys and values.
    chunk: after so many tokens of a row what there is is kept, and the rest goes on with a new cache.
    keep: is given a name and what makes a chunk, as tensors on the CPU, and gives what that gives, or gave before. rows
    is what tells each row of the chunk from others, together whether the processes need each other to make it.
    keep_logprobs: also the sampler's log-probabilities. on_finished: called with a row, its completion and the ids of
    that as soon as it has ended, while others go on. engine: `local`, our loop, where the model's cache allows it, or
    `transformers`, its generate; or another one, which samples by one role alone, in one chunk, all rows at a time.
    """
    stops = stop_ids(backbone, tokenizer, prompts)
    pad = pad_id(tokenizer, embedding_rows(backbone.model))
    numbers = list(range(len(prompts))) if row_ids is None else list(row_ids)
    seed = int(torch.randint(1 << 62, ()))
    sampling = policy_of(backbone, "reference" if mixture == 1 else role)
    if not isinstance(engine, str):
        if drawing is not None or 0 < mixture < 1:
            raise UserError(f"{engine.name} samples from one role; a mixture of two, or steering, takes engine: local")
        rule = Rule(max_new_tokens, tuple(stops), seed, temperature, top_k, top_p, keep_logprobs)

        def told(place: int, completion: list[int]) -> None:
            if on_finished is not None and completion[-1] in stops:
                on_finished(place, text_of(tokenizer, prompts[place], completion, stops), completion)

        asked = [Ask(prompt.ids, number) for prompt, number in zip(prompts, numbers, strict=True)]
        with signals.apart() if backbone.shards is None else nullcontext():
            found = sample_all(engine, backbone, sampling, asked, rule, keep=keep, ended=told)
        of_engine = ([one.logprobs for one in found], [one.drawn for one in found], None) if keep_logprobs else None
        return _rollout(backbone, tokenizer, prompts, [one.ids for one in found], stops, of_engine)
    if drawing is None:
        drawing = (
            Mixing(mixture, temperature, top_k, top_p) if 0 < mixture < 1
            else Drawing([sampling], temperature, top_k, top_p)
        )  # fmt: skip
    draws = drawing
    completions: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    drawn: list[list[float]] = [[] for _ in prompts]
    spreads: list[Tensor] = []

    places = {number: place for place, number in enumerate(numbers)}

    def over(completion: list[int]) -> bool:
        return len(completion) == max_new_tokens or (bool(completion) and completion[-1] in stops)

    def ended(row: Row) -> None:
        if on_finished is not None and row.number in places and row.tokens[-1] in stops:
            place, completion = places[row.number], [*completions[places[row.number]], *row.tokens]
            on_finished(place, text_of(tokenizer, prompts[place], completion, stops), completion)

    with backbone.sampling() as in_step, nullcontext() if in_step else signals.apart():
        is_local = engine == "local" and why_not_local(backbone, in_step) is None
        size = len(prompts) if is_local else rows_per_pass or len(prompts)

        def sample(rows: Sequence[Row], tokens: int) -> None:
            draws.begin(seed)
            sample_rows(
                backbone, draws, rows, tokens, stops=stops, pad=pad, slots=rows_per_pass, ended=ended,
                engine="local" if is_local else "transformers", in_step=in_step,
            )  # fmt: skip

        def sampled(places: list[int], tokens: int) -> dict[str, Tensor]:
            """Further tokens of some rows, (B, N), -1 behind those of each, and their log-probabilities."""
            rows = [Row(numbers[place], [*prompts[place].ids, *completions[place]], len(completions[place]),
                        max_new_tokens - len(completions[place])) for place in places]  # fmt: skip
            sample(rows, tokens)
            made = {
                "tokens": _padded([row.tokens for row in rows], -1),
                "logprobs": _padded([row.logprobs for row in rows], 0.0),
                "drawn": _padded([row.drawn for row in rows], 0.0),
            }
            return {**made, "spread": torch.tensor(draws.spread)}

        def idly() -> dict[str, Tensor]:
            sample([Row(-1, [*prompts[0].ids], 0, max_new_tokens)], max_new_tokens)
            return {}

        starts = range(0, len(prompts), size)
        idle = backbone.idle_passes(len(starts)) if in_step else 0
        most = max_new_tokens if in_step or chunk is None else chunk  # others would have to know how many chunks it was
        for start in starts:
            left = list(range(start, min(start + size, len(prompts))))
            while left:  # of the pass, places of those that have not ended
                names = [_name(seed, numbers[place], prompts[place].ids, len(completions[place])) for place in left]
                make = partial(sampled, left, min(most, max_new_tokens))
                made = keep("tokens", make, rows=names, together=in_step)
                spreads.append(made["spread"])
                for place, tokens, *values in zip(left, made["tokens"], made["logprobs"], made["drawn"], strict=True):
                    count = int((tokens >= 0).sum())
                    completions[place] += tokens[:count].tolist()
                    for row, of_row in zip((logprobs[place], drawn[place]), values, strict=True):
                        row += of_row[:count].tolist()
                left = [place for place in left if not over(completions[place])]
                left.sort(key=lambda place: not completions[place])  # those that wait come last
        for _ in range(idle):
            keep("idle tokens", idly, together=True)
    of_sampler = (logprobs, drawn, float(torch.stack(spreads).mean())) if keep_logprobs else None
    return _rollout(backbone, tokenizer, prompts, completions, stops, of_sampler)


def _rollout(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    stops: Sequence[int],
    values: tuple[Sequence[list[float]], Sequence[list[float]], float | None] | None,
) -> Rollout:
    """values: what SamplerView has, by row, where it is kept."""
    scored = not {"reward", "cost"}.isdisjoint(backbone.heads)
    examples = [example(p, c, closed=scored) for p, c in zip(prompts, completions, strict=True)]
    batch = pad_batch(examples, pad_id(tokenizer, embedding_rows(backbone.model))).to(backbone.model.device)
    sampler = None
    if values is not None:
        logprobs, drawn, spread = values
        sampler = SamplerView(placed(logprobs, batch), placed(drawn, batch), spread)
    return Rollout(
        prompts=list(prompts),
        batch=batch,
        completions=[text_of(tokenizer, p, c, stops) for p, c in zip(prompts, completions, strict=True)],
        finished=torch.tensor([c[-1] in stops for c in completions]),
        sampler=sampler,
    )


def _name(*what: object) -> str:
    """Of the tokens of a row, by all that decides them beside the weights."""
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _padded(rows: Sequence[Sequence[float]], filler: float) -> Tensor:
    """(B, N) of the numbers of each row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
