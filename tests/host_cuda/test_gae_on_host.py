"""The CUDA kernel of gae, its own source compiled for the host with one thread per CUDA thread."""

import ctypes

import pytest
import torch

from rlhf_fast.backends import DTYPE_CODES
from rlhf_fast.ops.advantages._scan import Sequences
from rlhf_fast.ops.advantages.gae import reference
from rlhf_fast.testing.numerics import assert_contract
from tests.host_cuda.token_logprobs import address


@pytest.fixture(scope="module")
def host(compiled):
    return compiled("gae")


def run(host, rewards, values=None, *, mask=None, cu_seqlens=None, bootstrap=None, gamma=0.99, lam=0.95, value_lam=None,
        lams=None):  # fmt: skip
    batch = Sequences(mask, cu_seqlens, bootstrap)
    outputs = batch.empty(rewards, 1 if values is None else 2)
    outputs = [x.fill_(0 if cu_seqlens is not None else torch.nan) for x in outputs]
    sequences = batch.count(rewards)
    strides = [rewards.stride(0), 0 if values is None else values.stride(0)]
    pointer, rates = ctypes.c_void_p, (gamma, lam, lam if value_lam is None else value_lam)
    host.gae(
        pointer(address(rewards)), pointer(address(values)), DTYPE_CODES[rewards.dtype],
        (ctypes.c_int64 * 4)(sequences, rewards.shape[-1], *strides), pointer(address(mask)),
        pointer(address(cu_seqlens)), pointer(address(bootstrap)), (ctypes.c_double * 3)(*rates),
        pointer(address(lams)), value_lam is not None,
        pointer(0 if values is None else address(outputs[0])), pointer(address(outputs[-1])),
    )  # fmt: skip
    return outputs


def example(shape, dtype=torch.float32):
    torch.manual_seed(shape[-1])
    rewards, values = (torch.randn(shape).to(dtype) for _ in range(2))
    return rewards, values, (torch.rand(shape) > 0.4).to(torch.uint8)


@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 2500)], ids=str)
def test_values_keep_the_numerics_contract(host, shape, dtype):
    rewards, values, mask = example((shape[0], shape[1] + 3), dtype)
    rewards, mask = rewards[:, 3:], mask[:, 3:].contiguous()  # strided rows
    values = values[:, 3:].contiguous()
    bootstrap = torch.randn(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"mask": mask, "gamma": 0.99, "lam": 0.95}
    exact = reference(rewards.double(), values.double(), bootstrap=bootstrap.double(), **options)
    eager = reference(rewards, values, bootstrap=bootstrap, **options)
    ours = run(host, rewards, values, bootstrap=bootstrap, **options)
    for name, *results in zip(("advantages", "returns"), ours, eager, exact, strict=True):
        assert_contract(name, *results)


def test_packed_sequences_give_the_same_bits_as_padded_ones(host):
    rewards, values, mask = example((3, 1100))
    cu_seqlens = torch.arange(4) * 1100
    padded = run(host, rewards, values, mask=mask)
    packed = run(host, rewards.view(-1), values.view(-1), mask=mask.view(-1), cu_seqlens=cu_seqlens)
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a.view(-1), b)


def test_nan_behind_the_mask_stays_there(host):
    rewards, values, mask = example((2, 40))
    expected = run(host, rewards, values, mask=mask)
    rewards, values = (torch.where(mask != 0, x, torch.nan) for x in (rewards, values))
    for a, b in zip(expected, run(host, rewards, values, mask=mask), strict=True):
        assert torch.equal(a, b)
        assert a[mask == 0].eq(0).all()


def test_with_lam_1_returns_are_the_discounted_returns_bit_for_bit(host):
    rewards, values, _ = example((1, 1100))
    _, returns = run(host, rewards, values, lam=1.0)
    assert torch.equal(returns, run(host, rewards, lam=1.0)[0])


def test_lambdas_of_their_own_for_the_returns_and_for_every_sequence(host):
    rewards, values, mask = example((3, 1100))
    lam, value_lam = torch.tensor([0.5, 0.75, 1.0]), 1.0
    lams = torch.stack([lam.double(), torch.ones(3, dtype=torch.float64)])
    found = run(host, rewards, values, mask=mask, lam=1.0, value_lam=1.0, lams=lams)
    for i in range(3):
        row = (rewards[i : i + 1], values[i : i + 1])
        alone = run(host, *row, mask=mask[i : i + 1], lam=lams[0, i].item(), value_lam=value_lam)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(found, alone, strict=True))
    options = {"mask": mask, "gamma": 0.99, "lam": lam, "value_lam": value_lam}
    exact = reference(rewards.double(), values.double(), **options)
    eager = reference(rewards, values, **options)
    for name, *results in zip(("advantages", "returns"), found, eager, exact, strict=True):
        assert_contract(name, *results)
