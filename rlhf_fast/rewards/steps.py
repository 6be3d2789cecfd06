"""A process reward model as a source: every step of a completion is paid at its end, or the worst one at the last."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Encoder, Example, load_tokenizer
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.architecture import context_length
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import embedding_rows
from rlhf_fast.models.peft_io import base_of, load_adapter
from rlhf_fast.rewards.adapter import Combination, read_stats

ROLE = "process_reward"


class StepRewardModel:
    """Scores the steps of completions; called like a reward function.

    A step is a piece between separators that has more than white space. It is tokenised by itself, as the model was
    trained, so that the policy's own tokens do not matter, and its score counts as (score - mean) / std of the
    reference answers' steps: a further step of mean quality is paid nothing.
    combination: mean pays every step, as (end in characters, score); min the worst step, as one number (Math-Shepherd,
    Wang et al. 2023, 2312.08935).
    """

    def __init__(
        self, backbone: Backbone, folder: str, combination: Combination, *, chat: bool = False, rows_per_pass: int = 16
    ) -> None:
        if combination.variant not in ("mean", "min"):
            raise UserError(f"reward_combine of the process reward model {folder} is mean or min, "
                            f"got {combination.variant}")  # fmt: skip
        load_adapter(backbone, ROLE, folder, trainable=False)
        if ROLE not in backbone.heads:
            raise UserError(f"reward {folder} is an adapter without a score head, such as a policy's")
        self.backbone, self.worst, self.rows_per_pass = backbone, combination.variant == "min", rows_per_pass
        self.stats = read_stats(Path(folder))
        if self.stats["members"]:
            raise UserError(f"reward {folder} is an ensemble of process reward models, of which there must be one")
        own = (Path(folder) / "tokenizer_config.json").is_file()
        context = context_length(backbone.model)
        self.encoder = Encoder(
            load_tokenizer(folder if own else base_of(folder)), context, context, chat or "auto", "truncate",
            vocab_size=embedding_rows(backbone.model),
        )  # fmt: skip

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
        paid: list[Any] = []
        for start in range(0, len(completions), self.rows_per_pass):
            some = slice(start, start + self.rows_per_pass)
            paid += self._scored(prompts[some], completions[some])
        return [min(score for _, score in steps) for steps in paid] if self.worst else paid

    @torch.no_grad()
    def _scored(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[list[tuple[int, float]]]:
        separator = self.stats.get("step_separator", "\n")
        steps = [list(steps_of(text, separator)) for text in completions]
        rows, places = [], []
        for prompt, parts in zip(prompts, steps, strict=True):
            row = Row("a completion", {"prompt": prompt, "completions": [text for _, text in parts]})
            start, ids, ends = self.encoder.steps(row, separator)
            budget = self.encoder.max_tokens
            rows.append(Example(ids[:budget], start))
            places.append([min(end, budget - 1) for end in ends])  # what is cut off counts as the last token
        batch = pad_batch(rows, self.encoder.pad_id).to(self.backbone.model.device)
        hidden = self.backbone.hidden(batch.input_ids, batch.attention_mask, [ROLE])[ROLE]
        paid = []
        for number, (parts, ends) in enumerate(zip(steps, places, strict=True)):
            raw = self.backbone.head(ROLE)(hidden[number, ends].float()).mean(1)
            scores = ((raw - self.stats["mean"]) / self.stats["std"]).tolist()
            paid.append([(end, score) for (end, _), score in zip(parts, scores, strict=True)])
        return paid


def steps_of(text: str, separator: str) -> Iterator[tuple[int, str]]:
    """(end in characters, text) of each step; the separator belongs to the step that it ends. A text without a step is
    one."""
    place, found = 0, False
    for piece in text.split(separator):
        place = min(place + len(piece) + len(separator), len(text))
        if piece.strip():
            found = True
            yield place, piece
    if not found:
        yield len(text), text
