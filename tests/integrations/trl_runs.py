"""A few steps of TRL's trainers on a tiny Llama with random weights: what they log at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import set_seed

from rlhf_fast.models.tiny import tiny

COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 5,
}  # fmt: skip
SAMPLED = {"max_completion_length": 6, "num_generations": 4, "num_iterations": 2, "temperature": 1.2}
TEXTS = [f"{a} {b}" for a in ("red", "blue", "green", "grey") for b in ("fox", "owl", "cat")]


def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between almost any two completions."""
    return [sum(i % 7 for i in ids) / 7 for ids in completion_ids]


def sentences() -> list[dict[str, str]]:
    return [{"text": x} for x in TEXTS]


def pairs() -> list[dict[str, str]]:
    return [{"prompt": f"{x} is", "chosen": " good", "rejected": " a bad one"} for x in TEXTS]


def judged() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{x} is", "completion": [" good", " bad"][i % 2], "label": i % 2 == 0} for i, x in enumerate(TEXTS)
    ]


# name -> (trainer, its config, rows of its data set, other arguments of the trainer, options of the config)
RUNS: dict[str, tuple[Any, Any, Callable[[], list[dict[str, Any]]], dict[str, Any], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, sentences, {}, {}),
    "sft in bfloat16": (trl.SFTTrainer, trl.SFTConfig, sentences, {}, {"bf16": True}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pairs, {}, {"use_weighting": True}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, judged, {}, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, pairs, {"reward_funcs": score}, {**SAMPLED, "beta": 0.05}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, pairs, {"reward_funcs": score}, SAMPLED),
}


def curves(name: str, folder: Path, steps: int = 20) -> dict[str, list[float]]:
    """What is logged at every step, but times; the same at every call with the same arguments."""
    trainer, config, rows, arguments, options = RUNS[name]
    set_seed(5)
    model, tokenizer = tiny(1, hidden_size=32, layers=1, heads=2)
    model.save_pretrained(folder / "model")  # TRL loads the reference model from where it loaded the model
    settings = config(output_dir=str(folder), max_steps=steps, **{**COMMON, **options})
    run = trainer(
        model=str(folder / "model"),
        args=settings,
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        **arguments,
    )
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    keys = {key for entry in entries for key in entry if "time" not in key}
    return {key: [entry[key] for entry in entries if key in entry] for key in sorted(keys)}
