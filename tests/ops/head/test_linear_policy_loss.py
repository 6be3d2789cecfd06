import math

import pytest
import torch

from rlhf_fast import PolicyObjective, linear_logprobs, linear_policy_loss, policy_loss
from rlhf_fast.ops.head.linear_policy_loss import OPS, coupling
from rlhf_fast.ops.policy.policy_loss import VARIANTS
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

KERNELS = OPS["linear_policy_loss"]
BACKENDS = ("reference", *KERNELS)
SHAPE = (4, 7)
TENSORS = head(SHAPE)
MASK = torch.rand(SHAPE) < 0.8
TARGETS = torch.randint(0, V, SHAPE)
_LORA = (TENSORS["lora_a"], TENSORS["lora_b"], 0.7)
_NOW = linear_logprobs(
    *(TENSORS["hidden"], TENSORS["weight"], TARGETS), bias=TENSORS["bias"], head_lora=_LORA, **TRANSFORM, backend="cpu"
)
OLD, REF, SAMPLER = (_NOW + 0.2 * torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
ADVANTAGES = torch.randn(SHAPE, dtype=torch.float64)
ADVANTAGES[1] = 0  # a group of equal rewards
TERMS = {"ref_logprobs": REF, "sampler_logprobs": SAMPLER}
ROW = V * 8 + (2 * D + 2 * 3 + D) * 8  # bytes of scratch per row of a tile, see rows_that_fit
FIXED = 4 * 7 * 128


def objective(variant="ppo_clip", **numbers):
    needed = {"dr_grpo": {"fixed_length": 7.0}, "clip_cov": {"cov_low": 0.01}}.get(variant, {})
    return PolicyObjective(variant, **{"kl_coef": 0.1, "cov_fraction": 0.2} | needed | numbers)


def fused(chosen, *, old=OLD, mask=MASK, backend="cpu", **options):
    def call(hidden, weight, **head):
        return linear_policy_loss(
            hidden, weight, TARGETS, old, ADVANTAGES, objective=chosen, mask=mask, **TERMS, **TRANSFORM, **head,
            backend=backend, **options,
        )  # fmt: skip

    return call


def composed(chosen, *, on_policy=False, mask=MASK):
    """The same from logits that are there as a whole."""

    def call(hidden, weight, **head):
        logprobs, entropy = linear_logprobs(
            hidden, weight, TARGETS, mask=mask, **TRANSFORM, **head, return_entropy=True, backend="reference"
        )
        terms = TERMS | ({"entropy": entropy} if chosen.entropy_coef or chosen.entropy_fraction < 1 else {})
        old = logprobs.detach() if on_policy else OLD
        return policy_loss(logprobs, old, ADVANTAGES, objective=chosen, mask=mask, **terms, backend="reference")

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_two_tokens_gives_the_policy_gradient_of_the_logistic_function(backend):
    # logits 0 and 2, the second is taken; ratio 1, A = 3: d loss / d logprob = -3 (PPO, eq. 7)
    hidden, weight = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    weight.requires_grad_()
    old = torch.tensor([-math.log1p(math.exp(-2.0))])
    loss, metrics = linear_policy_loss(hidden, weight, torch.tensor([1]), old, torch.tensor([3.0]), backend=backend)
    loss.backward()
    rest = 1 / (1 + math.exp(2.0))  # the probability of the other token
    assert loss.item() == pytest.approx(-3.0, rel=1e-6)
    assert metrics["clip_fraction"].item() == 0
    torch.testing.assert_close(hidden.grad, torch.tensor([[-3 * rest, -1.5 * rest]]))
    torch.testing.assert_close(weight.grad, 3 * rest * torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "cpu" in objective(name).kernels])
def test_every_variant_is_linear_logprobs_and_policy_loss_within_any_budget(variant):
    chosen = objective(variant, entropy_coef=0.01)
    expected = run(composed(chosen), TENSORS)
    for options in ({}, {"scratch_bytes": FIXED + 4 * ROW}):
        assert_close(run(fused(chosen, **options), TENSORS), expected)


FEW = torch.zeros(SHAPE, dtype=torch.bool)
FEW[0, 2:5] = FEW[2, 1:] = True  # 9 of 28


