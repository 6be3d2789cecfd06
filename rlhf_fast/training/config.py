"""Configuration: one flat set of keys, the same in YAML files and on the command line."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf_fast.errors import UserError, short
from rlhf_fast.ops.core.check import nearest
from rlhf_fast.ops.policy.objective import PolicyObjective
from rlhf_fast.training import core_yaml
from rlhf_fast.training.byte_sizes import bytes_of
from rlhf_fast.training.entries import EngineConfig, FromStage, JudgeConfig, VerifyConfig
from rlhf_fast.training.foreign_keys import (
    ACCUMULATION,
    ALIASES,
    PER_DEVICE,
    names_a_key,
    no_equal,
    renamed,
    with_batches,
)

# Key -> the key that it takes the place of.
EXCLUSIVE = {"epochs": "steps", "warmup_ratio": "warmup_steps"}
NESTED = ("columns.", "objective.", "verify.", "judge.", "engine.")  # what begins so is an entry of a key


class Config(BaseModel):
    """Keys that every algorithm has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    family: ClassVar[str] = ""  # the algorithm that reads the same data and has the same keys
    reads: ClassVar[str] = ""  # the algorithm whose layouts of data it takes, where that is not its family
    gives: ClassVar[tuple[str, ...]] = ("model",)  # what a later stage may take: a model, data
    divides: ClassVar[bool] = True  # whether several processes divide the work, which else is that of the first
    counted: ClassVar[bool] = True  # whether training/memory_plan.py knows its passes

    _as_given: dict[str, Any] = PrivateAttr(default_factory=dict)  # of the keys that were fitted

    algorithm: str = Field(description="what learns; `rlhf_fast keys` lists all")
    model: str | FromStage = Field(description="model folder, adapter folder of a run, or tiny (built by code)")
    data: str | FromStage | list[str | FromStage] = Field(
        description="examples: .jsonl, .json, .csv, .parquet, a folder of them, or a hub id; or several"
    )
    data_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="shares of the places in `data` among the rows, one each; rows repeat for it"
    )
    eval_data: str | None = Field(None, description="held-out examples; default: rows of data, drawn by seed")
    trust_remote_code: bool = Field(False, description="run the code that the folder of a model holds")
    columns: dict[str, str] | None = Field(None, description="{prompt: question}: our name, and the data's own")
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="nulls, pairs that differ in earlier turns, what the template refuses"
    )
    data_cache: str | None = Field(
        "auto",
        description="folder for what was found in data; auto: rlhf_fast in XDG_CACHE_HOME or ~/.cache; null: none",
    )
    eval_size: int | None = Field(None, ge=1, description="rows held out; default: a tenth, at most 64")
    output_dir: str = Field("run", description="run folder: adapters, metrics, samples, curves, checkpoints")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of new adapters, samples and order")
    data_seed: int | None = Field(None, ge=0, lt=1 << 63, description="held-out draw and order; default: seed")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    quantization: Literal["nf4", "int8"] | None = Field(None, description="of the frozen model, by bitsandbytes")
    shards: int = Field(
        1, ge=1, description="neighbouring processes over which the frozen model is split (FSDP2); 1: whole on each"
    )
    whole_rollouts: Literal["auto"] | bool = Field(
        "auto", description="with shards: sample from all weights, gathered once a rollout; auto: where memory allows"
    )
    attn_implementation: str = Field("auto", description="auto: flash-attn where installed, on a GPU, else SDPA")

    chat: Literal["auto"] | bool = Field("auto", description="chat template for plain prompts too (true), or never")
    max_prompt_tokens: int | None = Field(None, ge=1, description="default: what the model's context leaves")
    max_tokens: int | None = Field(None, ge=2, description="prompt + completion; default: the model's context")
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error", description="what becomes of a row over budget; truncate cuts prompts first, behind the system message"
    )
    train_on: Literal["last", "all_assistant"] = Field("last", description="answers of a conversation that sft learns")

    batch_size: int = Field(32, ge=1, description="sequences per step, of all processes together")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per pass of a process; default: all that it has")
    padding_free: bool = Field(
        True, description="passes leave padding out, and compute a prompt once for its answers, where that is exact"
    )
    steps: int = Field(100, ge=1, description="optimizer steps; for ppo and grpo, rollouts")
    epochs: float | None = Field(None, gt=0, description="in place of steps: passes over the examples or prompts")
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="in place of warmup_steps: share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True, description="per role; .inf never clips")
    max_bad_steps: int = Field(5, ge=1, description="stop after so many non-finite updates in a row")
    max_loss_growth: float | None = Field(
        10.0, gt=1, description="stop at a loss above 20 and so many times its largest before; null: never"
    )
    max_norm_growth: float | None = Field(
        100.0, gt=1, description="stop at a gradient norm above 100 and so many times its largest before; null: never"
    )
    explosion_steps: int = Field(5, ge=1, description="steps in a row that these, and max_kl, wait before they stop")

    lora_rank: int = Field(8, ge=0, description="0 trains every weight (sft only)")
    lora_alpha: float = Field(16, gt=0)
    lora_targets: str | list[str] = "all-linear"
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input, in passes that train")
    use_rslora: bool = Field(False, description="scale lora_alpha / sqrt(lora_rank), not lora_alpha / lora_rank")
    use_dora: bool = Field(False, description="adapters with a magnitude per output")
    top_layers: int | None = Field(None, ge=1, description="adapters on the top layers only; the rest runs once")
    gradient_checkpointing: bool | None = Field(
        None, description="compute activations again in the backward; default: false, or what memory takes"
    )
    head_chunk_tokens: int | None = Field(
        None,
        ge=16,
        description="tokens whose logits exist at a time; default: 1 GiB of them on a GPU, 128 MiB on a CPU",
    )
    memory: int | None = Field(
        None, ge=1, description="8GiB, 500MB or bytes, of each device: fits micro_batch_size, gradient_checkpointing, "
        "head_chunk_tokens and rollout_rows where they are not given; --dry-run shows how"
    )  # fmt: skip

    log_every: int = Field(10, ge=1, description="lines on a terminal that cannot show a progress bar")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: before and after only")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    save_minutes: float | None = Field(
        30.0, gt=0, description="a step that ends so long after the last checkpoint has one too; null: never"
    )
    keep_checkpoints: int = Field(2, ge=1, description="the newest; the last before skipped updates stays as well")
    allow_changed_inputs: bool = Field(False, description="resume on model, data or rewards that are others by now")
    report_to: Literal["none", "tensorboard"] = "tensorboard"
    self_test: bool = Field(True, description="look in the first steps whether weights move and adapters reload")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Config":
        for key, other in EXCLUSIVE.items():
            if getattr(self, key) is not None and other in self.model_fields_set:
                raise ValueError(f"{key} and {other} exclude each other, got {getattr(self, key)} and "
                                 f"{getattr(self, other)}")  # fmt: skip
        return self

    def values(self) -> dict[str, Any]:
        """The keys as config.yaml has them; reading that gives this config again."""
        replaced = {other for short, other in EXCLUSIVE.items() if getattr(self, short) is not None}
        given = self.model_dump(mode="json", by_alias=True) | self._as_given
        return {k: v for k, v in given.items() if k not in replaced}

    def fitted(self: "C", changes: Mapping[str, Any]) -> "C":
        """With what `memory` leaves to be fitted; `values` stay as they were."""
        fitted = self.model_copy(update=changes)
        fitted._as_given = {key: getattr(self, key) for key in changes}
        return fitted

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return bytes_of(value) if isinstance(value, str) else value

    @property
    def examples_per_step(self) -> int:
        """Of the data: what `epochs` counts."""
        return self.batch_size

    def for_data(self: "C", size: int) -> "C":
        """With the steps that `epochs` and `warmup_ratio` mean for `size` examples."""
        changes = {}
        if self.epochs is not None:
            steps = round(self.epochs * size / self.examples_per_step, 6)  # 0.1 x 30 is 3, not a little more
            changes["steps"] = max(1, math.ceil(steps))
        if self.warmup_ratio is not None:
            changes["warmup_steps"] = math.ceil(self.warmup_ratio * changes.get("steps", self.steps))
        return self.model_copy(update=changes)

    @property
    def compares_rows(self) -> bool:
        """Whether the loss compares the rows of a micro-batch with each other, which then have to be those."""
        return bool(getattr(getattr(self, "objective", None), "compares_rows", False))

    def peak_rate(self, role: str) -> float:
        """The learning rate of a role after its warm-up."""
        return self.learning_rate

    @property
    def order_seed(self) -> int:
        """The seed of everything that chooses among examples: which are held out, and the order of the others."""
        return self.seed if self.data_seed is None else self.data_seed


