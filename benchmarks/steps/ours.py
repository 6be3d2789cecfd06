"""rlhf_fast's steps, through the functions that `rlhf_fast train` calls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.memory import states
from benchmarks.steps.recorder import Recorder
from benchmarks.steps.setting import GROUPED, Setting, Workspace
from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.training import experience
from rlhf_fast.training.config import parse
from rlhf_fast.training.job import seed_everything


def grouped(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    """What both algorithms of groups have."""
    return {
        "reward": "benchmarks.steps.setting:share_of_letters", "max_new_tokens": setting.max_new_tokens,
        "num_generations": setting.num_generations,
    }  # fmt: skip


def grpo(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    return {**grouped(workspace, setting), "objective": {"kl_coef": setting.kl_coef}}


def rloo(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    """TRL's loss is the mean over completions of a sum over their tokens."""
    objective = {"variant": "reinforce", "aggregation": "seq_mean_token_sum"}
    return {**grouped(workspace, setting), "advantage": "rloo", "kl_coef": setting.kl_coef, "objective": objective}


def ppo(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    return {
        "reward": str(workspace.adapter("reward")), "max_new_tokens": setting.max_new_tokens,
        "ppo_epochs": setting.ppo_epochs, "kl_coef": setting.kl_coef,
    }  # fmt: skip


def dpo(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    return {"objective": {"beta": setting.beta}}


def kto(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    return {"objective": {"beta": setting.beta}}


def sft(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    return {}


def reward_model(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    """Goes on from the adapter and the head that TRL starts from: a head of zeros teaches its adapter nothing."""
    return {"model": str(workspace.adapter("reward"))}


OWN = {function.__name__: function for function in (dpo, grpo, kto, ppo, reward_model, rloo, sft)}
SAMPLING = (*GROUPED, "ppo")


def prepare(workspace: Workspace, recorder: Recorder) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """(train, tensors): all steps, and the tensors that stay between them."""
    setting = workspace.setting
    values = {
        "algorithm": setting.algorithm, "model": setting.model, "device": "cpu", "dtype": "float32",
        "data": str(workspace.examples), "eval_data": str(workspace.held_out), "seed": setting.seed,
        "batch_size": setting.batch_size, "steps": setting.steps, "learning_rate": setting.learning_rate,
        "lora_rank": setting.lora_rank, "lora_alpha": setting.lora_alpha, "max_grad_norm": setting.max_grad_norm,
        "gradient_checkpointing": setting.gradient_checkpointing,
    }  # fmt: skip
    values |= OWN[setting.algorithm](workspace, setting)
    module = load_algorithm(setting.algorithm)
    config = parse(module.AlgorithmConfig, values)
    seed_everything(config.seed)
    job = module.prepare(config)
    # A new one for each repeat, which finds nothing that an earlier one kept.
    recorder.folder = Path(tempfile.mkdtemp(dir=workspace.folder))
    if setting.algorithm in ("dpo", "kto"):
        recorder.watch(module, "reference_logprobs", "scoring")
    if setting.algorithm in SAMPLING:
        recorder.watch(experience, "judge", "scoring")
        recorder.watch(experience, "roll_out", "generation", seeded=True)

    def tensors() -> list[Tensor]:
        backbone = job.backbone
        roles = {*backbone.adapters, *backbone.heads}
        adapters = [p for role in roles for p in backbone.parameters_of(role)]
        model = [*backbone.model.parameters(), *backbone.model.buffers()]
        return [*model, *adapters, *states(list(job.optimizers.values()))]

    return lambda: module.train(job, config, recorder), tensors
