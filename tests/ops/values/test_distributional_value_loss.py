import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import distributional_value_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.values.distributional_value_loss import Numbers, reference
from rlhf_fast.testing.numerics import assert_contract
from tests.losses import BACKENDS, DTYPES, KERNELS, compiled, draw, ragged

RANGE = {"v_min": -2.0, "v_max": 3.0}


def inputs_of(shape, bins, dtype=torch.float32, seed=0):
    (logits,), (returns,) = draw((*shape, bins), 1, dtype, seed), draw(shape, 1, torch.float32, seed + 1)
    return logits, 2 * returns.to(torch.float64 if dtype == torch.float64 else torch.float32)


def run(logits, returns, op=distributional_value_loss, **options):
    leaf = logits.detach().requires_grad_()
    loss, metrics, values = op(leaf, returns, **RANGE | options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), "values": values, **metrics, "gradient": gradient}


def eager(logits, returns, *, v_min, v_max, mask):
    """In the manner of the listing in arXiv 2403.03950, appendix A: support, cdf, bin probabilities, cross-entropy."""
    bins = logits.shape[-1]
    support = torch.linspace(v_min, v_max, bins + 1, dtype=returns.dtype)
    sigma = 0.75 * (v_max - v_min) / bins
    cdf = torch.special.erf((support - returns.clamp(v_min, v_max)[..., None]) / (math.sqrt(2) * sigma))
    target = (cdf[..., 1:] - cdf[..., :-1]) / (cdf[..., -1] - cdf[..., 0])[..., None]
    losses = -(target * logits.log_softmax(-1).to(target.dtype)).sum(-1)
    values = (logits.softmax(-1).to(target.dtype) * (support[1:] + support[:-1]) / 2).sum(-1)
    outside = ((returns < v_min) | (returns > v_max)).to(target.dtype)
    loss, share = ((x * mask).sum() / mask.sum() for x in (losses, outside))
    return loss, {"outside_fraction": share}, (values * mask).detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_bins_by_hand(backend):
    # arXiv 2403.03950, section 3.1: edges -1, 0, 1, so a target of 0 splits evenly; the softmax is 3 : 1.
    logits = torch.tensor([[math.log(3.0), 0.0]])
    got = run(logits, torch.zeros(1), v_min=-1.0, v_max=1.0, sigma=0.5, backend=backend)
    torch.testing.assert_close(got["loss"].item(), -0.5 * math.log(0.75) - 0.5 * math.log(0.25))
    torch.testing.assert_close(got["gradient"], torch.tensor([[0.25, -0.25]]))
    torch.testing.assert_close(got["values"], torch.tensor([0.75 * -0.5 + 0.25 * 0.5]))
    assert got["outside_fraction"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_is_the_histogram_of_the_gaussian_by_hand(backend):
    # Edges 0, 1, 2, 3, return 1, sigma 1: normal probabilities of [-1, 0], [0, 1], [1, 2], over their sum.
    normal = [0.3413447460685429, 0.3413447460685429, 0.13590512198327787]
    expected = torch.tensor([1 / 3 - p / sum(normal) for p in normal])
    got = run(torch.zeros(1, 3), torch.ones(1), v_min=0.0, v_max=3.0, sigma=1.0, backend=backend)
    torch.testing.assert_close(got["gradient"][0], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["loss"].item(), math.log(3.0))
    assert got["values"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_outside_of_the_bins_count_as_the_nearer_end(backend):
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    got = run(logits, torch.tensor([-50.0, 1.0]), denominator=2, backend=backend)
    assert got["outside_fraction"].item() == 0.5
    at_the_end = run(logits, torch.tensor([-2.0, 1.0]), denominator=2, backend=backend)
    assert all(torch.equal(got[name], at_the_end[name]) for name in ("loss", "values", "gradient"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "bins"), [((1, 1), 2), ((17, 3), 51), ((5, 31), 101)], ids=str)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, bins):
    logits, returns = inputs_of(shape, bins, dtype)
    mask = ragged(shape)
    got, plain = run(logits, returns, mask=mask, backend=backend), run(logits, returns, eager, mask=mask)
    exact = run(logits.double(), returns.double(), eager, mask=mask)
    for name, value in got.items():
        assert_contract(name, value, plain[name], exact[name])
    assert got["gradient"].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_the_mask_changes_nothing(backend):
    mask, (logits, returns) = ragged((6, 9)), inputs_of((6, 9), 5)
    expected = run(logits, returns, mask=mask, backend=backend)
    poisoned = [x.masked_fill(m, math.nan) for x, m in ((logits, ~mask[..., None]), (returns, ~mask))]
    got = run(*poisoned, mask=mask, backend=backend)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert got["gradient"][~mask].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=str)
