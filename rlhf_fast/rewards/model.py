"""A reward model that is not on the backbone: its own weights and its own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Encoder, load_tokenizer
from rlhf_fast.errors import UserError
from rlhf_fast.models.classifier import classify, context_of, load_classifier
from rlhf_fast.models.loading import embedding_rows


class RewardModel:
    """Scores a prompt with its completion by a local sequence classifier; called like a reward function.

    label: the output that is the reward, by its name in the config's `id2label` or its number; its logit is the score.
    None for a classifier with one output.

    A list of messages (and, with chat=True, any prompt) goes through the classifier's own chat template. It reads the
    ids that it would have been trained on: the whole conversation with the end of its last turn. A conversation that is
    longer than its context loses its first turns. Plain text is read as one, prompt and completion, between the special
    tokens of the classifier's own tokenizer ([CLS] and [SEP]).
    """

    def __init__(
        self,
        folder: str,
        label: str | None = None,
        *,
        device: torch.device,
        chat: bool = False,
        rows_per_pass: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder, self.rows_per_pass = folder, rows_per_pass
        self.model, self.output = load_classifier(folder, label, device=device, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(folder, needs_eos=False, trust_remote_code=trust_remote_code)
        context = context_of(self.model)
        self.encoder = Encoder(
            tokenizer, context, context, chat or "auto", "truncate", vocab_size=embedding_rows(self.model)
        )
        self._check_padding()

    def _check_padding(self) -> None:
        """UserError for a classifier whose score of a text depends on how far it is padded (FNet, ConvBERT)."""
        texts = [self.encoder.tokenizer(text, verbose=False)["input_ids"] for text in ("a", "a b c d e f")]
        for ids in texts:
            self.encoder.tokens.check(f"reward model {self.folder}", ids)
        alone = torch.cat([classify(self.model, [ids], self.output) for ids in texts])
        difference = (classify(self.model, texts, self.output) - alone).abs().max().item()
        bound = 1e-3 if self.model.dtype == torch.float32 else 0.1
        if not difference <= bound * max(1.0, alone.abs().max().item()):
            kind = type(self.model).__name__
            raise UserError(f"reward model {self.folder}: padding changes the score of a {kind} by {difference:.3g}")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], tools: Sequence[Any] | None = None
    ) -> Tensor:
        schemas = tools if tools is not None else [None] * len(prompts)
        try:
            ids = [self.encoder.scored(*row) for row in zip(prompts, completions, schemas, strict=True)]
        except UserError as error:
            raise UserError(f"reward model {self.folder}: {error}") from None
        size = self.rows_per_pass
        return torch.cat([classify(self.model, ids[i : i + size], self.output) for i in range(0, len(ids), size)])
