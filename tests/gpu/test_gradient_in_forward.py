"""The row kernels of token_logprobs on the GPU as ops with a linear head call them: the gradient in the same call."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Transform, empty_stats, reference
from rlhf_fast.testing.numerics import assert_contract
from tests.op_table import DTYPES, OPS


def run(backend, logits, targets, mask, gradient):
    stats = [s.fill_(torch.nan) for s in empty_stats(logits, True, True, targets.shape[2:])]
    IMPLS[backend][0](logits, targets, mask, Transform(temperature=0.7), True, stats, gradient)
    return stats


def with_gradient(logits, targets, mask):
    leaf = logits.detach().clone().requires_grad_()
    logprobs, entropy = reference(leaf, targets, temperature=0.7, mask=mask)
    logprobs.sum().backward()
    return [x.detach().cpu() for x in (logprobs, entropy, leaf.grad)]


# In bfloat16 rows of one block, then of clusters of 2, 4 and 8; rows that are not aligned are left to the row kernel.
@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32_000, 50_264, 151_936, 262_144, 50_257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", OPS["token_logprobs"][1:])
def test_a_gradient_in_forward_keeps_the_contract_on_the_gpu(backend, dtype, vocabulary):
    torch.manual_seed(vocabulary)
    logits = (4 * torch.randn(1, 5, vocabulary, device="cuda")).to(dtype)
    targets = torch.randint(vocabulary, (1, 5, 2), device="cuda")
    mask = torch.tensor([[1, 1, 0, 1, 1]], dtype=torch.uint8, device="cuda")
    logits[0, 2] = torch.nan
    gradient = torch.full_like(logits, torch.nan)
    stats = run(backend, logits, targets, mask, gradient)
    assert all(torch.equal(a, b) for a, b in zip(stats, run(backend, logits, targets, mask, None), strict=True))
    counted = logits.clone()
    counted[0, 2] = 0
    oracle, eager = (with_gradient(x, targets, mask) for x in (counted.double(), counted))
    found = (*stats[:2], gradient)
    for name, ours, *others in zip(("logprobs", "entropy", "gradient"), found, eager, oracle, strict=True):
        assert_contract(name, ours.cpu(), *others)
    run(backend, logits, targets, mask, logits)
    assert torch.equal(logits, gradient)
