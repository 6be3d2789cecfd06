"""Liger's losses under their own names beside the installed Liger: values, metrics and gradients, option by option.

The peer computes in float32 at best, so the float64 result is ours; the peer's float32 result holds it in place. Its
Triton functions run in the interpreter where there is no GPU.
"""

from __future__ import annotations

import importlib
import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast.integrations as integrations
from rlhf_fast.integrations import liger
from rlhf_fast.ops.head import _logprobs_op
from rlhf_fast.testing.numerics import TOLERANCE, assert_contract
from tests.linear_losses import products

pytest.importorskip("liger_kernel", reason="needs liger-kernel (make peers)")
from liger_kernel import chunked_loss
from liger_kernel.ops import fused_linear_scaled_cross_entropy as scaled
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

B, T, D, V = 4, 6, 8, 53
TRAINED = ("_input", "lin_weight", "bias", "student_input", "student_weight", "student_bias")


def label(case: tuple[dict[str, Any], ...]) -> str:
    options = (f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for part in case for k, v in part.items())
    return " ".join(options) or "default"


def in_float32_and_bfloat16(cases: list[Any], half: list[Any], name=label) -> pytest.MarkDecorator:
    """Every case in float32; those whose kernels differ in bfloat16 too."""
    both = [(case, torch.float32) for case in cases] + [(case, torch.bfloat16) for case in half]
    return pytest.mark.parametrize(("case", "dtype"), both, ids=[f"{d} {name(c)}"[6:] for c, d in both])


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def outcome(module: torch.nn.Module, inputs: dict[str, Any], frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every result of `module` by position and the gradients of its parameters under an upstream gradient of 1.5."""
    leaves = {
        name: x.detach().clone().requires_grad_() if name in TRAINED and name not in frozen else x
        for name, x in inputs.items()
        if x is not None
    }
    results = flat(module(**leaves))
    (1.5 * results[0]).backward()
    found = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return found | {f"d {name}": x.grad for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The policy's and the reference's tensors rounded to dtype, and then in float64."""
    parts = ("_input", "weight", "bias", "student", "teacher")
    rounded = {n: x.to(dtype).double() for n, x in inputs.items() if x is not None and any(p in n for p in parts)}
    return inputs | rounded


def assert_beside(ours: dict[str, Tensor], theirs: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """Ours has the peer's types and shapes and keeps the contract; the peer's float32 results are near the oracle."""
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        peer, truth = theirs[name], oracle[name].double()
        assert (found.dtype, found.shape) == (peer.dtype, peer.shape), name
        assert_contract(name, found, peer, truth)
        if all(x.dtype == torch.float32 for x in ours.values()):
            bound = 20 * TOLERANCE[torch.float32] * max(1.0, truth.abs().max().item())
            assert (peer - truth).abs().max() <= bound, f"{name}: the peer has {peer}, in float64 it is {truth}"


def assert_parity(name: str, options: dict[str, Any], inputs: dict[str, Any], dtype: torch.dtype, frozen=()) -> None:
    exact = cast(inputs, dtype)
    given = {n: x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float64 else x for n, x in exact.items()}
    ours = outcome(getattr(liger, name)(compiled=False, **options), given, frozen)
    theirs = outcome(getattr(chunked_loss, name)(compiled=False, **options), given, frozen)
    assert_beside(ours, theirs, outcome(getattr(liger, name)(compiled=False, **options), exact, frozen))


def peers(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


PLACES = {x.__name__: dotted for dotted, x in liger.replacements().items()}


@pytest.mark.parametrize("name", [n for n in PLACES if n in vars(liger) and (n.startswith("Liger") or n[0] in "ft")])
def test_signatures_are_the_peer_s(name):
    ours, theirs = getattr(liger, name), peers(PLACES[name])
    parts = [p for p in ("forward", "apply") if hasattr(ours, p)]
    pairs = [(ours, theirs)] if not name.endswith("Function") else []
    if isinstance(theirs, type) and issubclass(theirs, torch.autograd.Function):  # whose own apply shows no parameters
        found, expected = (list(inspect.signature(f).parameters.values()) for f in (ours.apply, theirs.forward))
        assert [p.name for p in found] == [p.name for p in expected[1:]]
        assert all(p.default in (q.default, None) for p, q in zip(found, expected[1:], strict=True))
        return
    for one, other in pairs + [(getattr(ours, p), getattr(theirs, p)) for p in parts]:
        found, expected = (inspect.signature(f).parameters.values() for f in (one, other))
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("name", [n for n in PLACES if n.endswith("Loss")])
def test_options_are_attributes_as_in_the_peer(name):
    ours, theirs = getattr(liger, name)(), peers(PLACES[name])()
    assert {k: v for k, v in vars(theirs).items() if k[0] != "_"} == {
        k: v for k, v in vars(ours).items() if k[0] != "_"
    }


# --- GRPO -------------------------------------------------------------------------------------------------------------

ROW = torch.tensor([0.02, -0.5, 0.45, -0.05])  # log-ratios of the sequences, none near a bound
MASK = torch.ones(B, T)
MASK[0, 4:] = MASK[1, 1:] = MASK[3] = 0  # a sequence with one token, and one with none


def grpo_inputs(padded: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(B, T, D).double(), torch.randn(V, D).double() / 2, torch.randn(V).double() / 4
    ids = torch.randint(V, (B, T))
    logprobs = torch.log_softmax(hidden @ weight.t() + bias, -1).gather(-1, ids[..., None])[..., 0].float()
    spread = torch.tensor([0.0, 0.4, -0.4, 0.02, 0.6, -0.6])
    return {
        "_input": hidden, "lin_weight": weight, "selected_token_ids": ids,
        "attention_mask": MASK if padded else torch.ones(B, T), "advantages": torch.tensor([1.0, -1.2, 0.7, 2.0]),
        "bias": bias, "ref_per_token_logps": logprobs + 0.3 * torch.randn(B, T),
        "old_per_token_logps": logprobs - ROW[:, None] - spread,
    }  # fmt: skip


def ratio(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return 0.5 + torch.rand(shape)


HALF = {
    name: x.bfloat16()
    for name, x in grpo_inputs().items()
    if name in ("advantages", "old_per_token_logps", "ref_per_token_logps")
}
ON_POLICY = {"old_per_token_logps": None}
LOSS_TYPES = [{"loss_type": name, "max_completion_length": 9} for name in liger.grpo.LOSS_TYPES]
SEQUENCE = [
    {**o, "importance_sampling_level": "sequence"} for o in LOSS_TYPES if o["loss_type"] not in liger.grpo.TOKEN_ONLY
]
KINDS = [{"loss_type": name} for name in ("dapo", "cispo", "sapo", "vespo")]
LEVELS = [{}, {"importance_sampling_level": "sequence"}]
GRPO_TYPES = [(o, given) for o in LOSS_TYPES + SEQUENCE for given in ({}, ON_POLICY)]
GRPO_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *GRPO_TYPES,
    *((o, {"vllm_is_ratio": ratio(B, T)} | given) for o in KINDS + LEVELS for given in ({}, ON_POLICY)),
    *((o, {"vllm_is_ratio": ratio(*s)}) for o in (LEVELS[0], KINDS[3]) for s in ((B,), (B, 1))),
    *((o | {"delta": delta}, {}) for o in LEVELS for delta in (0.7, 1.1, 1.5)),
    ({"delta": 0.7}, ON_POLICY),
    *((o | {"use_bias_correction_kl": True, "beta": 0.5}, g) for o in KINDS + LEVELS for g in ({}, ON_POLICY)),
    *((o, {"num_items_in_batch": 31}) for o in KINDS),
    ({}, {"num_items_in_batch": torch.tensor(31)}),
    *(({"loss_type": "cispo", "epsilon_high": high}, {}) for high in (0.8, 3.0)),
    ({"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5, "loss_type": "sapo"}, {}),
    ({"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.0, "vespo_k_neg": 0.5, "loss_type": "vespo"}, {}),
    ({"temperature": 0.7, "epsilon_low": 0.1, "epsilon_high": 0.3, "chunk_size": 3}, {}),
    ({"beta": 0.0, "use_ref_model": False}, {"ref_per_token_logps": None}),
    ({"use_ref_model": False}, {"ref_per_token_logps": None}),
    ({"use_ref_model": False}, {}),
    ({}, {"bias": None}),
    ({}, HALF),
]


@in_float32_and_bfloat16(GRPO_CASES, GRPO_TYPES)
def test_grpo(case, dtype):
    options, changes = case
    assert_parity("LigerFusedLinearGRPOLoss", options, grpo_inputs() | changes, dtype)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_grpo_with_a_frozen_head_trains_the_hidden_states_alone(loss_type):
    frozen = ("lin_weight", "bias")
    assert_parity("LigerFusedLinearGRPOLoss", {"loss_type": loss_type}, grpo_inputs(), torch.float32, frozen)


def test_grpo_scores_the_reference_s_hidden_states():
    inputs = grpo_inputs() | {"ref_per_token_logps": None, "ref_input": torch.randn(B, T, 5).double()}
    inputs |= {"ref_weight": torch.randn(V, 5).double(), "ref_bias": torch.randn(V).double()}
    assert_parity("LigerFusedLinearGRPOLoss", {"temperature": 1.3}, inputs, torch.float32)


def test_grpo_takes_a_temperature_as_the_peer_does_from_a_call_by_place():
    """Its own tests hand `compiled`, a bool, where the temperature stands."""
    assert_parity("LigerFusedLinearGRPOLoss", {"temperature": True}, grpo_inputs(), torch.float32)


def test_grpo_says_that_hidden_states_of_the_reference_are_not_used_beside_its_log_probabilities():
    inputs = grpo_inputs() | {"ref_input": torch.randn(B, T, 5).double()}
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        found = outcome(liger.LigerFusedLinearGRPOLoss(), inputs)
    assert torch.equal(found["result 0"], outcome(liger.LigerFusedLinearGRPOLoss(), grpo_inputs())["result 0"])


@pytest.mark.parametrize("frozen", [(), ("lin_weight", "bias")], ids=["trained", "frozen"])
def test_grpo_does_not_look_behind_the_mask(frozen):
    inputs, hidden = grpo_inputs(), torch.where(MASK.bool(), 0, torch.nan)
    poisoned = {n: inputs[n] + hidden for n in ("old_per_token_logps", "ref_per_token_logps")}
    poisoned |= {"_input": inputs["_input"] + hidden[..., None]}
    poisoned["selected_token_ids"] = torch.where(MASK.bool(), inputs["selected_token_ids"], -100)
    expected = outcome(liger.LigerFusedLinearGRPOLoss(), inputs, frozen)
    for name, found in outcome(liger.LigerFusedLinearGRPOLoss(), inputs | poisoned, frozen).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "luspo"])
def test_grpo_of_an_empty_mask_is_a_connected_zero(loss_type):
    inputs = grpo_inputs() | {"attention_mask": torch.zeros(B, T)}
    assert_parity("LigerFusedLinearGRPOLoss", {"loss_type": loss_type}, inputs, torch.float32)
    found = outcome(liger.LigerFusedLinearGRPOLoss(loss_type=loss_type), cast(inputs, torch.float32))
    assert found["result 0"] == 0
    assert all((x == 0).all() for name, x in found.items() if name.startswith("d "))


def test_grpo_of_one_token():
    inputs = {n: x[:1, :1] if n not in ("lin_weight", "bias", "advantages") else x for n, x in grpo_inputs().items()}
    assert_parity("LigerFusedLinearGRPOLoss", {}, inputs | {"advantages": torch.ones(1)}, torch.float32)


def test_grpo_of_non_contiguous_hidden_states_and_weights():
    inputs = grpo_inputs()
    strided = {"_input": inputs["_input"].transpose(0, 1).contiguous().transpose(0, 1),
               "lin_weight": inputs["lin_weight"].t().contiguous().t()}  # fmt: skip
    expected = outcome(liger.LigerFusedLinearGRPOLoss(), inputs)
    for name, found in outcome(liger.LigerFusedLinearGRPOLoss(), inputs | strided).items():
        torch.testing.assert_close(found, expected[name])


def test_grpo_takes_a_head_of_another_type():
    inputs = cast(grpo_inputs(), torch.bfloat16)
    mixed = inputs | {"_input": inputs["_input"].bfloat16(), "lin_weight": inputs["lin_weight"].float()}
    found = outcome(liger.LigerFusedLinearGRPOLoss(), mixed | {"bias": None})
    assert found["d lin_weight"].dtype == torch.float32
    assert found["d _input"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"loss_type": "ppo"}, {}, "Unsupported loss_type 'ppo'"),
        ({"importance_sampling_level": "word"}, {}, "importance_sampling_level must be"),
        ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, {}, "must be token for loss_type sapo"),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length must be given"),
        ({}, {"ref_per_token_logps": None}, "needs ref_per_token_logps, or ref_input"),
        ({}, {"vllm_is_ratio": torch.ones(B, T - 1)}, "vllm_is_ratio must be"),
    ],
)
def test_grpo_says_what_does_not_fit(options, changes, message):
    with pytest.raises(ValueError, match=message):
        outcome(liger.LigerFusedLinearGRPOLoss(**options), grpo_inputs() | changes)


@pytest.mark.parametrize("changes", [{}, ON_POLICY], ids=["off policy", "on policy"])
def test_grpo_takes_three_products_where_the_log_probabilities_alone_take_four(changes, monkeypatch):
    monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)
    inputs = grpo_inputs(padded=False) | {"bias": None} | changes
    assert products(lambda: outcome(liger.LigerFusedLinearGRPOLoss(), inputs)) == 3 * B * T * D * V


@pytest.mark.parametrize("name", ["sapo_temperature_pos", "sapo_temperature_neg", "delta"])
def test_grpo_numbers_that_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        liger.LigerFusedLinearGRPOLoss(**{name: 0.0})


# --- Preference losses ------------------------------------------------------------------------------------------------


def preference_inputs(reference: bool = True) -> dict[str, Any]:
    """Three pairs; ragged, and with padding inside."""
    torch.manual_seed(0)
    target = torch.randint(V, (6, T))
    target[0, 3:] = target[4, :2] = target[2, 2] = target[5, 1:] = -100
    inputs = {
        "lin_weight": torch.randn(V, D).double() / 3, "_input": torch.randn(6, T, D).double(), "target": target,
        "bias": torch.randn(V).double() / 4,
    }  # fmt: skip
    if reference:
        inputs |= {"ref_input": torch.randn(6, T, 5).double(), "ref_weight": torch.randn(V, 5).double() / 3}
    return inputs


DPO_LOSSES = [{"loss_type": name, "label_smoothing": 0.2} for name in liger.preference.DPO_TYPES]
DPO_CASES = [
    *DPO_LOSSES,
    *(
        {"loss_type": name, "label_smoothing": 0.2, "use_ref_model": False, "beta": 0.4}
        for name in ("sigmoid", "robust")
    ),
    *({"loss_type": n, "average_log_prob": True, "label_smoothing": 0.1} for n in liger.preference.DPO_TYPES),
    {"compute_nll_loss": True, "alpha": 0.3},
    {"compute_nll_loss": True, "average_log_prob": True, "loss_type": "apo_zero", "chunk_size": 2},
    {"loss_type": "discopop", "discopop_tau": 0.5},
]
PAIR_CASES = [
    *(("LigerFusedLinearDPOLoss", options) for options in DPO_CASES),
    *(
        (f"LigerFusedLinear{name}Loss", options)
        for name in ("CPO", "SimPO")
        for options in (
            {}, {"compute_nll_loss": False}, {"label_smoothing": 0.2, "alpha": 0.3, "beta": 0.7},
            {"compute_nll_loss": False, "label_smoothing": 0.2},
        )
    ),
    ("LigerFusedLinearCPOLoss", {"average_log_prob": True}),
    ("LigerFusedLinearSimPOLoss", {"gamma": 1.5, "compute_nll_loss": False}),
    ("LigerFusedLinearORPOLoss", {}),
    ("LigerFusedLinearORPOLoss", {"compute_nll_loss": False, "beta": 0.6}),
]  # fmt: skip


PAIR_LOSSES = [*PAIR_CASES[: len(DPO_LOSSES)], *(c for c in PAIR_CASES if "DPO" not in c[0])]


@in_float32_and_bfloat16(PAIR_CASES, PAIR_LOSSES, name=lambda case: f"{case[0][16:-4]} {label(case[1:])}")
def test_pairs(case, dtype):
    name, options = case
    with_reference = name == "LigerFusedLinearDPOLoss" and options.get("use_ref_model", True)
    assert_parity(name, options, preference_inputs(with_reference), dtype)


def test_orpo_takes_the_nll_of_its_own_labels():
    inputs = preference_inputs(reference=False)
    labels = inputs["target"].flip(0).clone()
    labels[1] = -100
    assert_parity("LigerFusedLinearORPOLoss", {}, inputs | {"nll_target": labels}, torch.float32)


@pytest.mark.parametrize("name", ["DPO", "CPO", "SimPO", "ORPO"])
def test_pairs_without_bias_frozen_head_and_other_ignore_index(name):
    inputs = preference_inputs(reference=name == "DPO")
    inputs["target"] = torch.where(inputs["target"] == -100, 7, inputs["target"])
    assert_parity(
        f"LigerFusedLinear{name}Loss", {"ignore_index": 7}, inputs | {"bias": None}, torch.float32, ("lin_weight",)
    )


@pytest.mark.parametrize("name", ["CPO", "SimPO", "ORPO"])
def test_an_answer_without_a_token_is_finite_where_the_peer_s_is_not(name):
    inputs = preference_inputs(reference=False)
    inputs["target"][0] = -100
    found = outcome(getattr(liger, f"LigerFusedLinear{name}Loss")(), inputs)
    assert all(x.isfinite().all() for x in found.values())


def test_pairs_of_an_odd_number_of_sequences_raise():
    inputs = preference_inputs(reference=False)
    inputs |= {"target": inputs["target"][:5], "_input": inputs["_input"][:5]}
    with pytest.raises(ValueError, match=r"target must be \(2 B, T\)"):
        outcome(liger.LigerFusedLinearCPOLoss(), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "Unsupported loss_type: ipo"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0 for loss_type='exo_pair', got 0.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must lie in .* got 0.5"),
    ],
)
def test_dpo_says_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearDPOLoss(**options)


