"""What a run takes of its device's memory, counted before it starts, and the settings that a budget leaves room for.

    peak = weights + roles + what a step keeps + the largest of: a rollout, a pass of scoring, a pass that trains

Passes are run on the meta device by models/counting.py with rows as long as the longest that were read, none of which
begins as another, so that no micro-batch is larger: what is packed (models/packing.py) takes less. Bytes are those of
tensors: what an allocator loses between them, and what CUDA takes for itself (about half a GiB), comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rlhf_fast.data.encoded import Encoded, first_and_longest
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.counting import peak_of, twin_of
from rlhf_fast.rollout.cache import SlotCache, sliding_layers
from rlhf_fast.rollout.decoder import CACHE_NAMES, PROMPT_TOKENS
from rlhf_fast.rollout.engines import why_not_local
from rlhf_fast.training import ranks
from rlhf_fast.training.byte_sizes import shown
from rlhf_fast.training.config import Config, RolloutConfig, SamplingConfig
from rlhf_fast.training.job import FULL, Job
from rlhf_fast.training.supervised import sequences_of

LOOKED_AT = 64  # of the examples, the first and the longest, this many of each
# Tokens of a micro-batch that keep a device busy: with fewer, recomputing activations costs less than they do.
ENOUGH = {"cpu": 512, "cuda": 4096}
LEAST_CHUNK = 128  # tokens whose logits exist at a time


class Settings(NamedTuple):
    """Keys that a budget decides where they are not given."""

    micro_batch_size: int
    gradient_checkpointing: bool
    head_chunk_tokens: int | None
    rollout_rows: int | None = None


@dataclass(frozen=True)
class Shape:
    """Of the rows of a run. width: tokens of the longest. prompt: of its prompt, where answers are sampled. learnt: the
    most tokens of a row that count. each: rows of an example, as micro_batch_size counts them. examples: of a minibatch
    of this process; all: of its batch."""

    width: int
    prompt: int
    learnt: int
    each: int
    examples: int
    all: int


def shape_of(job: Job, config: Config) -> Shape:
    """Of the examples that were looked at."""
    places: Sequence[int] = range(min(len(job.train), LOOKED_AT))
    if isinstance(job.train, Encoded):
        places = first_and_longest(job.train.rows, LOOKED_AT)
    seen = [job.train[place] for place in places]
    share = -(-config.batch_size // ranks.world())
    if isinstance(config, RolloutConfig):
        prompt, end = max(len(one.ids) for one in seen), job.encoder.longest_end
        minibatch = -(-share // config.num_minibatches)
        return Shape(prompt + config.max_new_tokens + end, prompt, config.max_new_tokens, 1, minibatch, share)
    rows = [sequences_of([one]) for one in seen]
    width = max(len(row.ids) for some in rows for row in some)
    learnt = max(sum(row.learnt) for some in rows for row in some)
    return Shape(width, 0, learnt, max(map(len, rows)), share, share)


class Parts(NamedTuple):
    """Bytes. held: weights, roles and what a step keeps. rollout, scoring, update, step: of what is made in each of
    these phases."""

    weights: int
    roles: int
    kept: int
    rollout: int
    scoring: int
    update: int
    step: int

    @property
    def held(self) -> int:
        return self.weights + self.roles + self.kept

    @property
    def total(self) -> int:
        return self.held + max(self.rollout, self.scoring, self.update, self.step)


class Counter:
    """Counts what a job takes under some settings."""

    def __init__(self, backbone: Backbone, trained: Sequence[str], moments: int, config: Config, shape: Shape) -> None:
        """trained: the roles that have an optimizer, of so many moments. The backbone is copied to the meta device."""
        self.config, self.shape, self.trained, self.moments = config, shape, list(trained), moments
        self.device = backbone.model.device.type
        if self.device == "meta":
            self.device = "cuda"
        self.backbone = twin_of(backbone)
        self.padded = True
        self._counted: dict[Any, int] = {}

    @property
    def _loss_kl(self) -> bool:
        return isinstance(self.config, SamplingConfig) and self.config.loss_kl is not None

    @property
    def parameters(self) -> int:
        """Bytes of what trains."""
        return sum(parameter.nbytes for parameter in self._trained_parameters())

    def _trained_parameters(self) -> list[nn.Parameter]:
        if FULL in self.trained:
            return list(self.backbone.model.parameters())
        return [parameter for role in self.trained for parameter in self.backbone.parameters_of(role)]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of what stays, by name; "base" are the weights."""
        return {**self.backbone.bytes(), "optimizers": self.moments * self.parameters}

    def parts(self, settings: Settings) -> Parts:
        shape, of_samples = self.shape, isinstance(self.config, RolloutConfig)
        rows = min(settings.micro_batch_size, shape.examples) * shape.each
        several = settings.micro_batch_size < shape.examples and FULL not in self.trained
        lower = self._lower_bytes() * shape.all * shape.width if of_samples else 0
        return Parts(
            self.sizes["base"],
            sum(size for name, size in self.sizes.items() if name != "base"),
            lower + (self._states_bytes() * shape.all * shape.width if of_samples and self._loss_kl else 0),
            self._rollout(settings.rollout_rows or shape.all) if of_samples else 0,
            self._scoring(rows, settings) if of_samples else 0,
            self._update(rows, settings) + several * self.parameters,
            # PyTorch takes the roots of all second moments together where it has kernels for many tensors.
            self.parameters * (2 if self.device == "cuda" else 1),
        )

    def _states_bytes(self) -> int:
        """Of the hidden state of a token."""
        return self.backbone.hidden_size * self.backbone.model.dtype.itemsize

    def _lower_bytes(self) -> int:
        return self._states_bytes() if self.backbone.first_adapted_layer else 0

    def _peak(self, key: tuple[Any, ...], function: Callable[[], Any]) -> int:
        if key not in self._counted:
            try:
                self._counted[key] = peak_of(function, self.device, padded=self.padded)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # whatever the code of an architecture may raise where there are no values
                kind = type(self.backbone.model).__name__
                raise UserError(f"the memory of {kind} cannot be counted: {first_line(error)}") from error
        return self._counted[key]

    def _rows(self, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, attention mask and the states below the first adapted layer."""
        ids = torch.zeros(rows, self.shape.width, dtype=torch.int64, device="meta")
        first = self.backbone.first_adapted_layer
        lower = None
        if first and isinstance(self.config, RolloutConfig):
            lower = torch.empty(*ids.shape, self.backbone.hidden_size, dtype=self.backbone.model.dtype, device="meta")
        return ids, torch.ones_like(ids), lower

    def _update(self, rows: int, settings: Settings) -> int:
        """A forward and backward of each role that trains, of samples one after the other."""
        backbone, config = self.backbone, self.config
        backbone.enable_checkpointing(settings.gradient_checkpointing)
        backbone.head_chunk = settings.head_chunk_tokens
        full = FULL in self.trained
        roles = [None] if full else [role for role in self.trained if role in backbone.adapters]
        passes = [[role] for role in roles] if isinstance(config, RolloutConfig) else [roles]
        heads = [role for role, head in backbone.heads.items() if head.weight.requires_grad]
        ids, real, lower = self._rows(rows)

        def function() -> None:
            for some in passes:
                hidden = backbone.hidden(ids, real, some, lower=lower, dropout_seed=0 if config.lora_dropout else None)
                total = [self._predicted(h, ids, real) for role, h in hidden.items() if role in (None, "policy")]
                read = [role for role in heads if role in some or (role not in backbone.adapters and role not in roles)]
                total += [backbone.values(role, hidden.get(role, hidden[some[0]])).sum() for role in read]
                del hidden
                sum(total[1:], total[0]).backward()
                del total
            for parameter in self._trained_parameters():
                parameter.grad = None

        return self._peak(("update", rows, settings[1:3]), function)

    def _predicted(self, hidden: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """What the loss reads of the policy's predictions."""
        backbone = self.backbone
        of_tokens: dict[str, Any] = {"mask_count": len(ids) * self.shape.learnt}
        if self._loss_kl:
            found = backbone.divergence(hidden, torch.empty_like(hidden), ids, real, return_entropy=True, **of_tokens)
            assert found.logprobs is not None
            return found.kl.sum() + found.logprobs.sum()
        if isinstance(self.config, RolloutConfig):
            return backbone.logprobs(hidden, ids, real, return_entropy=True, **of_tokens)[0].sum()
        return backbone.logprobs(hidden, ids, real, **of_tokens).sum()

    def _scoring(self, rows: int, settings: Settings) -> int:
        """A pass of scoring of all roles."""
        self.backbone.head_chunk = settings.head_chunk_tokens
        ids, real, lower = self._rows(rows)
        assert isinstance(self.config, RolloutConfig)
        options = {"policy": self.config.scores_policy, "ref_hidden": self.config.loss_kl is not None}
        count = rows * self.shape.learnt
        return self._peak(
            ("scoring", rows, settings.head_chunk_tokens),
            lambda: self.backbone.score(ids, real, real, mask_count=count, lower=lower, **options),  # type: ignore[arg-type]
        )

    def _rollout(self, rows: int) -> int:
        """Prompts, the cache of all rows, and the pass of their last token."""
        assert isinstance(self.config, RolloutConfig)
        if self.config.engine.kind == "vllm":
            return 0
        backbone, shape, rows = self.backbone, self.shape, min(rows, self.shape.all)
        if why_not_local(backbone, False) is not None:
            raise UserError(f"the memory of a rollout cannot be counted: {why_not_local(backbone, False)}")
        prompts = -(-rows // self.config.num_generations)
        width = shape.prompt + self.config.max_new_tokens
        width += 0 if rows == shape.all else width // 2
        sliding, model = sliding_layers(backbone.model), backbone.model
        cache_name = next(name for name in CACHE_NAMES if name in backbone.accepted)

        def run(cache: SlotCache, count: int, tokens: int, seen: int) -> Tensor:
            ids = torch.zeros(count, tokens, dtype=torch.int64, device="meta")
            given = {
                "input_ids": ids, "attention_mask": torch.ones(count, seen, dtype=torch.int64, device="meta"),
                "position_ids": ids, cache_name: cache, "use_cache": True, "logits_to_keep": 1,
            }  # fmt: skip
            given = {name: value for name, value in given.items() if name in backbone.accepted}
            logits = model(**given).logits[:, -1]
            cache.column += tokens
            return logits

        @torch.no_grad()
        def function() -> None:
            caches, left = [], prompts
            with backbone.using("policy"):
                while left > 0:
                    count = min(left, max(1, PROMPT_TOKENS // shape.prompt))
                    caches.append(SlotCache(sliding, shape.prompt))
                    logits = run(caches[-1], count, shape.prompt, shape.prompt)
                    left -= count
                cache = SlotCache(sliding, width)
                cache.begin(rows, caches[0])
                cache.column = width - 1
                caches.clear()
                logits = run(cache, rows, 1, width)
                logits.float().softmax(-1)

        return self._peak(("rollout", rows), function)


class Plan(NamedTuple):
    """sizes: bytes of each adapter, head and of the optimizers. budget: None: the settings are those of the config."""

    settings: Settings
    parts: Parts
    shape: Shape
    sizes: dict[str, int]
    budget: int | None
    why: str


def counter_of(job: Job, config: Config) -> Counter:
    """Raises UserError where the passes of the job are not known here."""
    if not config.counted:
        raise UserError(f"the memory of {config.algorithm} cannot be counted")
    if job.backbone.shards is not None:
        raise UserError(f"the memory of a model in {config.shards} shards cannot be counted")
    moments = max(1 if isinstance(o, torch.optim.RMSprop) else 2 for o in job.optimizers.values())
    try:
        return Counter(job.backbone, list(job.optimizers), moments, config, shape_of(job, config))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # of what cannot be copied
        kind = type(job.backbone.model).__name__
        raise UserError(f"the memory of {kind} cannot be counted: {first_line(error)}") from error


def plan_of(job: Job, config: Config) -> Plan:
    """What the job takes: with the settings that `memory` leaves room for, or those of the config. UserError where it
    cannot be counted, or nothing fits."""
    counter = counter_of(job, config)
    return given(counter) if config.memory is None else Fit(counter, config.memory).plan()


def given(counter: Counter) -> Plan:
    """With the settings of the config."""
    config, shape = counter.config, counter.shape
    size = config.micro_batch_size or shape.examples
    rows = getattr(config, "rollout_rows", None)
    settings = Settings(size, bool(config.gradient_checkpointing), config.head_chunk_tokens, rows)
    return Plan(settings, counter.parts(settings), shape, counter.sizes, None, "as given")


class Fit:
    """The settings that fit a budget: as few recomputed activations and as many rows as there is room for."""

    def __init__(self, counter: Counter, budget: int) -> None:
        self.counter, self.budget, self.config = counter, budget, counter.config

    def fits(self, settings: Settings) -> bool:
        return self.counter.parts(settings).total <= self.budget

    def plan(self) -> Plan:
        config, shape = self.config, self.counter.shape
        chunk = config.head_chunk_tokens
        rollout = self._rollout_rows()
        choices = [False, True] if config.gradient_checkpointing is None else [config.gradient_checkpointing]
        enough = ENOUGH.get(self.counter.device, ENOUGH["cuda"])
        found: list[Settings] = []
        for chunks in [chunk] if chunk is not None else [None, 1024, LEAST_CHUNK]:
            for recompute in choices:
                size = self._size(Settings(1, recompute, chunks, rollout))
                if size is not None:
                    settings = Settings(size, recompute, chunks, rollout)
                    if size == shape.examples or size * shape.each * shape.width >= enough:
                        return self._made(settings)
                    found.append(settings)
            if found:
                return self._made(max(found, key=lambda one: one.micro_batch_size))
        raise UserError(self._refusal(rollout))

    def _made(self, settings: Settings) -> Plan:
        shape, reasons = self.counter.shape, []
        if self.config.micro_batch_size is None:
            whole = settings.micro_batch_size == shape.examples
            reasons.append("all rows of a minibatch fit" if whole else "one row more does not fit")
        if self.config.gradient_checkpointing is None:
            reasons.append("so few rows would fit without checkpointing" if settings.gradient_checkpointing
                           else "activations fit")  # fmt: skip
        parts, why = self.counter.parts(settings), ", ".join(reasons) or "as given"
        return Plan(settings, parts, shape, self.counter.sizes, self.budget, why)

    def _size(self, least: Settings) -> int | None:
        """The largest micro-batch that fits, None where one row is too much."""
        most, wanted = self.counter.shape.examples, self.config.micro_batch_size
        if wanted is not None:
            return wanted if self.fits(least._replace(micro_batch_size=wanted)) else None
        if not self.fits(least):
            return None
        low, high = 1, most  # fits, and the most that may
        if self.fits(least._replace(micro_batch_size=most)):
            return most
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(least._replace(micro_batch_size=middle)):
                low = middle
            else:
                high = middle
        return low

    def _rollout_rows(self) -> int | None:
        """None: all at a time."""
        if not isinstance(self.config, RolloutConfig) or self.config.rollout_rows is not None:
            return getattr(self.config, "rollout_rows", None)
        counter, rows = self.counter, self.counter.shape.all
        while rows > 1:
            parts = counter.parts(Settings(1, True, LEAST_CHUNK, rows))
            if parts.held + parts.rollout <= self.budget:
                break
            rows = -(-rows // 2)
        return None if rows == counter.shape.all else rows

    def _refusal(self, rollout: int | None) -> str:
        config = self.config
        least = Settings(
            config.micro_batch_size or 1, config.gradient_checkpointing is not False,
            config.head_chunk_tokens or LEAST_CHUNK, rollout,
        )  # fmt: skip
        parts = self.counter.parts(least)
        return (
            f"memory {shown(self.budget)} is too little: the least that this run takes is {shown(parts.total)}, of "
            f"which {shown(parts.weights)} are weights, with {described(least)}"
        )


def described(settings: Settings) -> str:
    """As keys."""
    shown_keys = {"micro_batch_size": settings.micro_batch_size,
                  "gradient_checkpointing": str(settings.gradient_checkpointing).lower(),
                  "head_chunk_tokens": settings.head_chunk_tokens, "rollout_rows": settings.rollout_rows}  # fmt: skip
    return ", ".join(f"{key} {value}" for key, value in shown_keys.items() if value is not None)


def fitted(job: Job, config: Config) -> Config:
    """The config with what `memory` decides; without it, as it is. UserError where nothing fits."""
    if config.memory is None:
        return config
    settings = plan_of(job, config).settings
    job.backbone.enable_checkpointing(settings.gradient_checkpointing)
    job.backbone.head_chunk = settings.head_chunk_tokens
    changes = settings._asdict()
    if not isinstance(config, RolloutConfig):
        del changes["rollout_rows"]
    return config.fitted(changes)


def print_plan(console: Console, job: Job, config: Config) -> None:
    """What `--dry-run` says of memory. UserError where a budget cannot be kept."""
    try:
        plan = plan_of(job, config)
    except UserError as error:
        if config.memory is not None:
            raise
        console.print(f"{error}; weights and roles are {shown(sum(job.backbone.bytes().values()))}")
        return
    console.print(table_of(plan))
    chosen = f"memory {shown(plan.budget)}: " if plan.budget is not None else ""
    console.print(f"{chosen}{described(plan.settings)} ({plan.why})")


def table_of(plan: Plan) -> Table:
    """The plan as a person reads it."""
    parts, shape, settings = plan.parts, plan.shape, plan.settings
    rows = min(settings.micro_batch_size, shape.examples) * shape.each
    each = f"{rows} rows of {shape.width} tokens"
    recomputed = "recomputed by layers" if settings.gradient_checkpointing else "all kept"
    chunk = "" if settings.head_chunk_tokens is None else f", logits of {settings.head_chunk_tokens} tokens at a time"
    sampled = settings.rollout_rows or shape.all
    lines = [
        ("weights", parts.weights, ""),
        (
            "roles",
            parts.roles,
            ", ".join(f"{name} {shown(size)}" for name, size in plan.sizes.items() if name != "base"),
        ),
        ("kept in a step", parts.kept, "hidden states"),
        ("+ rollout", parts.rollout, f"keys and values of {sampled} rows of up to {shape.width} tokens, and a pass"),
        ("+ scoring", parts.scoring, f"a pass of {each}"),
        ("+ update", parts.update, f"a pass of {each}, activations {recomputed}{chunk}, and gradients"),
        ("+ optimizer", parts.step, "gradients and what a step makes"),
    ]
    table = Table("memory", "bytes", "what")
    table.columns[1].justify = "right"
    for name, size, what in lines:
        if size:
            table.add_row(name, shown(size), what)
    table.add_row("at most", shown(parts.total), "what is held, and the largest of the phases (+)")
    return table
