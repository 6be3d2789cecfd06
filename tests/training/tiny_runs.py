"""What the tests of training share: a model of a few thousand weights, small data, a config for each algorithm."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training.job import Job, seed_everything

ALGORITHMS = ("sft", "reward_model", "ppo", "grpo", "dpo", "kto", "online_dpo", "hpo")
DEVICE = os.environ.get("RLHF_FAST_TEST_DEVICE", "cpu")
TRAINED = {"sft": "policy", "reward_model": "reward", "ppo": "policy", "grpo": "policy", "dpo": "policy",
           "kto": "policy", "online_dpo": "policy", "hpo": "policy"}  # fmt: skip
_KEPT: list[tempfile.TemporaryDirectory] = []

REWARD = '''
from itertools import count

SCORED = count()


def score(prompts, completions):
    """Longer is better, up to a point, and vowels are worth a little."""
    return [len(c) % 11 / 5.0 + 0.1 * sum(x in "aeiou" for x in c) for c in completions]


def apart(completions):
    """0, 1 and 2 in turn: they differ in every group and from call to call, whatever was sampled."""
    return [float(next(SCORED) % 3) for _ in completions]


def letters(completions):
    """They differ in most groups, and depend on the text alone."""
    return [sum(map(ord, c)) % 7 / 2.0 for c in completions]


def halves(completions):
    """Two steps: what each is paid depends on its letters."""
    return [[(len(c) // 2, sum(map(ord, c[: len(c) // 2])) % 7), (len(c), sum(map(ord, c)) % 5)] for c in completions]


def even(completions):
    """Right or wrong."""
    return [float(len(c) % 2 == 0) for c in completions]
'''


@cache
def folder() -> Path:
    """A folder, kept for the session, with model/, data files and a reward function."""
    _KEPT.append(tempfile.TemporaryDirectory())
    path = Path(_KEPT[-1].name)
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    tiny(1, hidden_size=48, layers=1, heads=2, max_length=128)[0].save_pretrained(path / "teacher")
    tokenizer.save_pretrained(path / "teacher")
    write_jsonl(path / "prompts.jsonl", [{"prompt": "ab cd"[: 1 + i % 5] * (1 + i % 2), "tag": i} for i in range(9)])
    write_jsonl(path / "sft.jsonl", [{"prompt": "p" * (1 + i % 4), "completion": "xyz" * (i % 3)} for i in range(9)])
    pairs = [{"prompt": "q" * (1 + i % 3), "chosen": "good" * (1 + i % 2), "rejected": "b" * i} for i in range(9)]
    write_jsonl(path / "pairs.jsonl", pairs)
    answers = [{"prompt": "r" * (1 + i % 4), "completion": "uv" * (i % 5), "label": i % 3 > 0} for i in range(9)]
    write_jsonl(path / "answers.jsonl", answers)
    write_jsonl(path / "judged.jsonl", [judged(i) for i in range(12)])
    rankings = [
        {"prompt": "s" * (1 + i % 3), "completions": ["a", "bb" * i, "c", "dd"][: 3 + i % 2],
         "ranks": [2, 1, None if i % 4 == 0 else 2, 3][: 3 + i % 2]} for i in range(9)
    ]  # fmt: skip
    write_jsonl(path / "rankings.jsonl", rankings)
    (path / "reward.py").write_text(REWARD)
    return path


def save_supple_model(path: Path) -> None:
    """One that mostly repeats printable bytes, and that a few steps can teach otherwise."""
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    with torch.no_grad():
        # Random weights of the usual size give near-uniform logits, which so few dimensions cannot bend far.
        model.get_input_embeddings().weight.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def judged(i: int) -> dict[str, Any]:
    """A row with every form of judgement."""
    return {
        "prompt": "ab cd"[: 2 + i % 3] + str(i), "chosen": "good" * (1 + i % 2), "rejected": "bad" * (1 + i % 3),
        "margin": i % 3, "preference": 0.6 + 0.1 * (i % 5), "annotator": "ab"[i % 2],
        "completions": ["x", "good" * (1 + i % 2), "bad", "goo"][: 3 + i % 2], "ranks": [3, 1, None, 2][: 3 + i % 2],
        "labels": [False, True, False, True][: 3 + i % 2], "completion": "good" if i % 3 else "bad", "label": i % 3 > 0,
        "rating": 1 + i % 5, "ratings": {"help": 1 + i % 5, "style": 5 - i % 3},
    }  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def values_of(algorithm: str, **changes: Any) -> dict[str, Any]:
    """The keys of a small run; batches do not divide the data, so checkpoints fall inside an epoch."""
    data = {
        "sft": "sft.jsonl",
        "reward_model": "pairs.jsonl",
        "dpo": "pairs.jsonl",
        "kto": "answers.jsonl",
        "hpo": "pairs.jsonl",
    }
    values: dict[str, Any] = {
        "algorithm": algorithm, "model": str(folder() / "model"), "device": DEVICE, "report_to": "none", "seed": 3,
        "data": str(folder() / data.get(algorithm, "prompts.jsonl")), "eval_size": 2, "steps": 5, "batch_size": 4,
        "learning_rate": 0.02, "lora_rank": 4,
    }  # fmt: skip
    if algorithm in ("ppo", "grpo", "online_dpo"):
        values |= {"reward": f"{folder() / 'reward.py'}:score", "max_new_tokens": 6}
        values |= {"ppo_epochs": 2, "num_minibatches": 2}
    if algorithm == "ppo":
        values |= {"kl_target": 0.5, "kl_horizon": 50, "reference_ema": 0.9}
    if algorithm == "hpo":
        values |= {"reward": f"{folder() / 'reward.py'}:score", "max_new_tokens": 6}
    if algorithm == "online_dpo":
        values |= {"num_generations": 4, "batch_size": 8, "pick": "all_above", "reference_refresh_every": 2}
    if algorithm == "grpo":
        values |= {"num_generations": 2, "objective": {"kl_coef": 0.1}, "reference_refresh_every": 2}
    return {**values, **changes}


def config_of(algorithm: str, **changes: Any) -> Any:
    return load_algorithm(algorithm).AlgorithmConfig.model_validate(values_of(algorithm, **changes))


def job_of(config: Any, *, scrambled: bool = True) -> Job:
    """A prepared job whose adapters and heads are all different from zero."""
    seed_everything(config.seed)
    job = load_algorithm(config.algorithm).prepare(config)
    if scrambled:
        scramble(job.backbone)
    return job


@torch.no_grad()
def scramble(backbone: Backbone) -> None:
    for role in sorted({*backbone.adapters, *backbone.heads}):
        for parameter in backbone.parameters_of(role):
            parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.device))


def gradients(job: Job) -> dict[str, torch.Tensor]:
    """Every gradient by role and name, and none left behind."""
    found = {}
    for role in job.optimizers:
        for name, parameter in job.backbone.named_parameters_of(role).items():
            assert parameter.grad is not None, f"{role} {name} got no gradient"
            found[f"{role} {name}"] = parameter.grad.clone()
            parameter.grad = None
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal to fp32 rounding of each tensor's own scale: the same sums in another order.

    Advantages of both signs cancel in a sum over tokens, which leaves a few hundred units in the last place.
    """
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