def test_dpo_without_its_reference_raises():
    with pytest.raises(ValueError, match="needs ref_input"):
        outcome(liger.LigerFusedLinearDPOLoss(), preference_inputs(reference=False))


KTO_CASES = [
    ({}, {}),
    ({"beta": 0.5}, {"kl": torch.tensor(0.7)}),
    ({"average_log_prob": True, "ignore_index": 3}, {}),
    ({"chunk_size": 6}, {"kl": torch.linspace(0, 1, 6)}),
    ({}, {"kl": torch.tensor([0.3]), "bias": None}),
]


@in_float32_and_bfloat16(KTO_CASES, KTO_CASES[:2])
@pytest.mark.parametrize("reference", [True, False])
def test_kto(case, dtype, reference):
    options, changes = case
    inputs = preference_inputs(reference) | {"preference_labels": torch.tensor([True, False, True, True, False, False])}
    if "ignore_index" in options:
        inputs["target"] = torch.where(inputs["target"] == -100, 3, inputs["target"])
    assert_parity("LigerFusedLinearKTOLoss", options | {"use_ref_model": reference}, inputs | changes, dtype)


def test_kto_without_labels_raises():
    with pytest.raises(ValueError, match="preference_labels must be given"):
        outcome(liger.LigerFusedLinearKTOLoss(), preference_inputs(reference=False))


