"""What a rollout gives: prompts with sampled completions, and what tokens, masks and texts are of them."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Batch
from rlhf_fast.data.encoding import Example, Prompt
from rlhf_fast.models.backbone import Backbone


@dataclass(frozen=True)
class SamplerView:
    """logprobs: (B, T) fp32, the sampler's own of the sampled tokens, nats, at the temperature and before top_k and
    top_p, 0 behind the mask. drawn: those under what top_k and top_p left, which the tokens were drawn from. spread:
    mean standard deviation of its logits over the vocabulary, at the temperature. Where an engine does not tell them,
    drawn is NaN and spread None.
    """

    logprobs: Tensor
    drawn: Tensor
    spread: float | None


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


def policy_of(backbone: Backbone, role: str | None = "policy") -> str | None:
    """Who samples: the role, or the base model where it has no adapter."""
    return role if role in backbone.adapters else None


def placed(rows: Sequence[Sequence[float]], batch: Batch) -> Tensor:
    """(B, T) fp32: each row's values at the places that the batch's mask marks."""
    values = torch.zeros(batch.mask.shape)
    mask = batch.mask.bool().cpu()
    values[mask] = torch.tensor([value for row in rows for value in row])
    return values.to(batch.mask.device)


def example(prompt: Prompt, completion: list[int], *, closed: bool) -> Example:
    """The sampled tokens are learnt; `closed` puts what their turn lacks behind them."""
    missing = prompt.turn_end.missing(completion) if closed and prompt.turn_end is not None else []
    mask = [0] * len(prompt.ids) + [1] * len(completion) + [0] * len(missing)
    return Example([*prompt.ids, *completion, *missing], len(prompt.ids), mask)


def text_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: list[int], stops: Sequence[int]) -> str:
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
        return text_of(tokenizer, prompt, completion[: token + 1], ()).startswith(written)

    return min(bisect_left(range(len(completion)), True, key=complete), len(completion) - 1)
