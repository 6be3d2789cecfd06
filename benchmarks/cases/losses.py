"""Losses of numbers per token, per answer or per pair, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

import rlhf_fast
from benchmarks.cases.build import Job, backward, both
from benchmarks.cases.sizes import Sizes, masked, normal, of_planes
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.peers import BETA, CLIP, VALUE_COEF
from rlhf_fast import PreferenceObjective, UnpairedPreferenceObjective

LOW, HIGH = 1 - CLIP, 1 + CLIP
ANSWERS, BINS = 8, 51  # to a prompt; of a distributional value
V_MIN, V_MAX = -3.0, 3.0

Loss = tuple[Tensor, dict[str, Tensor]]


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
    """With the metrics that policy_loss gives: clip fractions, approximate KL, ratio."""
    counts = mask.to(logprobs.dtype)
    total = counts.sum()
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(LOW, HIGH) * advantages
    loss = (-torch.minimum(unclipped, clipped) * counts).sum() / total
    with torch.no_grad():
        metrics = {
            "clip_fraction_low": (((ratio < LOW) & (advantages < 0)) * counts).sum() / total,
            "clip_fraction_high": (((ratio > HIGH) & (advantages > 0)) * counts).sum() / total,
            "clip_fraction": ((clipped < unclipped) * counts).sum() / total,
            "approx_kl": ((torch.expm1(log_ratio) - log_ratio) * counts).sum() / total,
            "ratio_mean": (ratio * counts).sum() / total,
            "ratio_max": torch.where(mask != 0, ratio, -torch.inf).max(),
            "ratio_min": torch.where(mask != 0, ratio, torch.inf).min(),
        }
    return loss, metrics


def policy(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        drawn = masked(sizes, device, "logprobs", "old_logprobs", "advantages")
        old = -drawn["old_logprobs"].abs() - 0.1
        return drawn | {"old_logprobs": old, "logprobs": old + 0.1 * drawn["logprobs"]}

    return Job(
        "policy_loss", *of_planes(sizes), draw, clipped_surrogate, rlhf_fast.policy_loss, ("logprobs",),
        peers="policy_loss",
    )  # fmt: skip


def bars(sizes: Sizes, device: str) -> list[Case]:
    """Beside eager with its metrics; other libraries compute other ones."""
    job = replace(
        policy(sizes, device), name="policy_loss, forward + backward, metrics", peers="", group="bars",
        bars=(Bar("cpu", "eager", 5),),
    )  # fmt: skip
    return [backward(job, device)]


def of_tokens(sizes: Sizes, device: str) -> list[Job]:
    surrogate = policy(sizes, device)

    def policy_and_value() -> Inputs:
        return masked(sizes, device, "values", "old_values", "returns") | surrogate.draw()

    def steps() -> Inputs:
        drawn = masked(sizes, device, "scores", "labels")
        return drawn | {"labels": (drawn["labels"] > 0).float()}

    def value(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
        error = torch.maximum((values - returns).square(), (clipped - returns).square())
        return 0.5 * (error * mask).sum() / mask.sum()

    def both_losses(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, **samples: Tensor) -> Tensor:
        policy, _ = clipped_surrogate(**samples, mask=mask)
        return policy + VALUE_COEF * value(values, old_values, returns, mask)

    def ours(
        values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, backend: str, **samples: Tensor
    ) -> Tensor:
        policy, _ = rlhf_fast.policy_loss(**samples, mask=mask, backend=backend)
        critic, _ = rlhf_fast.value_loss(values, old_values, returns, mask=mask, clip_eps=CLIP, backend=backend)
        return policy + VALUE_COEF * critic

    def process(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return (binary_cross_entropy_with_logits(scores, labels, reduction="none") * mask).sum() / mask.sum()

    return [
        surrogate,
        Job(
            "value_loss", *of_planes(sizes), lambda: masked(sizes, device, "values", "old_values", "returns"), value,
            partial(rlhf_fast.value_loss, clip_eps=CLIP), ("values",), peers="value_loss",
        ),
        Job(
            "policy_loss + value_loss", *of_planes(sizes), policy_and_value, both_losses, ours, ("logprobs", "values"),
            peers="policy_loss + value_loss",
        ),
        Job(
            "step_reward_loss", *of_planes(sizes), steps, process, rlhf_fast.step_reward_loss, ("scores",),
        ),
        distributional(sizes, device),
    ]  # fmt: skip


def distributional(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        return {"logits": normal(device, sizes.N, BINS, seed=0), "returns": normal(device, sizes.N, seed=1)}

    def eager(logits: Tensor, returns: Tensor) -> Tensor:
        edges = torch.linspace(V_MIN, V_MAX, BINS + 1, device=logits.device, dtype=logits.dtype)
        sigma = 0.75 * (V_MAX - V_MIN) / BINS
        cumulated = torch.erf((edges - returns.clamp(V_MIN, V_MAX)[:, None]) / (2**0.5 * sigma))
        target = cumulated.diff(dim=1) / (cumulated[:, -1:] - cumulated[:, :1])
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    return Job(
        "distributional_value_loss", f"N={sizes.N} K={BINS} float32", {"N": sizes.N, "K": BINS, "s": 4}, draw, eager,
        partial(rlhf_fast.distributional_value_loss, v_min=V_MIN, v_max=V_MAX), ("logits",),
    )  # fmt: skip


def of_answers(sizes: Sizes, device: str) -> list[Job]:
    n = 16 * sizes.B
    shape, counted = f"N={n} float32", {"N": n, "K": ANSWERS, "s": 4}

    def drawn(*names: str) -> Inputs:
        return {name: normal(device, n, seed=seed) for seed, name in enumerate(names)}

    def unpaired() -> Inputs:
        answers = drawn("logprobs", "ref_logprobs", "desirable")
        return answers | {"desirable": answers["desirable"] > 0, "kl": torch.full((), 0.5, device=device)}

    def ranked() -> Inputs:
        order = normal(device, n // ANSWERS, ANSWERS, seed=1).argsort(1)
        return {"rewards": normal(device, n, seed=0), "ranks": order.flatten()}

    def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return -logsigmoid(BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()

    def kto(logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
        above = BETA * (logprobs - ref_logprobs) - BETA * kl.clamp(min=0)
        return torch.where(desirable, 1 - above.sigmoid(), 1 - (-above).sigmoid()).mean()

    def plackett_luce(rewards: Tensor, ranks: Tensor) -> Tensor:
        best_first = rewards.view(-1, ANSWERS).gather(1, ranks.view(-1, ANSWERS).argsort(1))
        return (best_first.flip(1).logcumsumexp(1).flip(1) - best_first).sum(1).mean()

    return [
        Job(
            "preference_loss", shape, counted, lambda: drawn("chosen", "rejected", "ref_chosen", "ref_rejected"), dpo,
            partial(rlhf_fast.preference_loss, objective=PreferenceObjective(beta=BETA)), ("chosen", "rejected"),
            label="sigmoid", peers="preference_loss",
        ),
        Job(
            "unpaired_preference_loss", shape, counted, unpaired, kto,
            partial(rlhf_fast.unpaired_preference_loss, objective=UnpairedPreferenceObjective(beta=BETA)),
            ("logprobs",), label="kto",
        ),
        Job(
            "reward_loss", shape, counted, lambda: drawn("chosen_rewards", "rejected_rewards"),
            lambda chosen_rewards, rejected_rewards: -logsigmoid(chosen_rewards - rejected_rewards).mean(),
            rlhf_fast.reward_loss, ("chosen_rewards", "rejected_rewards"), peers="reward_loss",
        ),
        Job(
            "ranking_loss", shape, counted, ranked, plackett_luce,
            partial(rlhf_fast.ranking_loss, group_size=ANSWERS), ("rewards",),
        ),
    ]  # fmt: skip


def ops(sizes: Sizes, device: str) -> list[Case]:
    return [case for job in [*of_tokens(sizes, device), *of_answers(sizes, device)] for case in both(job, device)]
