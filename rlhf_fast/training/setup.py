"""From a config to a model with roles and encoded examples: everything that can fail on bad input."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_fast.data.batches import held_out_indices
from rlhf_fast.data.cache import NONE, Cache, Entry
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Prompt, load_tokenizer
from rlhf_fast.data.feedback import Unlike, as_read, check_alike
from rlhf_fast.data.layouts import rename_columns, require_columns, with_known_columns
from rlhf_fast.data.notes import say, tell
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import Prepared, View, content_of, facts_of, joined, picked
from rlhf_fast.data.sources import GATHERED, read_rows
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.architecture import context_length
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import attention_for, embedding_rows, load_model
from rlhf_fast.models.peft_io import base_of, load_adapter
from rlhf_fast.models.sharding import Shards
from rlhf_fast.ops.advantages.kl_controller import AdaptiveKLController, FixedKLController
from rlhf_fast.rewards import AdapterSource, Rewards, Source, Verifier, load_rewards
from rlhf_fast.rewards.adapter import MEAN, Combination
from rlhf_fast.rollout import check_sampler
from rlhf_fast.rollout.engines.protocol import Engine
from rlhf_fast.training.config import Config, RolloutConfig, SamplingConfig, listed
from rlhf_fast.training.constraints import Constraints
from rlhf_fast.training.engine import engine_of
from rlhf_fast.training.entries import FromStage
from rlhf_fast.training.experience import Experience, collect, sampler_gap, separate_randomness
from rlhf_fast.training.job import Job
from rlhf_fast.training.judging import build_judge
from rlhf_fast.training.optim import build_optimizer

# Nats per token by which an engine's log-probabilities may differ from ours: bfloat16 explains a tenth of it.
OTHER_WEIGHTS = 0.3
# Keys of which nothing that is found in the data depends; a key that is not here makes another entry of the cache.
NOT_OF_DATA = {
    "data_cache", "output_dir", "device", "dtype", "quantization", "shards", "whole_rollouts", "attn_implementation",
    "batch_size", "micro_batch_size", "padding_free", "steps", "epochs", "learning_rate", "lr_schedule", "warmup_steps",
    "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm", "max_bad_steps",
    "max_loss_growth", "max_norm_growth", "explosion_steps", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout",
    "use_rslora", "use_dora", "top_layers", "gradient_checkpointing", "head_chunk_tokens", "memory", "rollout_rows",
    "log_every", "eval_every", "save_every",
    "save_minutes", "keep_checkpoints", "allow_changed_inputs", "report_to", "self_test", "seed", "data_seed",
}  # fmt: skip

Rows = Sequence[Row]
Prepare = Callable[[list[Row]], list[Row]]
Places = str | FromStage | list[str | FromStage]


def build_model(config: Config) -> tuple[Backbone, Any, str | None]:
    """The backbone without roles, its tokenizer, and the adapter folder when config.model is one."""
    if isinstance(config.model, FromStage):
        raise UserError(f"model: {{from: {config.model.stage}}} needs `stages`")
    device = usable_device(config.device)
    dtype = _dtype(config, device)
    shards = _shards(config, device)
    if config.model == "tiny":
        if config.quantization is not None:
            raise UserError(f"quantization {config.quantization} needs a model with weights of its own, not tiny")
        from rlhf_fast.models.tiny import tiny

        built, tokenizer = tiny(config.seed)
        built.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        return Backbone(built, shards, padding_free=config.padding_free), tokenizer, None
    adapter = config.model if (Path(config.model) / "adapter_config.json").is_file() else None
    base = base_of(adapter) if adapter else config.model
    attention = attention_for(config.attn_implementation, device) or config.attn_implementation

    def load(place: torch.device) -> Any:
        return load_model(
            base, dtype=dtype, attn_implementation=attention, device=place, quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip

    backbone = Backbone(load(device) if shards is None else shards.load(load), shards, padding_free=config.padding_free)
    if config.padding_free and (reason := backbone.why_not_packed()):
        say(f"padding_free: rows of this model keep their padding: {reason}")
    if backbone.quantized and config.lora_rank == 0 and adapter is None:
        raise UserError(f"lora_rank 0 trains every weight, but those of {base} are quantised")
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    place = adapter if adapter is not None and own else base
    return backbone, load_tokenizer(place, trust_remote_code=config.trust_remote_code), adapter


def _shards(config: Config, device: torch.device) -> Shards | None:
    """How the model is split over processes; None where each holds it whole."""
    if config.shards == 1:
        return None
    if config.lora_rank == 0:
        raise UserError(f"lora_rank 0 trains every weight; shards {config.shards} splits a frozen model")
    if config.trust_remote_code:
        raise UserError(f"trust_remote_code: shards {config.shards} splits models of transformers' own code")
    whole_rollouts = None if config.whole_rollouts == "auto" else config.whole_rollouts
    return Shards(config.shards, device, whole_rollouts=whole_rollouts)


def add_trained_adapter(backbone: Backbone, name: str, config: Config, saved: str | None) -> None:
    """The trainable adapter `name`: fresh, or continued from the folder `saved`."""
    if saved:
        load_adapter(backbone, name, saved, trainable=True)
        backbone.set_dropout(name, config.lora_dropout)
        return
    if config.lora_rank < 1:
        raise UserError(f"{config.algorithm} trains an adapter: lora_rank must be at least 1 (0 is for sft)")
    widest = max(max(shape) for shape in backbone.linear_shapes.values())
    if config.lora_rank > widest:
        raise UserError(f"lora_rank {config.lora_rank} is more than the widest linear of this model has, {widest}")
    backbone.add_adapter(
        name, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
        top_layers=config.top_layers, seed=config.seed, use_rslora=config.use_rslora, use_dora=config.use_dora,
        dropout=config.lora_dropout,
    )  # fmt: skip


def add_policy(backbone: Backbone, config: Config, saved: str | None, *, moving_reference: bool = False) -> None:
    """The policy, and the reference: the base model itself, or a frozen copy of the policy where the policy starts
    from a saved adapter or the reference will move."""
    add_trained_adapter(backbone, "policy", config, saved)
    if saved or moving_reference:
        backbone.add_adapter("reference", copy_of="policy", trainable=False)


def add_rewards(backbone: Backbone, config: SamplingConfig, rows: Sequence[Row], tokenizer: Any) -> Rewards | None:
    """The sources of config.reward, config.verify and config.judge, which `rows` suit; None where there are none.

    A reward that an earlier stage has yet to train is a fresh adapter in its place.
    """
    if config.reward is None and config.verify is None and config.judge is None:
        return None
    specs = config.reward if isinstance(config.reward, list) else [] if config.reward is None else [config.reward]
    count = len(specs) + (config.verify is not None) + (config.judge is not None)
    weights = [1.0] * count if config.reward_weights is None else config.reward_weights
    if len(weights) != count:
        raise UserError(f"reward_weights has {len(weights)} entries for {count} rewards")
    repeated = [spec for i, spec in enumerate(specs) if spec in specs[:i]]
    if repeated or not count:
        raise UserError(f"reward names {repeated[0]} twice; give it a weight" if specs else "reward names none")
    saved = {spec: weight for spec, weight in zip(specs, weights, strict=False) if isinstance(spec, str)}
    combination = Combination(config.reward_combine, config.reward_combine_coef)
    # One that is yet to be trained is combined when it is.
    waits = len(saved) < len(specs)
    rewards = load_rewards(
        saved, backbone, chat=config.chat is True, timeout=config.reward_timeout,
        combination=MEAN if waits else combination, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    if config.verify is not None:
        verifier = Verifier(config.verify)
        check_answers(config, verifier, rows)
        rewards.sources.append(Source(verifier.name, weights[len(specs)], verifier))
    rewards.judge, rewards.judge_weight = build_judge(config, backbone, tokenizer), weights[-1]
    rewards.check_rows(rows)
    if waits:
        backbone.add_adapter("reward", rank=config.lora_rank, top_layers=config.top_layers, trainable=False)
        backbone.add_head("reward", trainable=False)
        rewards.adapter = AdapterSource("reward", 1.0, 0.0, 1.0)
    return rewards


def check_answers(config: SamplingConfig, verifier: Verifier, rows: Sequence[Row]) -> None:
    """`verifier.check_rows`; what was found fine in many rows is not looked at again at the next start."""

    def checked() -> Entry:
        verifier.check_rows(rows)
        return {"fine": np.ones(1, np.int8)}

    if isinstance(rows, View) and verifier.gold is None:
        known_of(config).entry((content_of(rows), verifier.name), checked)
    else:
        verifier.check_rows(rows)


def check_weights(config: RolloutConfig, rewards: Rewards) -> None:
    """UserError where there is not one number for each reward."""
    for key in ("final_reward_weights", "reward_floors"):
        given = getattr(config, key)
        if given is not None and len(given) != len(rewards.weights):
            raise UserError(f"{key} has {len(given)} entries for {len(rewards.weights)} rewards")


def add_constraints(
    backbone: Backbone, config: RolloutConfig, rows: Sequence[Row], rewards: Rewards, held_out: int
) -> Constraints | None:
    """The costs of config.cost, and where they are tested the policy that passes, so far the one that starts."""
    specs, floors = listed(config.cost), listed(config.reward_floors)
    if not specs and not floors and config.cost_limit is None:
        return None
    if not specs and config.cost_limit is not None:
        raise UserError(f"{config.algorithm}: cost_limit {config.cost_limit} needs a cost: a source as reward has")
    if config.cost_confidence is not None:
        backbone.add_adapter("safe", copy_of="policy", trainable=False)
    saved = {spec: 1.0 for spec in specs if isinstance(spec, str)}
    sources = load_rewards(saved, backbone, chat=config.chat is True, timeout=config.reward_timeout, role="cost",
                           trust_remote_code=config.trust_remote_code)  # fmt: skip
    sources.check_rows(rows)
    if len(saved) < len(specs):  # an earlier stage has yet to train it
        backbone.add_adapter("cost", rank=config.lora_rank, top_layers=config.top_layers, trainable=False)
        backbone.add_head("cost", trainable=False)
        sources.adapter = AdapterSource("cost", 1.0, 0.0, 1.0)
    names = [spec if isinstance(spec, str) else "cost" for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"cost names one source twice: {', '.join(names)}")
    limits = dict(zip(names, listed(config.cost_limit), strict=True))
    held = {name: floor for name, floor in zip(rewards.weights, floors, strict=False) if floor is not None}
    limits |= {f"-{name}": -floor for name, floor in held.items()}
    return Constraints(sources, limits, config, held_out, {f"-{name}": name for name in held})


def build_encoder(config: Config, backbone: Backbone, tokenizer: Any, *, new_tokens: int = 0) -> Encoder:
    """The encoder with its budgets: the model's context, less what will be generated and the end of its turn."""
    context = context_length(backbone.model)
    max_tokens = min(config.max_tokens or context, context)
    if new_tokens >= max_tokens:
        raise UserError(f"max_new_tokens {new_tokens} leaves no room for a prompt in {max_tokens} tokens")
    encoder = Encoder(
        tokenizer, min(config.max_prompt_tokens or max_tokens, max_tokens - new_tokens), max_tokens, config.chat,
        config.too_long, config.train_on, vocab_size=embedding_rows(backbone.model),
        bad_rows=config.bad_rows, known=known_of(config),
    )  # fmt: skip
    if not new_tokens:
        return encoder
    room = context - new_tokens - encoder.longest_end
    return replace(encoder, max_prompt_tokens=min(encoder.max_prompt_tokens, room))


