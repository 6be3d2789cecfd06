"""TRL's steps: its trainers of today, and the PPO trainer that TRL 1.12 was the last to have."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from benchmarks.memory import states
from benchmarks.steps.recorder import Recorder
from benchmarks.steps.setting import Setting, Workspace, share_of_letters
from rlhf_fast.data.encoding import pad_id


class Steps(TrainerCallback):
    """Tells the recorder where steps end and what was logged."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.recorder.losses.append(logs["loss"])
        if "loss/policy_avg" in logs:
            self.recorder.losses.append(logs["loss/policy_avg"] + logs["loss/value_avg"])
        if "grad_norm" in logs:
            self.recorder.grad_norms.append(logs["grad_norm"])
        for name in ("reward", "objective/scores"):
            if name in logs:
                self.recorder.rewards.append(logs[name])


def prepare(workspace: Workspace, recorder: Recorder) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """(train, tensors): all steps, and the tensors that stay between them."""
    setting = workspace.setting
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    tokenizer.pad_token_id = pad_id(tokenizer)  # never EOS, which the PPO trainer would then leave out of the loss
    lora = LoraConfig.from_pretrained(str(workspace.adapter("policy")))
    lora.inference_mode = False  # saved adapters say true, with which nothing would be trained
    common = {
        "model": model, "processing_class": tokenizer, "callbacks": [Steps(recorder)], "peft_config": lora,
    }  # fmt: skip
    trainer, policy, modules = TRAINERS[setting.algorithm](workspace, recorder, common)
    if policy is not None:
        set_peft_model_state_dict(policy, load_peft_weights(str(workspace.adapter("policy"))))

    def tensors() -> list[Tensor]:
        held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return [*held, *states([trainer.optimizer])]

    return trainer.train, tensors


