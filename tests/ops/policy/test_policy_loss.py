import math
from functools import partial
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import BackendError, PolicyObjective, policy_loss
from rlhf_fast.ops.policy.objective import FUNCTIONS, VARIANTS, Function, Variant
from rlhf_fast.ops.policy.policy_loss import ALWAYS, Inputs, Numbers, Plan, numbers
from tests.losses import (
    BACKENDS,
    DTYPES,
    EVERYWHERE,
    KERNELS,
    SHAPES,
    assert_keeps_contract,
    assert_same,
    compiled,
    draw,
    evaluate,
    of_policy,
    ragged,
)

# The losses that hold no factor constant to the gradient: autograd's is the derivative of the value.
SMOOTH = ["ppo_clip", "grpo", "dr_grpo", "dapo", "gspo", "luspo", "gmpo", "sapo", "dro", "gpg", "reinforce", "a2c"]
EVERYTHING = {
    "kl_coef": 0.1, "entropy_coef": 0.02, "entropy_fraction": 0.7, "correction_low": 0.5, "correction_high": 1.5,
    "off_policy_max_kl": 0.3, "fixed_length": 40, "cov_fraction": 0.2, "cov_low": 0.0,
}  # fmt: skip
DUAL = PolicyObjective(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=1.5)


def inputs_of(shape, dtype=torch.float32, seed=0):
    """Old log-probabilities, new ones with ratios on both sides of every clip, advantages of both signs."""
    old, noise, advantages = draw(shape, 3, seed=seed)
    return [(old + 0.4 * noise).to(dtype), old.to(dtype), advantages.to(dtype)]


def run(inputs, **options):
    options = options if "objective" in options else of_policy(**options)
    return evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)


def extras(inputs, seed=1):
    """ref_logprobs, sampler_logprobs and entropy beside `inputs`."""
    ref, sampler, entropy = draw(inputs[1].shape, 3, seed=seed)
    old = inputs[1]
    return [old + 0.3 * ref.to(old.dtype), old + 0.3 * sampler.to(old.dtype), entropy.abs().to(old.dtype)]


def with_everything(mask, variant, backend, **options):
    """A loss of logprobs, entropy, old_logprobs, advantages, ref_logprobs and sampler_logprobs."""

    chosen = of_policy(**{"variant": variant, **EVERYTHING, **options})

    def loss(logprobs, entropy, old_logprobs, advantages, ref, sampler):
        return policy_loss(
            logprobs, old_logprobs, advantages, mask=mask, ref_logprobs=ref, sampler_logprobs=sampler,
            entropy=entropy, backend=backend, **chosen,
        )  # fmt: skip

    return loss


def everything(shape, variant, dtype=torch.float32):
    """Its inputs; the log-ratio of a sequence stays small for losses of the ratio of a whole sequence."""
    logprobs, old, advantages = inputs_of(shape, torch.float64)
    if variant in ("dro", "vespo"):
        logprobs = old + (logprobs - old) / shape[1]
    ref, sampler, entropy = extras([logprobs, old, advantages])
    return [x.to(dtype) for x in (logprobs - 3, entropy, old - 3, advantages, ref - 3, sampler - 3)]


def eager(mask, low=0.8, high=1.28, dual=1.5):
    def loss(logprobs, old_logprobs, advantages):
        counts = mask.to(logprobs.dtype)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        surrogate = torch.where(advantages < 0, torch.max(surrogate, dual * advantages), surrogate)
        clipped = (surrogate != ratio * advantages).to(ratio.dtype)
        below = (clipped != 0) & (ratio < low)
        rows = (-surrogate, clipped, below, clipped - below.to(ratio.dtype), ratio - 1 - log_ratio, ratio)
        means = [(x * counts).sum() / counts.sum() for x in rows]
        metrics = [*(x.detach() for x in means[1:]), ratio.detach()[mask].max(), ratio.detach()[mask].min()]
        return means[0], dict(zip(ALWAYS, metrics, strict=True))

    return loss


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
    assert got["ratio_min"].item() == 1.0
    assert (got["clip_fraction_low"].item(), got["clip_fraction_high"].item()) == (0.0, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_minibatch_has_ratio_1_and_no_kl_exactly(backend, dtype):
    logprobs, _, advantages = inputs_of((3, 70), dtype)
    got = run([logprobs, logprobs, advantages], mask=ragged((3, 70)), backend=backend)
    assert [got[name].item() for name in ALWAYS] == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_no_old_logprobs_are_the_logprobs_bit_for_bit(backend, variant):
    logprobs, entropy, _, *others = everything((3, 8), variant)
    loss = with_everything(ragged((3, 8)), variant, backend)
    expected = evaluate(loss, [logprobs, entropy, logprobs.clone(), *others], 2)
    assert_same(evaluate(lambda x, h, *rest: loss(x, h, None, *rest), [logprobs, entropy, *others], 2), expected)


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
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape):
    mask = ragged(shape)
    assert_keeps_contract(
        lambda *x: policy_loss(*x, objective=DUAL, mask=mask, backend=backend), eager(mask), inputs_of(shape, dtype), 1
    )