class SamplingConfig(Config):
    """Keys of the algorithms that sample completions and score them, if only to compare before and after."""

    reward: str | FromStage | list[str | FromStage] | None = Field(
        None, description="pkg.mod:function, file.py:function, a reward adapter or a reward model folder; or several"
    )
    verify: VerifyConfig | None = Field(
        None, description="pay right answers 1: exact, math, regex, json_schema, code, choice, or {kind: exact, ...}"
    )
    judge: JudgeConfig | None = Field(None, description="a language model as a reward; {by: backbone}, for instance")
    reward_weights: list[float] | None = Field(
        None, description="one per reward, verify and judge behind them; default 1"
    )
    reward_timeout: float = Field(
        600.0, gt=0, description="seconds that a reward function has for one batch, and again for its repeat"
    )
    reward_combine: Literal["mean", "min", "uwo", "pessimistic", "optimistic"] = Field(
        "mean",
        description="ensemble: mean, min, mean - coef variance, mean -+ coef std; one: its bound; steps: each, min",
    )
    reward_combine_coef: float | None = Field(None, ge=0, description="coef of reward_combine; default 1, uwo 0.1")
    engine: EngineConfig = Field(
        EngineConfig.model_validate({}), description="what samples: local, transformers, or {kind: vllm, url: ...}"
    )
    max_new_tokens: int = Field(64, ge=1)
    rollout_chunk: int = Field(
        512, ge=1, description="tokens after which a rollout is kept for a resume, and what has ended leaves it"
    )
    rollout_rows: int | None = Field(
        None, ge=1, description="completions of a process that are sampled at a time, by our own loop; default: all"
    )
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="0: off. Truncated sampling biases the importance ratio")
    top_p: float = Field(1.0, gt=0, le=1)
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken off the reward of an unfinished completion")
    overlong_buffer: float | None = Field(
        None, gt=0, description="the last tokens of max_new_tokens, or below 1 their share, that cost overlong_penalty"
    )
    overlong_penalty: float = Field(
        1.0,
        ge=0,
        description="taken off the reward of a completion of max_new_tokens; linear in the buffer",
    )

    @property
    def overlong_tokens(self) -> float | None:
        """The length of the overlong buffer."""
        buffer = self.overlong_buffer
        return buffer * self.max_new_tokens if buffer is not None and buffer < 1 else buffer

    @model_validator(mode="after")
    def _buffers(self) -> "SamplingConfig":
        if self.overlong_tokens is not None and self.overlong_tokens > self.max_new_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} is longer than max_new_tokens "
                             f"{self.max_new_tokens}")  # fmt: skip
        return self

    @property
    def loss_kl(self) -> str | None:
        """The divergence from the reference over the whole vocabulary in the loss, a variant of token_kl."""
        return None

    @property
    def judge_alone(self) -> bool:
        return self.judge is not None and self.reward is None and self.verify is None


