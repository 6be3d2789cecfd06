"""What both contenders get: hyper-parameters, model, examples and the adapters that training starts from."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import build_tiny

SUBJECTS = ("a walk in the rain", "tea", "the last train home", "an old map of the harbour", "snow", "bread and salt")
PRAISE = ("lovely", "a quiet joy", "warm and generous", "the best part of the day")
BLAME = ("dull", "a waste of time", "cold and bitter", "the worst part of the whole week")
GROUPED = ("grpo", "rloo")  # several completions of each prompt
PAIRS = ("dpo", "reward_model")


@dataclass(frozen=True)
class Setting:
    """One comparison. `model` is a local folder; batch_size counts completions, or pairs."""

    algorithm: str
    model: str
    steps: int
    batch_size: int
    num_generations: int
    max_new_tokens: int
    learning_rate: float
    gradient_checkpointing: bool
    lora_rank: int = 8
    lora_alpha: float = 16
    ppo_epochs: int = 2  # the first epoch has all ratios at 1; the second shows the clipping
    kl_coef: float = 0.05
    beta: float = 0.1
    seed: int = 0
    paid_at_end: bool = False  # TRL's PPO is made to pay the score at a completion's last token, as ours does

    @property
    def max_grad_norm(self) -> float:
        """TRL's PPO trainer clips no gradient, so ours is given a bound that never clips."""
        return 1e9 if self.algorithm == "ppo" else 1.0

    @property
    def rows_per_step(self) -> int:
        return self.batch_size // self.num_generations if self.algorithm in GROUPED else self.batch_size


@dataclass(frozen=True)
class Workspace:
    """A folder with what both contenders read. steps: only that many of the setting's."""

    folder: Path
    steps: int | None = None

    @property
    def setting(self) -> Setting:
        setting = Setting(**json.loads((self.folder / "setting.json").read_text()))
        return setting if self.steps is None else replace(setting, steps=self.steps)

    @property
    def examples(self) -> Path:
        return self.folder / "examples.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.jsonl"

    def adapter(self, role: str) -> Path:
        """PEFT's files of the policy at its start, or of the reward role with its head."""
        return self.folder / role

    def rows_in_order(self) -> list[dict[str, Any]]:
        """The examples in the order in which rlhf_fast's steps take them."""
        rows = read_jsonl(self.examples)
        return [rows[i] for i in shuffled_indices(len(rows), self.setting.seed, 0, len(rows))]


def build(folder: Path, setting: Setting) -> Workspace:
    """Write everything into the empty `folder`. A model named "tiny" is made there."""
    if setting.model == "tiny":
        setting = replace(setting, model=str(build_tiny(folder / "tiny", seed=setting.seed)))
    workspace = Workspace(folder)
    (folder / "setting.json").write_text(json.dumps(asdict(setting)))
    draw = random.Random(setting.seed)
    for path, count in ((workspace.examples, setting.steps * setting.rows_per_step), (workspace.held_out, 2)):
        path.write_text("".join(json.dumps(example(draw, setting.algorithm)) + "\n" for _ in range(count)))
    backbone = Backbone(load_model(setting.model, dtype=torch.float32))
    for role in ("policy", "reward"):
        # The seed is the one from which rlhf_fast draws its own fresh policy.
        backbone.add_adapter(role, rank=setting.lora_rank, alpha=setting.lora_alpha, seed=setting.seed)
    backbone.add_head("reward")
    generator = torch.Generator().manual_seed(setting.seed)
    with torch.no_grad():
        head = backbone.head("reward").weight
        head.normal_(std=head.shape[1] ** -0.5, generator=generator)
    for role in ("policy", "reward"):
        save_adapter(backbone, role, workspace.adapter(role))
    return workspace


def example(draw: random.Random, algorithm: str) -> dict[str, Any]:
    # Unfinished text, because a chat model may answer a bare question with nothing but its end.
    prompt = f"Letter {draw.randint(2, 1000)}. Dear friend, I thought of {draw.choice(SUBJECTS)} all day, and to me it"
    good = f" is {draw.choice(PRAISE)}."
    bad = f" is {draw.choice(BLAME)}, and {draw.choice(BLAME)}."
    if algorithm == "sft":
        return {"prompt": prompt, "completion": good}
    if algorithm == "kto":
        liked = draw.random() < 0.5
        return {"prompt": prompt, "completion": good if liked else bad, "label": liked}
    return {"prompt": prompt, "chosen": good, "rejected": bad} if algorithm in PAIRS else {"prompt": prompt}


def share_of_letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward function of groups: ASCII letters among the characters of each completion."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in completions]
