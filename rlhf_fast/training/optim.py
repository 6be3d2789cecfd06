"""One optimizer per role; gradients of a minibatch from its parts; the update that refuses what is not finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.training import halving, ranks
from rlhf_fast.training.config import Config, RolloutConfig
from rlhf_fast.training.halving import Parts
from rlhf_fast.training.job import FULL, Job
from rlhf_fast.training.kept import Kept


class Idle(Protocol):
    """A micro-batch. idle: of rows that another process has, without effect here."""

    @property
    def idle(self) -> bool: ...


R = TypeVar("R", bound=Idle)
Term = tuple[Tensor, dict[str, Tensor]]  # (loss, metrics)
Loss = Callable[[R], Term]  # what a method brings: rows -> (loss, metrics)
Terms = Callable[[R], Iterator[Term]]  # or several that add up, each made when the one before is back-propagated
EXTREMES = ("ratio_max", "ratio_min")  # of the metrics; the others add up


def adamw(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW with the config's settings; the learning rate is set at every step by `learning_rate`."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay
    )


def build_optimizer(parameters: list[nn.Parameter], config: RolloutConfig) -> torch.optim.Optimizer:
    """AdamW, or RMSprop, which has adam_beta2 and adam_eps for its squares and no momentum."""
    if config.optimizer == "adamw":
        return adamw(parameters, config)
    return torch.optim.RMSprop(
        parameters, lr=config.learning_rate, alpha=config.adam_beta2, eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def learning_rate(config: Config, step: int, *, role: str = "policy") -> float:
    """The rate at `step` (from 0): linear warm-up to the role's, then constant, or down to 0 at config.steps."""
    peak = config.peak_rate(role)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    scale = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * scale[config.lr_schedule]


def set_learning_rates(job: Job, config: Config, step: int) -> None:
    for role, optimizer in job.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, role=role)


def accumulate(
    loss: Loss[R] | Terms[R],
    parts: Iterable[R],
    kept: Kept | None = None,
    *,
    beside: tuple[Loss[Any], Iterable[Any]] | None = None,
) -> dict[str, Tensor]:
    """Backward of this process's part of a minibatch, part by part; the minibatch's loss and metrics, detached.

    Those of the parts add up, because each divides by the numbers of the whole minibatch. kept: of a step that keeps
    the sums so far, and has those of the parts that were done before, which `parts` lack. beside: a further loss, whose
    gradient is added, and its parts, behind the others; of it come the metrics alone.
    """
    collected = [] if kept is None else kept.sums()
    for _ in collected if ranks.world() > 1 else ():
        ranks.heed()  # as often as the processes that have done fewer of them

    def learn(of_rows: Loss[Any] | Terms[Any], counts: bool, rows: Any) -> dict[str, Tensor]:
        said = of_rows(rows)
        total, metrics = torch.zeros(()), dict[str, Tensor]()
        for term, of_term in [said] if isinstance(said, tuple) else said:
            if isinstance(said, tuple) or term.requires_grad:  # one of several may be a constant
                (0.0 * term if rows.idle else term).backward()
            total, metrics = total.to(term) + term.detach(), metrics | of_term
        metrics = {"loss": total, **metrics} if counts else metrics
        # The extremes of idle rows are among those of the process that has them.
        found = {name: metric.detach() for name, metric in metrics.items()}
        return {n: 0.0 * m if rows.idle and n not in EXTREMES else m for n, m in found.items()}

    terms: list[tuple[Loss[Any] | Terms[Any], Iterable[Any], bool]] = [(loss, parts, True)]
    terms += [] if beside is None else [(*beside, False)]
    finished = 0  # rows of the terms that are over
    for of_rows, those, counts in terms:
        for made in halving.each(those, partial(learn, of_rows, counts)):
            if made is None:
                collected.clear()
                continue
            collected.append(made)
            if kept is not None and isinstance(those, Parts):
                kept.keep_sums(collected, finished + those.done)
            ranks.heed()
        finished += those.done if isinstance(those, Parts) else 0
    if kept is not None:
        kept.close()
    names = dict.fromkeys(name for part in collected for name in part)
    stacked = {name: torch.stack([part[name] for part in collected if name in part]) for name in names}
    return over_processes({n: extreme(n, values) if n in EXTREMES else values.sum() for n, values in stacked.items()})


