"""rlhf_fast's steps, through the functions that `rlhf_fast train` calls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from benchmarks.memory import states
from benchmarks.steps.recorder import Recorder
from benchmarks.steps.setting import Workspace
from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.training import experience, on_policy
from rlhf_fast.training.config import parse
from rlhf_fast.training.job import seed_everything

REWARDS = {"grpo": "benchmarks.steps.setting:share_of_letters"}


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
    if setting.algorithm == "dpo":
        values |= {"objective": {"beta": setting.beta}}
    else:
        values |= {"max_new_tokens": setting.max_new_tokens}
        values |= {"reward": REWARDS.get(setting.algorithm, str(workspace.adapter("reward")))}
    if setting.algorithm == "grpo":
        values |= {"num_generations": setting.num_generations, "objective": {"kl_coef": setting.kl_coef}}
    if setting.algorithm == "ppo":
        values |= {"ppo_epochs": setting.ppo_epochs, "kl_coef": setting.kl_coef}
    module = load_algorithm(setting.algorithm)
    config = parse(module.AlgorithmConfig, values)
    seed_everything(config.seed)
    job = module.prepare(config)
    # A new one for each repeat, which finds nothing that an earlier one kept.
    recorder.folder = Path(tempfile.mkdtemp(dir=workspace.folder))
    if setting.algorithm == "dpo":
        recorder.watch(module, "reference_logprobs", "scoring")
    else:
        recorder.watch(on_policy, "collect", "scoring")
        recorder.watch(experience, "roll_out", "generation", seeded=True)

    def tensors() -> list[Tensor]:
        backbone = job.backbone
        roles = {*backbone.adapters, *backbone.heads}
        adapters = [p for role in roles for p in backbone.parameters_of(role)]
        model = [*backbone.model.parameters(), *backbone.model.buffers()]
        return [*model, *adapters, *states(list(job.optimizers.values()))]

    return lambda: module.train(job, config, recorder), tensors