CONTRACT = [*(("cpu", dtype, (17, 9)) for dtype in DTYPES), ("cpu", torch.float32, (3, 1100)),
            ("triton", torch.float32, (5, 9)), ("triton", torch.bfloat16, (2, 3))]  # fmt: skip
ON_KERNELS = [(*case, name) for case in CONTRACT for name, backend in EVERYWHERE if backend == case[0]]


@pytest.mark.parametrize(("backend", "dtype", "shape", "variant"), ON_KERNELS, ids=str)
def test_every_function_with_every_term_keeps_the_contract(backend, dtype, shape, variant):
    # Beside the reference, whose values the papers' constants pin.
    mask = ragged(shape)
    plain = with_everything(mask, variant, "reference")
    assert_keeps_contract(with_everything(mask, variant, backend), plain, everything(shape, variant, dtype), 2)


@pytest.mark.parametrize("variant", ["ppo_clip", "dr_grpo", "gspo"])
def test_blocks_of_tokens_inherit_nothing_from_the_one_before(variant):
    # A thread of the C++ kernel takes four of its blocks one after the other: whole, partly masked, partly dropped.
    blocks, length = 256, 512
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(4, (blocks, 1), generator=generator)
    draws = torch.rand(blocks, length, generator=generator)
    mask = ((kinds == 0) | (kinds == 1) | ((kinds == 2) & (draws < 0.5))).view(2, -1)
    logprobs, old, advantages = inputs_of(mask.shape)
    entropy = torch.where((kinds == 1) & (draws < 0.5), 0.0, 1 + draws).view(2, -1)

    for fraction in (1.0, 0.7):
        objective = PolicyObjective(variant, fixed_length=9, entropy_fraction=fraction)
        loss = partial(policy_loss, objective=objective, mask=mask, entropy=entropy)
        inputs = [logprobs, old, advantages]
        assert_keeps_contract(partial(loss, backend="cpu"), partial(loss, backend="reference"), inputs, 1)


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_any_byte_of_a_mask_but_zero_counts(backend, variant):
    # Those that select tokens keep bits beside it, which a mask may have set.
    mask, inputs = ragged((4, 5)), everything((4, 5), variant)
    number = torch.arange(20).view(4, 5)
    for options in ({}, {"entropy_fraction": 1.0}):
        wanted = evaluate(with_everything(mask, variant, backend, **options), inputs, 2)
        for values in (number % 7 + 1, 254 + number % 2):
            numbers = torch.where(mask, values, 0).to(torch.uint8)
            assert_same(evaluate(with_everything(numbers, variant, backend, **options), inputs, 2), wanted)


