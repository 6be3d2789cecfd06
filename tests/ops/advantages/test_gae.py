"""gae and discounted_returns: hand-computed values, the definition as a plain loop, and what must never matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import discounted_returns, gae, length_adaptive_lambda
from rlhf_fast.backends import native
from rlhf_fast.ops.advantages import gae as module
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_loop(rewards, values, mask, bootstrap, gamma, lam):
    """Schulman et al. 2016, eq. 16, one sequence of tensors of one dtype at a time, step by step."""
    advantages = torch.zeros_like(values)
    next_value, next_advantage = bootstrap, torch.zeros_like(bootstrap)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            next_value, next_advantage = values[t], delta + gamma * lam * next_advantage
            advantages[t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0)


def plain_rows(rewards, values, mask, bootstrap, gamma, lam):
    rows = [plain_loop(*row, gamma, lam) for row in zip(rewards, values, mask, bootstrap, strict=True)]
    return tuple(torch.stack(x) for x in zip(*rows, strict=True))


def example(shape=(3, 17), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(shape, generator=generator) > 0.4
    return rewards, values, mask, torch.randn(shape[0], generator=generator).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_by_hand(backend):
    # gamma = lam = 1/2; delta = 1 + 1/2 * 1 - 1/2, 2 + 1/2 * 2 - 1, 4 + 1/2 * 4 - 2 = 1, 2, 4
    # advantage_2 = 4, advantage_1 = 2 + 4/4 = 3, advantage_0 = 1 + 3/4
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    advantages, returns = gae(rewards, values, bootstrap=torch.tensor([4.0]), gamma=0.5, lam=0.5, backend=backend)
    assert advantages.tolist() == [[1.75, 3.0, 4.0]]
    assert returns.tolist() == [[2.25, 4.0, 6.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bootstrap_the_state_after_the_end_is_worth_nothing(backend):
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), lam=0.5, backend=backend)
    assert advantages.tolist() == [[-0.25 + 0.5 * 0.75, 0.75]]
    assert returns.tolist() == [[0.625, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_step_hands_the_next_value_and_advantage_through_without_a_discount(backend):
    rewards, values = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[0.5, 9.0, 1.0]])
    mask = torch.tensor([[1, 0, 1]])
    advantages, returns = gae(rewards, values, mask=mask, gamma=0.5, lam=0.5, backend=backend)
    assert advantages.tolist() == [[1 + 0.5 * 1 - 0.5 + 0.25 * 1, 0, 1]]
    assert returns.tolist() == [[1.75, 0, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_discounted_returns_by_hand(backend):
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert discounted_returns(rewards, gamma=0.5, backend=backend).tolist() == [[3.0, 4.0, 4.0]]
    assert discounted_returns(rewards, backend=backend).tolist() == [[7.0, 6.0, 4.0]]
    after = discounted_returns(rewards, gamma=0.5, bootstrap=torch.tensor([8.0]), backend=backend)
    assert after.tolist() == [[4.0, 6.0, 8.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_returns_may_have_a_lambda_of_their_own(backend):
    # gamma 1; delta = 1 + 1 - 1/2, 2 + 2 - 1, 4 - 2 = 3/2, 3, 2; advantages with lam 1/2, targets with value_lam 1
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    advantages, returns = gae(rewards, values, lam=0.5, value_lam=1.0, backend=backend)
    assert advantages.tolist() == [[3.5, 4.0, 2.0]]
    assert returns.tolist() == [[7.0, 6.0, 4.0]]


def test_length_adaptive_lambda_by_hand():
    # VAPO, section 4.2: 1 - 1 / (alpha l)
    assert length_adaptive_lambda(torch.tensor([8, 16, 3]), alpha=0.25).tolist() == [0.5, 0.75, 0.0]
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        length_adaptive_lambda(torch.tensor([8]), alpha=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lambdas_by_sequence_are_those_of_each_sequence_alone(backend, packed):
    rewards, values, mask, bootstrap = example((3, 17))
    lam = length_adaptive_lambda(torch.tensor([5, 40, 17]), alpha=0.25)
    one = lambda rate, i: rate[i].item() if isinstance(rate, torch.Tensor) else rate  # noqa: E731
    for value_lam in (None, 1.0, lam.flip(0)):
        options = {"lam": lam, "value_lam": value_lam, "bootstrap": bootstrap, "gamma": 0.9, "backend": backend}
        if packed:
            flat = [x.view(-1) for x in (rewards, values)]
            found = gae(*flat, mask=mask.view(-1), cu_seqlens=torch.arange(4) * 17, **options)
        else:
            found = gae(rewards, values, mask=mask, **options)
        for i in range(3):
            row = slice(i, i + 1)
            rates = {"lam": one(lam, i), "value_lam": one(value_lam, i), "bootstrap": bootstrap[row]}
            alone = gae(rewards[row], values[row], mask=mask[row], **options | rates)
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a.view(3, 17)[row], b, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(time=st.integers(1, 20), gamma=st.floats(0, 1), seed=st.integers(0, 99))
def test_with_lam_0_the_advantage_is_the_td_error(time, gamma, seed):
    rewards, values, _, bootstrap = example((2, time), seed=seed)
    after = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
    for backend in BACKENDS:
        advantages, _ = gae(rewards, values, bootstrap=bootstrap, gamma=gamma, lam=0.0, backend=backend)
        torch.testing.assert_close(advantages, rewards + gamma * after - values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ["ones", "ends", "holes", "zeros inside"])
def test_masks_of_every_kind_of_block_give_the_same_values(row):
    rewards, values, _, bootstrap = example((1, 1500))
    mask = torch.ones(1, 1500, dtype=torch.bool)
    if row == "ends":
        mask[:, :100] = mask[:, 1300:] = False
    elif row == "holes":
        mask[:, ::7] = False
    elif row == "zeros inside":
        mask[:, 300:1200] = False
    run = lambda backend: gae(  # noqa: E731
        rewards, values, mask=mask, bootstrap=bootstrap, lam=0.9, value_lam=1.0, gamma=0.99, backend=backend
    )
    for a, b in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 1100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype):
    rewards, values, mask, bootstrap = example(shape, dtype)
    exact = plain_rows(rewards.double(), values.double(), mask, bootstrap.double(), 0.99, 0.95)
    eager = plain_rows(rewards, values, mask, bootstrap, 0.99, 0.95)
    ours = gae(rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99, lam=0.95, backend=backend)
    for name, kernel, plain, oracle in zip(("advantages", "returns"), ours, eager, exact, strict=True):
        assert_contract(name, kernel, plain, oracle)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.0, 0.5), (0.9, 0.0)])
def test_the_ends_of_gamma_and_lam_keep_the_numerics_contract(backend, gamma, lam):
    rewards, values, mask, bootstrap = example((2, 1100))
    exact = plain_rows(rewards.double(), values.double(), mask, bootstrap.double(), gamma, lam)
    eager = plain_rows(rewards, values, mask, bootstrap, gamma, lam)
    ours = gae(rewards, values, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam, backend=backend)
    for name, kernel, plain, oracle in zip(("advantages", "returns"), ours, eager, exact, strict=True):
        assert_contract(name, kernel, plain, oracle)


rows = st.lists(st.integers(1, 20), min_size=1, max_size=4)
rates = st.floats(0, 1)


@settings(max_examples=12, deadline=None)
@given(lengths=rows, gamma=rates, lam=rates, seed=st.integers(0, 99))
def test_packed_equals_padded(lengths, gamma, lam, seed):
    rewards, values, mask, bootstrap = example((len(lengths), max(lengths)), seed=seed)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for backend in BACKENDS:
        options = {"bootstrap": bootstrap, "gamma": gamma, "lam": lam, "backend": backend}
        padded = gae(rewards, values, mask=mask & inside, **options)
        packed = gae(rewards[inside], values[inside], mask=mask[inside], cu_seqlens=cu_seqlens, **options)
        for a, b in zip(padded, packed, strict=True):
            torch.testing.assert_close(a[inside], b, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 20), left=st.integers(0, 30), right=st.integers(0, 30), gamma=rates, lam=rates)
def test_padding_on_either_side_changes_nothing(length, left, right, gamma, lam):
    rewards, values, mask, bootstrap = example((2, length))
    pad = lambda x: torch.nn.functional.pad(x, (left, right), value=0 if x.dtype == torch.bool else math.nan)  # noqa: E731
    for backend in BACKENDS:
        options = {"bootstrap": bootstrap, "gamma": gamma, "lam": lam, "backend": backend}
        plain = gae(rewards, values, mask=mask, **options)
        padded = gae(pad(rewards), pad(values), mask=pad(mask), **options)
        for a, b in zip(plain, padded, strict=True):
            torch.testing.assert_close(a, b[:, left : left + length], rtol=1e-5, atol=1e-5)
            assert b[:, :left].eq(0).all()
            assert b[:, left + length :].eq(0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_with_lam_1_the_advantage_is_the_discounted_return_minus_the_value_bit_for_bit(backend):
    rewards, values, _, bootstrap = example((3, 1100))
    advantages, returns = gae(rewards, values, bootstrap=bootstrap, gamma=0.97, lam=1.0, backend=backend)
    plain = discounted_returns(rewards, bootstrap=bootstrap, gamma=0.97, backend=backend)
    assert torch.equal(returns, plain)
    assert torch.equal(advantages, plain - values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_rows_permutes_the_results(backend):
    rewards, values, mask, bootstrap = example((5, 40))
    order = torch.tensor([3, 0, 4, 2, 1])
    plain = gae(rewards, values, mask=mask, bootstrap=bootstrap, backend=backend)
    permuted = gae(rewards[order], values[order], mask=mask[order], bootstrap=bootstrap[order], backend=backend)
    for a, b in zip(plain, permuted, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_the_mask_and_in_other_sequences_stays_there(backend):
    rewards, values, mask, _ = example((2, 33))
    expected = gae(rewards, values, mask=mask, backend=backend)
    rewards, values = (torch.where(mask, x, math.nan) for x in (rewards, values))
    for a, b in zip(expected, gae(rewards, values, mask=mask, backend=backend), strict=True):
        assert torch.equal(a, b)
    poisoned = rewards.clone().masked_fill_(~mask, 0).view(-1)
    poisoned[:33] = math.nan
    cu_seqlens = torch.tensor([0, 33, 66])
    alone = discounted_returns(poisoned, cu_seqlens=cu_seqlens, mask=mask.view(-1), backend=backend)
    assert alone[33:].isfinite().all()


def test_more_rows_than_65535_keep_apart():
    rewards, values, mask, bootstrap = example((70_001, 2))
    for a, b in zip(
        gae(rewards, values, mask=mask, bootstrap=bootstrap, backend="cpu"),
        gae(rewards, values, mask=mask, bootstrap=bootstrap, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_all_masked_batch_gives_zeros(backend):
    nan = torch.full((2, 9), math.nan)
    for result in gae(nan, nan, mask=torch.zeros(2, 9), bootstrap=torch.ones(2), backend=backend):
        assert result.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_and_steps_of_no_sequence_give_nothing(backend):
    rewards = torch.tensor([1.0, 2.0, math.nan])
    cu_seqlens = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    assert discounted_returns(rewards, cu_seqlens=cu_seqlens, backend=backend).tolist() == [3.0, 2.0, 0.0]
    assert gae(torch.zeros(0, 4), torch.zeros(0, 4), backend=backend)[0].shape == (0, 4)
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), backend=backend)[0].shape == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_mixed_inputs_give_the_same_values(backend):
    rewards, values, mask, _ = example((3, 20))
    expected = gae(rewards[:, 2:].contiguous(), values[:, 2:].contiguous(), mask=mask[:, 2:], backend=backend)
    sliced = gae(rewards[:, 2:], values[:, 2:], mask=mask[:, 2:], backend=backend)
    transposed = gae(rewards.T.contiguous().T[:, 2:], values[:, 2:], mask=mask[:, 2:], backend=backend)
    mixed = gae(rewards[:, 2:].double(), values[:, 2:], mask=mask[:, 2:], backend=backend)
    for i in range(2):
        assert torch.equal(expected[i], sliced[i])
        assert torch.equal(expected[i], transposed[i])
        assert mixed[i].dtype == torch.float64
        torch.testing.assert_close(expected[i].double(), mixed[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_constants_of_the_loss(backend):
    rewards, values, _, _ = example()
    assert not any(x.requires_grad for x in gae(rewards, values.requires_grad_(), backend=backend))


def test_the_reference_is_differentiable_twice():
    rewards, values, mask, bootstrap = (x[:2, :5].double() if x.dim() == 2 else x[:2].double() for x in example())
    run = lambda r, v, b: module.reference(r, v, mask=mask, bootstrap=b, gamma=0.9, lam=0.8)  # noqa: E731
    inputs = tuple(x.requires_grad_() for x in (rewards, values, bootstrap))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    rewards, values, mask, bootstrap = example()
    op, bytes_ = torch.ops.rlhf_fast.gae.default, mask.to(torch.uint8)
    torch.library.opcheck(op, (rewards, values, bytes_, None, bootstrap, 0.9, 0.8, None, None, backend))
    cu_seqlens = torch.tensor([0, 20, 51])
    torch.library.opcheck(op, (rewards.view(-1), None, None, cu_seqlens, None, 0.9, 1.0, None, None, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_compiled_graph_gives_the_same_values(backend):
    rewards, values, mask, bootstrap = example()
    run = lambda r, v: gae(r, v, mask=mask, bootstrap=bootstrap, gamma=0.9, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(rewards, values), compiled(rewards, values), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(17)}, r"\(B, T\) without cu_seqlens, got \(17,\)"),
        ({"cu_seqlens": torch.tensor([0, 17])}, r"\(N,\) with cu_seqlens, got \(3, 17\)"),
        ({"values": torch.zeros(3, 16)}, r"\(3, 17\), got \(3, 16\)"),
        ({"mask": torch.zeros(3)}, r"\(3, 17\), got \(3,\)"),
        ({"bootstrap": torch.zeros(17)}, r"\(B,\) = \(3,\), got \(17,\)"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"lam": torch.zeros(2)}, r"lam must be \(B,\) = \(3,\), got \(2,\)"),
        ({"value_lam": torch.tensor([0.0, 2.0, 1.0])}, r"lam must be in \[0, 1\], got .*2.0"),
        ({"lam": math.nan}, r"lam must be in \[0, 1\], got nan"),
    ],
)
def test_bad_input_raises_with_the_values(change, message):
    with pytest.raises(ValueError, match=message):
        gae(**{"rewards": torch.zeros(3, 17), "values": torch.zeros(3, 17), **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [[1, 5], [0, 4, 2, 5], [0, 6]])
def test_cu_seqlens_that_do_not_fit_raise_with_their_values(backend, cu_seqlens):
    with pytest.raises(ValueError, match=r"at most N = 5, got \[" + ", ".join(map(str, cu_seqlens))):
        discounted_returns(torch.zeros(5), cu_seqlens=torch.tensor(cu_seqlens), backend=backend)


@pytest.mark.skipif(not native().with_cuda, reason="built without a CUDA compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_cuda_kernel_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="gae: no CUDA device"):
        native().gae_cuda(0, 0, 0, [1, 1], (1, 1, 0, 0, 0), [1.0, 1.0, 1.0], 0, False, [0, 0], 0, 0)
