"""A reward model that is not on the backbone: its own weights and its own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.encoding import load_tokenizer, pad_id
from rlhf_fast.errors import UserError
from rlhf_fast.models.classifier import classify, load_classifier


class RewardModel:
    """Scores a prompt with its completion by a local sequence classifier; called like a reward function.

    A list of messages (and, with chat=True, any prompt) goes through the classifier's own chat template.
    """

    def __init__(self, folder: str, *, device: torch.device, chat: bool = False, rows_per_pass: int = 16) -> None:
        self.folder, self.chat, self.rows_per_pass = folder, chat, rows_per_pass
        self.tokenizer = load_tokenizer(folder)
        self.model = load_classifier(folder, device=device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
        ids = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        size = self.rows_per_pass
        pad = pad_id(self.tokenizer)
        return torch.cat([classify(self.model, ids[i : i + size], pad) for i in range(0, len(ids), size)])

    def _ids(self, prompt: Any, completion: str) -> list[int]:
        if isinstance(prompt, str) and not self.chat:
            return [*self.tokenizer(prompt + completion)["input_ids"], self.tokenizer.eos_token_id]
        if self.tokenizer.chat_template is None:
            raise UserError(f"reward model {self.folder} has no chat template for prompts that are conversations")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversation = [*messages, {"role": "assistant", "content": completion}]
        text = str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