@pytest.mark.parametrize("mask_count", [None, 9, 12], ids=["all rows", "exact", "upper bound"])
@pytest.mark.parametrize("variant", ["ppo_clip", "gspo", "clip_cov"])
def test_a_gpu_that_is_told_how_many_rows_count_multiplies_no_others(variant, mask_count, monkeypatch):
    chosen = objective(variant)
    tensors = TENSORS | {"hidden": torch.where(FEW[..., None], TENSORS["hidden"], torch.nan)}
    expected = run(composed(chosen, mask=FEW), TENSORS)
    plan_as_on_a_gpu(monkeypatch)
    options = {"mask": FEW, "mask_count": mask_count}
    assert_close(run(fused(chosen, **options), tensors), expected)
    small = {name: x for name, x in tensors.items() if name in ("hidden", "weight")}

    def call():
        leaves = [x.clone().requires_grad_() for x in small.values()]
        options = {"objective": chosen, "mask": FEW, "mask_count": mask_count, "backend": "cpu"}
        linear_policy_loss(*leaves, TARGETS, OLD, ADVANTAGES, ref_logprobs=REF, **options)[0].backward()

    # The logits of all rows that are taken; rows without a coefficient are left out of the gradients on the CPU alone.
    assert products(call) == ((mask_count or 28) + 2 * 9) * D * V


@pytest.mark.parametrize("mask", [None, FEW], ids=["no mask", "too few"])
def test_a_count_that_does_not_fit_the_mask_is_an_error(mask):
    message = "none is given" if mask is None else "mask counts 9 rows, more than mask_count = 8"
    with pytest.raises(ValueError, match=message):
        run(fused(objective(), mask=mask, mask_count=8), TENSORS)


@pytest.mark.parametrize("variant", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("options", [{"chunk_tokens": 3}, {"scratch_bytes": FIXED + ROW}], ids=str)
def test_tiles_do_not_change_the_result(variant, options):
    chosen = objective(variant)
    assert_close(run(fused(chosen, **options), TENSORS), run(fused(chosen), TENSORS))


@pytest.mark.parametrize("numbers", [
    {"entropy_fraction": 0.5}, {"correction_level": "sequence"}, {"off_policy_max_kl": 0.01},
    {"aggregation": "seq_mean_token_sum"},
], ids=str)  # fmt: skip
def test_terms_that_couple_tokens_are_those_of_policy_loss(numbers):
    chosen = objective(**numbers)
    found = run(fused(chosen, scratch_bytes=FIXED + 4 * ROW), TENSORS)
    assert_close(found, run(composed(chosen), TENSORS))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["ppo_clip", "gspo", "clip_cov"])
def test_every_backend_takes_every_coupling(backend, variant):
    chosen = objective(variant)
    found = run(fused(chosen, scratch_bytes=FIXED + 4 * ROW, backend=backend), TENSORS)
    assert_close(found, run(composed(chosen), TENSORS))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["ppo_clip", "gspo", "gmpo", "kl_cov"])
def test_no_old_logprobs_are_those_that_the_loss_makes(variant, backend, trained):
    chosen = objective(variant, off_policy_max_kl=0.2)
    found = run(fused(chosen, old=None, backend=backend, scratch_bytes=FIXED + 4 * ROW), TENSORS, trained)
    assert_close(found, run(composed(chosen, on_policy=True), TENSORS, trained))
    assert (found["ratio_min"], found["ratio_max"], found["approx_kl"]) == (1, 1, 0)


@pytest.mark.parametrize("trained", [("hidden",), ("lora_a", "lora_b"), ("weight",), ("bias", "hidden")], ids="+".join)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_any_part_of_the_head_may_be_trained_alone(trained, entropy_coef):
    chosen = objective(entropy_coef=entropy_coef)
    assert_close(run(fused(chosen), TENSORS, trained), run(composed(chosen), TENSORS, trained))


def test_variants_say_which_rows_they_couple():
    assert {v: coupling(objective(v)) for v in ("ppo_clip", "grpo", "gspo", "vespo", "clip_cov", "kl_cov")} == {
        "ppo_clip": "token", "grpo": "token", "gspo": "sequence", "vespo": "sequence", "clip_cov": "batch",
        "kl_cov": "batch",
    }  # fmt: skip
    assert coupling(objective(entropy_fraction=0.5)) == "batch"


P = 8 * 8 * 16 * 97  # one product of 64 rows