class RolloutConfig(SamplingConfig):
    """Keys of the algorithms that learn from their own samples."""

    num_generations: int = Field(1, ge=1, description="completions per prompt; batch_size counts completions")
    objective: PolicyObjective = Field(
        "ppo_clip", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )
    reward_clip: float | None = Field(None, gt=0, description="bound on the absolute reward of a completion or a step")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL penalty in the reward")
    kl_target: float | None = Field(None, gt=0, description="adapt kl_coef to this KL, in nats per completion")
    kl_horizon: float = Field(10_000, gt=0, description="completions over which kl_coef adapts")
    final_reward_weights: list[float] | None = Field(None, description="where reward_weights go, one per reward")
    reward_schedule: Literal["linear", "cosine"] = Field("linear", description="how reward_weights go there")
    reward_schedule_steps: int | None = Field(None, ge=2, description="in how many steps; default: all")
    reward_floors: list[float | None] | None = Field(
        None, description="least mean of each reward, or null: a multiplier as of a cost is then added to its weight"
    )
    mask_truncated_completions: bool = Field(
        False, description="unfinished completions are compared with, and not learnt from"
    )
    max_resamples: int = Field(
        0, ge=0, description="rounds of new prompts in the place of those whose completions are all judged the same"
    )
    cost: str | FromStage | list[str | FromStage] | None = Field(
        None, description="as reward: what must stay at cost_limit on average; or several"
    )
    cost_limit: float | list[float] | None = Field(None, description="one per cost")
    cost_multiplier: float = Field(1.0, gt=0, description="Lagrange multiplier of each cost at the start")
    cost_multiplier_rate: float = Field(0.1, ge=0, description="step of its logarithm; 0 keeps it")
    cost_multiplier_max: float = Field(5.0, gt=0, description="its bound")
    cost_window: int = Field(128, ge=1, description="completions whose mean cost moves it")
    cost_confidence: float | None = Field(
        None, gt=0.5, lt=1, description="test the held-out cost, keep the last policy that passes in safe/"
    )
    cost_range: tuple[float, float] | None = Field(
        None, strict=False, description="[lowest, highest] cost: the test is Hoeffding's, else Student's"
    )
    sampler_correction: bool = Field(
        False,
        description="weigh tokens by the sampler's own log-probabilities, see objective.correction_mode; vllm: on",
    )
    ppo_epochs: int = Field(1, ge=1, description="passes over each rollout")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per epoch; 1 saves scoring the policy first")
    early_stop_kl: float | None = Field(None, gt=0, description="end a step's updates above this approximate KL")
    max_kl: float | None = Field(
        20.0, gt=0, description="stop at a KL to the reference above it, nats per token; null: never"
    )
    optimizer: Literal["adamw", "rmsprop"] = Field("adamw", description="rmsprop: adam_beta2 is its alpha")
    policy_ema: float | None = Field(None, gt=0, lt=1, description="weight of the old average in ema/, at each step")
    best_by: Literal["reward"] | None = Field(None, description="keep the policy of the best evaluation in best/")
    kl_budget: float | None = Field(None, gt=0, description="of best_by: the KL that it may have, nats per completion")
    reference_refresh_every: int | None = Field(None, ge=1, description="copy the policy to the reference")
    reference_ema: float | None = Field(None, gt=0, lt=1, description="weight of the old reference at each step")

    @model_validator(mode="before")
    @classmethod
    def _corrected(cls, values: Any) -> Any:
        engine = values.get("engine") if isinstance(values, dict) else None
        if not isinstance(engine, dict) or engine.get("kind") != "vllm":
            return values
        if values.get("sampler_correction") is False:
            raise ValueError("sampler_correction false leaves a sampler of other rounding uncorrected: "
                             "engine vllm takes true")  # fmt: skip
        return {**values, "sampler_correction": True}

    @model_validator(mode="after")
    def _is_rewarded(self) -> "RolloutConfig":
        if self.needs_reward and self.reward is None and self.verify is None and self.judge is None:
            reward = SamplingConfig.model_fields["reward"].description
            raise ValueError(f"missing key 'reward' ({reward}), 'verify' or 'judge'")
        return self

    @property
    def examples_per_step(self) -> int:
        return self.batch_size // self.num_generations

    @property
    def needs_reward(self) -> bool:
        """Whether something must judge the samples."""
        return True

    @property
    def loss_kl(self) -> str | None:
        return self.objective.exact_kl if isinstance(self.objective, PolicyObjective) else None

    @property
    def scores_policy(self) -> bool:
        """Whether a rollout's old log-probabilities take a pass of their own.

        One minibatch has all rows before any step: its log-probabilities are the old ones, unless it has dropout. A
        penalty needs them before the update.
        """
        return self.num_minibatches > 1 or self.lora_dropout > 0 or self.kl_coef > 0

    @property
    def needs_collisions(self) -> bool:
        """Whether the policy's sums of squared probabilities are asked for, which only a scoring pass gives."""
        return False

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any, info: ValidationInfo) -> PolicyObjective:
        return PolicyObjective.of(value, fixed_length=info.data.get("max_new_tokens"))

    @model_validator(mode="after")
    def _divisible(self) -> "RolloutConfig":
        for name in ("num_generations", "num_minibatches"):
            if self.batch_size % getattr(self, name):
                raise ValueError(f"batch_size {self.batch_size} must be a multiple of {name} {getattr(self, name)}")
        return self

    @model_validator(mode="after")
    def _resamples(self) -> "RolloutConfig":
        if self.max_resamples and self.num_generations < 2:
            raise ValueError(f"max_resamples {self.max_resamples} is of num_generations from 2, got 1")
        return self

    @model_validator(mode="after")
    def _constrains(self) -> "RolloutConfig":
        costs = listed(self.cost)
        for name in ("cost_confidence", "cost_range"):
            if not costs and self.reward_floors is None and getattr(self, name) is not None:
                raise ValueError(f"{name} {getattr(self, name)} is of a cost or of reward_floors, and there is none")
        if costs and len(listed(self.cost_limit)) != len(costs):
            raise ValueError(f"cost_limit needs one number for each of {len(costs)} costs, got {self.cost_limit}")
        if self.cost_multiplier > self.cost_multiplier_max:
            raise ValueError(f"cost_multiplier {self.cost_multiplier} is above cost_multiplier_max "
                             f"{self.cost_multiplier_max}")  # fmt: skip
        if self.cost_range is not None and not self.cost_range[0] < self.cost_range[1]:
            raise ValueError(f"cost_range must be [lowest, highest], got {list(self.cost_range)}")
        return self

    @model_validator(mode="after")
    def _has_evaluations(self) -> "RolloutConfig":
        if self.best_by is not None and self.eval_every is None:
            raise ValueError(f"best_by {self.best_by} needs eval_every, the steps between evaluations")
        if self.kl_budget is not None and self.best_by is None:
            raise ValueError(f"kl_budget {self.kl_budget} needs best_by")
        return self

    @model_validator(mode="after")
    def _corrects(self) -> "RolloutConfig":
        for field in fields(self.objective):
            value = getattr(self.objective, field.name)
            if field.name.startswith("correction_") and value != field.default and not self.sampler_correction:
                raise ValueError(f"objective.{field.name} is of sampler_correction: true, got {value} without it")
        return self


