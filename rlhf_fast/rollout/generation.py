"""Sampling with transformers' own `generate`: for models whose rows cannot have slots, and to compare with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlhf_fast import signals
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.rows import Row, give, told


class _Sampler(LogitsProcessor):
    """Draws each token once, gives it to its row, and leaves it as the only one for all roles."""

    def __init__(self, drawing: Drawing, rows: Sequence[Row], tokens: int, stops: frozenset[int],
                 ended: Callable[[Row], None], device: torch.device, in_step: bool) -> None:  # fmt: skip
        self.in_step = in_step
        self.drawing, self.tokens, self.stops, self.ended = drawing, tokens, stops, ended
        self.rows: list[Row | None] = list(rows)
        self.numbers = torch.tensor([row.number for row in rows], device=device)
        self.steps = torch.tensor([row.first for row in rows], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        signals.heed()
        samples = self.drawing.draw(scores, self.numbers, self.steps)
        self.steps += 1
        for place in give(self.rows, told(samples), self.stops):
            row, self.rows[place] = self.rows[place], None
            assert row is not None
            self.ended(row)
        # Where generation looks a step ahead before it stops, that has no rows.
        self.rows = [None if row is None or len(row.tokens) == self.tokens else row for row in self.rows]
        drawn = samples.ids[:, None].repeat(len(self.drawing.roles), 1)
        if self.in_step and signals.caught():  # all completions end, and the program behind them
            drawn.fill_(min(self.stops))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@torch.no_grad()
def generate(
    backbone: Backbone,
    drawing: Drawing,
    rows: Sequence[Row],
    tokens: int,
    *,
    stops: Sequence[int],
    pad: int,
    ended: Callable[[Row], None] = lambda row: None,
    in_step: bool = False,
) -> None:
    """Sample until all rows have ended or have `tokens` more, those of all ranks where they go in step. ended: is told
    of each row that has ended, while others go on."""
    model, device = backbone.model, backbone.model.device
    width, copies = max(len(row.ids) for row in rows), len(drawing.roles)
    tokens = min(tokens, max(row.left for row in rows))
    ids = torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    # What is drawn is left as the only token, which is then the greatest.
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=pad, eos_token_id=[*stops])
    sampler = _Sampler(drawing, rows, tokens, frozenset(stops), ended, device, in_step)
    hooks: dict[str, Any] = {"synced_gpus": True} if in_step else {}
    with backbone.using(*drawing.roles), without_settings_of_the_checkpoint(model):
        model.generate(
            input_ids=ids.repeat(copies, 1), attention_mask=mask.repeat(copies, 1), generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]), **hooks,
        )  # fmt: skip


@contextmanager
def without_settings_of_the_checkpoint(model: PreTrainedModel) -> Iterator[None]:
    """`generate` takes each field that its caller leaves open from the model's generation_config: here an empty one."""
    of_checkpoint, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = of_checkpoint
