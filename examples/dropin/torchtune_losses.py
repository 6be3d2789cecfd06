"""torchtune's RLHF functions with and without us, side by side: time, and the largest difference.

python examples/dropin/torchtune_losses.py          (needs torchtune 0.6.1 and torchao 0.10.0)
"""

import timeit
from collections.abc import Callable

import torch
from torchtune import rlhf
from torchtune.rlhf import loss as losses

from rlhf_fast.integrations import patched

BATCH, LENGTH, VOCABULARY, REPEATS = 16, 512, 1024, 3


def cases() -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that looks torchtune's function up, and gives a tensor to compare: a result or a gradient."""
    torch.manual_seed(0)
    new, old, advantages, old_values, values, returns = (0.3 * torch.randn(BATCH, LENGTH) for _ in range(6))
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 4, LENGTH, (BATCH, 1))
    logits = torch.randn(BATCH, LENGTH, VOCABULARY)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH)).masked_fill(~mask, -100)

    def ppo() -> torch.Tensor:
        policy = new.clone().requires_grad_()
        losses.PPOLoss()(old, policy, advantages, old_values, values, returns, mask, mask)[0].backward()
        return policy.grad

    def log_probs() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        rlhf.get_batch_log_probs(leaf, labels).sum().backward()
        return leaf.grad

    return {
        "PPOLoss, forward and backward": ppo,
        "get_batch_log_probs, forward and backward": log_probs,
        "estimate_advantages": lambda: rlhf.estimate_advantages(values, advantages, 1.0, 0.95, mask)[0],
        "whiten": lambda: rlhf.whiten(advantages, mask) * mask,
    }


def measured(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(milliseconds of the fastest of REPEATS calls after one, the result)"""
    result = call()
    return 1e3 * min(timeit.repeat(call, number=1, repeat=REPEATS)), result


def main() -> None:
    named = cases()
    without = {name: measured(call) for name, call in named.items()}
    with patched("torchtune") as names:
        ours = {name: measured(call) for name, call in named.items()}
    print(f"replaced: {', '.join(names)}\n")
    print(f"{'':42s}  torchtune      ours  largest difference")
    for name in named:
        (their_ms, theirs), (ms, result) = without[name], ours[name]
        print(f"{name:42s}  {their_ms:6.2f} ms {ms:6.2f} ms  {(theirs - result).abs().max():.1e}")


if __name__ == "__main__":
    main()