@pytest.mark.parametrize("parts", [1, 2, 128])
def test_a_program_may_sum_several_blocks(parts, monkeypatch):
    from rlhf_fast.kernels import policy_loss as kernels

    monkeypatch.setattr(kernels, "PARTS", parts)
    inputs, mask = inputs_of((2, 2 * kernels.BLOCK + 3)), torch.ones(2, 2 * kernels.BLOCK + 3, dtype=torch.bool)
    assert_keeps_contract(lambda *x: policy_loss(*x, objective=DUAL, backend="triton"), eager(mask), inputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_one_advantage_per_sequence_is_that_of_its_tokens(backend, shape):
    logprobs, old, advantages = inputs_of((4, 4))
    advantages = advantages[:, :1]
    spread = run([logprobs, old, advantages.repeat(1, 4)], backend=backend)
    assert_same(run([logprobs, old, advantages.reshape(shape)], backend=backend), spread)


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_what_is_behind_the_mask_changes_nothing(backend, variant):
    mask, inputs = ragged((4, 5)), everything((4, 5), variant)
    poisoned = [x.masked_fill(~mask, math.nan) for x in inputs]
    loss = with_everything(mask, variant, backend)
    got = evaluate(loss, poisoned, 2)
    assert_same(got, evaluate(loss, inputs, 2))
    assert got["gradient 0"][~mask].eq(0).all()
    assert got["gradient 1"][~mask].eq(0).all()


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_nothing_counted_with_every_term_gives_a_connected_zero(backend, variant):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    got = evaluate(with_everything(mask, variant, backend), [torch.full((2, 3), math.nan)] * 6, 2)
    assert all(x.eq(0).all() for x in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("denominator", [None, 7])
def test_nothing_counted_gives_a_connected_zero(backend, shape, denominator):
    inputs = [torch.full(shape, math.nan)] * 3
    mask = torch.zeros(shape, dtype=torch.bool)
    got = run(inputs, mask=mask, denominator=denominator, backend=backend)
    assert [x.item() for x in list(got.values())[:8]] == [0.0] * 8
    assert torch.equal(got["gradient 0"], torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs, mask = inputs_of((5, 8)), ragged((5, 8))
    strided = [x.T.contiguous().T for x in inputs[:2]] + [torch.stack([inputs[2]] * 2, -1)[..., 0]]
    assert_same(run(strided, mask=mask, backend=backend), run(inputs, mask=mask, backend=backend))


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_packed_sequences_give_the_loss_of_padded_ones(backend, variant):
    mask, inputs = ragged((4, 6)), everything((4, 6), variant, torch.float64)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    padded = evaluate(with_everything(mask, variant, backend), inputs, 2)
    loss = with_everything(None, variant, backend, cu_seqlens=cu_seqlens)
    # Two tokens behind the last sequence do not count.
    packed = evaluate(loss, [torch.nn.functional.pad(x[mask], (0, 2), value=math.nan) for x in inputs], 2)
    for name in ("gradient 0", "gradient 1"):
        torch.testing.assert_close(packed.pop(name)[:-2], padded.pop(name)[mask])
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_ratio_of_1_holds_nothing_and_has_the_policy_gradient(variant):
    logprobs, _, advantages = inputs_of((3, 8), torch.float64)
    advantages = advantages[:, :1].expand(3, 8)
    options = {"variant": variant, "aggregation": "token_mean", "fixed_length": 8}
    got = run([logprobs - 3, logprobs - 3, advantages], **options)
    if variant not in ("clip_cov", "kl_cov"):  # they always select a token
        assert got["clip_fraction"].item() == 0.0
        torch.testing.assert_close(got["gradient 0"], -advantages / 24 * (8 if variant == "dro" else 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_one_token_has_the_loss_of_the_token(backend):
    inputs = inputs_of((9, 1))
    expected = run(inputs, clip_eps_low=0.2, clip_eps_high=0.3, backend=backend)
    for variant in ("gspo", "gspo_token", "luspo"):
        got = run(inputs, variant=variant, clip_eps_low=0.2, clip_eps_high=0.3, backend=backend)
        torch.testing.assert_close(got, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_micro_batches_with_the_global_denominator_sum_to_the_whole(rows, columns, seed):
    inputs, mask = inputs_of((rows, columns), torch.float64, seed), ragged((rows, columns))
    whole = run(inputs, mask=mask, objective=DUAL)
    for denominator in (mask.sum(), int(mask.sum())):
        parts = [
            run([x[rows_] for x in inputs], mask=mask[rows_], denominator=denominator, objective=DUAL)
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
    got = run(moved, mask=torch.nn.functional.pad(mask[order], (0, pad)), objective=DUAL)
    expected = run(inputs, mask=mask, objective=DUAL)
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


@pytest.mark.parametrize("variant", SMOOTH)
def test_the_reference_is_differentiable_twice(variant):
    logprobs, entropy, old, advantages, ref, sampler = everything((2, 4), variant, torch.float64)
    plain = with_everything(ragged((2, 4)), variant, "reference", entropy_fraction=1.0, off_policy_max_kl=None)

    def loss(x, h):
        return plain(x, h, old, advantages, ref, sampler)[0]

    leaves = logprobs.requires_grad_(), entropy.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_of_a_kernel_raises(backend):
    logprobs, old, advantages = inputs_of((2, 5))
    logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(
        policy_loss(logprobs, old, advantages, backend=backend)[0], logprobs, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"_loss has no second derivative; backend=.reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["ppo_clip", "gspo"])
def test_the_registered_op_passes_opcheck(backend, variant):
    logprobs, entropy, *rest = everything((3, 5), variant)
    objective = PolicyObjective(variant, **EVERYTHING)
    inputs = Inputs(logprobs.requires_grad_(), *rest, entropy.requires_grad_())
    args = (*inputs, *Plan.of(objective, logprobs, mask=ragged((3, 5))), *numbers(objective), backend)
    torch.library.opcheck(torch.ops.rlhf_fast.policy_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["ppo_clip", "gspo", "clip_cov"])
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend, variant):
    loss, inputs = with_everything(ragged((3, 5)), variant, backend, denominator=11), everything((3, 5), variant)
    assert_same(evaluate(compiled(loss), inputs, 2), evaluate(loss, inputs, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_is_the_objective_of_that_name_compiled_too(backend):
    inputs = inputs_of((3, 5))
    expected = run(inputs, objective=PolicyObjective("dapo"), backend=backend)
    assert_same(run(inputs, objective="dapo", backend=backend), expected)
    named = compiled(lambda *x: policy_loss(*x, objective="dapo", backend=backend))
    assert_same(evaluate(named, inputs, 1), expected)


def test_a_variant_without_kernels_runs_on_the_reference_and_nowhere_else(monkeypatch):
    def plain(tokens, objective):
        return -tokens.ratio * tokens.advantages, tokens.ratio < 0, tokens.ratio < 0

    monkeypatch.setitem(FUNCTIONS, "plain", Function(plain, kernels=()))
    monkeypatch.setitem(VARIANTS, "plain", Variant("plain", {"aggregation": "token_mean"}))
    logprobs, old, advantages = inputs_of((2, 3))
    for backend in ("reference", None):
        loss, _ = policy_loss(logprobs, old, advantages, objective="plain", backend=backend)
        torch.testing.assert_close(loss, -(advantages * (logprobs - old).exp()).mean())
    for backend in KERNELS:
        with pytest.raises(BackendError, match=f"policy_loss of plain: .* it has no {backend} implementation"):
            policy_loss(logprobs, old, advantages, objective="plain", backend=backend)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: [x[0], x[1][:1], x[2]], {}, r"old_logprobs .*\(2, 3\), got \(1, 3\)"),
        (lambda x: [x[0], x[1], x[2][0]], {}, r"advantages .*\(2, 3\), got \(3,\)"),
        (lambda x: [y[None] for y in x], {}, r"logprobs must be \(B, T\) or \(N,\), got \(1, 2, 3\)"),
        (lambda x: x, {"mask": torch.ones(3, 2)}, r"mask .*\(2, 3\), got \(3, 2\)"),
        (lambda x: x, {"variant": "trpo"}, "variant must be one of ppo_clip, .*, got 'trpo'"),
        (lambda x: x, {"clip_eps_low": 1.5}, r"clip_eps_low must be in \[0, 1\], got 1.5"),
        (lambda x: x, {"clip_eps_high": -0.1}, "clip_eps_high must be >= 0, got -0.1"),
        (lambda x: x, {"dual_clip": 1.0}, "dual_clip must be > 1 or None, got 1.0"),
        (lambda x: x, {"aggregation": "mean"}, "aggregation must be one of token_mean, .*, got 'mean'"),
        (lambda x: x, {"variant": "dr_grpo"}, "fixed_length must be given for seq_mean_token_sum_norm"),
        (lambda x: x, {"kl_coef": 0.1}, "ref_logprobs must be given for kl_coef 0.1"),
        (lambda x: x, {"entropy_coef": 0.1}, "entropy must be given for entropy_coef 0.1"),
        (lambda x: x, {"correction_low": 3.0}, "correction_low must be < correction_high, got 3.0 and 2.0"),
        (lambda x: [y[0] for y in x], {"variant": "gspo"}, r"cu_seqlens must be given for packed logprobs \(3,\)"),
        (lambda x: x, {"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens .*\(2,\) and \(2, 3\)"),
        (
            lambda x: [y[0] for y in x],
            {"cu_seqlens": torch.tensor([0, 4])},
            r"cu_seqlens must be non-decreasing from 0 to at most N = 3, got \[0, 4\]",
        ),
        (lambda x: x, {"overlong": torch.ones(3)}, r"overlong must be \(B,\) = \(2,\), got \(3,\)"),
        (lambda x: x, {"ref_logprobs": torch.zeros(3, 2)}, r"ref_logprobs .*\(2, 3\), got \(3, 2\)"),
        (lambda x: x, {"denominator": 0}, "denominator must be > 0, got 0"),
        (lambda x: x, {"denominator": torch.ones(2)}, r"denominator .*got \(2,\)"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*change(inputs_of((2, 3))), **of_policy(**options))


def test_integer_logprobs_raise():
    with pytest.raises(TypeError, match=r"old_logprobs must be float32.*got torch.int64"):
        policy_loss(torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2))


def test_the_triton_kernels_take_the_numbers_by_the_names_of_the_op():
    kernels = pytest.importorskip("rlhf_fast.kernels.policy_losses")
    assert kernels.Numbers._fields == tuple(name for name, kind in get_type_hints(Numbers).items() if kind is float)
