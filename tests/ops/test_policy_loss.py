import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import policy_loss
from rlhf_fast.ops.policy_loss import METRICS, VARIANTS, reference
from tests.losses import (
    BACKENDS,
    DTYPES,
    KERNELS,
    SHAPES,
    assert_keeps_contract,
    assert_same,
    compiled,
    draw,
    evaluate,
    ragged,
)

DUAL = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": 1.5}


def inputs_of(shape, dtype=torch.float32, seed=0):
    """Old log-probabilities, new ones with ratios on both sides of every clip, advantages of both signs."""
    old, noise, advantages = draw(shape, 3, seed=seed)
    return [(old + 0.4 * noise).to(dtype), old.to(dtype), advantages.to(dtype)]


def run(inputs, **options):
    return evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)


def eager(mask, low=0.8, high=1.28, dual=1.5):
    def loss(logprobs, old_logprobs, advantages):
        counts = mask.to(logprobs.dtype)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        surrogate = torch.where(advantages < 0, torch.max(surrogate, dual * advantages), surrogate)
        clipped = (surrogate != ratio * advantages).to(ratio.dtype)
        rows = (-surrogate, clipped, ratio - 1 - log_ratio, ratio)
        means = [(x * counts).sum() / counts.sum() for x in rows]
        metrics = [*(x.detach() for x in means[1:]), ratio.detach()[mask].max()]
        return means[0], dict(zip(METRICS, metrics, strict=True))

    return loss


