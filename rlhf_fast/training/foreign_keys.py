"""The names that other trainers give our keys: TRL, transformers, PEFT, verl, OpenRLHF, axolotl, LLaMA-Factory.

A name is an alias where it means the same, number for number. Where it does not, its error says why.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError, short

OFFLINE, ONLINE = ("sft", "dpo", "kto", "reward_model"), ("ppo", "grpo")


class Alias(NamedTuple):
    """The keys that a name sets, and the algorithms, or families of them, that it holds for (empty: all that have the
    first key)."""

    keys: tuple[str, ...]
    algorithms: tuple[str, ...] = ()


def _aliases() -> dict[str, list[Alias]]:
    """name -> what it may mean; the first one that holds for an algorithm does."""
    table = {
        ("model",): "model_name_or_path model_name base_model pretrain",
        ("data",): "dataset dataset_name dataset_path train_file",
        ("eval_data",): "eval_dataset eval_file validation_file",
        ("reward",): "reward_funcs reward_model_path reward_pretrain",
        ("output_dir",): "save_path",
        ("dtype",): "torch_dtype model_dtype",
        ("learning_rate",): "lr actor_learning_rate actor_lr",
        ("critic_learning_rate",): "critic_lr",
        ("lr_schedule",): "lr_scheduler_type lr_scheduler",
        ("warmup_ratio",): "lr_warmup_ratio lr_warmup_steps_ratio",
        ("warmup_steps",): "lr_warmup_steps num_warmup_steps",
        ("adam_eps",): "adam_epsilon",
        ("max_grad_norm",): "gradient_clipping grad_clip clip_grad max_norm",
        ("micro_batch_size",): "micro_train_batch_size",
        ("log_every",): "logging_steps",
        ("save_every",): "save_steps save_freq",
        ("eval_every",): "eval_steps test_freq",
        ("keep_checkpoints",): "save_total_limit max_ckpt_num",
        ("eval_size",): "val_size",
        ("lora_rank",): "lora_r r",
        ("lora_targets",): "lora_target_modules target_modules lora_target",
        ("max_tokens",): "max_length max_seq_length max_seq_len max_len sequence_len cutoff_len",
        ("max_prompt_tokens",): "max_prompt_length prompt_max_len",
        ("objective.dual_clip",): "clip_ratio_c",
        ("objective.clip_eps_low", "objective.clip_eps_high"): "epsilon cliprange clip_range clip_ratio eps_clip",
        ("objective.clip_eps_low",): "epsilon_low clip_ratio_low",
        ("objective.clip_eps_high",): "epsilon_high clip_ratio_high",
        ("value_clip_eps",): "cliprange_value value_clip",
        ("lam",): "gae_lambda lambd",
        ("objective.entropy_coef",): "entropy_coef entropy_coeff ent_coef",
        ("objective.kl_coef",): "kl_loss_coef",
        ("objective.label_smoothing",): "label_smoothing",
        ("objective.gamma",): "simpo_gamma",
        ("objective.reference_free",): "reference_free",
        ("wpo",): "use_weighting",
        ("ppo_epochs",): "num_ppo_epochs num_iterations",
        ("num_minibatches",): "num_mini_batches",
        ("num_generations",): "n_samples_per_prompt group_size",
        ("overlong_buffer",): "overlong_buffer_len soft_punish_cache",
        ("overlong_penalty",): "overlong_penalty_factor",
        ("cost_multiplier",): "lambda_init",
        ("cost_multiplier_rate",): "lambda_lr",
        ("cost_multiplier_max",): "lambda_max",
        ("cost_window",): "episode_cost_window_size",
    }
    aliases = {name: [Alias(keys)] for keys, names in table.items() for name in names.split()}
    aliases |= {name: [Alias(("epochs",))] for name in ("num_train_epochs", "num_epochs", "total_epochs")}
    aliases["max_epochs"] = [Alias(("epochs",), OFFLINE)]  # of OpenRLHF, where ppo's counts something else
    aliases |= {name: [Alias(("steps",), OFFLINE)] for name in ("max_steps", "max_train_steps")}
    aliases["total_training_steps"] = [Alias(("steps",))]  # of verl, which counts rollouts too
    aliases |= {name: [Alias(("batch_size",), OFFLINE)] for name in ("train_batch_size", "global_batch_size")}
    aliases |= {
        name: [Alias(("max_new_tokens",), ONLINE)]
        for name in ("max_completion_length", "response_length", "max_response_length", "generate_max_len")
    }
    # TRL's beta is in the loss of GRPO and in the reward of RLOO.
    in_loss = Alias(("objective.kl_coef",), ("grpo",))
    aliases["beta"] = [Alias(("objective.beta",)), Alias(("kl_coef",), ("rloo",)), in_loss]
    aliases["init_kl_coef"] = [Alias(("kl_coef",), ("ppo",))]
    aliases["delta"] = [Alias(("objective.dual_clip",), ("grpo",))]
    aliases["loss_type"] = [Alias(("objective.variant",), ("dpo", "kto"))]
    return aliases


ALIASES = _aliases()
PER_DEVICE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

_PROCESSES = "torchrun or accelerate launch starts several processes, over which shards splits the frozen model"
_OTHER_POLICY = "it would sample from another distribution than is scored; there are temperature, top_k, top_p"
_ROLLOUTS = "for ppo and grpo, batch_size counts the completions of a rollout, num_minibatches the updates on it"
_STEPS = "for ppo and grpo, steps counts rollouts, with ppo_epochs x num_minibatches updates on each"
NO_EQUAL = {
    "beta": "it is objective.kl_coef for grpo, kl_coef for rloo and ppo, objective.beta for dpo; nothing else has one",
    "max_completion_length": "only ppo and grpo sample completions: max_tokens bounds prompt and completion together",
    "max_epochs": "for ppo and grpo it is ppo_epochs (passes over a rollout) or epochs (passes over the prompts)",
    "train_batch_size": _ROLLOUTS, "global_batch_size": _ROLLOUTS, "max_steps": _STEPS, "max_train_steps": _STEPS,
    "rollout_batch_size": "it counts prompts; batch_size counts completions, num_generations of each prompt",
    "ppo_mini_batch_size": "num_minibatches counts the minibatches of a rollout, not their rows",
    "steps_per_generation": "batch_size is a rollout, in num_minibatches updates",
    "generation_batch_size": "batch_size is a rollout, in num_minibatches updates",
    "total_episodes": "steps x batch_size is what it counts",
    "per_device_eval_batch_size": "evaluations go in passes of micro_batch_size, or batch_size",
    "vf_coef": "it is the weight of the value loss of ppo and a2c; nothing else has a critic",
    "loss_type": "the policy loss is `objective`, the comparison of completions `advantage`",
    "variant": "it is `objective`",
    "importance_sampling_level": "sequence-level ratios are an `objective`: gspo",
    "scale_rewards": "false is advantage: dr_grpo",
    "sync_ref_model": "reference_refresh_every or reference_ema move the reference",
    "ref_model_mixup_alpha": "reference_ema is the weight of the old reference at each step",
    "ref_model_sync_steps": "reference_refresh_every copies the policy to the reference",
    "ref_model": "the reference is the model, or the adapter, that the policy starts from",
    "reference_free": "the losses of pairs have it: objective.reference_free, or an objective without a reference",
    "precompute_ref_log_probs": "that is always done",
    "repetition_penalty": _OTHER_POLICY, "min_p": _OTHER_POLICY, "num_beams": _OTHER_POLICY,
    "generation_kwargs": _OTHER_POLICY,
    "bf16": "dtype: bfloat16 loads the frozen model so; adapters stay in float32",
    "fp16": "dtype is float32 or bfloat16",
    "load_in_4bit": "quantization: nf4", "load_in_8bit": "quantization: int8",
    "optim": "the optimizer is AdamW", "optimizer": "the optimizer is AdamW",
    "packing": "no row is cut or joined to another; padding_free leaves their padding out",
    "push_to_hub": "the run folder is local; huggingface-cli upload sends it", "hub_model_id": "see push_to_hub",
    "resume_from_checkpoint": "it is the flag --resume", "overwrite_output_dir": "it is the flag --overwrite",
    "save_strategy": "save_every counts steps", "eval_strategy": "eval_every counts steps",
    "evaluation_strategy": "eval_every counts steps", "logging_strategy": "every step is in metrics.jsonl",
    "load_best_model_at_end": "best_by keeps the best policy of ppo and grpo; checkpoints keep earlier weights",
    "val_set_size": "eval_size counts rows", "logging_dir": "it is output_dir/tensorboard",
    "train_on_inputs": "completion_only: false counts the prompt's tokens too",
    "completion_only_loss": "completion_only", "dataset_text_field": "columns maps names",
    "deepspeed": _PROCESSES, "fsdp": _PROCESSES, "fsdp_config": _PROCESSES, "ddp_find_unused_parameters": _PROCESSES,
    "use_vllm": "it is engine: {kind: vllm, url: ...}", "use_liger_kernel": "its kernels are always our own",
    "use_peft": "lora_rank says so",
    "dataloader_num_workers": "the examples are in memory", "remove_unused_columns": "rewards may ask for any column",
    "truncate_prompts": "too_long: truncate",
}  # fmt: skip


def names_a_key(name: str, algorithm: Collection[str | None], keys: Collection[str]) -> bool:
    """Whether `name` is one of the `keys` of an algorithm, or another's name of one. algorithm: it and its family."""
    return name in keys or name in (PER_DEVICE, ACCUMULATION) or _meaning(name, algorithm, keys) is not None


