"""One optimizer per role, and the update that refuses numbers that are not finite."""

import math

import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import FULL, Job


def adamw(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW with the config's settings; the learning rate is set at every step by `learning_rate`."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )


def learning_rate(config: Config, step: int, *, peak: float | None = None) -> float:
    """The rate at `step` (from 0): linear warm-up to `peak`, then constant, or down to 0 at config.steps."""
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    scale = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * scale[config.lr_schedule]


def set_learning_rates(job: Job, rates: dict[str, float]) -> None:
    for role, rate in rates.items():
        for group in job.optimizers[role].param_groups:
            group["lr"] = rate


def update(job: Job, config: Config, losses: dict[str, Tensor]) -> dict[str, float]:
    """Clip each role's accumulated gradient to max_grad_norm and step its optimizer; gradients are then cleared.

    losses: the values that were back-propagated, by name, for the check. If any loss or gradient is not finite,
    nothing steps; after config.max_bad_steps such updates in a row UserError names the first bad tensor.
    Returns the gradient norms before clipping and `skipped` (0 or 1).
    """
    parameters = {role: optimizer.param_groups[0]["params"] for role, optimizer in job.optimizers.items()}
    gradients = {role: [p.grad for p in group if p.grad is not None] for role, group in parameters.items()}
    norms = {role: nn.utils.get_total_norm(group) for role, group in gradients.items()}
    checked = torch.stack([*(v.detach().float() for v in losses.values()), *(n.float() for n in norms.values())])
    finite = bool(torch.isfinite(checked).all())
    if not finite:
        job.bad_tensor = _bad_tensor(job, losses)
        if job.counters["bad_steps"] + 1 >= config.max_bad_steps:
            raise UserError(
                f"{job.bad_tensor} is not finite, {config.max_bad_steps} updates in a row (max_bad_steps); "
                "lower learning_rate or look at the data"
            )
    for role, optimizer in job.optimizers.items():
        if finite:
            nn.utils.clip_grads_with_norm_(parameters[role], config.max_grad_norm, norms[role])
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    job.counters["bad_steps"] = 0 if finite else job.counters["bad_steps"] + 1
    job.counters["updates"] = job.counters.get("updates", 0) + finite
    report = {f"grad_norm_{role}": float(norm) for role, norm in norms.items()}
    return {**report, "skipped": float(not finite)}


def check_progress(job: Job) -> None:
    """UserError at the end of a run whose every update was skipped: it changed nothing."""
    if job.counters.get("updates") == 0:
        raise UserError(f"every update was skipped, the last because {job.bad_tensor or 'a number'} is not finite; "
                        "look at the data and the model")  # fmt: skip


def _bad_tensor(job: Job, losses: dict[str, Tensor]) -> str:
    for name, value in losses.items():
        if not bool(torch.isfinite(value)):
            return name
    for role in job.optimizers:
        model = job.backbone.model
        named = dict(model.named_parameters()) if role == FULL else job.backbone.named_parameters_of(role)
        for name, parameter in named.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"the gradient of {role} {name}"
    return "the gradient norm"
