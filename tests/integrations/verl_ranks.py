"""A rank of `linear_cross_entropy` over a sharded head; in a file of its own, so that the processes import no verl."""

import torch
import torch.distributed as dist

from rlhf_fast.integrations.verl.logprobs import linear_cross_entropy

N, D, V, WORLD = 9, 16, 40, 2


def inputs():
    """(hidden, weight, labels, upstream gradient of the log-probabilities)"""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return hidden, weight, torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)


def evaluated(hidden, weight, labels, upstream, group=None):
    """Log-probabilities, entropies and the gradients of hidden and of the head's rows that are given."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 1.0, "none", group)
    (logprobs * upstream + entropy).sum().backward()
    return [x.detach() for x in (logprobs, entropy, hidden.grad, weight.grad)]


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    hidden, weight, labels, upstream = inputs()
    results = evaluated(hidden, weight.chunk(WORLD)[rank], labels, upstream, dist.group.WORLD)
    dist.all_reduce(results[2])  # as verl's callers do
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