def load_rows(config: Config, layouts: Sequence[Sequence[str]], prepare: Prepare = list) -> tuple[Rows, Rows]:
    """(training, held-out) rows of config.data and config.eval_data, which must have one of the column layouts;
    `prepare` brings the rows of one place into their last form.

    Held-out rows are drawn by the seed, those that ask the same together, and keep the order that they have in the
    data. Of places with data_weights, training rows come as often as these say.
    """
    parts, named = parts_of(config, config.data, layouts, prepare=prepare), shown_data(config.data)
    rows = joined(parts)
    if config.eval_data is not None:
        held_out = rows_of(config, config.eval_data, layouts, prepare=prepare)
        if config.eval_size is not None and config.eval_size < len(held_out):
            held_out = picked(held_out, _draw(config, held_out, config.eval_size))
        shared = int(np.isin(facts_of(held_out, "asks"), facts_of(rows, "asks")).sum())
        if shared:
            say(f"{shared} of the {len(held_out)} rows of {config.eval_data} ask what {named} asks too")
        return picked(rows, _mixed(config, parts, [])), held_out
    size = max(1, min(64, len(rows) // 10)) if config.eval_size is None else config.eval_size
    if size >= len(rows):
        raise UserError(f"{named} has {len(rows)} rows; holding out {size} (eval_size) leaves none to train on")
    drawn = _draw(config, rows, size)
    return picked(rows, _mixed(config, parts, drawn)), picked(rows, drawn)


def _mixed(config: Config, parts: Sequence[Rows], held_out: Sequence[int]) -> NDArray[np.int64]:
    """The places of the training rows: those of all parts less the held-out ones, once; or, with data_weights, so often
    that the parts have these shares, and that every row comes at least once."""
    ends = list(accumulate(map(len, parts)))
    places = [np.setdiff1d(np.arange(end - len(part), end), held_out) for part, end in zip(parts, ends, strict=True)]
    weights = config.data_weights
    if weights is None:
        return np.concatenate(places)
    if not isinstance(config.data, list) or len(weights) != len(parts):
        raise UserError(f"data_weights has {len(weights)} entries for {shown_data(config.data)}")
    if not all(len(part) for part in places):
        raise UserError(f"data_weights {weights}: a place of {shown_data(config.data)} has no row to train on")
    total = max(len(part) / weight for part, weight in zip(places, weights, strict=True))
    return np.concatenate([np.resize(part, round(total * w)) for part, w in zip(places, weights, strict=True)])


def all_rows(config: Config, layouts: Sequence[Sequence[str]]) -> Rows:
    """Every row of config.data, none held out."""
    return rows_of(config, config.data, layouts)


def rows_of(
    config: Config, data: Places, layouts: Sequence[Sequence[str]], as_algorithm: str | None = None,
    prepare: Prepare = list,
) -> Rows:  # fmt: skip
    """The rows of one place or of several, of which some may still be empty: labels that come later.

    as_algorithm: the one that the rows are for; default: the config's.
    """
    return joined(parts_of(config, data, layouts, as_algorithm, prepare))


def parts_of(
    config: Config, data: Places, layouts: Sequence[Sequence[str]], as_algorithm: str | None = None,
    prepare: Prepare = list,
) -> list[Rows]:  # fmt: skip
    """The rows of every place."""
    places = data if isinstance(data, list) else [data]
    parts: list[Rows] = []
    for place in places:
        if isinstance(place, FromStage):
            raise UserError(f"data: {{from: {place.stage}}} needs `stages`")
        rows = read_rows(place, may_be_empty=isinstance(data, list))

        def change(rows: list[Row], place: str = place) -> list[Row]:
            return prepare(_as_learnt(config, rows, place, layouts, as_algorithm))

        def change_each(rows: list[Row], change: Prepare = change) -> list[Row]:
            check_alike(rows, as_algorithm or config.reads or config.family)
            return change(rows)

        if isinstance(rows, View):
            try:
                parts.append(Prepared(rows, change_each, place, known_of(config), (as_algorithm, layouts)))
                continue
            except Unlike:
                if rows.size > GATHERED:
                    raise
        parts.append(change(list(rows)))
    if not any(map(len, parts)):
        raise UserError(f"data {shown_data(data)}: there is no example in any of them")
    return parts


def known_of(config: Config) -> Cache:
    """Where what is found in the data is kept: under all keys but those that cannot change it."""
    place = config.data_cache
    if place is None:
        return NONE
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(home) / "rlhf_fast" if place == "auto" else Path(place)
    settings = {key: value for key, value in sorted(config.values().items()) if key not in NOT_OF_DATA}
    return Cache(folder, repr(settings))


def shown_data(data: Places) -> str:
    places = data if isinstance(data, list) else [data]
    return ", ".join(str(place) for place in places)


def _as_learnt(
    config: Config, rows: list[Row], data: str, layouts: Sequence[Sequence[str]], as_algorithm: str | None
) -> list[Row]:
    """The rows of a place, checked, under the names that the algorithm knows."""
    if not rows:
        return []
    algorithm, family = as_algorithm or config.algorithm, as_algorithm or config.reads or config.family
    rows = as_read(rename_columns(rows, config.columns), family, data)
    skip = config.bad_rows == "skip"
    rows = with_known_columns(rows, algorithm, data, family=family, skip=skip)
    used, rows = require_columns(rows, layouts, algorithm, skip=skip)
    others = [names for names in layouts if set(names) <= rows[0].values.keys() and not set(names) <= set(used)]
    if others:
        say(f"{data}: {algorithm} reads {', '.join(used)}, not {', '.join(others[0])}")
    for name in ("completion", "chosen", "rejected"):
        empty = [(row, row.where) for row in rows if name in used and not _spoken(row.values[name])]
        tell(f"{data}: {name} is empty in {{found}} of {{rows}} rows, first in {{first}}", empty, rows)
    return rows


def _spoken(answer: Any) -> bool:
    """Whether an answer says anything: text, or a message with more than an empty text."""
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    last = {key: value for key, value in messages[-1].items() if key != "role"}
    return any(value.strip() if isinstance(value, str) else value for value in last.values())


def _draw(config: Config, rows: Rows, size: int) -> list[int]:
    keys = facts_of(rows, "asks")
    if len(np.unique(keys)) == 1:
        say(f"all {len(rows)} rows ask the same, the held-out ones too")
        keys = np.arange(len(rows), dtype=np.uint64)
    return held_out_indices(keys, size, config.order_seed)


def prepare_rollouts(config: RolloutConfig) -> Job:
    """The start of learning from samples: policy, reference, rewards and prompts, tried on two short completions."""
    train, held_out = load_rows(config, [("prompt",)])
    backbone, tokenizer, saved = build_model(config)
    moving = config.reference_ema is not None or config.reference_refresh_every is not None
    add_policy(backbone, config, saved, moving_reference=moving)
    backbone.enable_checkpointing(bool(config.gradient_checkpointing))
    encoder = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
    rows = joined([train, held_out])
    rewards = add_rewards(backbone, config, rows, tokenizer) or Rewards()
    job = Job(
        backbone,
        encoder,
        train=encode_rows(encoder, train, Encoder.prompt, "data"),
        held_out=encode_rows(encoder, held_out, Encoder.prompt, "held-out data"),
        optimizers={"policy": build_optimizer(backbone.parameters_of("policy"), config)},
        rewards=rewards,
        kl_controller=FixedKLController(config.kl_coef),
    )
    check_weights(config, rewards)
    whole = config.for_data(len(job.train))
    job.constraints = add_constraints(backbone, whole, rows, rewards, len(job.held_out))
    if config.policy_ema is not None:
        backbone.add_adapter("ema", copy_of="policy", trainable=False)
    if config.kl_target is not None:
        job.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    try_rewards(job, config, job.held_out)
    return job


def try_rewards(job: Job, config: SamplingConfig, prompts: Sequence[Prompt]) -> None:
    """Sample and score two short completions: a reward that cannot work, or a model that does not sample from the
    distribution that it is scored by, fails here, before any folder is touched."""
    tokens, engine = min(8, config.max_new_tokens), engine_of(job, config)
    with separate_randomness(config.seed):
        if isinstance(engine, str):
            comparison = check_sampler(
                job.backbone, [prompt.ids for prompt in prompts[:2]], pad=job.encoder.pad_id,
                temperature=config.temperature, new_tokens=tokens, engine=engine,
            )  # fmt: skip
            if not comparison.holds:
                raise UserError(
                    f"the model does not sample from the distribution that it is scored by; {comparison} (an "
                    "architecture that is not safe under left padding, or one that changes its logits while generating)"
                )
            job.sampler_scores = comparison.is_rounding
        short = config.model_copy(update={"max_new_tokens": tokens})
        experience = collect(job, short, prompts[:2], keep_sampler=not isinstance(engine, str))
        if not isinstance(engine, str):
            check_weights_of(job, config, experience, engine)


def check_weights_of(job: Job, config: SamplingConfig, experience: Experience, engine: Engine) -> None:
    """UserError where the engine that sampled has other weights than the backbone."""
    found = sampler_gap(job, config, experience.rollout)
    gap = found["sampler_gap"]
    if not gap <= (OTHER_WEIGHTS if config.engine.kind == "vllm" else found["sampler_gap_limit"]):
        raise UserError(f"{engine.name} samples from another model than the one that trains: log-probabilities of its "
                        f"tokens differ by {gap:.2g} nats in the worst of two completions")  # fmt: skip


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` a GPU where there is one; UserError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some have names and memory, and nothing to compute with
    except (RuntimeError, AssertionError, ImportError) as error:
        why = first_line(error).partition(". ")[0]  # what follows are PyTorch's backends
        raise UserError(f"device {name!r} cannot be used: {why}") from None
    return device


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        # Training all weights in bfloat16 would round small updates away.
        return torch.bfloat16 if config.lora_rank > 0 and device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