# --- Distillation -----------------------------------------------------------------------------------------------------


def jsd_inputs(further: int = 0) -> dict[str, Any]:
    """Of a teacher with `further` more tokens."""
    torch.manual_seed(0)
    labels = torch.randint(V, (11,))
    labels[3:6] = -100
    return {
        "student_input": torch.randn(11, D).double(), "student_weight": torch.randn(V, D).double() / 2,
        "teacher_input": torch.randn(11, 5).double(), "teacher_weight": torch.randn(V + further, 5).double(),
        "true_labels": labels, "student_bias": torch.randn(V).double(),
        "teacher_bias": torch.randn(V + further).double(),
    }  # fmt: skip


JSD_CASES = [
    ({}, {}),
    ({"beta": 0.0, "return_soft_hard_loss": True}, {}),
    ({"beta": 1.0, "weight_hard_loss": 0.0}, {}),
    ({"beta": 0.3, "temperature": 2.0, "chunk_size": 4}, {}),
    ({"weight_hard_loss": 0.0, "return_soft_hard_loss": True}, {}),
    ({"weight_hard_loss": 0.2, "weight_soft_loss": 1.5, "ignore_index": 7}, {"true_labels": torch.full((11,), 9)}),
    ({}, {"student_bias": None, "teacher_bias": None}),
    ({}, {"student_bias": None}),
    ({"return_soft_hard_loss": True}, {"true_labels": torch.full((11,), -100)}),
]


