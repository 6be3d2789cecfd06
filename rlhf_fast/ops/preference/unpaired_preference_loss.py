"""unpaired_preference_loss: the KTO family, from log-probabilities of answers that are desirable or not.

With the implicit reward a = beta (log pi - log ref), lambda the weight of the answer's class, w its own weight, z the
variant's shift, and u = a - z for a desirable answer, z - a for an undesirable one:

    kto:                L = w lambda (1 - sigmoid(u)),   z = beta max(0, mean of log pi - log ref over mismatched pairs)
    apo_zero_unpaired:  L = w lambda (1 - sigmoid(u)),   z = 0
    bco:                L = w lambda softplus(-u),       z = reward_shift
    loss = sum of L / denominator

    d L / d u = -w lambda sigmoid(u) sigmoid(-u), for bco -w lambda sigmoid(-u);   d u / d log pi = +-beta

Metrics: the mean rewards of the desirable and of the undesirable answers (0 where there is none) and their difference.

Numerics. softplus and sigmoid are taken through exp(-|u|). Computed in float32 (float64 for float64).

Cost per answer: five numbers read (weight and shift: one for all), one gradient coefficient written; one launch and a
sum.

Sources: KTO, Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7 to 9); APO-zero, D'Oosterlinck et al. 2024 (arXiv
2408.06266), whose two halves are those of kto without a shift; BCO with its reward shift and the weights that match
the prompts of both classes ("underlying distribution matching"), Jung et al. 2024 (arXiv 2404.04656).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss

METRICS = ("desirable_reward", "undesirable_reward", "margin")
_PARTS = ("desirable", "desirable_sum", "undesirable", "undesirable_sum")  # the kernel's means


class Variant(NamedTuple):
    """loss: of u, how far a reward lies on the right side of the shift. kernel: the name in the kernels' tables."""

    loss: Callable[[Tensor], Tensor]
    kernel: str
    shift: str | None  # what the shift comes from


VARIANTS = {
    "kto": Variant(lambda u: torch.sigmoid(-u), "kto", "kl"),
    "apo_zero_unpaired": Variant(lambda u: torch.sigmoid(-u), "kto", None),
    "bco": Variant(lambda u: softplus(-u), "bco", "reward_shift"),
}


@check.takes_numbers
def unpaired_preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    variant: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: Tensor | None = None,
    reward_shift: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of B answers and its metrics; only `logprobs` gets a gradient.

    logprobs, ref_logprobs: (B,) sums of token log-probabilities, in nats; float32, bfloat16, float16 or float64.
    desirable: (B,) bool, whether the answer is a good one.
    variant: one of VARIANTS. beta > 0, per nat. desirable_weight, undesirable_weight: >= 0, of the two classes.
    kl: () in nats, needed by kto: mismatched_kl of the batch, averaged over the ranks where there are several.
    reward_shift: () in units of reward, needed by bco: a running_reward_shift.
    weights: (B,) what an answer's loss is multiplied by (BCO: the odds that its prompt is one of a desirable answer).
    denominator: what the sum is divided by, a number or a 0-d tensor; B by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached. No answer gives a loss of 0.
    Raises ValueError or TypeError for what does not fit.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    parameters = [check.positive("beta", beta), desirable_weight, undesirable_weight]
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"the weights of the classes must be >= 0, got {desirable_weight} and {undesirable_weight}")
    inputs = _inputs(
        logprobs, ref_logprobs, desirable, variant, {"kl": kl, "reward_shift": reward_shift}, weights, beta
    )
    total = masked_loss.denominator_tensor(denominator, logprobs)
    name = resolve("unpaired_preference_loss", IMPLS, logprobs.device, backend)
    if name == "reference":
        return reference(inputs, variant=variant, parameters=parameters, denominator=total)
    kernel = VARIANTS[variant].kernel
    loss, parts = masked_loss.call(_run, inputs, None, total, kernel, parameters, name, _PARTS)
    return loss, _metrics(parts)