def _meaning(name: str, algorithm: Collection[str | None], keys: Collection[str]) -> Alias | None:
    holding = (a for a in ALIASES.get(name, []) if not a.algorithms or not {*a.algorithms}.isdisjoint(algorithm))
    return next((alias for alias in holding if alias.keys[0] in keys), None)


def renamed(
    values: Mapping[str, Any], algorithm: Collection[str | None], keys: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """`values` under our names, and a line for each that was another's. Unknown names stay as they are.

    algorithm: it and its family; None where it is not known yet, and only what holds for all is renamed. keys: those
    that there are. Raises UserError where two names of `values` mean one key.
    """
    # A name may be a key of one algorithm and another's name of a key of the next (gamma).
    aliases = {name: _meaning(name, algorithm, keys) for name in values if name not in keys}
    foreign = {name: alias for name, alias in aliases.items() if alias is not None}
    ours = {key: value for key, value in values.items() if key not in foreign}
    origin = {key: key for key in ours}
    lines = []
    # Names of several keys last: epsilon is both bounds, unless epsilon_high is there too.
    for name, alias in sorted(foreign.items(), key=lambda item: len(item[1].keys)):
        free = [key for key in alias.keys if key not in origin]
        if alias.keys[0] not in free:
            raise UserError(f"{name} and {origin[alias.keys[0]]} are both {alias.keys[0]}: give one of them")
        ours |= dict.fromkeys(free, values[name])
        origin |= dict.fromkeys(free, name)
        lines.append(f"{name} -> {', '.join(free)}")
    return ours, lines


def with_batches(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` with batch_size and micro_batch_size in place of the two keys that multiply to them.

    per_device_train_batch_size B and gradient_accumulation_steps A are micro_batch_size B and batch_size B x A; A alone
    divides batch_size. Raises UserError where they do not fit the rest.
    """
    given = {key: _whole(key, values[key]) for key in (PER_DEVICE, ACCUMULATION) if key in values}
    rest = {key: value for key, value in values.items() if key not in given}
    if not given:
        return rest, []
    for key in ("batch_size", "micro_batch_size") if PER_DEVICE in given else ("micro_batch_size",):
        if key in rest:
            raise UserError(f"{' and '.join(given)} already say {key}: give one of them")
    steps = given.get(ACCUMULATION, 1)
    if PER_DEVICE in given:
        sizes = {"batch_size": given[PER_DEVICE] * steps}
        sizes |= {"micro_batch_size": given[PER_DEVICE]} if steps > 1 else {}
    else:
        size = _whole("batch_size", rest.get("batch_size", 32))
        if size % steps:
            raise UserError(f"{ACCUMULATION} {steps} does not divide batch_size {size}")
        sizes = {"micro_batch_size": size // steps}
    return {**rest, **sizes}, [f"{' x '.join(given)} -> " + ", ".join(f"{key} {value}" for key, value in sizes.items())]


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: must be a whole number from 1, got {short(value)}")
    return value


def no_equal(key: str) -> str | None:
    """Why a name of other trainers has no key here; None for a name that is not known."""
    name = key.rsplit(".", 1)[-1]
    return NO_EQUAL.get(name)