def test_nothing_counted_gives_a_connected_zero(backend, shape):
    got = run(torch.full((*shape, 4), math.nan), torch.zeros(shape), mask=torch.zeros(shape), backend=backend)
    assert all(value.eq(0).all() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_forbidden_logits_stay_finite(backend):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, -math.inf]])
    got = run(logits, torch.tensor([-2.0, -2.0]), sigma=0.05, backend=backend)
    assert all(value.isfinite().all() for value in got.values())
    assert got["gradient"][1, 2].item() == 0


@pytest.mark.parametrize("sigma", [0.3, 40.0])
def test_targets_are_never_negative_and_keep_their_digits(sigma):
    # With equal logits the gradient is 1 / K - target.
    returns = torch.linspace(-2.5, 3.5, 4001)
    got = run(torch.zeros(4001, 300), returns, sigma=sigma, backend="cpu", denominator=1.0)["gradient"]
    exact = run(torch.zeros(4001, 300, dtype=torch.float64), returns.double(), sigma=sigma, denominator=1.0)["gradient"]
    assert (1 / 300 - got).min() > -1e-9
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_return_that_is_no_number_gives_a_loss_that_is_none(backend):
    got = run(*inputs_of((3,), 7)[:1], torch.tensor([0.0, math.nan, 1.0]), backend=backend)
    assert got["loss"].isnan()
    assert got["gradient"][1].isnan().all()
    assert got["gradient"][0].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_logits_give_the_bits_of_contiguous_ones(backend):
    logits, returns = inputs_of((5, 8), 6)
    expected = run(logits, returns, backend=backend)
    got = run(torch.cat([logits] * 2, -1)[..., :6], returns, backend=backend)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**16), st.floats(-5, 5))
def test_gradients_sum_to_zero_and_a_common_shift_changes_nothing(bins, seed, shift):
    logits, returns = inputs_of((4,), bins, torch.float64, seed)
    got, moved = run(logits, returns), run(logits + shift, returns)
    torch.testing.assert_close(got["gradient"].sum(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(got, moved)
    assert (got["values"] > RANGE["v_min"]).all()
    assert (got["values"] < RANGE["v_max"]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_micro_batches_with_the_global_denominator_sum_to_the_whole(rows, columns, seed):
    (logits, returns), mask = inputs_of((rows, columns), 11, torch.float64, seed), ragged((rows, columns))
    whole = run(logits, returns, mask=mask)
    parts = [
        run(logits[part], returns[part], mask=mask[part], denominator=mask.sum())
        for part in (slice(0, 1), slice(1, None))
    ]
    torch.testing.assert_close(sum(p["loss"] for p in parts), whole["loss"])
    torch.testing.assert_close(torch.cat([p["gradient"] for p in parts]), whole["gradient"])


def test_the_reference_is_differentiable_twice():
    logits, returns = inputs_of((2, 3), 5, torch.float64)

    def loss(x):
        return reference(x, returns, Over(ragged((2, 3))), Numbers(**RANGE, sigma=0.4))[0]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    logits, returns = inputs_of((6,), 5)
    args = (logits.requires_grad_(), returns, None, None, -2.0, 3.0, 0.4, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.distributional_value_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    logits, returns = inputs_of((3, 5), 7)
    got = run(logits, returns, compiled(lambda *x, **o: distributional_value_loss(*x, **o, backend=backend)))
    expected = run(logits, returns, backend=backend)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ((2, 3, 1), {}, r"\(N, K\) with K >= 2, got \(2, 3, 1\)"),
        ((2, 4, 5), {}, r"returns must be logits.shape\[:-1\] = \(2, 4\), got \(2, 3\)"),
        ((2, 3, 5), {"v_max": -2.0}, r"v_min must be below v_max, got -2\.0 and -2\.0"),
        ((2, 3, 5), {"sigma": 0.0}, "sigma must be > 0, got 0.0"),
        ((2, 3, 5), {"mask": torch.ones(3)}, r"mask .*\(2, 3\), got \(3,\)"),
    ],
)
def test_bad_input_raises_with_its_values(logits, options, message):
    with pytest.raises(ValueError, match=message):
        distributional_value_loss(torch.zeros(logits), torch.zeros(2, 3), **RANGE | options)
