"""Rewards from several sources, weighted and summed, with every bad answer reported as one line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rewards.adapter import MEAN, AdapterSource, Combination, load_adapter_source, read_stats
from rlhf_fast.rewards.functions import Payment, arguments_of, call, check_rows, load_function
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.rewards.one_by_one import OneByOne
from rlhf_fast.rewards.steps import ROLE, StepRewardModel
from rlhf_fast.rewards.verify import Verifier

JUDGE = "judge"  # the name of what a judge pays


@dataclass(frozen=True)
class Source:
    """A named callable (prompts, completions, columns) -> what each completion is paid (see functions.py). One that is
    no Worker is called in this process, and what it does to the process is done to the run."""

    name: str
    weight: float
    function: Callable[..., Any]


class Judged(NamedTuple):
    """total: (B,) fp32 on the CPU, the weighted sum of the sources. parts: each source's own scores, (B,), by name.
    payments: for each completion, weighted, what of the total is paid inside of it; None where no source does that."""

    total: Tensor
    parts: dict[str, Tensor]
    payments: list[list[Payment]] | None = None


@dataclass
class Rewards:
    """The sum of weighted sources, which may read columns that the policy does not see. named: those that were named by
    the user, in that order."""

    sources: list[Source] = field(default_factory=list)
    adapter: AdapterSource | None = None
    timeout: float | None = None  # seconds of one source for one batch
    named: list[str] = field(default_factory=list)
    judge: Judge | None = None
    judge_weight: float = 1.0

    @property
    def weights(self) -> dict[str, float]:
        """Of each source, by name, in the order in which they were named."""
        sources: list[Source | AdapterSource] = [*self.sources, *([] if self.adapter is None else [self.adapter])]
        found = {source.name: source.weight for source in sources}
        found |= {} if self.judge is None else {JUDGE: self.judge_weight}
        named = {name: found[name] for name in self.named if name in found}
        return {**named, **found}

    def reweigh(self, weights: Sequence[float]) -> None:
        """Give the sources other weights, in the same order."""
        by_name = dict(zip(self.weights, weights, strict=True))
        self.sources = [replace(source, weight=by_name[source.name]) for source in self.sources]
        if self.adapter is not None:
            self.adapter = replace(self.adapter, weight=by_name[self.adapter.name])
        self.judge_weight = by_name.get(JUDGE, self.judge_weight)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """UserError when a function or the judge needs a column that a row lacks."""
        for source in self.sources:
            check_rows(source.name, source.function, rows)
        if self.judge is not None:
            self.judge.check_rows(rows)

    @property
    def judge_calls(self) -> int:
        """The requests that the judge sent, which a resumed run goes on counting."""
        return 0 if self.judge is None else self.judge.speaker.calls

    @judge_calls.setter
    def judge_calls(self, calls: int) -> None:
        if self.judge is not None:
            self.judge.speaker.calls = calls

    def metrics(self) -> dict[str, float]:
        """What the sources tell of themselves since the last call."""
        return {} if self.judge is None else self.judge.metrics()

    @property
    def early(self) -> list[Verifier | OneByOne]:
        """The sources that can judge a row while others are still generated."""
        return [source.function for source in self.sources if isinstance(source.function, (Verifier, OneByOne))]

    def submit(self, row: int, completion: str, columns: Mapping[str, Any]) -> None:
        """Give those a completion. row: its number in the batch that will be asked for. columns: its row's, with
        `prompt` and `completion_ids`."""
        for source in self.early:
            if isinstance(source, Verifier):
                source.submit(completion, columns)
            else:
                lists = {name: [value] for name, value in columns.items()}
                source.submit(row, arguments_of(source, lists.pop("prompt"), [completion], lists))

    def timeout_of(self, source: Source) -> float | None:
        """A verifier has its own, for each completion."""
        return None if isinstance(source.function, Verifier) else self.timeout

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        adapter_scores: Tensor | None = None,
        adapter_features: Tensor | None = None,
    ) -> Judged:
        """What the sources pay.

        prompts: the rows' own `prompt` values; completions: text; columns: the other columns, as lists, and
        `completion_ids`, the sampled tokens, for sources that pay each; adapter_scores, adapter_features: (B,) or
        (B, M) raw scores of the adapter's roles, and (B, D), what the head of the first is given, needed when there is
        such a source.
        """
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(completions))
        payments: list[list[Payment]] | None = None
        for source in self.sources:
            parts[source.name], paid = call(
                source.name, source.function, prompts, completions, columns, self.timeout_of(source)
            )
            total = total + source.weight * parts[source.name]
            if paid is not None:
                payments = payments or [[] for _ in completions]
                for row, added in zip(payments, paid, strict=True):
                    row += [payment._replace(reward=source.weight * payment.reward) for payment in added]
        if self.adapter is not None:
            assert adapter_scores is not None, "the caller scores the adapter's role in its joint traversal"
            scores = self.adapter.combined(adapter_scores, adapter_features)
            parts[self.adapter.name] = scores
            total = total + self.adapter.weight * scores
        if self.judge is not None:
            parts[JUDGE] = self.judge.rewards(prompts, completions, columns)
            total = total + self.judge_weight * parts[JUDGE]
        return Judged(total, parts, payments)


def load_rewards(
    weights: Mapping[str, float],
    backbone: Backbone,
    *,
    chat: bool = False,
    timeout: float | None = None,
    role: str = "reward",
    combination: Combination = MEAN,
    trust_remote_code: bool = False,
) -> Rewards:
    """Rewards from 'pkg.mod:function', 'file.py:function', a reward adapter folder or a reward model folder, for one
    with several outputs 'folder:label'.

    weights: spec -> weight. An adapter is loaded onto `backbone` as the frozen role `role`, an ensemble as several; a
    process reward model pays every step. combination: how one score comes of several. chat: a reward model sees plain
    prompts through its chat template. timeout: seconds of a source for one batch. Raises UserError for anything else.
    """
    rewards = Rewards(timeout=timeout, named=list(weights))
    for spec, weight in weights.items():
        folder = Path(spec)
        if (folder / "adapter_config.json").is_file() and read_stats(folder).get("form") == "steps":
            rewards.sources.append(Source(spec, weight, StepRewardModel(backbone, spec, combination, chat=chat)))
        elif (folder / "adapter_config.json").is_file():
            if rewards.adapter is not None:
                raise UserError(f"only one {role} adapter per run; found {rewards.adapter.name} and {spec}")
            rewards.adapter = load_adapter_source(backbone, spec, weight, combination, role=role)
        elif (classifier := classifier_of(spec)) is not None:
            device = next(backbone.model.parameters()).device
            model = RewardModel(*classifier, device=device, chat=chat, trust_remote_code=trust_remote_code)
            rewards.sources.append(Source(spec, weight, model))
        elif is_function(spec):
            rewards.sources.append(Source(spec, weight, load_function(spec, timeout)))
        else:
            raise UserError(
                f"{role} {spec!r} is neither module:function, file.py:function, nor a folder with "
                "adapter_config.json or config.json"
            )
    if combination.variant != "mean" and not backbone.reward_roles and ROLE not in backbone.heads:
        raise UserError(f"reward_combine {combination.variant} is for a reward adapter, and reward names none")
    return rewards


def is_function(spec: str) -> bool:
    """Whether `load_rewards` takes it for the name of a function."""
    return ":" in spec and not (Path(spec) / "adapter_config.json").is_file() and classifier_of(spec) is None


def classifier_of(spec: str) -> tuple[str, str | None] | None:
    """(folder, label) of a 'folder' or 'folder:label' with a config.json; None for another spec."""
    folder, _, label = spec.rpartition(":")
    named: list[tuple[str, str | None]] = [(spec, None), (folder, label)]
    return next((found for found in named if found[0] and (Path(found[0]) / "config.json").is_file()), None)
