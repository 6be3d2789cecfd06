"""vtrace: hand-computed values, eq. 1 of the paper as a sum over all later steps, and what must never matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import gae, vtrace
from rlhf_fast.ops.advantages import vtrace as module
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RATES = {"gamma": 0.99, "lam": 0.9, "rho_clip": 1.1, "c_clip": 0.95}


def plain_row(r, v, logprobs, sampler, bootstrap, gamma, lam, rho_clip, c_clip):
    """Espeholt et al. 2018, eq. 1, with c_i = lam min(c_clip, ratio_i) (remark 2), for steps that all count."""
    ratio = (logprobs - sampler).exp()
    rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    values = torch.cat([v, bootstrap[None]])
    delta = rho * (r + gamma * values[1:] - v)
    targets = v.clone()
    for s in range(len(r)):
        weight = torch.ones_like(bootstrap)
        for t in range(s, len(r)):
            targets[s] += weight * delta[t]
            weight = weight * gamma * c[t]
    after = torch.cat([targets[1:], bootstrap[None]])
    return rho * (r + gamma * (values[1:] + lam * (after - values[1:])) - v), targets


def plain(inputs, mask, bootstrap, rates):
    """Every row's counted steps on their own, put back in their places."""
    found = [torch.zeros_like(inputs[0]) for _ in range(2)]
    for i, row in enumerate(mask):
        results = plain_row(*(x[i, row] for x in inputs), bootstrap[i], **rates)
        for out, result in zip(found, results, strict=True):
            out[i, row] = result
    return found


