"""A reward model that is not on the backbone: its own weights and its own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Encoder, load_tokenizer
from rlhf_fast.errors import UserError
from rlhf_fast.models.classifier import classify, load_classifier
from rlhf_fast.models.loading import embedding_rows


class RewardModel:
    """Scores a prompt with its completion by a local sequence classifier; called like a reward function.

    A list of messages (and, with chat=True, any prompt) goes through the classifier's own chat template. It reads the
    ids that it would have been trained on: the whole conversation with the end of its last turn. A conversation that is
    longer than its context loses its first turns.
    """

    def __init__(self, folder: str, *, device: torch.device, chat: bool = False, rows_per_pass: int = 16) -> None:
        self.folder, self.rows_per_pass = folder, rows_per_pass
        self.model = load_classifier(folder, device=device)
        context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 20
        self.encoder = Encoder(
            load_tokenizer(folder, needs_eos=False), context, context, chat or "auto", "truncate",
            vocab_size=embedding_rows(self.model),
        )  # fmt: skip

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], tools: Sequence[Any] | None = None
    ) -> Tensor:
        schemas = tools if tools is not None else [None] * len(prompts)
        try:
            ids = [self.encoder.scored(*row) for row in zip(prompts, completions, schemas, strict=True)]
        except UserError as error:
            raise UserError(f"reward model {self.folder}: {error}") from None
        size = self.rows_per_pass
        return torch.cat([classify(self.model, ids[i : i + size]) for i in range(0, len(ids), size)])
