"""GRPO with TRL's GRPOTrainer on a tiny model, with and without us: `python examples/dropin/trl_grpo.py`.

The one line that a program of yours needs is `rlhf_fast.patch("trl")`, before or after it imports TRL.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl_side_by_side import SETTINGS, side_by_side

PROMPTS = [{"prompt": f"Tell me about the {animal}. "} for animal in ("fox", "owl", "cat", "wolf", "bear", "hare")]


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: the share of even token ids, which a model with random weights learns to raise."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer(folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        model=model,
        reward_funcs=even_ids,
        args=GRPOConfig(output_dir=folder, max_completion_length=32, num_iterations=2, **SETTINGS),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    side_by_side(trainer)