@in_float32_and_bfloat16(JSD_CASES, JSD_CASES[:4])
def test_jsd(case, dtype):
    options, changes = case
    assert_parity("LigerFusedLinearJSDLoss", options, jsd_inputs() | changes, dtype)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_jsd_of_a_teacher_with_more_tokens(temperature):
    options = {"temperature": temperature, "return_soft_hard_loss": True}
    assert_parity("LigerFusedLinearJSDLoss", options, jsd_inputs(further=4), torch.float32)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"beta": 1.5}], ids=str)
def test_jsd_says_what_does_not_fit(options):
    with pytest.raises(ValueError, match="must be"):
        liger.LigerFusedLinearJSDLoss(**options)


# --- Scaled cross-entropy ---------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """The function of `package` as a module."""

    def __init__(self, package, **options):
        super().__init__()
        self.apply_it, self.options = package.LigerFusedLinearScaledCrossEntropyFunction.apply, options

    def forward(self, _input, lin_weight, target):
        results = flat(self.apply_it(_input, lin_weight, target, **self.options))
        return (sum(x.float().sum() for x in results), *results)


def scaled_inputs(dtype):
    torch.manual_seed(0)
    target = torch.randint(V, (9,))
    target[4] = -100
    return cast({"_input": torch.randn(9, D), "lin_weight": torch.randn(V, D) / 2, "target": target}, dtype)


