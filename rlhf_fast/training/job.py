"""What an algorithm works on, and the part of it that a resumed run needs."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn

from rlhf_fast.data.encoded import Encoded
from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.notes import say
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.advantages.kl_controller import FixedKLController
from rlhf_fast.rewards import Rewards
from rlhf_fast.rollout.engines.protocol import Engine
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.constraints import Constraints

if TYPE_CHECKING:
    from rlhf_fast.training.kept import Kept

FULL = "model"  # the optimizer key when every weight of the model trains


@dataclass
class Job:
    """A model with its roles, encoded data, optimizers by role, and what else changes while training.

    kl_controller: holds the weight of the KL penalty in the reward. constraints: the costs with their multipliers.
    counters: updates that were skipped in a row (bad_steps) and that were made (updates), passes with dropout (passes),
    prompts that took the place of others (extra_prompts), whether a policy passed the test of its costs (passed).
    """

    backbone: Backbone
    encoder: Encoder
    train: Encoded[Any]
    held_out: Encoded[Any]
    optimizers: dict[str, torch.optim.Optimizer]
    rewards: Rewards | None = None
    kl_controller: FixedKLController | None = None
    constraints: Constraints | None = None
    counters: dict[str, float] = field(default_factory=lambda: {"bad_steps": 0})
    pretraining: Sequence[Any] = field(default_factory=list)  # examples that learn beside the policy's own samples
    bad_tensor: str | None = None  # of the last update that was skipped
    kept: "Kept | None" = None  # what the present step has made; None outside of a step
    engine: str | Engine | None = None  # what samples; None: none was needed yet
    most_rows: dict[str, int] = field(default_factory=dict)  # of a kind of pass that has once not fitted the memory
    sampler_scores: bool = False  # the sampler's log-probabilities are, to rounding, those of a scoring pass

    @property
    def device(self) -> torch.device:
        return next(self.backbone.model.parameters()).device

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the model trains."""
        return FULL in self.optimizers

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of all optimizers."""
        optimizers = self.optimizers.values()
        return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def changing_adapters(self) -> list[str]:
        """The adapters that this run trains or moves."""
        names = [*self.optimizers, "reference", "safe", "ema", "teacher", "target_q", "target_q_2"]
        return [name for name in names if name in self.backbone.adapters or name in self.backbone.heads]


def dropout_seed(job: Job, config: Config) -> int | None:
    """The seed of the next pass's dropout; None without a gradient: scoring and evaluation drop nothing.

    The number of passes is among the counters, so a resumed run goes on where it was.
    """
    if not config.lora_dropout or not torch.is_grad_enabled():
        return None
    job.counters["passes"] = job.counters.get("passes", 0) + 1
    process = f" {ranks.rank()}" if ranks.rank() else ""
    digest = hashlib.sha256(f"{config.seed} {job.counters['passes']:.0f}{process}".encode()).digest()
    return int.from_bytes(digest[:5], "big")  # 40 bits: Backbone.hidden takes 47


def save_roles(job: Job, folder: Path, *beside: str) -> None:
    """The policy at the top of `folder`, in PEFT's format; of the roles `beside` those that are adapters, each in a
    folder of its name, and so the last policy whose costs passed their test and the policy's moving average."""
    save_adapter(job.backbone, "policy", str(folder))
    if "safe" in job.backbone.adapters:
        passed = "passed" in job.counters
        beside += ("safe",) * passed
        say("costs: the last policy that passed is in safe/" if passed else "costs: no policy passed")
    for role in (*beside, "ema"):
        if role in job.backbone.adapters:
            save_adapter(job.backbone, role, str(folder / role))


def capture(job: Job) -> dict[str, Any]:
    """Weights, optimizer states, random states and counters: all that the next step depends on."""
    state: dict[str, Any] = {
        "adapters": {name: job.backbone.snapshot(name) for name in job.changing_adapters()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in job.optimizers.items()},
        **passing_state(job),
    }
    if FULL in job.optimizers:
        state["model"] = job.backbone.model.state_dict()
    return state


def passing_state(job: Job) -> dict[str, Any]:
    """The part of it that is small, and changes in a step also before its first update."""
    return {
        "counters": dict(job.counters),
        "kl_controller": None if job.kl_controller is None else job.kl_controller.state_dict(),
        "constraints": None if job.constraints is None else job.constraints.state_dict(),
        "random": random_state(),
        "judge_calls": 0 if job.rewards is None else job.rewards.judge_calls,
    }


def restore(job: Job, state: dict[str, Any]) -> None:
    """Put a captured state back, bit for bit."""
    for name, snapshot in state["adapters"].items():
        job.backbone.restore(name, snapshot)
    if FULL in job.optimizers:
        job.backbone.model.load_state_dict(state["model"])
    for name, optimizer in job.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    restore_passing(job, state)


def restore_passing(job: Job, state: dict[str, Any]) -> None:
    """Put a `passing_state` back."""
    job.counters.clear()
    job.counters.update(state["counters"])
    if job.kl_controller is not None:
        job.kl_controller.load_state_dict(state["kl_controller"])
    if job.constraints is not None:
        job.constraints.load_state_dict(state["constraints"])
    if job.rewards is not None:
        job.rewards.judge_calls = state["judge_calls"]
    set_random_state(state["random"])


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as plain values and tensors."""
    legacy = numpy.random.get_state(legacy=False)
    generator = {**legacy["state"], "key": torch.from_numpy(legacy["state"]["key"].astype("int64"))}
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": generator},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put `random_state()` back."""
    random.setstate(state["python"])
    generator = state["numpy"]["state"]
    key = generator["key"].numpy().astype("uint32")
    numpy.random.set_state({**state["numpy"], "state": {**generator, "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