@pytest.mark.parametrize(("variant", "trained", "options", "expected"), [
    ("ppo_clip", ("hidden", "weight"), {"chunk_tokens": 5}, 3),
    ("gspo", ("hidden", "weight"), {"chunk_tokens": 5}, 3),
    ("clip_cov", ("hidden", "weight"), {}, 3),
    ("ppo_clip", ("hidden",), {"chunk_tokens": 5}, 2),
    ("gspo", ("hidden",), {"scratch_bytes": 64 * 128 + 3000}, 2),
    ("clip_cov", ("hidden", "weight"), {"scratch_bytes": 64 * 128 + 16 * (97 + 2 * 16) * 4}, 3.75),
    ("gspo", ("hidden", "weight"), {"scratch_bytes": 64 * 128 + 4 * (97 + 2 * 16) * 4}, 3.5),
    ("ppo_clip", (), {}, 1),
], ids=str)  # fmt: skip
def test_the_products_are_those_of_the_cost_model(variant, trained, options, expected):
    hidden, weight, targets = torch.randn(8, 8, 16), torch.randn(97, 16) / 8, torch.randint(0, 97, (8, 8))
    hidden.requires_grad_("hidden" in trained), weight.requires_grad_("weight" in trained)
    old, advantages = -5 - torch.rand(8, 8), 1 + torch.rand(8, 8)
    numbers = {"clip_eps_low": 1.0, "clip_eps_high": 1e6, "cov_fraction": 1e-9, "cov_low": 1e6, "cov_high": 2e6}

    def call():
        loss, _ = linear_policy_loss(
            hidden, weight, targets, old, advantages, objective=PolicyObjective(variant, **numbers), backend="cpu",
            **options,
        )  # fmt: skip
        if trained:
            loss.backward()

    assert products(call) == expected * P


LONG = (2, 60)  # sequences whose logits take more than a gradient of the head and a tile
BUDGET = 120 * 128 + 8 * (V * D + V + R * (D + V)) + 10 * ROW


def long_sequences(variant, terms, backend, fused, **options):
    """loss(hidden, weight, ...) of LONG, by linear_policy_loss or by its parts."""
    g = torch.Generator().manual_seed(1)
    old, other, advantages = (torch.randn(LONG, generator=g, dtype=torch.float64) for _ in range(3))
    targets, mask = torch.randint(0, V, LONG, generator=g), torch.rand(LONG, generator=g) < 0.9
    given = {"sampler_logprobs": old + 0.1 * other - 5, "ref_logprobs": old - 5}
    numbers = {"clip_eps_low": 1.0, "clip_eps_high": 9.0, "correction_level": "sequence"} | terms
    chosen = PolicyObjective(variant, **numbers)

    def call(hidden, weight, **head):
        if fused:
            return linear_policy_loss(
                hidden, weight, targets, old - 5, advantages, objective=chosen, mask=mask,
                **given, **TRANSFORM, **head, backend=backend, **options,
            )  # fmt: skip
        logprobs = linear_logprobs(hidden, weight, targets, mask=mask, **TRANSFORM, **head, backend=backend)
        return policy_loss(logprobs, old - 5, advantages, objective=chosen, mask=mask, **given, backend=backend)

    return call


@pytest.mark.parametrize(("variant", "backend"), [
    ("gspo", "cpu"), ("luspo", "cpu"), ("dro", "cpu"), ("gspo", "triton"),
])  # fmt: skip
def test_sequences_beyond_the_budget_are_summed_and_made_once(variant, backend):
    tensors = head(LONG)
    found = run(long_sequences(variant, {}, backend, fused=True, scratch_bytes=BUDGET, chunk_tokens=10), tensors)
    assert_close(found, run(long_sequences(variant, {}, "reference", fused=False), tensors))


@pytest.mark.parametrize(("variant", "terms"), [
    ("gmpo", {}), ("vespo", {}), ("gspo_token", {}), ("gspo", {"kl_coef": 0.1}), ("gspo", {"off_policy_max_kl": 0.01}),
    ("gspo", {"correction_level": "token"}), ("dro", {"entropy_coef": 0.1}),
], ids=str)  # fmt: skip
def test_sequences_with_several_slopes_are_not_summed(variant, terms):
    tensors = head(LONG)
    found = run(long_sequences(variant, terms, "cpu", fused=True, scratch_bytes=BUDGET, chunk_tokens=10), tensors)
    plain = run(long_sequences(variant, terms, "cpu", fused=True), tensors)
    assert_close(found, plain)


@pytest.mark.parametrize(("variant", "made_again"), [("gspo", 0), ("gmpo", 2)])
def test_long_sequences_of_one_slope_take_three_products(variant, made_again):  # of the three tiles of a sequence
    hidden, weight = torch.randn(*LONG, 16, requires_grad=True), (torch.randn(97, 16) / 8).requires_grad_()
    targets, old, advantages = torch.randint(0, 97, LONG), -5 - torch.rand(LONG), 1 + torch.rand(LONG)
    numbers = {"clip_eps_low": 1.0, "clip_eps_high": 1e6}
    scratch = 120 * 128 + 4 * 97 * 16 + 15 * 4 * (97 + 2 * 16)

    def call():
        linear_policy_loss(
            hidden, weight, targets, old, advantages, objective=PolicyObjective(variant, **numbers),
            scratch_bytes=scratch, chunk_tokens=15, backend="cpu",
        )[0].backward()  # fmt: skip

    assert 3 * products(call) == (9 + made_again) * 120 * 16 * 97


