import math

import pytest
import torch

from rlhf_fast import PreferenceObjective, linear_logprobs, linear_preference_loss, preference_loss
from rlhf_fast.ops.head.linear_preference_loss import OPS, coupling
from rlhf_fast.ops.preference.objective import VARIANTS
from rlhf_fast.testing.memory import peak_bytes
from tests.linear_losses import (
    PARAMETERS,
    TRANSFORM,
    D,
    R,
    V,
    assert_close,
    head,
    plan_as_on_a_gpu,
    products,
    run,
)

KERNELS = OPS["linear_preference_loss"]
BACKENDS = ("reference", *KERNELS)
SHAPE = (6, 7)
TENSORS = head(SHAPE)
MASK = torch.arange(7) < torch.tensor([[7], [3], [1], [5], [4], [6]])
TARGETS = torch.randint(0, V, SHAPE)
_draw = lambda: torch.rand(3, dtype=torch.float64)  # noqa: E731
REFERENCE = {"ref_chosen": -20 * _draw(), "ref_rejected": -20 * _draw()}
ADVANTAGES = {"chosen_advantages": _draw(), "rejected_advantages": _draw()}
ROW = V * 8 + (2 * D + 2 * 3 + D) * 8  # bytes of scratch per row of a tile, see rows_that_fit
FIXED = 6 * 7 * 128


def objective(variant="sigmoid"):
    return PreferenceObjective(variant, label_smoothing=0.1 if variant == "exo_pair" else 0.0)


def fused(chosen, *, targets=TARGETS, mask=MASK, backend="cpu", **options):
    def call(hidden, weight, **head):
        return linear_preference_loss(
            hidden, weight, targets, objective=chosen, mask=mask, **REFERENCE, **ADVANTAGES, **TRANSFORM, **head,
            backend=backend, **options,
        )  # fmt: skip

    return call


def composed(chosen, mask=MASK):
    """The same from logits that are there as a whole."""

    def call(hidden, weight, **head):
        logprobs = linear_logprobs(hidden, weight, TARGETS, mask=mask, **TRANSFORM, **head, backend="reference")
        chosen_sum, rejected_sum = logprobs.sum(1).chunk(2)
        lengths = dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(1).chunk(2), strict=True))
        return preference_loss(
            chosen_sum, rejected_sum, objective=chosen, **REFERENCE, **ADVANTAGES, **lengths, backend="reference"
        )

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_each_gives_dpo_of_two_logistic_functions(backend):
    # logits (0, 2): log pi(chosen) = -log(1 + e^-2), log pi(rejected) = that - 2; beta = 1, references 0: h = 2
    # DPO, eq. 7: L = softplus(-2), d L / d chosen = -sigmoid(-2) = -d L / d rejected
    hidden, weight = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]]), torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    hidden.requires_grad_(), weight.requires_grad_()
    zero = torch.zeros(1)
    loss, metrics = linear_preference_loss(
        hidden, weight, torch.tensor([[1], [0]]), objective=PreferenceObjective(beta=1.0), ref_chosen=zero,
        ref_rejected=zero, backend=backend,
    )  # fmt: skip
    loss.backward()
    p = 1 / (1 + math.exp(2.0))  # the probability of token 0, and sigmoid(-2)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-6)
    assert metrics["margin"].item() == pytest.approx(2.0, rel=1e-6)
    row = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(hidden.grad, torch.stack([-p * p * row, -p * (1 - p) * row])[:, None])
    torch.testing.assert_close(weight.grad, p * torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_linear_logprobs_and_preference_loss_within_any_budget(variant):
    chosen = objective(variant)
    expected = run(composed(chosen), TENSORS)
    for options in ({}, {"scratch_bytes": FIXED + 4 * ROW}):
        assert_close(run(fused(chosen, **options), TENSORS), expected)


@pytest.mark.parametrize("options", [{"chunk_tokens": 3}, {"scratch_bytes": FIXED + ROW}], ids=str)
def test_tiles_do_not_change_the_result(options):
    assert_close(run(fused(objective(), **options), TENSORS), run(fused(objective()), TENSORS))


def test_several_losses_with_weights_are_their_sum():
    chosen = PreferenceObjective({"sigmoid": 0.8, "sft": 0.2}, beta=0.3)
    assert_close(run(fused(chosen), TENSORS), run(composed(chosen), TENSORS))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["ipo", "aot"])
def test_every_backend_takes_every_coupling(backend, variant):
    found = run(fused(objective(variant), scratch_bytes=FIXED + 8 * ROW, backend=backend), TENSORS)
    assert_close(found, run(composed(objective(variant)), TENSORS))


@pytest.mark.parametrize("trained", [("hidden",), ("lora_a", "lora_b"), ("weight",), ("bias", "hidden")], ids="+".join)
def test_any_part_of_the_head_may_be_trained_alone(trained):
    assert_close(run(fused(objective()), TENSORS, trained), run(composed(objective()), TENSORS, trained))