# PPO, arXiv 1707.06347, eq. 7 with eps = 0.2: ratios 0.5, 0.9, 1.1, 1.5 with advantage 1, then with advantage -1.
RATIOS = torch.tensor([[0.5, 0.9, 1.1, 1.5]] * 2)
ADVANTAGES = torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_clip_is_equation_7_of_the_ppo_paper(backend):
    got = run([RATIOS.log(), torch.zeros(2, 4), ADVANTAGES], backend=backend)
    assert got["loss"].item() == pytest.approx((-0.5 - 0.9 - 1.1 - 1.2 + 0.8 + 0.9 + 1.1 + 1.5) / 8, abs=1e-6)
    assert got["clip_fraction"].item() == 2 / 8
    expected = torch.tensor([[-0.5, -0.9, -1.1, 0.0], [0.0, 0.9, 1.1, 1.5]]) / 8
    torch.testing.assert_close(got["gradient 0"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_clip_is_equation_5_of_its_paper(backend):
    # Ye et al. 2020, arXiv 1912.09729: max(min(r A, clip(r) A), c A) for A < 0, here r = 5, A = -2, c = 3.
    inputs = [torch.tensor([[5.0]]).log(), torch.zeros(1, 1), torch.tensor([[-2.0]])]
    assert run(inputs, backend=backend)["loss"].item() == pytest.approx(10.0)
    got = run(inputs, dual_clip=3.0, backend=backend)
    assert (got["loss"].item(), got["gradient 0"].item(), got["clip_fraction"].item()) == (6.0, 0.0, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upper_and_the_lower_bound_are_apart(backend):
    inputs = [torch.tensor([1.25, 1.35, 0.85]).log(), torch.zeros(3), torch.tensor([1.0, 1.0, -1.0])]
    got = run(inputs, clip_eps_low=0.1, clip_eps_high=0.3, backend=backend)
    assert got["loss"].item() == pytest.approx((-1.25 - 1.3 + 0.9) / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_two_tokens_by_hand(backend):
    got = run([torch.tensor([[math.log(2.0), 0.0]]), torch.zeros(1, 2), torch.ones(1)], backend=backend)
    assert got["approx_kl"].item() == pytest.approx((1 - math.log(2)) / 2)
    assert got["ratio_mean"].item() == pytest.approx(1.5)
    assert got["ratio_max"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_minibatch_has_ratio_1_and_no_kl_exactly(backend, dtype):
    logprobs, _, advantages = inputs_of((3, 70), dtype)
    got = run([logprobs, logprobs, advantages], mask=ragged((3, 70)), backend=backend)
    assert [got[name].item() for name in METRICS] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", KERNELS)
def test_approx_kl_of_a_tiny_step_does_not_cancel(backend):
    step = torch.full((1, 8), 2.0**-12)
    got = run([step, torch.zeros(1, 8), torch.ones(1)], backend=backend)
    assert got["approx_kl"].item() == pytest.approx(2.0**-25 * (1 + 2.0**-12 / 3), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_clamps_the_log_ratio_and_the_kl_does_not(backend):
    got = run([torch.full((1, 1), 30.0), torch.zeros(1, 1), -torch.ones(1)], backend=backend)
    assert got["loss"].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert got["gradient 0"].item() == 0.0
    assert got["approx_kl"].item() == pytest.approx(math.exp(30), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, variant):
    mask = ragged(shape)
    assert_keeps_contract(
        lambda *x: policy_loss(*x, mask=mask, variant=variant, **DUAL, backend=backend),
        eager(mask), inputs_of(shape, dtype), 1,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 128])
def test_a_program_may_sum_several_blocks(parts, monkeypatch):
    from rlhf_fast.kernels import losses as kernels

    monkeypatch.setattr(kernels, "PARTS", parts)
    inputs, mask = inputs_of((2, 2 * kernels.BLOCK + 3)), torch.ones(2, 2 * kernels.BLOCK + 3, dtype=torch.bool)
    assert_keeps_contract(lambda *x: policy_loss(*x, **DUAL, backend="triton"), eager(mask), inputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_one_advantage_per_sequence_is_that_of_its_tokens(backend, shape):
    logprobs, old, advantages = inputs_of((4, 4))
    advantages = advantages[:, :1]
    spread = run([logprobs, old, advantages.repeat(1, 4)], backend=backend)
    assert_same(run([logprobs, old, advantages.reshape(shape)], backend=backend), spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_the_mask_changes_nothing(backend):
    mask = ragged((6, 9))
    inputs = inputs_of((6, 9))
    poisoned = [x.masked_fill(~mask, math.nan) for x in inputs]
    got = run(poisoned, mask=mask, backend=backend)
    assert_same(got, run(inputs, mask=mask, backend=backend))
    assert got["gradient 0"][~mask].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("denominator", [None, 7])
def test_nothing_counted_gives_a_connected_zero(backend, shape, denominator):
    inputs = [torch.full(shape, math.nan)] * 3
    mask = torch.zeros(shape, dtype=torch.bool)
    got = run(inputs, mask=mask, denominator=denominator, backend=backend)
    assert [x.item() for x in list(got.values())[:5]] == [0.0] * 5
    assert torch.equal(got["gradient 0"], torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs, mask = inputs_of((5, 8)), ragged((5, 8))
    strided = [x.T.contiguous().T for x in inputs[:2]] + [torch.stack([inputs[2]] * 2, -1)[..., 0]]
    assert_same(run(strided, mask=mask, backend=backend), run(inputs, mask=mask, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tokens_give_the_loss_of_padded_ones(backend):
    inputs, mask = inputs_of((5, 8)), ragged((5, 8))
    padded, packed = run(inputs, mask=mask, backend=backend), run([x[mask] for x in inputs], backend=backend)
    assert packed["loss"].item() == pytest.approx(padded["loss"].item(), rel=1e-6)
    torch.testing.assert_close(packed["gradient 0"], padded["gradient 0"][mask])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_micro_batches_with_the_global_denominator_sum_to_the_whole(rows, columns, seed):
    inputs, mask = inputs_of((rows, columns), torch.float64, seed), ragged((rows, columns))
    whole = run(inputs, mask=mask, **DUAL)
    for denominator in (mask.sum(), int(mask.sum())):
        parts = [
            run([x[rows_] for x in inputs], mask=mask[rows_], denominator=denominator, **DUAL)
            for rows_ in (slice(0, 1), slice(1, None))
        ]
        for name in ("loss", "clip_fraction", "approx_kl", "ratio_mean"):
            torch.testing.assert_close(sum(p[name] for p in parts), whole[name])
        torch.testing.assert_close(torch.cat([p["gradient 0"] for p in parts]), whole["gradient 0"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**16))
def test_padding_and_the_order_of_rows_change_nothing(rows, columns, pad, seed):
    inputs, mask = inputs_of((rows, columns), torch.float64, seed), ragged((rows, columns))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = [torch.nn.functional.pad(x[order], (0, pad), value=math.inf) for x in inputs]
    got = run(moved, mask=torch.nn.functional.pad(mask[order], (0, pad)), **DUAL)
    expected = run(inputs, mask=mask, **DUAL)
    gradient = got.pop("gradient 0")[:, :columns]
    torch.testing.assert_close(gradient, expected.pop("gradient 0")[order])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits_with_and_without_gradients_and_threads(backend):
    inputs = inputs_of((7, 333))
    expected = run(inputs, backend=backend)["loss"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            assert torch.equal(policy_loss(*inputs, backend=backend)[0], expected)
    finally:
        torch.set_num_threads(threads)


def test_the_reference_is_differentiable_twice():
    logprobs, old, advantages = inputs_of((2, 5), torch.float64)
    logprobs.requires_grad_()

    def loss(x):
        return reference(x, old, advantages, bounds=(0.8, 1.2, 1.5), mask=ragged((2, 5)))[0]

    assert torch.autograd.gradcheck(loss, logprobs)
    assert torch.autograd.gradgradcheck(loss, logprobs)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_of_a_kernel_raises(backend):
    logprobs, old, advantages = inputs_of((2, 5))
    logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(
        policy_loss(logprobs, old, advantages, backend=backend)[0], logprobs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="scaled_gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    inputs, mask = inputs_of((3, 5)), ragged((3, 5)).to(torch.uint8)
    inputs[0].requires_grad_()
    args = (inputs, mask, torch.tensor(9.0), "ppo_clip", [0.8, 1.2, 3.0], backend)
    torch.library.opcheck(torch.ops.rlhf_fast.policy_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    inputs, mask = inputs_of((3, 5)), ragged((3, 5))

    def loss(*x):
        return policy_loss(*x, mask=mask, denominator=11, **DUAL, backend=backend)

    assert_same(evaluate(compiled(loss), inputs, 1), evaluate(loss, inputs, 1))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: [x[0], x[1][:1], x[2]], {}, r"old_logprobs .*\(2, 3\), got \(1, 3\)"),
        (lambda x: [x[0], x[1], x[2][0]], {}, r"advantages .*\(2, 3\), got \(3,\)"),
        (lambda x: [y[None] for y in x], {}, r"logprobs must be \(B, T\) or \(N,\), got \(1, 2, 3\)"),
        (lambda x: x, {"mask": torch.ones(3, 2)}, r"mask .*\(2, 3\), got \(3, 2\)"),
        (lambda x: x, {"variant": "trpo"}, "variant must be one of ppo_clip, got 'trpo'"),
        (lambda x: x, {"clip_eps_low": 1.5}, r"clip_eps_low must be in \[0, 1\], got 1.5"),
        (lambda x: x, {"clip_eps_high": -0.1}, "clip_eps_high must be >= 0, got -0.1"),
        (lambda x: x, {"dual_clip": 1.0}, "dual_clip must be > 1 or None, got 1.0"),
        (lambda x: x, {"denominator": 0}, "denominator must be > 0, got 0"),
        (lambda x: x, {"denominator": torch.ones(2)}, r"denominator .*got \(2,\)"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*change(inputs_of((2, 3))), **options)


def test_integer_logprobs_raise():
    with pytest.raises(TypeError, match=r"old_logprobs must be float32.*got torch.int64"):
        policy_loss(torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