def test_rows_that_do_not_count_cost_nothing_and_those_without_advantage_one_product():
    hidden, weight = torch.randn(8, 8, 16, requires_grad=True), (torch.randn(97, 16) / 8).requires_grad_()
    mask, advantages = torch.ones(8, 8), torch.ones(8, 8)
    mask[:2], advantages[2:5] = 0, 0
    targets, old = torch.randint(0, 97, (8, 8)), -5 - torch.rand(8, 8)
    chosen = PolicyObjective(clip_eps_high=1e6)
    call = lambda: linear_policy_loss(  # noqa: E731
        hidden, weight, targets, old, advantages, objective=chosen, mask=mask, chunk_tokens=20, backend="cpu"
    )[0].backward()
    assert products(call) == (6 * 1 + 3 * 2) / 8 * P


@pytest.mark.parametrize("variant", ["ppo_clip", "grpo", "gspo"])
def test_micro_batches_with_global_denominators_add_up_to_the_batch(variant):
    chosen = objective(variant)
    totals = {"denominator": MASK.sum(), "sequences": MASK.any(1).sum()}

    def parts(hidden, weight, **head):
        losses = [
            linear_policy_loss(
                hidden[part], weight, TARGETS[part], OLD[part], ADVANTAGES[part], objective=chosen, mask=MASK[part],
                ref_logprobs=REF[part], sampler_logprobs=SAMPLER[part], **TRANSFORM, **head, **totals, backend="cpu",
            )[0]
            for part in (slice(0, 1), slice(1, 4))
        ]  # fmt: skip
        return sum(losses), {}

    assert_close(run(parts, TENSORS), run(fused(chosen), TENSORS))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["ppo_clip", "grpo", "gspo"])
def test_packed_sequences_give_what_padded_ones_give(variant, backend):
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    chosen = objective(variant)
    lengths = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    tensors = TENSORS | {"hidden": TENSORS["hidden"][mask]}

    def packed(hidden, weight, **head):
        return linear_policy_loss(
            hidden, weight, TARGETS[mask], OLD[mask], ADVANTAGES[mask], objective=chosen, ref_logprobs=REF[mask],
            sampler_logprobs=SAMPLER[mask], cu_seqlens=lengths, **TRANSFORM, **head, backend=backend,
        )  # fmt: skip

    expected = run(fused(chosen, mask=mask), TENSORS)
    assert_close(run(packed, tensors), expected | {"d hidden": expected["d hidden"][mask]})


@pytest.mark.parametrize("variant", ["ppo_clip", "gspo", "clip_cov"])
@pytest.mark.parametrize("scratch", [1 << 20, 3 << 20])
def test_the_memory_beside_results_and_gradients_stays_within_the_budget(variant, scratch):
    hidden, weight = torch.randn(16, 64, 32, requires_grad=True), torch.randn(4099, 32, requires_grad=True)
    targets, old = torch.randint(0, 4099, (16, 64)), -8 - torch.rand(16, 64)
    gradients = 4 * (hidden.numel() + weight.numel())
    found = []

    def call():
        found.append(linear_policy_loss(
            hidden, weight, targets, old, old + 8, objective=PolicyObjective(variant, cov_fraction=0.1, cov_low=0.001),
            scratch_bytes=scratch, backend="cpu",
        ))  # fmt: skip

    peak = peak_bytes(call)
    assert scratch / 3 < peak - gradients <= scratch


def test_summed_sequences_stay_within_the_budget():
    hidden, weight = torch.randn(2, 512, 32, requires_grad=True), torch.randn(4099, 32, requires_grad=True)
    targets, old = torch.randint(0, 4099, (2, 512)), -8 - torch.rand(2, 512)
    gradients, scratch = 4 * (hidden.numel() + weight.numel()), 2 << 20
    found = []

    def call():
        found.append(linear_policy_loss(
            hidden, weight, targets, old, old + 8, objective=PolicyObjective("gspo"), scratch_bytes=scratch,
            chunk_tokens=80, backend="cpu",
        ))  # fmt: skip

    peak = peak_bytes(call)
    assert gradients + 4 * weight.numel() < peak <= gradients + scratch


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counted_gives_a_connected_zero(backend):
    found = run(fused(objective("gspo"), mask=torch.zeros(SHAPE), backend=backend), TENSORS)
    assert all((x == 0).all() for x in found.values())