def extreme(name: str, ratios: Tensor, over: Callable[[Tensor], Tensor] = torch.amax) -> Tensor:
    """(): that of the ratios of several parts, of which those are 0 that count no token. over: the greatest of them."""
    if name == "ratio_max":
        return over(ratios)
    least = -over(-torch.where(ratios == 0, torch.inf, ratios))
    return torch.where(least == torch.inf, 0.0, least)


def over_processes(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of 0-d metrics of each process's rows those of all."""
    if ranks.world() == 1:
        return metrics
    sums = [name for name in metrics if name not in EXTREMES]
    summed = ranks.all_sum(torch.stack([metrics[name].float() for name in sums]))
    found = dict(zip(sums, summed, strict=True))
    for name in [name for name in EXTREMES if name in metrics]:
        found[name] = extreme(name, metrics[name].float(), ranks.all_max)
    return {name: found[name] for name in metrics}


def as_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The metrics on the host, in one wait for the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def update(job: Job, config: Config, loss: Tensor) -> dict[str, float]:
    """Clip each role's gradient, the sum over the processes, to max_grad_norm and step its optimizer; gradients are
    then cleared.

    loss: the value that was back-propagated, for the check. If it or a gradient is not finite, nothing steps; after
    config.max_bad_steps such updates in a row UserError names the first bad tensor, and at once where a weight is not
    finite after the step.
    Returns the gradient norms before clipping and `skipped` (0 or 1).
    """
    parameters = {role: optimizer.param_groups[0]["params"] for role, optimizer in job.optimizers.items()}
    for group in parameters.values():
        ranks.sum_gradients(group)
    gradients = {role: [p.grad for p in group if p.grad is not None] for role, group in parameters.items()}
    none = loss.new_zeros(())  # of a role that does not train in this step
    norms = {role: (nn.utils.get_total_norm(group) if group else none).float() for role, group in gradients.items()}
    checked = torch.stack([loss.detach().float(), *norms.values()])
    finite = bool(torch.isfinite(checked).all())
    if not finite:
        job.bad_tensor = _bad_tensor(job, loss)
        if job.counters["bad_steps"] + 1 >= config.max_bad_steps:
            raise UserError(
                f"{job.bad_tensor} is not finite, {config.max_bad_steps} updates in a row (max_bad_steps); "
                "lower learning_rate or look at the data"
            )
    if job.kept is not None:
        job.kept.changed = True
    for role, optimizer in job.optimizers.items():
        if finite:
            nn.utils.clip_grads_with_norm_(parameters[role], config.max_grad_norm, norms[role])
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    job.counters["bad_steps"] = 0 if finite else job.counters["bad_steps"] + 1
    job.counters["updates"] = job.counters.get("updates", 0) + finite
    sizes = torch.stack([nn.utils.get_total_norm(group).float() for group in parameters.values()])
    # The norms after the step come to the host in the same wait as those before it.
    report = as_numbers({**norms, "weights": sizes.amax()})
    if not math.isfinite(report.pop("weights")):
        bad = _bad_weight(job)
        if bad is not None:  # else only a square was too large
            raise UserError(f"{bad} is not finite after an update; lower learning_rate")
    return {**{f"grad_norm_{role}": norm for role, norm in report.items()}, "skipped": float(not finite)}


def check_progress(job: Job) -> None:
    """UserError at the end of a run whose every update was skipped, or the last several: it changed nothing, or nothing
    any more. One alone happens in runs that are well."""
    every, last = job.counters.get("updates") == 0, job.counters["bad_steps"]
    if every or last > 1:
        skipped = "every update was" if every else f"the last {last:.0f} updates were"
        raise UserError(f"{skipped} skipped, the last because {job.bad_tensor or 'a number'} is not finite; look at "
                        "the data and the model")  # fmt: skip


def _bad_tensor(job: Job, loss: Tensor) -> str:
    if not bool(torch.isfinite(loss)):
        return "loss"
    for name, parameter in _named_parameters(job):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return "the gradient norm"


def _bad_weight(job: Job) -> str | None:
    named = _named_parameters(job)
    return next((name for name, parameter in named if not bool(torch.isfinite(parameter).all())), None)


def _named_parameters(job: Job) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimizers train, under the names of its role and in it."""
    for role in job.optimizers:
        model = job.backbone.model
        named = dict(model.named_parameters()) if role == FULL else job.backbone.named_parameters_of(role)
        yield from ((f"{role} {name}", parameter) for name, parameter in named.items())