SCALED = [
    {},
    {"temperature": 0.6, "m_tiles_per_cluster": 2},
    {"return_entropy": True, "temperature": 1.4},
    {"selected_token_ids": torch.tensor([5, 0, 5])},
    {"return_entropy": True, "selected_token_ids": torch.arange(V)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SCALED, ids=lambda o: label((o,)))
def test_scaled_cross_entropy(options, dtype):
    exact = scaled_inputs(dtype)
    given = exact | {n: exact[n].to(dtype) for n in ("_input", "lin_weight")}
    ours, theirs = outcome(Scaled(liger, **options), given), outcome(Scaled(scaled, **options), given)
    assert_beside(ours, theirs, outcome(Scaled(liger, **options), exact))


def test_scaled_cross_entropy_of_one_result_is_a_tensor_and_of_more_a_tuple():
    inputs = scaled_inputs(torch.float32)
    apply = liger.LigerFusedLinearScaledCrossEntropyFunction.apply
    arguments = inputs["_input"], inputs["lin_weight"], inputs["target"]
    assert isinstance(apply(*arguments), Tensor)
    assert type(apply(*arguments, return_entropy=True)) is tuple


def on(device: str) -> Any:
    return lambda x: torch.empty_like(x, device=device)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selected_token_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"must be \(K,\), got \(2, 2\)"),
        ({"selected_token_ids": [1, 2]}, TypeError, "selected_token_ids must be an int64 tensor, got list"),
        ({"selected_token_ids": torch.zeros(2)}, TypeError, "must be an int64 tensor, got torch.float32"),
        ({"selected_token_ids": torch.tensor([0, V])}, ValueError, rf"must be in \[0, {V}\), got {V}"),
        ({"selected_token_ids": torch.tensor([-1])}, ValueError, rf"must be in \[0, {V}\), got -1"),
        ({"selected_token_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "the same device"),
        ({"target": on("meta")}, ValueError, "must be on the same device, got cpu, cpu and meta"),
        ({"target": lambda x: x[:3]}, ValueError, r"target \(M,\), got \(9, 8\)"),
        ({"target": lambda x: x + V}, ValueError, rf"target must be in \[0, {V}\), got"),
        ({"target": lambda x: x.int()}, TypeError, "target must be an int64 tensor, got torch.int32"),
        ({"_input": lambda x: x.bfloat16()}, TypeError, "the same floating type, got torch.bfloat16"),
        ({"temperature": "1"}, TypeError, "temperature must be a real number, got '1'"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"m_tiles_per_cluster": 1.0}, TypeError, "m_tiles_per_cluster must be an int, got 1.0"),
        ({"m_tiles_per_cluster": 0}, ValueError, "m_tiles_per_cluster must be >= 1, got 0"),
        ({"return_entropy": 1}, TypeError, "return_entropy must be a bool, got 1"),
    ],
)
def test_scaled_cross_entropy_says_what_does_not_fit(changes, error, message):
    inputs = {k: x.float() if x.is_floating_point() else x for k, x in scaled_inputs(torch.float32).items()}
    inputs["weight"] = inputs.pop("lin_weight")
    given = inputs | {k: x(inputs[k]) if callable(x) else x for k, x in changes.items()}
    with pytest.raises(error, match=message):
        liger.LigerFusedLinearScaledCrossEntropyFunction.apply(**given)