def _inputs(
    logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, variant: str, shifts: dict[str, Tensor | None],
    weights: Tensor | None, beta: float,
) -> list[Tensor]:  # fmt: skip
    """[logprobs, ref_logprobs, desirable as 0 or 1, weights, shift], (B,) each."""
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must be (B,), got {tuple(logprobs.shape)}")
    shape, dtype = tuple(logprobs.shape), check.compute_dtype(logprobs.dtype)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}")
    check.shaped("desirable", desirable, shape, "(B,)")
    tensors = {"logprobs": logprobs, "ref_logprobs": ref_logprobs.detach()}
    tensors["weights"] = logprobs.new_ones((), dtype=dtype).expand(shape) if weights is None else weights.detach()
    masked_loss.floats(shape, "(B,)", **tensors)
    source = VARIANTS[variant].shift
    shift = logprobs.new_zeros((), dtype=dtype)
    if source is not None:
        given = shifts[source]
        if given is None:
            raise ValueError(f"{source} must be given for {variant}")
        check.shaped(source, check.floating(source, given), (), "a 0-d tensor")
        shift = given.detach().to(dtype) * (beta if source == "kl" else 1.0)
    check.same_device(("logprobs", logprobs), ("desirable", desirable), (str(source), shift))
    return [logprobs, tensors["ref_logprobs"], desirable.to(dtype), tensors["weights"], shift.expand(shape)]


def mismatched_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """kto's estimate of KL(policy || reference), () in nats: of answers under prompts that are not theirs.

    logprobs, ref_logprobs: (B,) sums of token log-probabilities of each answer under another answer's prompt, floats.
    max(0, mean of their difference), detached; 0 for no answer. Source: KTO (arXiv 2402.01306, section 4.1).
    """
    masked_loss.floats(tuple(logprobs.shape), "(B,)", logprobs=logprobs, ref_logprobs=ref_logprobs)
    dtype = check.compute_dtype(logprobs.dtype)
    difference = logprobs.detach().to(dtype) - ref_logprobs.detach().to(dtype)
    return masked_loss.mean(difference, None, None).clamp_min(0)


@check.takes_numbers
def running_reward_shift(reward_shift: Tensor, metrics: dict[str, Tensor], *, decay: float = 0.99) -> Tensor:
    """bco's next delta, (): the moving average of the mean of both classes' mean rewards.

    reward_shift: () the last one, a float tensor (0 before the first step). metrics: of unpaired_preference_loss on a
    batch that has both classes. decay: in [0, 1). Raises ValueError for one outside. Source: BCO (arXiv 2404.04656).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    return decay * reward_shift + (1 - decay) * 0.5 * (metrics["desirable_reward"] + metrics["undesirable_reward"])


def reference(
    inputs: list[Tensor], *, variant: str, parameters: list[float], denominator: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) by definition, differentiable any number of times.

    inputs: [logprobs, ref_logprobs, desirable as 0 or 1, weights, shift]; parameters: beta and the classes' weights.
    """
    dtype = check.compute_dtype(inputs[0].dtype)
    logprobs, ref_logprobs, desirable, weights, shift = (x.to(dtype) for x in inputs)
    beta, desirable_weight, undesirable_weight = parameters
    reward, good = beta * (logprobs - ref_logprobs), desirable > 0
    losses = VARIANTS[variant].loss(torch.where(good, reward - shift, shift - reward))
    losses = masked_loss.product(torch.where(good, desirable_weight * weights, undesirable_weight * weights), losses)
    reward = reward.detach()
    parts = (desirable, torch.where(good, reward, 0.0), 1 - desirable, torch.where(good, 0.0, reward))
    means = [masked_loss.mean(x, None, denominator) for x in parts]
    return masked_loss.mean(losses, None, denominator), _metrics(dict(zip(_PARTS, means, strict=True)))


def _metrics(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    desirable, desirable_sum, undesirable, undesirable_sum = (parts[name] for name in _PARTS)
    good = desirable_sum / torch.where(desirable == 0, 1, desirable)
    bad = undesirable_sum / torch.where(undesirable == 0, 1, undesirable)
    return dict(zip(METRICS, (good, bad, good - bad), strict=True))


# (kernel, [logprobs, ref_logprobs, desirable, weights, shift], None, denominator, parameters, outputs)
IMPLS = {"cpu": masked_loss.cpu, "triton": masked_loss.triton}
OPS = {"unpaired_preference_loss": tuple(IMPLS)}
_run = masked_loss.register("unpaired_preference_loss", IMPLS, inputs=5, gradients=1)
