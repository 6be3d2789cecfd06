"""Sampling completions with transformers' own generation, from the weights that train.

Of the checkpoint's generation_config only the stop ids are used: whatever else it says would sample from another
distribution than the one whose log-probabilities are trained on. `check_sampler` compares the two.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_fast import signals
from rlhf_fast.data.batches import Batch, pad_batch
from rlhf_fast.data.encoding import Example, Prompt, pad_id
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import embedding_rows
from rlhf_fast.ops.tokens.sample_tokens import sample_tokens

Keep = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True)
class SamplerView:
    """logprobs: (B, T) fp32, the sampler's own of the sampled tokens, nats, at the temperature and before top_k and
    top_p, 0 behind the mask. spread: mean standard deviation of its logits over the vocabulary, at the temperature.
    """

    logprobs: Tensor
    spread: float


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled completions.

    batch: right-padded (B, T); its mask marks the sampled tokens, the one that stopped them included. Behind them, and
    not marked, is what a closed turn has besides, where the roles 'reward' and 'cost' read their scores.
    completions: text without special tokens. finished: (B,) bool, True where a stop token was sampled.
    sampler: what the sampler drew from; None where it was not asked for.
    """

    prompts: list[Prompt]
    batch: Batch
    completions: list[str]
    finished: Tensor
    sampler: SamplerView | None = None

    def columns(self) -> dict[str, list[object]]:
        """The data's columns other than `prompt`, one list per column; None where a row lacks it."""
        names = [name for name in dict.fromkeys(chain(*(p.columns for p in self.prompts))) if name != "prompt"]
        return {name: [p.columns.get(name) for p in self.prompts] for name in names}

    def completion_ids(self) -> list[list[int]]:
        """The sampled tokens of each row, the one that stopped it included."""
        ids, mask = self.batch.input_ids.cpu(), self.batch.mask.bool().cpu()
        return [row[sampled].tolist() for row, sampled in zip(ids, mask, strict=True)]


def stop_ids(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt] = ()) -> list[int]:
    """The token that ends a turn of the prompts' chat template, the tokenizer's EOS, and whatever else the model's
    generation config stops at."""
    config = backbone.model.generation_config
    declared = config.eos_token_id if config is not None and config.eos_token_id is not None else []
    declared = declared if isinstance(declared, list) else [declared]
    turns = {prompt.turn_end.stop for prompt in prompts if prompt.turn_end is not None}
    return sorted({tokenizer.eos_token_id, *declared, *turns})


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
    keep: "Keep" = lambda what, make: make(),
    keep_logprobs: bool = False,
    on_finished: Callable[[int, str, list[int]], None] | None = None,
    mixture: float = 0.0,
    role: str | None = "policy",
    drawing: "Drawing | None" = None,
    row_ids: Sequence[int] | None = None,
) -> Rollout:
    """One completion of at most max_new_tokens tokens (at least one) for each prompt, by `role` (None: the base model).

    mixture: the weight of the reference: tokens are drawn from softmax((1 - mixture) log policy + mixture log
    reference), both at a cost of their own; 1 is the reference alone. drawing: what draws the tokens instead.

    A number from torch's global random state, the row and the place of a token decide how that is drawn: not what other
    rows there are. row_ids: the numbers of the prompts among all that are sampled, where these are a part; default:
    from 0. rows_per_pass bounds the memory of the key-value cache. The prompts are padded on the left for generation
    and the result on the right, so nothing downstream needs to know about the left.
    chunk: after so many tokens the completions that have ended leave the pass, and the others begin with a new cache.
    keep: is given a name and what makes a chunk, as tensors on the CPU, and gives what that gives, or gave before.
    keep_logprobs: also the sampler's log-probabilities. on_finished: called with a row, its completion and the ids of
    that as soon as it has ended, while others go on.
    """
    stops = stop_ids(backbone, tokenizer, prompts)
    pad = pad_id(tokenizer, embedding_rows(backbone.model))
    # What is drawn is left as the only token, which is then the greatest.
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=stops)
    size = rows_per_pass or len(prompts)
    numbers = torch.arange(len(prompts)) if row_ids is None else torch.tensor(row_ids)
    seed = int(torch.randint(1 << 62, ()))
    if drawing is None:
        sampling = "reference" if mixture == 1 else _role(backbone, role)
        drawing = (
            Mixing(mixture, temperature, top_k, top_p) if 0 < mixture < 1
            else Drawing([sampling], temperature, top_k, top_p)
        )  # fmt: skip
    draws = drawing
    completions: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[Tensor]] = [[] for _ in prompts]
    spreads: list[Tensor] = []

    def sampled(rows: list[int], first: int, tokens: int) -> dict[str, Tensor]:
        """Up to so many further tokens of some rows, (B, N), of which the first is their token number `first`, with
        their log-probabilities where these are kept."""
        settings.max_new_tokens = tokens
        ids = [[*prompts[row].ids, *completions[row]] for row in rows]
        recorder = Recorder(temperature) if keep_logprobs else None
        told = None if on_finished is None else _Watch(tokenizer, prompts, completions, rows, stops, on_finished)
        draws.begin(seed, numbers[rows].to(_device(backbone)), recorder, step=first)
        made = _generate(backbone, ids, settings, draws, told)[:, max(map(len, ids)) :]
        return {"tokens": made.cpu()} | ({} if recorder is None else recorder.finish(made))

    with backbone.sampling() as in_step:
        starts = range(0, len(prompts), size)
        idle = backbone.idle_passes(len(starts)) if in_step else 0
        most = max_new_tokens if in_step or chunk is None else chunk  # others would have to know how many chunks it was
        for start in starts:
            rows, first = list(range(start, min(start + size, len(prompts)))), 0
            name = hashlib.sha256(repr([prompts[row].ids for row in rows]).encode()).hexdigest()
            while rows and first < max_new_tokens:
                made = keep(f"tokens {name}", partial(sampled, rows, first, min(max_new_tokens - first, most)))
                for row, tokens in zip(rows, made["tokens"].tolist(), strict=True):
                    completions[row] += _cut(tokens, stops)
                if keep_logprobs:
                    spreads.append(made["spreads"])
                    for row, values in zip(rows, made["logprobs"], strict=True):
                        logprobs[row].append(values)
                first += made["tokens"].shape[1]
                rows = [row for row in rows if completions[row][-1] not in stops]
        for _ in range(idle):
            drawing.begin(seed, numbers[:1].to(_device(backbone)))
            _generate(backbone, [prompts[0].ids], settings, drawing)
    scored = not {"reward", "cost"}.isdisjoint(backbone.heads)
    examples = [_example(p, c, closed=scored) for p, c in zip(prompts, completions, strict=True)]
    batch = pad_batch(examples, pad).to(_device(backbone))
    sampler = None
    if keep_logprobs:
        rows_logprobs = [torch.cat(values) for values in logprobs]
        sampler = SamplerView(_placed(rows_logprobs, batch), float(torch.cat(spreads).mean()))
    return Rollout(
        prompts=list(prompts),
        batch=batch,
        completions=[_text(tokenizer, p, c, stops) for p, c in zip(prompts, completions, strict=True)],
        finished=torch.tensor([c[-1] in stops for c in completions]),
        sampler=sampler,
    )