def test_losses_that_sort_or_shift_by_the_batch_take_all_of_it():
    names = {name for name in VARIANTS if coupling(objective(name), None) == "batch"}
    assert names == {"aot", "aot_unpaired", "bco_pair"}
    assert coupling(objective("bco_pair"), torch.zeros(())) == "pair"
    assert coupling(PreferenceObjective({"sigmoid": 1.0, "aot": 1.0}), None) == "batch"


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_pairs_give_what_padded_ones_give(backend, frozen):
    lengths = torch.nn.functional.pad(MASK.sum(1).cumsum(0), (1, 0))
    packed = fused(objective("ipo"), targets=TARGETS[MASK], mask=None, cu_seqlens=lengths, backend=backend)
    trained = ("hidden",) if frozen else PARAMETERS
    expected = run(fused(objective("ipo"), backend=backend), TENSORS, trained)
    found = run(packed, TENSORS | {"hidden": TENSORS["hidden"][MASK]}, trained)
    assert_close(found, expected | {"d hidden": expected["d hidden"][MASK]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_of_the_reference_stand_for_its_sums(backend):
    hidden, weight = torch.randn((*SHAPE, D)).double(), torch.randn(V, D).double()
    chosen, rejected = linear_logprobs(hidden, weight, TARGETS, mask=MASK, backend="cpu").sum(1).chunk(2)
    options = {"objective": objective(), "mask": MASK, "backend": backend}
    given = linear_preference_loss(
        TENSORS["hidden"], weight, TARGETS, ref_chosen=chosen, ref_rejected=rejected, **options
    )
    made = linear_preference_loss(TENSORS["hidden"], weight, TARGETS, ref_hidden=hidden, **options)
    torch.testing.assert_close(made[0], given[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", ["sigmoid", "aot"])
def test_a_gpu_that_is_told_how_many_rows_count_has_the_same_result(variant, monkeypatch):
    few = torch.zeros(SHAPE, dtype=torch.bool)
    few[:, 1:3] = True
    tensors = TENSORS | {"hidden": torch.where(few[..., None], TENSORS["hidden"], torch.nan)}
    expected = run(composed(objective(variant), few), TENSORS)
    plan_as_on_a_gpu(monkeypatch)
    found = run(fused(objective(variant), mask=few, mask_count=2 * SHAPE[0]), tensors)
    assert_close(found, expected)


@pytest.mark.parametrize(("trained", "rows", "expected"), [
    (("hidden", "weight"), 32, 3), (("hidden",), 8, 2), ((), 32, 1),
    (("hidden", "weight"), 8, 3.5),  # a pair is two tiles, of which one is made twice
], ids=str)  # fmt: skip
def test_the_products_are_those_of_the_cost_model(trained, rows, expected):
    hidden, weight, targets = torch.randn(4, 8, 16), torch.randn(97, 16) / 8, torch.randint(0, 97, (4, 8))
    hidden.requires_grad_("hidden" in trained), weight.requires_grad_("weight" in trained)
    scratch = 4 * 8 * 128 + rows * (97 + 2 * 16) * 4

    def call():
        chosen = PreferenceObjective("simpo")
        loss, _ = linear_preference_loss(
            hidden, weight, targets, objective=chosen, scratch_bytes=scratch, backend="cpu"
        )
        if trained:
            loss.backward()

    assert products(call) == expected * 4 * 8 * 16 * 97


LONG = (6, 70)  # pairs whose logits take more than two gradients of the head and a tile
SUMS = 2 * (V * D + V + R * (D + V))  # numbers in them


@pytest.mark.parametrize(("variant", "backend"), [
    *((variant, "cpu") for variant in ("sigmoid", "nca_pair", "simpo", "orpo")), ("simpo", "triton"),
])  # fmt: skip
def test_pairs_beyond_the_budget_are_summed(variant, backend):
    torch.manual_seed(1)
    targets, mask = torch.randint(0, V, LONG), torch.rand(LONG) < 0.9
    chosen, tensors, scratch = objective(variant), head(LONG), 420 * 128 + 8 * SUMS + 10 * ROW
    given = {"targets": targets, "mask": mask}
    found = run(fused(chosen, scratch_bytes=scratch, chunk_tokens=10, backend=backend, **given), tensors)
    assert_close(found, run(fused(chosen, backend="reference", **given), tensors))


@pytest.mark.parametrize(("trained", "sums"), [
    (("hidden", "weight"), 2 * 97 * 16), (("hidden", "bias"), 2 * 97),
], ids=str)  # fmt: skip
def test_a_long_pair_takes_its_logits_once(trained, sums):
    tensors = {"hidden": torch.randn(2, 70, 16), "weight": torch.randn(97, 16) / 8, "bias": torch.randn(97)}
    for name in trained:
        tensors[name].requires_grad_()
    scratch = 140 * 128 + 4 * sums + 10 * 4 * (97 + 2 * 16)

    def call():
        linear_preference_loss(
            tensors["hidden"], tensors["weight"], torch.zeros(2, 70, dtype=torch.long), bias=tensors["bias"],
            objective=PreferenceObjective("simpo"), scratch_bytes=scratch, chunk_tokens=10, backend="cpu",
        )[0].backward()  # fmt: skip

    of_head = 16 if "weight" in trained else 1  # columns of the product for the trained part of the head
    assert products(call) == 140 * 97 * (16 + 16 + of_head)


@pytest.mark.parametrize("scratch", [1 << 20, 3 << 20])
def test_the_memory_beside_results_and_gradients_stays_within_the_budget(scratch):
    hidden, weight = torch.randn(4, 256, 32, requires_grad=True), torch.randn(4099, 32, requires_grad=True)
    targets, gradients = torch.randint(0, 4099, (4, 256)), 4 * (hidden.numel() + weight.numel())
    found = []

    def call():
        chosen = PreferenceObjective("simpo")
        found.append(linear_preference_loss(
            hidden, weight, targets, objective=chosen, scratch_bytes=scratch, backend="cpu"
        ))  # fmt: skip

    assert scratch / 3 < peak_bytes(call) - gradients <= scratch


def test_pairs_are_parts_of_a_batch_with_a_global_denominator():
    def parts(hidden, weight, **head):
        losses = []
        for pairs in (slice(0, 1), slice(1, 3)):
            take = lambda x, pairs=pairs: torch.cat([x[:3][pairs], x[3:][pairs]])  # noqa: E731
            losses.append(linear_preference_loss(
                take(hidden), weight, take(TARGETS), mask=take(MASK), **{k: x[pairs] for k, x in REFERENCE.items()},
                denominator=3, **TRANSFORM, **head, backend="cpu",
            )[0])  # fmt: skip
        return sum(losses), {}

    assert_close(run(parts, TENSORS), run(fused(objective()), TENSORS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counted_gives_gradients_of_zero(backend):
    found = run(fused(objective(), mask=torch.zeros(SHAPE), backend=backend), TENSORS)
    assert all((x == 0).all() for name, x in found.items() if name.startswith("d "))
    assert found["loss"].isfinite()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_reference_is_differentiable_twice(packed):
    small = {name: x[:2, :2] if name == "hidden" else x[:3] for name, x in TENSORS.items()}
    leaves = [small[name].detach().requires_grad_() for name in PARAMETERS]
    targets, ends = torch.tensor([[0, 2], [1, 1]]), torch.tensor([0, 2, 4])

    def call(hidden, weight, bias, lora_a, lora_b):
        return linear_preference_loss(
            hidden.reshape(4, D) if packed else hidden, weight, targets.view(-1) if packed else targets, bias=bias,
            head_lora=(lora_a, lora_b, 0.5), cu_seqlens=ends if packed else None, backend="reference",
            objective=PreferenceObjective("simpo"),
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("variant", ["sigmoid", {"ipo": 0.5, "sft": 0.5}], ids=str)
def test_it_compiles_with_its_backward_into_one_graph(variant):
    torch.compiler.reset()
    call = fused(PreferenceObjective(variant))
    assert_close(run(torch.compile(call, fullgraph=True, backend="aot_eager"), TENSORS), run(call, TENSORS))


def test_bad_input_raises_with_the_shapes_in_the_message():
    hidden, weight = TENSORS["hidden"], TENSORS["weight"]
    with pytest.raises(ValueError, match=r"targets must be \(2 B, T\), chosen then rejected, .* got \(5, 7\)"):
        linear_preference_loss(hidden[1:], weight, TARGETS[1:], **REFERENCE)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(2 B \+ 1,\) and targets \(N,\), got \(4,\) and \(9,\)"):
        linear_preference_loss(hidden.view(-1, D)[:9], weight, TARGETS.view(-1)[:9], cu_seqlens=torch.arange(4))
    with pytest.raises(ValueError, match=r"cu_seqlens must be non-decreasing from 0 to N = 9, got \[0, 3, 2\]"):
        linear_preference_loss(hidden.view(-1, D)[:9], weight, TARGETS.view(-1)[:9], cu_seqlens=torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="ref_chosen must be given for sigmoid"):
        linear_preference_loss(hidden, weight, TARGETS)
    with pytest.raises(ValueError, match=r"ref_rejected must be \(B,\) = \(3,\), got \(2,\)"):
        linear_preference_loss(hidden, weight, TARGETS, ref_chosen=_draw(), ref_rejected=_draw()[:2])
