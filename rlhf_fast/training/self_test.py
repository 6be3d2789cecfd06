"""Whether a run learns at all, found out in its first steps: what fails in silence otherwise.

moves      after a step some weight of each role that trains is another; A of a LoRA aside, which weight decay moves
gradients  the gradient norm of each role is finite and not 0
ratio      the policy's ratio is 1 on the first minibatch: scoring and training see the same tokens and weights
reload     an adapter that is saved and loaded anew gives the same log-probabilities; PEFT reads it too, if installed

Where rewards are all the same a step teaches nothing: `moves` and `gradients` have the first PATIENCE steps, and those
in which the critic alone trains.
"""

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import load_adapter, save_adapter
from rlhf_fast.models.self_test import trial
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.experience import separate_randomness
from rlhf_fast.training.files import replace_file
from rlhf_fast.training.job import Job

FILE = "self_test.json"
PATIENCE = 5
# Of a ratio from 1: float32 rounds differently in passes of other rows; half precision by up to 2 units of a logit.
RATIO_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
RELOAD_ERROR = 1e-4  # nats; the same kernels on the same numbers


@dataclass(frozen=True)
class Result:
    """passed after `step`, or failed at it; value: the number that decided; why: nothing where it passed."""

    passed: bool
    step: int
    value: float
    why: str = ""


class SelfTest:
    """The tests of a run that is at its first step."""

    def __init__(self, job: Job, config: Config, folder: Path) -> None:
        self.job, self.config, self.folder = job, config, folder
        self.before = {role: self._sums(role) for role in job.optimizers}
        self.open = {f"{what} {role}" for role in job.optimizers for what in ("moves", "gradients")}
        self.results: dict[str, Result] = {}

    @property
    def finished(self) -> bool:
        return not self.open

    def step(self, done: int, metrics: dict[str, float]) -> list[str]:
        """Look at the run after `done` steps, the last with these metrics. A line for each test that failed."""
        news: dict[str, Result] = {}
        if done == 1:
            news |= self._ratio(metrics) | self._reload()
        for role in self.job.optimizers:
            alone = getattr(self.config, "critic_warmup_steps", 0) if role == "policy" else 0
            last = done >= min(PATIENCE + alone, self.config.steps)
            norm = metrics.get(f"grad_norm_{role}")
            moved = max(abs(now - then) for now, then in zip(self._sums(role), self.before[role], strict=True))
            if norm is None:  # the method tells of none
                self.open.discard(f"gradients {role}")
            else:
                news |= self._decided(f"gradients {role}", 0 < norm < math.inf, done, norm, last,
                    f"the gradient norm of {role} is {norm:g}: rewards that are all the same, or a loss without it"
                )  # fmt: skip
            news |= self._decided(f"moves {role}", moved > 0, done, moved, last,
                f"no weight of {role} has changed: its gradient is 0, or updates are skipped"
            )  # fmt: skip
        self.results |= news
        self.open -= set(news)
        if news and ranks.is_first():
            text = json.dumps({name: asdict(result) for name, result in self.results.items()}, indent=1)
            replace_file(self.folder / FILE, text + "\n")
        return [f"{name} after {done} steps: {result.why}" for name, result in news.items() if not result.passed]

    def _decided(self, name: str, passed: bool, done: int, value: float, last: bool, why: str) -> dict[str, Result]:
        if name not in self.open or not (passed or last):
            return {}
        return {name: Result(passed, done, value, "" if passed else why)}

    @torch.no_grad()
    def _sums(self, role: str) -> list[float]:
        """Of each weight that tells whether the role moves, the sum of its absolute values."""
        backbone = self.job.backbone
        if role in backbone.adapters or role in backbone.heads:
            named = backbone.named_parameters_of(role)
            weights = [p for name, p in named.items() if "lora_A" not in name]
        else:
            weights = self.job.optimizers[role].param_groups[0]["params"]
        return torch.stack([weight.abs().sum(dtype=torch.float64) for weight in weights]).tolist()

    def _ratio(self, metrics: dict[str, float]) -> dict[str, Result]:
        error = metrics.get("first_ratio_error")
        if error is None or self.config.lora_dropout:  # dropout alone takes the ratio off 1
            return {}
        bound = RATIO_ERROR[next(self.job.backbone.model.parameters()).dtype]
        why = f"a ratio of the first minibatch is {error:.2g} off 1: old log-probabilities are of another policy"
        return {"ratio": Result(error <= bound, 1, error, "" if error <= bound else why)}

    def _reload(self) -> dict[str, Result]:
        results = {}
        for role in self.job.optimizers:
            if role in self.job.backbone.adapters:
                try:
                    error, why = reload_error(self.job.backbone, role), "a saved adapter loads as another"
                except UserError as failed:
                    error, why = math.inf, str(failed)
                results[f"reload {role}"] = Result(
                    error <= RELOAD_ERROR, 1, error, "" if error <= RELOAD_ERROR else why
                )
        return results


def reload_error(backbone: Backbone, role: str) -> float:
    """Largest difference between log-probabilities of two short rows by the role and by its saved copy, in nats.

    Nothing is left of the copy. Raises UserError where PEFT reads something else from the files.
    """
    input_ids, mask = trial(backbone.model)
    with separate_randomness(0), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_adapter(backbone, role, folder)
        load_adapter(backbone, "reloaded", folder, trainable=False)
        try:
            hidden = {name: backbone.hidden(input_ids, mask, [name])[name] for name in (role, "reloaded")}
            ours, theirs = (backbone.logprobs(states, input_ids, mask) for states in hidden.values())
        finally:
            backbone.remove_adapter("reloaded")
    return float((ours - theirs).abs().max())