@dataclass(frozen=True)
class Agreement:
    """How the sampler's log-probabilities of its own tokens compare with the scored ones.

    sampled, scored: their means, nats per token. gap: the mean absolute difference, of the worst row. bar: what
    rounding may make of it.
    """

    sampled: float
    scored: float
    gap: float
    bar: float

    @property
    def holds(self) -> bool:
        return self.gap <= self.bar  # False for NaN

    def __str__(self) -> str:
        return (
            f"mean log-probability of the sampled tokens: {self.sampled:.4f} nats by the sampler, {self.scored:.4f} "
            f"scored; they differ by {self.gap:.2g} in the worst row, rounding explains {self.bar:.2g}"
        )


@torch.no_grad()
def check_sampler(
    backbone: Backbone, prompts: Sequence[Sequence[int]], *, pad: int, temperature: float = 1.0, new_tokens: int = 8
) -> Agreement:
    """Samples `new_tokens` from prompts of different lengths, padded on the left and with a cache, as rollouts do, and
    scores them padded on the right and without one.

    prompts: token ids; the first half of each is a row as well, so that there is padding. The role is 'policy'.
    Uses torch's global random state. The sampler's side is what it drew from, after every processor.
    """
    rows = [list(ids) for prompt in prompts for ids in (prompt, prompt[: (len(prompt) + 1) // 2])]
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, pad_token_id=pad,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    try:
        output = _generate(backbone, rows, settings)
    except UserError:
        raise
    except Exception as error:  # whatever the code of an architecture may raise
        raise UserError(f"{type(backbone.model).__name__} cannot generate: {first_line(error)}") from error
    scores = torch.stack(output.scores, dim=1)  # (B, N, V)
    tokens = output.sequences[:, -scores.shape[1] :]
    sampled = scores.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    batch = pad_batch([Example(ids + t, len(ids)) for ids, t in zip(rows, tokens.tolist(), strict=True)], pad)
    batch = batch.to(_device(backbone))
    return agreement(backbone, batch, SamplerView(_placed(list(sampled), batch), float(_spread(scores))), temperature)


# Honest models were measured at up to 1.1 of what `_rounding` says (fp32 and bfloat16, 2 to 30 layers).
MARGIN = 3.0


def _rounding(backbone: Backbone, hidden: Tensor) -> float:
    """Relative error of the logits, to a factor: each layer rounds its sum once more, at random. fp32 sums of D
    products round at each of them; half precision sums in fp32 and rounds the result."""
    eps, width = torch.finfo(hidden.dtype).eps, hidden.shape[-1]
    return eps * len(backbone.layer_names) ** 0.5 * (width**0.5 if hidden.dtype == torch.float32 else 1.0)


@torch.no_grad()
def agreement(backbone: Backbone, batch: Batch, sampler: SamplerView, temperature: float) -> Agreement:
    """The sampler's log-probabilities beside those of a scoring pass over `batch`, by the role 'policy'."""
    role = _role(backbone)
    hidden = backbone.hidden(batch.input_ids, batch.attention_mask, [role])[role]
    scored = backbone.logprobs(hidden, batch.input_ids, batch.mask, mask_count=batch.count, temperature=temperature)
    count = batch.mask.sum(1)
    gaps = (sampler.logprobs - scored).abs().sum(1) / count
    mean = float(sampler.logprobs.sum() / count.sum())
    return Agreement(
        sampled=mean,
        scored=float(scored.sum() / count.sum()),
        gap=float(gaps.max()),
        bar=MARGIN * _rounding(backbone, hidden) * max(sampler.spread, -mean),
    )


class Recorder:
    """Log-probabilities of the tokens that are sampled, kept without keeping the logits of every step.

    It is shown the tokens so far and the next logits, before temperature, top_k and top_p; the token that was drawn
    from those is the last one of the next time.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._steps: list[Tensor] = []  # (B, 1) each
        self._last: Tensor | None = None  # (B, V), of the step whose token is not known yet
        self._spreads: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> None:
        if self._last is not None:
            self._steps.append(self._last.gather(1, input_ids[:, -1:]))
        logits = scores.float() / self.temperature
        self._spreads.append(_spread(logits))
        self._last = logits.log_softmax(1)

    def finish(self, tokens: Tensor) -> dict[str, Tensor]:
        """The pass is over; it gave the tokens (B, N). logprobs: (B, N). spreads: of each step's logits. On the CPU."""
        assert self._last is not None, "it was shown logits"
        self._steps.append(self._last.gather(1, tokens[:, -1:]))
        # Where generation looks a step ahead before it stops, there is one step more than it returns.
        logprobs = torch.cat(self._steps[: tokens.shape[1]], dim=1)
        return {"logprobs": logprobs.cpu(), "spreads": torch.stack(self._spreads).cpu()}


class _Heed(StoppingCriteria):
    """Ends the program between two tokens where a signal asks for it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        signals.heed()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Watch(StoppingCriteria):
    """Stops nothing; tells of each row when it has sampled a stop token."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        before: Sequence[list[int]],
        rows: Sequence[int],
        stops: Sequence[int],
        tell: Callable[[int, str, list[int]], None],
    ) -> None:
        """rows: the numbers of the prompts that are sampled, behind the tokens that they have from `before`."""
        self.tokenizer, self.prompts, self.before, self.rows = tokenizer, prompts, before, rows
        self.stops, self.tell = stops, tell
        self.open = set(range(len(rows)))
        self.width = max(len(prompts[row].ids) + len(before[row]) for row in rows)

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        for row in sorted(row for row in self.open if last[row] in self.stops):
            self.open.remove(row)
            number = self.rows[row]
            completion = self.before[number] + input_ids[row, self.width :].tolist()
            text = _text(self.tokenizer, self.prompts[number], completion, self.stops)
            self.tell(number, text, completion)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Drawing(LogitsProcessor):
    """Draws the next tokens from what one role, or several, say of them, each for an equal share of the rows.

    Each token is drawn here, once, and left as the only one for all of its rows.
    """

    def __init__(self, roles: Sequence[str | None], temperature: float, top_k: int, top_p: float) -> None:
        self.roles = list(roles)
        self.rule: dict[str, Any] = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}
        self.recorder: Recorder | None = None
        self.seed, self.row_ids, self.step = 0, torch.empty(0), 0

    def begin(self, seed: int, row_ids: Tensor, recorder: "Recorder | None" = None, *, step: int = 0) -> None:
        """A pass over the rows of these numbers, (B,), begins, with their token number `step`. recorder: is shown what
        one role alone says."""
        self.seed, self.row_ids, self.step, self.recorder = seed, row_ids, step, recorder

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """(B, V), what tokens are drawn from, before temperature, top_k and top_p; logits: fp32, of each role."""
        return logits[0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.recorder is not None:
            self.recorder(input_ids, scores)
        mixed = self.combined(scores.float().chunk(len(self.roles)))
        drawn = sample_tokens(mixed, seed=self.seed, row_ids=self.row_ids, step=self.step, **self.rule).ids[:, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.repeat(len(self.roles), 1), 0.0)


class Mixing(Drawing):
    """The geometric mixture of policy and reference."""

    def __init__(self, mixture: float, temperature: float, top_k: int, top_p: float) -> None:
        super().__init__(["policy", "reference"], temperature, top_k, top_p)
        self.mixture = mixture

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        first, second = (part.log_softmax(-1) for part in logits)
        return torch.lerp(first, second, self.mixture)


def _spread(logits: Tensor) -> Tensor:
    """(..., V) -> (): mean standard deviation over the vocabulary, less the entries that a model masks out."""
    open_entries = logits.where(logits > torch.finfo(torch.float16).min, torch.nan)
    return (open_entries - open_entries.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt().mean()


def _placed(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    """(B, T): each row's values at the places that the batch's mask marks."""
    placed = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for row, values, mask in zip(placed, rows, batch.mask.bool(), strict=True):
        row[mask] = values[: int(mask.sum())].to(placed.device)
    return placed


def _cut(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """The tokens up to the first stop token, which belongs to them."""
    end = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def _role(backbone: Backbone, role: str | None = "policy") -> str | None:
    """Who samples: the role, or the base model where it has no adapter."""
    return role if role in backbone.adapters else None


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.model.parameters()).device


def _example(prompt: Prompt, completion: list[int], *, closed: bool) -> Example:
    """The sampled tokens are learnt; `closed` puts what their turn lacks behind them."""
    missing = prompt.turn_end.missing(completion) if closed and prompt.turn_end is not None else []
    mask = [0] * len(prompt.ids) + [1] * len(completion) + [0] * len(missing)
    return Example([*prompt.ids, *completion, *missing], len(prompt.ids), mask)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: list[int], stops: Sequence[int]) -> str:
    """The completion as text that continues the prompt: a SentencePiece tokenizer drops the first space of a text."""
    written = completion[:-1] if completion[-1] in stops else completion
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt.ids, prompt.ids + written)
    )
    return (
        whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(written, skip_special_tokens=True))
    )


