"""Losses of numbers per token, per answer or per pair, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

import rlhf_fast
from benchmarks.cases.build import Job, cases
from benchmarks.cases.losses import eager as clipped_surrogate
from benchmarks.cases.sizes import Sizes, normal, planes, ragged_mask
from benchmarks.harness import Case, Inputs
from benchmarks.peers import BETA, CLIP, VALUE_COEF

ANSWERS, BINS = 8, 51  # to a prompt; of a distributional value
V_MIN, V_MAX = -3.0, 3.0


def of_tokens(sizes: Sizes, device: str) -> list[Job]:
    shape, costed = f"B={sizes.B} T={sizes.T} float32", {"N": sizes.B * sizes.T, "s": 4}

    def masked(*names: str) -> Inputs:
        return planes(sizes, device, *names) | {"mask": ragged_mask(sizes.B, sizes.T, device)}

    def policy() -> Inputs:
        given = masked("logprobs", "old_logprobs", "advantages")
        old = -given["old_logprobs"].abs() - 0.1
        return given | {"old_logprobs": old, "logprobs": old + 0.1 * given["logprobs"]}

    def policy_and_value() -> Inputs:
        return masked("values", "old_values", "returns") | policy()

    def near() -> Inputs:
        """Nearer than where the estimates of some libraries are clipped."""
        given = planes(sizes, device, "logprobs", "ref_logprobs")
        logprobs = -given["logprobs"].abs() - 0.1
        return {"logprobs": logprobs, "ref_logprobs": logprobs + 0.3 * given["ref_logprobs"]}

    def steps() -> Inputs:
        given = masked("scores", "labels")
        return given | {"labels": (given["labels"] > 0).float()}

    def value(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
        error = torch.maximum((values - returns).square(), (clipped - returns).square())
        return 0.5 * (error * mask).sum() / mask.sum()

    def both(
        values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
    ) -> Tensor:  # fmt: skip
        surrogate = clipped_surrogate(logprobs, old_logprobs, advantages, mask)
        return surrogate + VALUE_COEF * value(values, old_values, returns, mask)

    def ours_both(
        values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, backend: str,
    ) -> Tensor:  # fmt: skip
        surrogate, _ = rlhf_fast.policy_loss(logprobs, old_logprobs, advantages, mask=mask, backend=backend)
        found, _ = rlhf_fast.value_loss(values, old_values, returns, mask=mask, clip_eps=CLIP, backend=backend)
        return surrogate + VALUE_COEF * found

    def process(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return (binary_cross_entropy_with_logits(scores, labels, reduction="none") * mask).sum() / mask.sum()

    def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        log_ratio = ref_logprobs - logprobs
        return log_ratio.exp() - 1 - log_ratio

    return [
        Job(
            "policy_loss", shape, costed, policy, clipped_surrogate,
            lambda backend, **x: rlhf_fast.policy_loss(**x, backend=backend)[0],
            ("logprobs",), peers="policy_loss", compiles=False,
        ),
        Job(
            "value_loss", shape, costed, lambda: masked("values", "old_values", "returns"), value,
            lambda backend, **x: rlhf_fast.value_loss(**x, clip_eps=CLIP, backend=backend)[0],
            ("values",), peers="value_loss",
        ),
        Job(
            "policy_loss + value_loss", shape, costed, policy_and_value, both, ours_both, ("logprobs", "values"),
            peers="policy_loss + value_loss", compiles=False,
        ),
        Job(
            "step_reward_loss", shape, costed, steps, process,
            lambda backend, **x: rlhf_fast.step_reward_loss(**x, backend=backend)[0], ("scores",),
        ),
        Job(
            "kl_estimate", shape, costed, near, k3,
            lambda backend, **x: rlhf_fast.kl_estimate(**x, estimator="k3", backend=backend),
            ("logprobs",), label="k3", peers="kl_estimate",
        ),
        distributional(sizes, device),
    ]  # fmt: skip


def distributional(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        return {
            "logits": normal(device, sizes.N, BINS, seed=0),
            "returns": normal(device, sizes.N, seed=1),
        }

    def eager(logits: Tensor, returns: Tensor) -> Tensor:
        edges = torch.linspace(V_MIN, V_MAX, BINS + 1, device=logits.device, dtype=logits.dtype)
        sigma = 0.75 * (V_MAX - V_MIN) / BINS
        cumulated = torch.erf((edges - returns.clamp(V_MIN, V_MAX)[:, None]) / (2**0.5 * sigma))
        target = cumulated.diff(dim=1) / (cumulated[:, -1:] - cumulated[:, :1])
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    return Job(
        "distributional_value_loss", f"N={sizes.N} K={BINS} float32", {"N": sizes.N, "K": BINS, "s": 4}, draw, eager,
        lambda backend, **x: rlhf_fast.distributional_value_loss(**x, v_min=V_MIN, v_max=V_MAX, backend=backend)[0],
        ("logits",),
    )  # fmt: skip


def of_answers(sizes: Sizes, device: str) -> list[Job]:
    n = 16 * sizes.B
    shape, costed = f"N={n} float32", {"N": n, "K": ANSWERS, "s": 4}

    def drawn(*names: str) -> Inputs:
        return {name: normal(device, n, seed=seed) for seed, name in enumerate(names)}

    def unpaired() -> Inputs:
        given = drawn("logprobs", "ref_logprobs", "desirable")
        return given | {"desirable": given["desirable"] > 0, "kl": torch.full((), 0.5, device=device)}

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
            "preference_loss", shape, costed, lambda: drawn("chosen", "rejected", "ref_chosen", "ref_rejected"), dpo,
            lambda backend, **x: rlhf_fast.preference_loss(**x, beta=BETA, backend=backend)[0],
            ("chosen", "rejected"), label="sigmoid", peers="preference_loss",
        ),
        Job(
            "unpaired_preference_loss", shape, costed, unpaired, kto,
            lambda backend, **x: rlhf_fast.unpaired_preference_loss(**x, beta=BETA, backend=backend)[0],
            ("logprobs",), label="kto",
        ),
        Job(
            "reward_loss", shape, costed, lambda: drawn("chosen_rewards", "rejected_rewards"),
            lambda chosen_rewards, rejected_rewards: -logsigmoid(chosen_rewards - rejected_rewards).mean(),
            lambda backend, **x: rlhf_fast.reward_loss(**x, backend=backend)[0],
            ("chosen_rewards", "rejected_rewards"), peers="reward_loss",
        ),
        Job(
            "ranking_loss", shape, costed, ranked, plackett_luce,
            lambda backend, **x: rlhf_fast.ranking_loss(**x, group_size=ANSWERS, backend=backend)[0], ("rewards",),
        ),
    ]  # fmt: skip


def op_cases(sizes: Sizes, device: str) -> list[Case]:
    jobs = [*of_tokens(sizes, device), *of_answers(sizes, device)]
    return [case for job in jobs for case in cases(job, device)]