# --- From logits: the peer's are Triton kernels -----------------------------------------------------------------------


def logits_inputs(dtype):
    inputs = grpo_inputs()
    logits = inputs["_input"] @ inputs["lin_weight"].t() + inputs["bias"]
    last = torch.full((B, 1, V), torch.nan).double()
    return torch.cat([logits, last], 1).to(dtype), {
        "old_logp": inputs["old_per_token_logps"], "ref_logp": inputs["ref_per_token_logps"],
        "completion_ids": inputs["selected_token_ids"], "advantages": inputs["advantages"], "completion_mask": MASK,
    }  # fmt: skip


def of_logits(function, logits, given, options) -> dict[str, Tensor]:
    leaf = logits.clone().requires_grad_()
    result = function(leaf, **given, **{"temperature": 1.0, "inplace": False} | options)
    weights = 1.5 if options.get("reduce") else torch.linspace(0.5, 1.5, T)
    (result[0] * weights).sum().backward()
    parts = [result[0], *result[1]] if options.get("reduce") else [x for x in result if x is not None]
    return {f"result {i}": x.detach() for i, x in enumerate(parts)} | {"d logits": leaf.grad}


TRITON_CASES = [
    *(
        (o | {"reduce": True}, given)
        for o, given in (*((o, {}) for o in LOSS_TYPES + SEQUENCE), (KINDS[0], {"old_logp": None}))
        if o["loss_type"] != "luspo" or "importance_sampling_level" in o
    ),
    *((o, given) for o in KINDS + LEVELS[1:] for given in ({}, {"vllm_is_ratio": ratio(B, T)})),
    ({"delta": 0.7, "temperature": 0.9}, {"vllm_is_ratio": ratio(B)}),
    ({"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "delta": 1.5}, {}),
    ({"use_bias_correction_kl": True, "reduce": True}, {}),
    ({"beta": 0.0}, {"ref_logp": None}),
    ({"reduce": True, "num_items_in_batch": 31, "eps_low": 0.1, "eps_high": 0.3}, {"completion_mask": None}),
]


@pytest.mark.parametrize("case", TRITON_CASES, ids=label)
def test_triton_grpo_loss(case):
    options, changes = case
    logits, given = logits_inputs(torch.float32)
    given |= changes
    theirs, ours = (of_logits(f, logits, given, options) for f in (triton_grpo_loss, liger.triton_grpo_loss))
    assert_beside(ours, theirs, of_logits(liger.triton_grpo_loss, logits.double(), given, options))


def test_triton_grpo_loss_of_luspo_by_token_has_the_peer_s_value_and_the_gradient_of_that_value():
    # The peer's backward pass takes the weights of other sequences there.
    logits, given = logits_inputs(torch.float32)
    options: dict[str, Any] = {"loss_type": "luspo", "reduce": True}
    theirs, ours = (of_logits(f, logits, given, options) for f in (triton_grpo_loss, liger.triton_grpo_loss))
    oracle = of_logits(liger.triton_grpo_loss, logits.double(), given, options)
    for found in (theirs, ours, oracle):
        gradient = found.pop("d logits")
    assert_beside(ours, theirs, oracle)
    step = 1e-6 * torch.randn(logits.shape, dtype=torch.float64)
    values = [of_logits(liger.triton_grpo_loss, logits.double() + d, given, options)["result 0"] for d in (step, -step)]
    torch.testing.assert_close((gradient * step).sum(), 1.5 * (values[0] - values[1]) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_triton_grpo_loss_of_luspo_reads_nothing_behind_the_mask(level):
    logits, given = logits_inputs(torch.float32)
    options = {"loss_type": "luspo", "reduce": True, "importance_sampling_level": level}
    expected = of_logits(liger.triton_grpo_loss, logits, given, options)
    hidden = {key: given[key].masked_fill(MASK == 0, torch.nan) for key in ("old_logp", "ref_logp")}
    found = of_logits(liger.triton_grpo_loss, logits, given | hidden, options)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not expected["d logits"][:, :-1][MASK == 0].any()


def test_triton_grpo_loss_in_place_writes_the_gradient_over_the_logits():
    logits, given = logits_inputs(torch.float32)
    expected = of_logits(liger.triton_grpo_loss, logits, given, {})["d logits"]
    leaf = logits.clone().requires_grad_()
    (liger.triton_grpo_loss(leaf, **given, temperature=1.0)[0] * torch.linspace(0.5, 1.5, T)).sum().backward()
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(leaf.detach(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 1.5, "loss_type": "sapo"}, "delta must be None for loss_type sapo"),
        ({"ref_logp": None}, "ref_logp must be given"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "must be token for loss_type vespo"),
    ],
)
def test_triton_grpo_loss_says_what_does_not_fit(options, message):
    logits, given = logits_inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        liger.triton_grpo_loss(logits, **given | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_fused_selective_log_softmax(masked, dtype):
    logits, given = logits_inputs(dtype)
    ids = torch.cat([torch.zeros(B, 3, dtype=torch.int64), given["completion_ids"]], 1)
    mask = torch.cat([torch.ones(B, 3), MASK], 1) if masked else None
    ours = liger.fused_selective_log_softmax(logits.requires_grad_(), ids, mask=mask)
    theirs = fused_selective_log_softmax(logits, ids, mask=mask)
    oracle = liger.fused_selective_log_softmax(logits.double(), ids, mask=mask)
    assert (ours.dtype, ours.shape, ours.requires_grad) == (torch.float32, (B, T), False)
    assert_contract("logprobs", ours, theirs, oracle)


# --- In the peer's place ----------------------------------------------------------------------------------------------


def test_patch_replaces_every_name_and_unpatch_restores_it():
    ours = {dotted.rpartition(".")[::2]: x for dotted, x in liger.replacements().items()}
    ours |= {("liger_kernel.chunked_loss", name): getattr(liger, name) for name in PLACES
             if hasattr(liger, name) and hasattr(chunked_loss, name)}  # fmt: skip
    modules = {place: importlib.import_module(place[0]) for place in ours}
    before = {place: getattr(module, place[1]) for place, module in modules.items()}
    with integrations.patched("liger") as names:
        assert {".".join(place) for place in ours} <= set(names)
        assert all(getattr(modules[place], place[1]) is x for place, x in ours.items())
    assert all(getattr(modules[place], place[1]) is old for place, old in before.items())


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "dropin" / "liger_losses.py"), run_name="__main__")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == ["grpo", "dpo", "orpo", "jsd"]
