"""The CUDA kernels' own source, compiled for the host with one thread per CUDA thread: what CI runs without a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rlhf_fast.backends import DTYPE_CODES
from rlhf_fast.ops.tokens.token_logprobs import empty_stats
from rlhf_fast.testing.numerics import assert_contract
from tests.host_cuda.token_logprobs import address, arguments, row_sizes, with_gradients


@pytest.fixture(scope="module")
def host(compiled):
    return compiled("token_logprobs")


def _forward(host, logits, targets, mask=None, gradient=None, **transform):
    stats = [s.fill_(torch.nan) for s in empty_stats(logits, True, True, targets.shape[2:])]
    host.forward(*arguments(logits, targets, mask, transform, stats), ctypes.c_void_p(address(gradient)))
    return stats


def _backward(host, logits, targets, stats, grad_logprobs, grad_entropy, grad_lse, gradient, **transform):
    upstream = [ctypes.c_void_p(address(x)) for x in (grad_logprobs, grad_entropy, grad_lse, gradient)]
    rows = (ctypes.c_int64 * 4)(*row_sizes(gradient))
    host.backward(*arguments(logits, targets, None, transform, stats), *upstream, rows)


@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "per_row", "transform"),
    [
        (1, 1, {}),
        (17, 3, {"temperature": 0.7}),
        (4099, 1, {"temperature": 1.3, "softcap": 5.0}),
        (9001, 2, {"logit_scale": 0.5}),
    ],
    ids=str,
)
def test_forward_and_backward_keep_the_numerics_contract(host, dtype, vocabulary, per_row, transform):
    torch.manual_seed(vocabulary)
    logits = (4 * torch.randn(2, 3, vocabulary)).to(dtype)[:, 1:]  # strided rows, aligned nowhere in particular
    targets = torch.randint(vocabulary, (2, 2, per_row))
    g = [torch.randn(targets.shape, dtype=torch.float64), *torch.randn(2, 2, 2, dtype=torch.float64)]
    oracle = with_gradients(logits.double(), targets, transform, *g)
    eager = with_gradients(logits, targets, transform, *g)

    stats = _forward(host, logits, targets, **transform)
    gradient = torch.full(logits.shape, torch.nan, dtype=dtype)
    upstream = [x.to(stats[0].dtype) for x in g]
    _backward(host, logits, targets, stats, *upstream, gradient, **transform)
    for name, *values in zip(("logprobs", "entropy", "gradient"), (*stats[:2], gradient), eager, oracle, strict=True):
        assert_contract(name, *values)

    in_place = logits.contiguous().clone()
    _backward(host, in_place, targets, stats, *upstream, in_place, **transform)
    assert torch.equal(in_place, gradient)


def test_every_target_has_the_slope_of_a_saturated_softcap(host):
    torch.manual_seed(0)
    logits, targets = 25 + 3 * torch.rand(1, 1, 700), torch.randperm(700)[None, None, :600]
    exact = logits.double()
    e, z = torch.exp(-exact / 2), 4 * torch.tanh(exact / 4)
    is_target = torch.zeros_like(exact).scatter(-1, targets, 1.0)
    expected = ((is_target - 600 * torch.softmax(z, -1)) * 4 * e / (1 + e).square()).float()
    gradient = torch.empty_like(logits)
    _forward(host, logits, targets, gradient=gradient, softcap=4.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_the_statistics_of_two_logits_are_those_of_a_coin(host):
    logits = torch.tensor([[[1.0, 3.0, 0.0]]]).log()  # and a forbidden token
    _, _, row_max, row_logsum, sum_p_squared = _forward(host, logits, torch.tensor([[1]]))
    found = [row_max.item(), row_logsum.item(), sum_p_squared.item()]
    assert found == pytest.approx([1.0986122887, 0.2876820724, 0.625], rel=1e-6)


def test_forward_writes_the_gradient_over_the_logits(host):
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 3, 4101), torch.randint(4101, (1, 3))
    none = torch.zeros(1, 3)
    expected = with_gradients(logits.double(), targets[..., None], {}, torch.ones(1, 3, 1), none, none)[2]
    _forward(host, logits, targets, gradient=logits)
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-7)


def test_masked_rows_are_never_read_and_give_zero(host):
    logits, targets = torch.randn(1, 3, 40), torch.tensor([[1, 10**9, 2]])
    logits[0, 1] = torch.nan
    mask = torch.tensor([[1, 0, 1]], dtype=torch.uint8)
    gradient = torch.full_like(logits, torch.nan)
    stats = _forward(host, logits, targets, mask, gradient=gradient)
    assert all(s[0, 1] == 0 for s in stats)
    assert not gradient[0, 1].any()
    assert torch.isfinite(gradient).all()


def test_a_target_outside_the_vocabulary_makes_its_own_row_nan(host):
    logits, targets = torch.randn(1, 4, 33), torch.tensor([[1, 33, -1, 32]])
    stats = _forward(host, logits, targets)
    assert stats[0].isnan().tolist() == [[False, True, True, False]]


def test_banned_tokens_and_ties_at_the_maximum_are_exact(host):
    logits = torch.full((1, 2, 4096), -torch.inf)
    logits[0, 0, [0, 4000]] = 5.0  # two equal candidates, whole threads without any
    logits[0, 1, 7] = 3.0  # nothing but the target
    logprobs, entropy, *_ = _forward(host, logits, torch.tensor([[4000, 7]]))
    half = torch.tensor(2.0).log().item()
    torch.testing.assert_close(logprobs, torch.tensor([[-half, 0.0]]))
    torch.testing.assert_close(entropy, torch.tensor([[half, 0.0]]))


def test_a_confident_token_keeps_its_value_and_its_gradient(host):
    logits = torch.zeros(1, 1, 2)
    logits[..., 0] = 20.0
    gradient = torch.empty_like(logits)
    logprobs, *_ = _forward(host, logits, torch.tensor([[0]]), gradient=gradient)
    p = 2.061153618190204e-09  # 1 / (1 + e^20)
    torch.testing.assert_close(logprobs.double(), torch.tensor([[-p]], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.tensor([[[p, -p]]], dtype=torch.float64), rtol=1e-6, atol=0)
