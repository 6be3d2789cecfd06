"""A PPO step's advantages and loss by verl's functions and by ours, out of verl's own registries.

    python examples/dropin/verl_losses.py

`register()` adds ours as rlhf_fast_<name>, so that a config can choose them (actor.policy_loss.loss_mode=
rlhf_fast_vanilla); `rlhf_fast.patch("verl")` puts them in the place of verl's instead.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from typing import Any

import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.config import ActorConfig

from rlhf_fast.integrations import verl as rlhf_fast_verl

B, T = 64, 1024


def median_ms(function: Callable[[], Any], repeats: int = 5) -> tuple[Any, float]:
    return function(), 1e3 * statistics.median(timeit.repeat(function, number=1, repeat=repeats))


def main() -> None:
    torch.manual_seed(0)
    rlhf_fast_verl.register()
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=B)
    rewards, values = torch.randn(B, T), torch.randn(B, T)
    logprobs = -3 * torch.rand(B, T)
    old_logprobs = logprobs + 0.2 * torch.randn(B, T)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1))).long()

    def step(prefix: str) -> tuple[Any, float, Any, float]:
        estimate, loss = get_adv_estimator_fn(f"{prefix}gae"), get_policy_loss_fn(f"{prefix}vanilla")
        (advantages, _), estimate_ms = median_ms(lambda: estimate(rewards, values, mask, 1.0, 0.95))

        def forward_and_backward() -> dict[str, float]:
            leaf = logprobs.clone().requires_grad_()
            value, metrics = loss(old_logprobs, leaf, advantages, mask, "token-mean", config)
            value.backward()
            return {"loss": value.item(), "gradient": leaf.grad.norm().item(), **metrics}

        return (advantages * mask, estimate_ms, *median_ms(forward_and_backward))

    theirs, ours = step(""), step("rlhf_fast_")
    print(f"{B} answers of up to {T} tokens, {torch.get_num_threads()} threads")
    print(f"{'':24}{'verl':>14}{'rlhf_fast':>14}")
    for name, value in theirs[2].items():
        print(f"{name:24}{value:14.8f}{ours[2][name]:14.8f}")
    print(f"{'GAE, ms':24}{theirs[1]:14.2f}{ours[1]:14.2f}")
    print(f"{'PPO loss, ms':24}{theirs[3]:14.2f}{ours[3]:14.2f}")
    print(f"largest difference of an advantage: {(theirs[0] - ours[0]).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
