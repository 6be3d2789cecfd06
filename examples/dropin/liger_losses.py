"""Liger's losses from hidden states with and without us, side by side: time, the loss, and how far the gradients are.

python examples/dropin/liger_losses.py          (needs liger-kernel 0.8.5)

The calls are Liger's own, unchanged: `patched` puts our classes under its names for the length of a block.
"""

import timeit
from collections.abc import Callable

import torch
from liger_kernel import chunked_loss

from rlhf_fast.integrations import patched

SEQUENCES, LENGTH, HIDDEN, VOCABULARY, REPEATS = 4, 128, 64, 8192, 3
Measured = tuple[float, float, torch.Tensor]  # milliseconds, loss, gradient of the hidden states


def cases() -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Name -> a call that looks Liger's class up, and gives (loss, gradient of the hidden states)."""
    torch.manual_seed(0)
    states, reference = (torch.randn(SEQUENCES, LENGTH, HIDDEN) for _ in range(2))
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN) / 8)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 4, LENGTH, (SEQUENCES, 1))
    labels = ids.masked_fill(~mask, -100)
    scored = torch.log_softmax(states @ weight.detach().t(), -1).gather(-1, ids[..., None])[..., 0]
    old, advantages = scored + 0.1 * torch.randn_like(scored), torch.randn(SEQUENCES)

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = states.clone().requires_grad_()
        value = loss(hidden)
        value.backward()
        assert hidden.grad is not None
        return value.detach(), hidden.grad

    def grpo(hidden: torch.Tensor) -> torch.Tensor:
        loss = chunked_loss.LigerFusedLinearGRPOLoss(compiled=False)
        return loss(hidden, weight, ids, mask, advantages, ref_per_token_logps=scored, old_per_token_logps=old)[0]

    def dpo(hidden: torch.Tensor) -> torch.Tensor:
        loss = chunked_loss.LigerFusedLinearDPOLoss(compiled=False)
        return loss(weight, hidden, labels, ref_input=reference, ref_weight=weight.detach())[0]

    def orpo(hidden: torch.Tensor) -> torch.Tensor:
        return chunked_loss.LigerFusedLinearORPOLoss(compiled=False)(weight, hidden, labels)[0]

    def jsd(hidden: torch.Tensor) -> torch.Tensor:
        loss = chunked_loss.LigerFusedLinearJSDLoss(compiled=False)
        return loss(hidden.flatten(0, 1), weight, reference.flatten(0, 1), weight.detach(), labels.flatten())

    return {loss.__name__: lambda loss=loss: gradient(loss) for loss in (grpo, dpo, orpo, jsd)}  # type: ignore[misc]


def measured(call: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Measured:
    """The fastest of REPEATS calls after one, with what that one gave."""
    loss, gradient = call()
    return 1e3 * min(timeit.repeat(call, number=1, repeat=REPEATS)), loss.item(), gradient


def main() -> None:
    named = cases()
    without = {name: measured(call) for name, call in named.items()}
    with patched("liger") as names:
        print("replaced:", *names, sep="\n  ")
        ours = {name: measured(call) for name, call in named.items()}
    print(f"\n{SEQUENCES} x {LENGTH} tokens, vocabulary {VOCABULARY}, forward and backward on the CPU:")
    print("       Liger, ms   with us, ms   Liger's loss      our loss   gradients differ by, of the largest")
    for name, (milliseconds, loss, gradient) in ours.items():
        before, their_loss, their_gradient = without[name]
        apart = ((gradient - their_gradient).abs().max() / their_gradient.abs().max()).item()
        print(f"{name:5s} {before:10.1f} {milliseconds:13.1f} {their_loss:14.6f} {loss:13.6f} {apart:38.1e}")


if __name__ == "__main__":
    main()
