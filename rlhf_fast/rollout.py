"""Sampling completions with transformers' own generation, from the weights that train."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_fast.data.batches import Batch, pad_batch
from rlhf_fast.data.encoding import Example, Prompt, pad_id
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled completions.

    batch: right-padded (B, T); its mask marks the completion tokens, EOS included.
    completions: text without special tokens. finished: (B,) bool, True where EOS was sampled.
    """

    prompts: list[Prompt]
    batch: Batch
    completions: list[str]
    finished: Tensor

    def columns(self) -> dict[str, list[object]]:
        """The data's columns other than `prompt`, one list per column."""
        names = [name for name in self.prompts[0].columns if name != "prompt"]
        return {name: [p.columns.get(name) for p in self.prompts] for name in names}


def stop_ids(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and whatever else the model's generation config stops at."""
    config = backbone.model.generation_config
    declared = config.eos_token_id if config is not None and config.eos_token_id is not None else []
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


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
) -> Rollout:
    """One completion of at most max_new_tokens tokens (at least one) for each prompt, by the role 'policy'.

    Uses torch's global random state. rows_per_pass bounds the memory of the key-value cache. The prompts are padded
    on the left for generation and the result on the right, so nothing downstream needs to know about the left.
    """
    stops = stop_ids(backbone, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p,
        pad_token_id=pad_id(tokenizer), eos_token_id=stops,
    )  # fmt: skip
    size = rows_per_pass or len(prompts)
    completions: list[list[int]] = []
    for i in range(0, len(prompts), size):
        completions += _generate(backbone, prompts[i : i + size], settings, stops)
    examples = [Example(p.ids + c, len(p.ids)) for p, c in zip(prompts, completions, strict=True)]
    device = next(backbone.model.parameters()).device
    return Rollout(
        prompts=list(prompts),
        batch=pad_batch(examples, pad_id(tokenizer)).to(device),
        completions=tokenizer.batch_decode(completions, skip_special_tokens=True),
        finished=torch.tensor([c[-1] in stops for c in completions]),
    )


def _before_head(head: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The prompts' last hidden states are a strided slice, for which a CPU product copies the head once per row.

    Sampling from NaN would end in an error of torch's own and, on a GPU, take the process's device with it.
    """
    if not inputs[0].isfinite().all():
        raise UserError("the policy's hidden states are not finite: a lower learning_rate, or a model without NaN")
    return (inputs[0].contiguous(),)


def _generate(
    backbone: Backbone, prompts: Sequence[Prompt], settings: GenerationConfig, stops: Sequence[int]
) -> list[list[int]]:
    """Completion ids, cut after the first stop token."""
    device = next(backbone.model.parameters()).device
    width = max(len(p.ids) for p in prompts)
    pad = settings.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    hook = backbone.model.get_output_embeddings().register_forward_pre_hook(_before_head)
    try:
        with backbone.using("policy"):
            tokens = backbone.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    finally:
        hook.remove()
    completions = tokens[:, width:].tolist()
    ends = [next((t + 1 for t, token in enumerate(c) if token in stops), len(c)) for c in completions]
    return [c[:end] for c, end in zip(completions, ends, strict=True)]