def arguments(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    """What the trainers' configs share."""
    return {
        "output_dir": str(workspace.folder / "trl"), "use_cpu": True, "bf16": False, "seed": setting.seed,
        "learning_rate": setting.learning_rate, "lr_scheduler_type": "constant",
        "max_grad_norm": setting.max_grad_norm, "gradient_checkpointing": setting.gradient_checkpointing,
        "per_device_train_batch_size": setting.batch_size, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


# Trainer, policy whose adapter is set (None: it is), everything that stays in memory
Parts = tuple[Any, nn.Module | None, list[nn.Module]]


def dpo(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import DPOConfig, DPOTrainer

    setting = workspace.setting
    config = DPOConfig(
        **arguments(workspace, setting), max_steps=setting.steps, beta=setting.beta, max_length=None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DPOTrainer(args=config, train_dataset=Dataset.from_list(workspace.rows_in_order()), **common)
    recorder.watch(trainer.model, "forward", "scoring", without_grad=True)
    return trainer, trainer.model, [trainer.model]


def kto(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import KTOConfig, KTOTrainer

    setting = workspace.setting
    config = KTOConfig(
        **arguments(workspace, setting), max_steps=setting.steps, beta=setting.beta, max_length=None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = KTOTrainer(args=config, train_dataset=Dataset.from_list(workspace.rows_in_order()), **common)
    recorder.watch(trainer.model, "forward", "scoring", without_grad=True)
    return trainer, trainer.model, [trainer.model]


def sft(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import SFTConfig, SFTTrainer

    setting = workspace.setting
    config = SFTConfig(
        **arguments(workspace, setting), max_steps=setting.steps, max_length=None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = SFTTrainer(args=config, train_dataset=Dataset.from_list(workspace.rows_in_order()), **common)
    return trainer, trainer.model, [trainer.model]


def reward_model(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import RewardConfig, RewardTrainer

    setting = workspace.setting
    config = RewardConfig(
        **arguments(workspace, setting), max_steps=setting.steps, max_length=None, disable_dropout=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    model = classifier(workspace, trainable=True)
    model.config.pad_token_id = common["processing_class"].pad_token_id
    given = common | {"model": model, "peft_config": None}
    trainer = RewardTrainer(args=config, train_dataset=Dataset.from_list(workspace.rows_in_order()), **given)
    return trainer, None, [trainer.model]


def grpo(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import GRPOConfig, GRPOTrainer

    setting = workspace.setting
    config = GRPOConfig(
        **of_groups(workspace, setting), beta=setting.kl_coef, loss_type="bnpo", use_bias_correction_kl=False
    )
    return watched_groups(GRPOTrainer, config, workspace, recorder, common)


def rloo(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    from trl import RLOOConfig, RLOOTrainer

    config = RLOOConfig(**of_groups(workspace, workspace.setting), beta=workspace.setting.kl_coef)
    return watched_groups(RLOOTrainer, config, workspace, recorder, common)


def of_groups(workspace: Workspace, setting: Setting) -> dict[str, Any]:
    """What both trainers of groups are given."""
    return arguments(workspace, setting) | {
        "max_steps": setting.steps, "num_generations": setting.num_generations,
        "max_completion_length": setting.max_new_tokens, "shuffle_dataset": False,
    }  # fmt: skip


def watched_groups(
    trainer_class: Any, config: Any, workspace: Workspace, recorder: Recorder, common: dict[str, Any]
) -> Parts:
    """A trainer of groups with share_of_letters as its reward."""

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return share_of_letters(prompts, completions)

    data = Dataset.from_list(workspace.rows_in_order())
    trainer = trainer_class(args=config, train_dataset=data, reward_funcs=reward, **common)
    recorder.watch(trainer, "_generate_and_score_completions", "scoring")
    recorder.watch(trainer, "_generate", "generation", seeded=True)
    return trainer, trainer.model, [trainer.model]


def ppo(workspace: Workspace, recorder: Recorder, common: dict[str, Any]) -> Parts:
    """The critic trains a LoRA as ours does; the reward model has its adapter merged, and reads completions closed.

    TRL would score one that is cut off at its last sampled token, ours with the end that the reward model learnt from.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    setting, tokenizer = workspace.setting, common["processing_class"]
    config = PPOConfig(
        **arguments(workspace, setting), total_episodes=setting.steps * setting.batch_size,
        response_length=setting.max_new_tokens, stop_token="eos", temperature=1.0, num_sample_generations=0,
        num_ppo_epochs=setting.ppo_epochs, num_mini_batches=1, local_rollout_forward_batch_size=setting.batch_size,
        kl_coef=setting.kl_coef, vf_coef=1.0,
    )  # fmt: skip
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in workspace.rows_in_order()]
    data = Dataset.from_dict({"input_ids": prompts})
    if setting.paid_at_end:
        PPOTrainer.train = paid_at_end(ppo_trainer)
    reward = classifier(workspace, trainable=False).merge_and_unload()
    critic = classifier(workspace, trainable=True).get_base_model()
    trainer = PPOTrainer(
        args=config, train_dataset=data, eval_dataset=data, ref_model=None, reward_model=reward, value_model=critic,
        **common,
    )  # fmt: skip
    trainer.dataloader = DataLoader(data, batch_size=setting.batch_size, collate_fn=trainer.data_collator)
    score = ppo_trainer.get_reward

    def closed(model: nn.Module, ids: Tensor, pad: int, context: int) -> Any:
        if model is trainer.reward_model:
            ended = (ids[:, context:] == tokenizer.eos_token_id).any(1, keepdim=True)
            ids = torch.cat([ids, torch.where(ended, pad, tokenizer.eos_token_id)], dim=1)
        return score(model, ids, pad, context)

    ppo_trainer.get_reward = closed
    recorder.watch(ppo_trainer, "batch_generation", "generation", seeded=True)
    for name in ("forward", "get_reward", "selective_log_softmax"):
        recorder.watch(ppo_trainer, name, "scoring", without_grad=True)
    return trainer, trainer.model.policy, [trainer.model, trainer.reward_model]


def paid_at_end(module: Any) -> Callable[[Any], None]:
    """PPOTrainer.train with one line changed: the last paid token is a completion's last, not the one behind it.

    `sequence_lengths` is the index of the last token. Where padding follows, TRL pays the score at the first padding
    token, and trains the critic there too.
    """
    line, changed = "sequence_lengths_p1 = sequence_lengths + 1", "sequence_lengths_p1 = sequence_lengths"
    source = textwrap.dedent(inspect.getsource(module.PPOTrainer.train))
    if source.count(line) != 1:
        raise RuntimeError(f"{source.count(line)} lines of TRL's PPOTrainer.train are `{line}`, needs 1")
    functions: dict[str, Any] = {}
    exec(source.replace(line, changed), vars(module), functions)
    return functions["train"]


def classifier(workspace: Workspace, *, trainable: bool) -> PeftModel:
    """The reward role's adapter and head on a model of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(
        workspace.setting.model, num_labels=1, dtype=torch.float32
    )
    return PeftModel.from_pretrained(model, str(workspace.adapter("reward")), is_trainable=trainable)


TRAINERS = {function.__name__: function for function in (dpo, grpo, kto, ppo, reward_model, rloo, sft)}
