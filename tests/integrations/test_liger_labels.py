"""Liger's cross-entropies and functions by position under their own names, without Liger: beside torch's cross-entropy
in float64, and beside the losses that they call."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_fast.integrations import liger
from rlhf_fast.integrations.liger.functions import FUNCTIONAL, FUNCTIONS
from rlhf_fast.testing.numerics import assert_contract

N, D, V = 13, 8, 37
TARGET = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
TARGET[[2, 7]] = -100
CLASSES = 0.2 + torch.rand(V, generator=torch.Generator().manual_seed(2))
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "lse_square_scale": 1e-2},
    {"weight": CLASSES},
    {"weight": CLASSES, "reduction": "none", "softcap": 3.0},
    {"weight": CLASSES, "lse_square_scale": 1e-2},
    {"label_smoothing": 0.1, "ignore_index": int(TARGET[0])},
    {"label_smoothing": 0.2, "weight": CLASSES, "lse_square_scale": 1e-2, "softcap": 5.0},
    {"label_smoothing": 0.2, "weight": CLASSES, "reduction": "none"},
]
NAMES = [" ".join(k if isinstance(v, Tensor) else f"{k}={v}" for k, v in o.items()) or "plain" for o in OPTIONS]


def target(ignore_index=-100, **_) -> Tensor:
    return torch.where(TARGET == -100, ignore_index, TARGET)


def definition(
    logits, ids, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None,
):  # fmt: skip
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weight = None if weight is None else weight.to(z.dtype)
    loss = functional.cross_entropy(
        z, ids, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    counts = ids != ignore_index
    z_losses = torch.where(counts, lse_square_scale * torch.logsumexp(z, -1) ** 2, 0)
    z_loss = {"none": z_losses, "sum": z_losses.sum(), "mean": z_losses.sum() / counts.sum()}[reduction]
    return loss + z_loss, z_loss


def outcome(function, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    loss, z_loss = function(**leaves)
    assert not (z_loss.requires_grad and function.__name__ == "ours")
    (loss * torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)).sum().backward()
    return {"loss": loss.detach(), "z_loss": z_loss.detach()} | {f"d {name}": x.grad for name, x in leaves.items()}


def assert_is_the_definition(ours, theirs, leaves: dict[str, Tensor]) -> None:
    found, eager = outcome(ours, leaves), outcome(theirs, leaves)
    exact = outcome(theirs, {name: x.double() for name, x in leaves.items()})
    for name, x in found.items():
        assert_contract(name, x, eager[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_cross_entropy_of_logits_is_torchs_with_a_z_loss(options, dtype):
    logits = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = target(**options)

    def ours(logits):
        loss, z_loss, *_ = liger.LigerCrossEntropyFunction.apply(logits, ids, return_z_loss=True, **options)
        assert loss.dtype == z_loss.dtype == logits.dtype
        return loss, z_loss

    assert_is_the_definition(ours, lambda logits: definition(logits, ids, **options), {"logits": logits})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_cross_entropy_of_hidden_states_is_torchs_with_a_z_loss(options, dtype):
    draws = torch.Generator().manual_seed(4)
    leaves = {"_input": torch.randn(N, D, generator=draws), "weight": torch.randn(V, D, generator=draws)}
    leaves = {name: x.to(dtype) for name, x in leaves.items()} | {"bias": torch.randn(V, generator=draws).to(dtype)}
    ids, named = target(**options), {("ce_weight" if k == "weight" else k): x for k, x in options.items()}

    def ours(**given):
        return liger.LigerFusedLinearCrossEntropyFunction.apply(**given, target=ids, return_z_loss=True, **named)[:2]

    def theirs(_input, weight, bias):
        return definition(functional.linear(_input, weight, bias), ids, **options)

    assert_is_the_definition(ours, theirs, leaves)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_scaling_weighs_a_loss_with_the_probability_of_its_label(smoothing):
    draws = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(N, D, generator=draws).requires_grad_(), torch.randn(V, D, generator=draws)
    found, *_ = liger.LigerFusedLinearCrossEntropyFunction.apply(
        hidden, head, TARGET, use_token_scaling=True, label_smoothing=smoothing, reduction="sum"
    )
    logits = functional.linear(hidden.double(), head.double())
    p = logits.softmax(-1).gather(1, TARGET.clamp(min=0)[:, None])[:, 0].detach()
    losses = functional.cross_entropy(logits, TARGET, reduction="none", label_smoothing=smoothing)
    expected = (p * losses).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = (torch.autograd.grad(x, hidden) for x in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_modules_give_the_predicted_ids_and_their_accuracy_of_the_labels_that_count(reduction):
    hidden, head = torch.eye(D)[[0, 1, 2, 3]], torch.eye(D)
    labels = torch.tensor([0, 5, 2, -100])
    options = {"reduction": reduction, "return_token_accuracy": True, "return_predicted_tokens": True}
    for found in (
        liger.LigerCrossEntropyLoss(**options)(hidden, labels),
        liger.LigerFusedLinearCrossEntropyLoss(**options)(head, hidden, labels),
    ):
        assert found.predicted_tokens.tolist() == [0, 1, 2, -1]
        right = found.token_accuracy if reduction == "none" else 3 * found.token_accuracy
        torch.testing.assert_close(right, torch.tensor([1.0, 0, 1, 0] if reduction == "none" else 2.0))
        assert found.z_loss is None


@pytest.mark.parametrize(
    "options", [{}, {"weight": CLASSES}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}], ids=str
)
def test_a_batch_without_a_label_has_loss_0_and_no_gradient(options):
    logits = torch.full((3, V), torch.nan).requires_grad_()
    loss = liger.LigerCrossEntropyLoss(**options)(logits, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.ones(V - 1)}, rf"weight must be \({V},\) of a floating type, got \({V - 1},\)"),
        ({"weight": torch.ones(V, dtype=torch.int64)}, "of a floating type, got .* torch.int64"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none, got 'median'"),
        ({"softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ],
)
def test_cross_entropies_say_what_does_not_fit(options, message):
    named = {("ce_weight" if k == "weight" else k): x for k, x in options.items()}
    with pytest.raises(ValueError, match=message):
        liger.LigerCrossEntropyFunction.apply(torch.zeros(N, V), TARGET, **options)
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearCrossEntropyFunction.apply(torch.zeros(N, D), torch.zeros(V, D), TARGET, **named)


# --- Functions by position --------------------------------------------------------------------------------------------


def test_a_function_by_position_is_its_loss_with_the_same_options():
    draws = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(4, 3, D, generator=draws), torch.randn(V, D, generator=draws)
    ids = torch.randint(V, (4, 3), generator=draws)
    by_position = FUNCTIONS["CPO"].apply(hidden, head, ids, None, -100, 0.3, 0.5, 0.1, False)
    named = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.5, label_smoothing=0.1, compute_nll_loss=False)
    assert torch.equal(by_position[0], named(head, hidden, ids)[0])
    labels = torch.tensor([True, False, True, True])
    kto = FUNCTIONAL["liger_fused_linear_kto"](hidden, head, ids, labels, None, hidden, head + 0.1)
    expected = liger.LigerFusedLinearKTOLoss(use_ref_model=True)(
        hidden, head, ids, preference_labels=labels, ref_input=hidden, ref_weight=head + 0.1
    )
    assert torch.equal(kto[0], expected[0])


def test_a_function_says_how_many_arguments_it_takes():
    with pytest.raises(TypeError, match=r"LigerFusedLinearORPOFunction\.apply takes 3 to 10 arguments, got 2"):
        FUNCTIONS["ORPO"].apply(1, 2)


@pytest.mark.parametrize("reduce", [True, False])
def test_the_grpo_function_takes_the_weights_of_vespo_that_the_wrapper_makes(reduce):
    draws = torch.Generator().manual_seed(6)
    logits, ids = torch.randn(3, 5, V, generator=draws), torch.randint(V, (3, 4), generator=draws)
    old, advantages = -torch.rand(3, 4, generator=draws) - 3, torch.tensor([1.0, -1.0, 0.5])
    weights = torch.tensor([0.5, 2.0, 1.0])
    given = (logits, old, None, ids, advantages, None, 1.0, 0.0, 0.2, 0.2, False, "vespo", None, reduce)
    leaf = logits.clone().requires_grad_()
    found = liger.GrpoLossFunction.apply(leaf, *given[1:], phi_seq=weights)
    logprobs = leaf[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    losses = -(weights * advantages)[:, None] * logprobs
    torch.testing.assert_close(found[0], losses.mean() if reduce else losses, rtol=1e-5, atol=1e-6)
    assert found[1] is None
    with pytest.raises(ValueError, match="phi_seq must be given for loss_type vespo"):
        liger.GrpoLossFunction.apply(*given)


def test_the_grpo_function_has_the_peers_parameters_in_its_order():
    names = list(inspect.signature(liger.GrpoLossFunction.apply).parameters)
    assert names[:6] == ["logits", "old_logp", "ref_logp", "completion_ids", "advantages", "completion_mask"]
    assert names[-2:] == ["num_items_in_batch", "phi_seq"]


def test_the_grpo_function_looks_at_the_temperatures_of_sapo_for_sapo_alone():
    draws = torch.Generator().manual_seed(7)
    hidden, head = torch.randn(2, 3, D, generator=draws), torch.randn(V, D, generator=draws)
    given = [hidden, head, torch.randint(V, (2, 3), generator=draws), torch.ones(2, 3), torch.ones(2)]
    defaults = [None] * 6 + [0.0, 0.2, 0.2]
    loss, _ = FUNCTIONS["GRPO"].apply(*given, *defaults, "dapo", None, "token", 1.0, 0.0, 1.0, False, False)
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"sapo_temperature_neg must be positive, got 0\.0"):
        FUNCTIONS["GRPO"].apply(*given, *defaults, "sapo", None, "token", 1.0, 0.0, 1.0, False, False)
