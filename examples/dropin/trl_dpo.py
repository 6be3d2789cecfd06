"""DPO with TRL's DPOTrainer on a tiny model, with and without us: `python examples/dropin/trl_dpo.py`.

The one line that a program of yours needs is `rlhf_fast.patch("trl")`, before or after it imports TRL.
"""

from __future__ import annotations

import copy

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl_side_by_side import SETTINGS, side_by_side

PAIRS = [
    {
        "prompt": f"What does the {animal} do when {when}? Describe it in one sentence. ",
        "chosen": f"The {animal} sleeps in the shade of an old tree and does not care.",
        "rejected": f"The {animal} howls, runs in circles, and then howls again.",
    }
    for animal in ("fox", "owl", "cat", "wolf", "bear")
    for when in ("it rains", "the sun sets", "winter comes", "somebody knocks")
]


def trainer(folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(output_dir=folder, **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    side_by_side(trainer)
