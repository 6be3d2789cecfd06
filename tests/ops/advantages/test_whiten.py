"""whiten: exact statistics, constants, masks, and one distribution over all ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_fast import whiten
from rlhf_fast.ops.advantages import whiten as module
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(x, mask, shift_mean=True, eps=1e-8):
    values = x[mask]
    mean, variance = values.mean(), values.var() if len(values) > 1 else torch.zeros_like(values.sum())
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def example(shape, dtype=torch.float32, seed=0, offset=3.0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + offset).to(dtype)
    mask = torch.rand(shape, generator=generator) > 0.4
    mask.view(-1)[-1] = True
    return x, mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_numbers_by_hand(backend):
    # mean 4, variance (4 + 4 + 0) / 2 = 4
    x, mask = torch.tensor([2.0, 6.0, 4.0, 99.0]), torch.tensor([1, 1, 1, 0])
    assert whiten(x, mask, eps=1e-12, backend=backend).tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert whiten(x, mask, shift_mean=False, eps=1e-12, backend=backend).tolist() == [3.0, 5.0, 4.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 4100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype):
    x, mask = example(shape, dtype)
    for shift_mean in (True, False):
        ours = whiten(x, mask, shift_mean=shift_mean, backend=backend)
        assert_contract("x", ours, plain(x, mask, shift_mean), plain(x.double(), mask, shift_mean))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_larger_than_the_spread_does_not_cancel(backend):
    x, mask = example((2, 5000), offset=1e5)
    assert_contract("x", whiten(x, mask, backend=backend), plain(x, mask), plain(x.double(), mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_gives_exactly_0_or_its_mean(backend, dtype):
    x, mask = torch.full((3, 1501), 0.1, dtype=dtype), example((3, 1501))[1]
    assert whiten(x, mask, backend=backend).eq(0).all()
    assert torch.equal(whiten(x, mask, shift_mean=False, backend=backend), torch.where(mask, x, 0).to(whiten(x).dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_the_mask_stays_there_and_an_empty_mask_gives_zeros(backend):
    x, mask = example((3, 17))
    poisoned = torch.where(mask, x, math.nan)
    for shift_mean in (True, False):
        expected = whiten(x, mask, shift_mean=shift_mean, backend=backend)
        assert torch.equal(expected, whiten(poisoned, mask, shift_mean=shift_mean, backend=backend))
        nothing = whiten(x * math.nan, torch.zeros_like(mask), shift_mean=shift_mean, backend=backend)
        assert nothing.eq(0).all()
    assert whiten(torch.zeros(0), backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shape_strides_and_order_do_not_matter(backend):
    x, mask = example((12, 17))
    expected = whiten(x, mask, backend=backend)
    assert torch.equal(expected, whiten(x.T.contiguous().T, mask, backend=backend))
    assert torch.equal(expected.view(-1), whiten(x.view(-1), mask.view(-1), backend=backend))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = whiten(x[order], mask[order], backend=backend)
    torch.testing.assert_close(expected[order], permuted, rtol=1e-5, atol=1e-6)


def _rank(rank, folder, backend, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, mask = example((6, 901), offset=100.0)
    rows = slice(0, 2) if rank == 0 else slice(2, 6)
    for name in backend:
        results[name, rank] = whiten(x[rows], mask[rows], process_group=dist.group.WORLD, backend=name)
        constant = torch.full((rank, 3), 0.1)  # rank 0 has nothing at all
        results[name, rank, "constant"] = whiten(constant, process_group=dist.group.WORLD, backend=name)
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path), BACKENDS, results), nprocs=2)
        results = dict(results)
    x, mask = example((6, 901), offset=100.0)
    for backend in BACKENDS:
        both = torch.cat([results[backend, 0], results[backend, 1]])
        torch.testing.assert_close(both, whiten(x, mask, backend=backend), rtol=1e-6, atol=1e-6)
        assert results[backend, 1, "constant"].eq(0).all()


def test_the_reference_is_differentiable_twice():
    x, mask = example((2, 5), torch.float64)
    run = lambda x: module.reference(x, mask, shift_mean=False)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_ops_pass_opcheck_and_compile(backend):
    x, mask = example((3, 17))
    ops, bytes_ = torch.ops.rlhf_fast, mask.to(torch.uint8)
    torch.library.opcheck(ops.whiten_moments.default, (x, bytes_, backend))
    (moments,) = ops.whiten_moments(x, bytes_, backend)
    torch.library.opcheck(ops.whiten.default, (x, None, moments, False, 1e-8, backend))
    run = lambda x: whiten(x, mask, backend=backend)  # noqa: E731
    assert torch.equal(run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x))


def test_bad_input_raises_with_the_values():
    with pytest.raises(ValueError, match=r"x.shape = \(3, 4\), got \(3,\)"):
        whiten(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        whiten(torch.zeros(3), eps=0)
    with pytest.raises(TypeError, match=r"x must be float32.*got torch.int64"):
        whiten(torch.zeros(3, dtype=torch.int64))
