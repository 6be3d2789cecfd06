"""A reward adapter on the backbone as a source: one score out of those of its members, or of one model and how sure it
is.

reward_stats.json beside the adapter has the mean and the standard deviation of its scores on the reference answers; of
several outputs each one's own, and the folders of the further members of an ensemble. reward_covariance.safetensors has
Sigma (D, D), from which the bound of one model comes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import load_adapter
from rlhf_fast.ops.rewards.reward_loss import ensemble_scores

STATS_FILE = "reward_stats.json"
COVARIANCE_FILE = "reward_covariance.safetensors"
BOUNDS = {"pessimistic": -1.0, "optimistic": 1.0}


class Output(NamedTuple):
    """One output of one member: a raw score s counts as (s - mean) / std."""

    name: str
    mean: float
    std: float


class Combination(NamedTuple):
    """variant: of ops/rewards/reward_loss.ensemble_scores. coef: what the spread is weighed by; None: 0.1 for uwo, as
    Coste et al. 2023 have it for PPO, else 1."""

    variant: str = "mean"
    coef: float | None = None

    @property
    def weight(self) -> float:
        return self.coef if self.coef is not None else 0.1 if self.variant == "uwo" else 1.0


MEAN = Combination()


@dataclass(frozen=True)
class AdapterSource:
    """The reward roles of the backbone.

    mean, std: of the raw score of the role "reward", of several outputs of their mean. outputs: of all members, in
    order; () for one that counts as (s - mean) / std. factor: (D, D) fp64, the lower Cholesky factor of Sigma, for the
    bound r -+ coef sqrt(phi^T Sigma^-1 phi) of one model, phi what its head is given.
    """

    name: str
    weight: float
    mean: float
    std: float
    outputs: tuple[Output, ...] = ()
    combination: Combination = MEAN
    factor: Tensor | None = None

    def combined(self, scores: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,) fp32 on the CPU. scores: (B,) or (B, M), raw. features: (B, D), where there is a factor."""
        raw = scores.float().cpu()
        raw = raw[:, None] if raw.dim() == 1 else raw
        variant, coef = self.combination.variant, self.combination.weight
        if self.factor is not None:
            assert features is not None, "the caller has the states of the role 'reward' from its joint traversal"
            raw = raw + BOUNDS[variant] * coef * width(self.factor, features)[:, None]
            variant = "mean"
        outputs = self.outputs or (Output("reward", self.mean, self.std),)
        means, stds = torch.tensor([[o.mean, o.std] for o in outputs]).unbind(1)
        return ensemble_scores(((raw - means) / stds).T, variant=variant, coef=coef)

    def outputs_of_first(self, backbone: Backbone) -> Sequence[Output]:
        """Those of the role "reward", where it has several."""
        count = backbone.heads["reward"].out_features
        return self.outputs[:count] if count > 1 else ()


def width(factor: Tensor, features: Tensor) -> Tensor:
    """(B,) fp32: sqrt(phi^T Sigma^-1 phi) of every row of features (B, D); factor: as of AdapterSource."""
    solved = torch.linalg.solve_triangular(factor, features.double().cpu().T, upper=False)
    return solved.norm(dim=0).float()


def load_adapter_source(
    backbone: Backbone, spec: str, weight: float, combination: Combination = MEAN, *, role: str = "reward"
) -> AdapterSource:
    """The reward adapter in the folder `spec` as the frozen role `role`, with the other members of its ensemble.

    UserError for an adapter without a score head, and for a combination that it cannot have.
    """
    folder, outputs = Path(spec), []
    for number, place in enumerate([folder, *member_folders(folder)]):
        member = f"{role}_{number}" if number else role
        load_adapter(backbone, member, str(place), trainable=False)
        if member not in backbone.heads:
            raise UserError(f"{role} {spec} is an adapter without a score head, such as a policy's")
        outputs += _outputs(place, read_stats(place), backbone.heads[member].out_features)
    if role != "reward" and len(outputs) > 1:
        raise UserError(f"{role} {spec} has {len(outputs)} outputs; only a reward may be an ensemble")
    stats, factor = read_stats(folder), None
    if combination.variant != "mean" and len(outputs) == 1:
        if combination.variant not in BOUNDS:
            raise UserError(f"reward_combine {combination.variant} is for several members, {spec} has one output")
        factor = read_factor(folder, backbone.heads[role].in_features)
    return AdapterSource(spec, weight, stats["mean"], stats["std"], tuple(outputs), combination, factor)


def member_folders(folder: Path) -> list[Path]:
    """The folders of the further members of the ensemble in `folder`."""
    return [folder / name for name in read_stats(folder)["members"]]


def _outputs(folder: Path, stats: dict[str, Any], count: int) -> list[Output]:
    outputs = stats["outputs"] or [Output("reward", stats["mean"], stats["std"])]
    if len(outputs) != count:
        raise UserError(f"{folder / STATS_FILE} tells of {len(outputs)} outputs, the score head has {count}")
    return outputs


def read_stats(folder: Path) -> dict[str, Any]:
    """reward_stats.json: mean, std, outputs, members and more; 0, 1, [] and [] where there is none. UserError for a
    bad one."""
    path = folder / STATS_FILE
    if not path.is_file():
        return {"mean": 0.0, "std": 1.0, "outputs": [], "members": []}
    try:
        stats = json.loads(path.read_text())
        mean, std = float(stats["mean"]), float(stats["std"])
        outputs = [Output(str(o["name"]), float(o["mean"]), float(o["std"])) for o in stats.get("outputs", [])]
        members = [str(name) for name in stats.get("members", [])]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} must hold a mean and a std: {error}") from None
    for m, s in [(mean, std), *((o.mean, o.std) for o in outputs)]:
        if not (math.isfinite(m) and math.isfinite(s) and s > 0):
            raise UserError(f"{path}: mean and std must be finite and std > 0, got {m} and {s}")
    return {**stats, "mean": mean, "std": std, "outputs": outputs, "members": members}


def write_stats(folder: Path, mean: float, std: float, outputs: Sequence[Output] = (), **more: Any) -> None:
    """outputs: where there are several. more: `members`, folder names, and whatever else is to be kept."""
    stats = {"mean": mean, "std": std, "outputs": [output._asdict() for output in outputs], **more}
    (folder / STATS_FILE).write_text(json.dumps({key: x for key, x in stats.items() if x not in ([], None)}) + "\n")


def write_covariance(folder: Path, sigma: Tensor) -> None:
    """sigma: (D, D), symmetric and positive definite."""
    save_file({"sigma": sigma.double().contiguous()}, folder / COVARIANCE_FILE)


def read_factor(folder: Path, dim: int) -> Tensor:
    """(D, D) fp64: the lower Cholesky factor of what `write_covariance` wrote. UserError where there is none."""
    path = folder / COVARIANCE_FILE
    if not path.is_file():
        raise UserError(f"reward {folder} has no {COVARIANCE_FILE}: train it with bound: true, or as an ensemble")
    try:
        sigma = load_file(path)["sigma"].double()
        if sigma.shape != (dim, dim):
            raise UserError(f"{path} must be ({dim}, {dim}), got {tuple(sigma.shape)}")
        return torch.linalg.cholesky(sigma)
    except (SafetensorError, KeyError, torch.linalg.LinAlgError) as error:
        raise UserError(f"{path} cannot be used: {error}") from None
