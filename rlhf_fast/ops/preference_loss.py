"""preference_loss: the DPO family, from log-probabilities of chosen and rejected sequences.

With log-ratios x = log pi(chosen) - log ref(chosen) and y = log pi(rejected) - log ref(rejected), s the label
smoothing, softplus(t) = log(1 + exp(t)), and n, m the numbers of tokens of chosen and rejected:

    sigmoid:  h = beta (x - y),            L = (1 - s) softplus(-h) + s softplus(h)       (DPO where s = 0, else cDPO)
              d L / d chosen = beta (s sigmoid(h) - (1 - s) sigmoid(-h)) = -d L / d rejected
    ipo:      e = x / n - y / m - 1 / (2 beta),   L = e^2
              d L / d chosen = 2 e / n,   d L / d rejected = -2 e / m
    loss = mean of L over the pairs

Metrics are means over the pairs of the implicit rewards beta x and beta y (for ipo beta x / n and beta y / m), of their
difference (margin) and of whether chosen is the greater (accuracy; a tie counts as wrong).

Numerics. softplus and sigmoid are taken through exp(-|h|): no overflow, and no loss of the gradient of a pair that is
told apart with confidence. Computed in float32 (float64 for float64).

Cost per pair: four (ipo: six) numbers read, two gradient coefficients written; one launch and a sum.

Sources: DPO, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); label smoothing, Mitchell 2023, "A note on DPO with noisy
preferences" (cDPO); IPO, Azar et al. 2023 (arXiv 2310.12036, eq. 17), its log-ratios averaged over the tokens as its
authors advise.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _check, _losses

METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    variant: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean preference loss of B pairs and its metrics; only `chosen` and `rejected` get a gradient.

    chosen, rejected, ref_chosen, ref_rejected: (B,) sums of token log-probabilities, in nats; float32, bfloat16,
    float16 or float64, any strides. variant: one of VARIANTS. beta > 0: for sigmoid per nat, for ipo the paper's tau.
    label_smoothing: the chance in [0, 0.5) that a pair's label is flipped; sigmoid only.
    chosen_lengths, rejected_lengths: (B,) tokens that the sums run over, any number type, one below 1 counts as 1;
    ipo needs them, sigmoid does not look at them.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached; see the module for each.
    No pair gives a loss of 0. Raises ValueError or TypeError for what does not fit.
    """
    if chosen.dim() != 1:
        raise ValueError(f"chosen must be (B,), got {tuple(chosen.shape)}")
    shape, inputs = tuple(chosen.shape), [chosen, rejected, ref_chosen.detach(), ref_rejected.detach()]
    _losses.floats(shape, "(B,)", chosen=chosen, rejected=rejected, ref_chosen=inputs[2], ref_rejected=inputs[3])
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if variant == "ipo":
        if label_smoothing:
            raise ValueError(f"label_smoothing is of the sigmoid variant, got {label_smoothing} with ipo")
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        inputs += [_lengths(name, given, chosen) for name, given in lengths.items()]
    parameters = (_check.positive("beta", beta), label_smoothing)
    name = resolve("preference_loss", IMPLS, chosen.device, backend)
    if name == "reference":
        return reference(inputs, variant=variant, beta=beta, label_smoothing=label_smoothing)
    return _losses.call("preference_loss", inputs, None, None, variant, parameters, name, METRICS)


def _lengths(name: str, lengths: Tensor | None, like: Tensor) -> Tensor:
    if lengths is None:
        raise ValueError(f"{name} must be given for ipo: its log-ratios are averages over the tokens")
    _check.shaped(name, lengths, tuple(like.shape), "(B,)")
    _check.same_device(("chosen", like), (name, lengths))
    return lengths.detach().to(_check.compute_dtype(like.dtype))


def sigmoid(chosen_reward: Tensor, rejected_reward: Tensor, beta: float, label_smoothing: float) -> Tensor:
    h = chosen_reward - rejected_reward
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def ipo(chosen_reward: Tensor, rejected_reward: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return ((chosen_reward - rejected_reward) / beta - 0.5 / beta).square()


# (chosen_reward, rejected_reward, beta, label_smoothing) -> loss, per pair
VARIANTS = {"sigmoid": sigmoid, "ipo": ipo}


def reference(
    inputs: list[Tensor], *, variant: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) by definition, differentiable any number of times.

    inputs: [chosen, rejected, ref_chosen, ref_rejected], for ipo also [chosen_lengths, rejected_lengths].
    """
    dtype = _check.compute_dtype(inputs[0].dtype)
    chosen, rejected, ref_chosen, ref_rejected, *lengths = (x.to(dtype) for x in inputs)
    ratios = [chosen - ref_chosen, rejected - ref_rejected]
    if lengths:
        ratios = [ratio / length.clamp_min(1) for ratio, length in zip(ratios, lengths, strict=True)]
    chosen_reward, rejected_reward = (beta * ratio for ratio in ratios)
    losses = VARIANTS[variant](chosen_reward, rejected_reward, beta, label_smoothing)
    won, lost = chosen_reward.detach(), rejected_reward.detach()
    metrics = ((won > lost).to(dtype), won - lost, won, lost)
    means = [_losses.mean(x, None, None) for x in metrics]
    return _losses.mean(losses, None, None), dict(zip(METRICS, means, strict=True))


# (variant, [chosen, rejected, ref_chosen, ref_rejected, lengths of both for ipo], None, None, parameters, outputs)
IMPLS = {"cpu": _losses.cpu, "triton": _losses.triton}
OPS = {"preference_loss": tuple(IMPLS)}
_losses.register("preference_loss", IMPLS, gradients=2)