def token_that_ends(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: list[int], written: str) -> int:
    """The number of the sampled token with which the text of the completion's tokens first begins with `written`; the
    last one's where none does."""

    def complete(token: int) -> bool:
        return _text(tokenizer, prompt, completion[: token + 1], ()).startswith(written)

    return min(bisect_left(range(len(completion)), True, key=complete), len(completion) - 1)


def _before_head(head: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The prompts' last hidden states are a strided slice, for which a CPU product copies the head once per row.

    Sampling from NaN would end in an error of torch's own and, on a GPU, take the process's device with it.
    """
    if not inputs[0].isfinite().all():
        raise UserError("the policy's hidden states are not finite: a lower learning_rate, or a model without NaN")
    return (inputs[0].contiguous(),)


@contextmanager
def _without_settings_of_the_checkpoint(model: PreTrainedModel) -> Iterator[None]:
    """`generate` takes each field that its caller leaves open from the model's generation_config: here an empty one."""
    of_checkpoint, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = of_checkpoint


def _generate(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    drawing: "Drawing | None" = None,
    watch: StoppingCriteria | None = None,
) -> Any:
    """What `generate` returns: the ids (B, W + N), prompts padded on the left to W, or with the settings' outputs.

    drawing: what draws the tokens, from its roles; default: `generate` itself, from the policy.
    """
    model, device = backbone.model, _device(backbone)
    width = max(len(ids) for ids in prompts)
    pad = settings.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + [*ids] for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    roles: list[str | None] = [_role(backbone)]
    if drawing is not None:
        roles = drawing.roles
        input_ids, mask = input_ids.repeat(len(roles), 1), mask.repeat(len(roles), 1)
    hooks: dict[str, Any] = {} if drawing is None else {"logits_processor": LogitsProcessorList([drawing])}
    hooks["stopping_criteria"] = StoppingCriteriaList([_Heed(), *([] if watch is None else [watch])])
    hook = model.get_output_embeddings().register_forward_pre_hook(_before_head)
    try:
        with (
            backbone.sampling() as in_step,
            backbone.using(*roles),
            _without_settings_of_the_checkpoint(model),
        ):
            if in_step:
                hooks["synced_gpus"] = True
            output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings, **hooks)
            return output[: len(prompts)] if isinstance(output, Tensor) else output
    finally:
        hook.remove()