def example(shape=(3, 17), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    logprobs = -torch.rand(shape, generator=generator)
    sampler = logprobs + torch.randn(shape, generator=generator) / 4
    mask = torch.rand(shape, generator=generator) > 0.3
    bootstrap = torch.randn(shape[0], generator=generator).to(dtype)
    return [x.to(dtype) for x in (rewards, values, logprobs, sampler)], mask, bootstrap


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_by_hand(backend):
    # gamma 1/2, lam 1, ratios 2 and 1/4, clipped at 1: rho = c = 1, 1/4. V = 1, 2, then 4.
    # delta_1 = (8 + 1/2 4 - 2) / 4 = 2, target_1 = 4; delta_0 = 3 + 1/2 2 - 1 = 3, target_0 = 1 + 3 + 1/2 (4 - 2) = 5
    # advantage_1 = 2; advantage_0 = 3 + 1/2 4 - 1 = 4
    logprobs = torch.tensor([[math.log(2), -math.log(4)]])
    advantages, targets = vtrace(
        torch.tensor([[3.0, 8.0]]), torch.tensor([[1.0, 2.0]]), logprobs, torch.zeros(1, 2),
        bootstrap=torch.tensor([4.0]), gamma=0.5, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(advantages, torch.tensor([[4.0, 2.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(targets, torch.tensor([[5.0, 4.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_clips_bound_what_they_name(backend):
    # ratio 4, rho at most 2, c at most 1/2, lam 1/2: delta_1 = 2 (1 - 0) = 2; delta_0 = 2 (0 + 0 - 0) = 0
    # target_0 = 0 + 1/2 1/2 2 = 1/2; advantage_0 = 2 (0 + 1/2 2 - 0) = 2
    advantages, targets = vtrace(
        torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.full((1, 2), math.log(4)), torch.zeros(1, 2), lam=0.5,
        rho_clip=2.0, c_clip=0.5, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(advantages, torch.tensor([[2.0, 2.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(targets, torch.tensor([[0.5, 2.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 600)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype):
    inputs, mask, bootstrap = example(shape, dtype)
    if shape[1] == 600:
        mask[:, :-60] = False  # eq. 1 as a sum is quadratic; the blocks before hold nothing
        mask[:, ::50] = True
    exact = plain([x.double() for x in inputs], mask, bootstrap.double(), RATES)
    eager = plain(inputs, mask, bootstrap, RATES)
    ours = vtrace(*inputs, mask=mask, bootstrap=bootstrap, **RATES, backend=backend)
    for name, *results in zip(("advantages", "targets"), ours, eager, exact, strict=True):
        assert_contract(name, *results)


@pytest.mark.parametrize("backend", KERNELS)
def test_long_rows_equal_the_recursion(backend):
    inputs, mask, bootstrap = example((1, 1100))
    ours = vtrace(*inputs, mask=mask, bootstrap=bootstrap, **RATES, backend=backend)
    plain = module.reference(*inputs, mask=mask, bootstrap=bootstrap, **RATES)
    exact = module.reference(*(x.double() for x in inputs), mask=mask, bootstrap=bootstrap.double(), **RATES)
    for name, *results in zip(("advantages", "targets"), ours, plain, exact, strict=True):
        assert_contract(name, *results)


rates = st.floats(0, 1)


@settings(max_examples=10, deadline=None)
@given(gamma=rates, lam=rates, seed=st.integers(0, 99), time=st.integers(1, 12))
def test_on_the_policy_s_own_samples_it_is_gae(gamma, lam, seed, time):
    (rewards, values, logprobs, _), mask, bootstrap = example((2, time), seed=seed)
    options = {"mask": mask, "bootstrap": bootstrap, "gamma": gamma, "lam": lam}
    for backend in BACKENDS:
        ours = vtrace(rewards, values, logprobs, logprobs, **options, backend=backend)
        for a, b in zip(ours, gae(rewards, values, **options, backend=backend), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_packed_equals_padded(lengths, seed):
    inputs, mask, bootstrap = example((len(lengths), max(lengths)), seed=seed)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for backend in BACKENDS:
        options = {"bootstrap": bootstrap, **RATES, "backend": backend}
        padded = vtrace(*inputs, mask=mask & inside, **options)
        packed = vtrace(*(x[inside] for x in inputs), mask=mask[inside], cu_seqlens=cu_seqlens, **options)
        for a, b in zip(padded, packed, strict=True):
            torch.testing.assert_close(a[inside], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_behind_the_mask_is_looked_at(backend):
    inputs, mask, bootstrap = example()
    expected = vtrace(*inputs, mask=mask, bootstrap=bootstrap, backend=backend)
    poisoned = [torch.where(mask, x, math.nan) for x in inputs]
    for a, b in zip(expected, vtrace(*poisoned, mask=mask, bootstrap=bootstrap, backend=backend), strict=True):
        assert torch.equal(a, b)
    for result in vtrace(*poisoned, mask=torch.zeros_like(mask), bootstrap=bootstrap, backend=backend):
        assert result.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_permuted_and_mixed_inputs_give_the_same_values(backend):
    inputs, mask, bootstrap = example((4, 20))

    def run(inputs, rows=slice(None)):
        return vtrace(*inputs, mask=mask[rows, 2:], bootstrap=bootstrap[rows], backend=backend)

    expected = run([x[:, 2:].contiguous() for x in inputs])
    order = torch.tensor([2, 0, 3, 1])
    mixed = run([inputs[0][:, 2:].double(), *(x[:, 2:] for x in inputs[1:])])
    for i in range(2):
        assert torch.equal(expected[i], run([x[:, 2:] for x in inputs])[i])
        assert torch.equal(expected[i], run([x.T.contiguous().T[:, 2:] for x in inputs])[i])
        assert torch.equal(expected[i][order], run([x[order, 2:] for x in inputs], order)[i])
        assert mixed[i].dtype == torch.float64
        torch.testing.assert_close(expected[i].double(), mixed[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bound_is_an_infinite_one_and_results_are_constants(backend):
    inputs, mask, _ = example()
    unbounded = vtrace(*inputs, mask=mask, rho_clip=None, c_clip=None, backend=backend)
    large = vtrace(*(x.requires_grad_() for x in inputs), mask=mask, rho_clip=1e9, c_clip=1e9, backend=backend)
    for a, b in zip(unbounded, large, strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad
    assert vtrace(*(torch.zeros(2, 0) for _ in range(4)), backend=backend)[0].shape == (2, 0)


def test_the_reference_is_differentiable_twice():
    inputs, mask, bootstrap = example((2, 5), torch.float64)
    run = lambda *x: module.reference(*x[:4], mask=mask, bootstrap=x[4], **RATES)  # noqa: E731
    tensors = tuple(x.requires_grad_() for x in (*inputs, bootstrap))
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck_and_compiles(backend):
    inputs, mask, bootstrap = example()
    op = torch.ops.rlhf_fast.vtrace.default
    torch.library.opcheck(op, (*inputs, mask.to(torch.uint8), None, bootstrap, 0.9, 0.8, 1.0, 1.0, backend))
    run = lambda *x: vtrace(*x, mask=mask, bootstrap=bootstrap, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(*inputs), compiled(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(17)}, r"rewards must be \(B, T\) without cu_seqlens, got \(17,\)"),
        ({"logprobs": torch.zeros(3, 16)}, r"logprobs must be rewards.shape = \(3, 17\), got \(3, 16\)"),
        ({"mask": torch.zeros(3)}, r"\(3, 17\), got \(3,\)"),
        ({"bootstrap": torch.zeros(17)}, r"\(B,\) = \(3,\), got \(17,\)"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"rho_clip": 0.0}, "rho_clip must be > 0, got 0.0"),
    ],
)
def test_bad_input_raises_with_the_values(change, message):
    names = ("rewards", "values", "logprobs", "sampler_logprobs")
    with pytest.raises(ValueError, match=message):
        vtrace(**{name: torch.zeros(3, 17) for name in names} | change)