C = TypeVar("C", bound=Config)


def listed(value: Any) -> list[Any]:
    """One or several values of a key as a list; nothing is none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def keys_of(config_class: type[Config]) -> list[str]:
    """Every key of the algorithm, those of its objective as `objective.KEY`."""
    objective = config_class.model_fields.get("objective")
    own = [] if objective is None else [f"objective.{field.name}" for field in fields(objective.annotation)]  # type: ignore
    own += [f"verify.{name}" for name in VerifyConfig.model_fields if "verify" in config_class.model_fields]
    own += [f"judge.{name}" for name in JudgeConfig.model_fields if "judge" in config_class.model_fields]
    own += [f"engine.{name}" for name in EngineConfig.model_fields if "engine" in config_class.model_fields]
    return [*config_class.model_fields, *own]


def means_something(key: str, config_class: type[Config], algorithm: str | None) -> bool:
    """Whether `key` is a key of the algorithm, or another trainer's name of one."""
    if key.startswith("columns."):
        return True
    return names_a_key(key, (algorithm, config_class.family), keys_of(config_class))


def merged(
    config_class: type[Config], algorithm: str | None, *layers: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The layers' values, later ones above, under our names, and a line for each name that was another's.

    A layer that sets one of two keys which exclude each other takes the other one out of the layers below. One that
    names the objective takes out its numbers; one that has numbers alone changes those of the objective below.
    """
    values: dict[str, Any] = {}
    lines: list[str] = []
    for layer in layers:
        own, said = renamed(flat(layer), (algorithm, config_class.family), keys_of(config_class))
        rivals = {*EXCLUSIVE.items(), *((b, a) for a, b in EXCLUSIVE.items())}
        rivals |= {(PER_DEVICE, "batch_size"), (PER_DEVICE, "micro_batch_size"), (ACCUMULATION, "micro_batch_size"),
                   ("batch_size", PER_DEVICE), ("batch_size", ACCUMULATION)}  # fmt: skip
        below = {other for key, other in rivals if key in own}
        for whole in ("objective.variant", "verify.kind", "engine.kind"):
            if whole in own:
                below |= {key for key in values if key.startswith(whole.partition(".")[0] + ".")}
        values = {key: value for key, value in values.items() if key not in below} | own
        lines += said
    values, said = with_batches(values)
    return values, lines + said


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`objective: ipo`, `objective: {beta: 0.2}`, `verify: exact`, `judge: {by: backbone}` and `engine: local` as
    objective.variant, objective.beta, verify.kind, judge.by and engine.kind."""
    entries: dict[str, Any] = {}
    rest = dict(values)
    for key, name in (("objective", "variant"), ("verify", "kind"), ("judge", None), ("engine", "kind")):
        value = {name: values[key]} if name and isinstance(values.get(key), str) else values.get(key)
        if isinstance(value, Mapping):
            del rest[key]
            entries |= {f"{key}.{entry}": number for entry, number in value.items()}
    return {**entries, **rest}


def parse(config_class: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """`values` checked against `config_class`; UserError names the first bad key, with the nearest good one."""
    try:
        return config_class.model_validate(folded(flat(values)))
    except ValidationError as errors:
        raise UserError(where + _one_line(config_class, errors)) from None


def folded(values: Mapping[str, Any]) -> dict[str, Any]:
    """`columns.prompt: question` and `objective.beta: 0.2`, as flags say it, as entries of `columns`, `objective`."""
    whole = {key: value for key, value in values.items() if not key.startswith(NESTED)}
    for key, value in values.items():
        name, _, entry = key.partition(".")
        if key not in whole and isinstance(whole.get(name) or {}, dict):
            whole[name] = {**(whole.get(name) or {}), entry: value}
    return whole


def _one_line(config_class: type[Config], errors: ValidationError) -> str:
    # An unknown key first: the "missing" key beside it is usually the same typing error. Longer places are inside of
    # a value, one error for each type that it could have had.
    unknown = [e for e in errors.errors() if e["type"] == "extra_forbidden" and len(_place(e)) == 1]
    error = [*unknown, *errors.errors()][0]
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    key = str(_place(error)[0])
    if unknown:
        return unknown_key(key, keys_of(config_class))
    if error["type"] == "missing":
        known = VerifyConfig.model_fields if key.startswith("verify.") else config_class.model_fields
        return f"missing key {key!r} ({known[key.removeprefix('verify.')].description})"
    if error["type"] == "value_error":  # our own, which has the value
        return message if message.startswith(key) else f"{key}: {message}"
    return f"{key}: {message}, got {short(error['input'])}"


def _place(error: Any) -> tuple[Any, ...]:
    """Where an error is; an entry of `verify`, `judge` or `engine` is a key of its own, verify.kind."""
    location = error["loc"]
    nested = location[:1] in (("verify",), ("judge",), ("engine",))
    return (".".join(map(str, location[:2])), *location[2:]) if nested else location


def unknown_key(key: str, known: Any) -> str:
    """The sentence for a key that does not exist."""
    reason = no_equal(key)
    if reason is not None:
        return f"unknown key {key!r}: {reason}"
    return f"unknown key {key!r}{nearest(key, [*known, *ALIASES, PER_DEVICE, ACCUMULATION])}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; UserError with the line otherwise."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"config file {path} does not exist" if not path.exists() else f"{path} is no config file")
        with path.open(encoding="utf-8-sig") as file:
            values = core_yaml.load(file.read(core_yaml.SIZE + 1))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    return values


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`key=value`, `--key=value` and `--key value` (dashes or underscores) as a mapping; values are YAML.

    Of a key that is there twice the last one counts, as with flags of any command.
    """
    overrides: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise UserError(f"do not understand {word!r}; write key=value or --key value")
            if not queue or queue[0].startswith("--"):
                raise UserError(f"--{key} needs a value")
            value = queue.pop(0)
        try:
            overrides[key.replace("-", "_")] = core_yaml.load(value)
        except ValueError as error:
            raise UserError(f"{key}: cannot read the value {short(value)}: {error}") from None
    return overrides