def test_the_log_probabilities_are_returned_without_gradient():
    *_, logprobs = fused(objective(), return_logprobs=True)(
        TENSORS["hidden"].clone().requires_grad_(), TENSORS["weight"], bias=TENSORS["bias"], head_lora=_LORA
    )
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, torch.where(MASK, _NOW, 0))


def test_the_reference_is_differentiable_twice():
    small = {name: x[:2, :2] if name == "hidden" else x[:3] for name, x in TENSORS.items()}
    leaves = [small[name].detach().requires_grad_() for name in PARAMETERS]
    targets, old = torch.tensor([[0, 2], [1, 1]]), torch.full((2, 2), -1.0, dtype=torch.float64)

    def call(hidden, weight, bias, lora_a, lora_b):
        return linear_policy_loss(
            hidden, weight, targets, old, old, bias=bias, head_lora=(lora_a, lora_b, 0.5), backend="reference",
            objective=PolicyObjective("gspo", clip_eps_low=0.9, clip_eps_high=9.0, entropy_coef=0.1),
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("variant", ["ppo_clip", "gspo"])
def test_it_compiles_with_its_backward_into_one_graph(variant):
    torch.compiler.reset()
    call = fused(objective(variant, entropy_coef=0.01))
    assert_close(run(torch.compile(call, fullgraph=True, backend="aot_eager"), TENSORS), run(call, TENSORS))


def test_the_objective_may_be_made_inside_a_compiled_graph():
    def call(hidden):
        chosen = PolicyObjective("cispo", clip_eps_high=0.1, entropy_coef=0.5)
        options = {"objective": chosen, "mask": MASK, "backend": "cpu"}
        return linear_policy_loss(hidden, TENSORS["weight"], TARGETS, OLD, ADVANTAGES, **options)[0]

    torch.compiler.reset()
    hidden = TENSORS["hidden"].clone().requires_grad_()
    assert torch.compile(call, fullgraph=True, backend="aot_eager")(hidden) == call(hidden)


def test_bad_input_raises_with_the_shapes_in_the_message():
    hidden, weight = TENSORS["hidden"], TENSORS["weight"]
    with pytest.raises(ValueError, match=r"hidden must be .* got \(4, 7, 16\) and \(16, 97\)"):
        linear_policy_loss(hidden, weight.t(), TARGETS, OLD, ADVANTAGES)
    with pytest.raises(ValueError, match=r"targets must be .* = \(4, 7\), got \(4, 6\)"):
        linear_policy_loss(hidden, weight, TARGETS[:, 1:], OLD, ADVANTAGES)
    with pytest.raises(ValueError, match=r"old_logprobs must be .* got \(4, 6\)"):
        linear_policy_loss(hidden, weight, TARGETS, OLD[:, 1:], ADVANTAGES)
    with pytest.raises(ValueError, match=r"head_lora B must be \(V, R\) = \(97, 3\), got \(96, 3\)"):
        linear_policy_loss(hidden, weight, TARGETS, OLD, ADVANTAGES, head_lora=(_LORA[0], _LORA[1][1:], 1.0))
    with pytest.raises(TypeError, match=r"weight must have the type of hidden, torch.float64, got torch.float32"):
        linear_policy_loss(hidden, weight.float(), TARGETS, OLD, ADVANTAGES)
    with pytest.raises(ValueError, match=r"ref_logprobs must be given for kl_coef 0.1"):
        linear_policy_loss(hidden, weight, TARGETS, OLD, ADVANTAGES, objective=objective())
    with pytest.raises(ValueError, match=r"chunk_tokens must be >= 1, got 0"):
        linear_policy_loss(hidden, weight, TARGETS, OLD, ADVANTAGES, chunk_tokens=0)
    with pytest.raises(IndexError, match=r"row 0 is 97, outside \[0, 97\)"):
        linear_policy_loss(hidden, weight.clone().requires_grad_(), torch.full(SHAPE, 97), OLD, ADVANTAGES)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_going_backward_again_gives_the_same_gradient_or_says_that_the_first_was_overwritten(scale):
    weight, hidden = torch.randn(V, D, requires_grad=True), torch.randn(6, D)
    targets, old = torch.randint(V, (6,)), -torch.rand(6) - 4
    loss = scale * linear_policy_loss(hidden, weight, targets, old, torch.randn(6), backend="cpu")[0]
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(first, again)
    expected = first.clone()
    first.zero_()
    if scale == 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
    else:
        assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)
