"""What users bring as numbers, masks and ids, for every op that takes them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast import (
    AdaptiveKLController,
    FixedKLController,
    PolicyObjective,
    PreferenceObjective,
    UnpairedPreferenceObjective,
    group_advantages,
    linear_logprobs,
    linear_policy_loss,
    lora_linear,
    policy_loss,
    preference_loss,
)
from rlhf_fast.testing.cases.case import Case, flatten
from tests.op_inputs import CASES, each

BACKENDS = ["reference", "cpu", "triton"]
# A value of every argument that is a number, where 0.5, or 1 of an integer, is none.
NUMBERS: dict[str, Any] = {
    "chunk_tokens": 16, "group_size": 4, "mask_count": 24, "scratch_bytes": 1 << 20, "seed": 3, "top_k": 3, "k": 2,
    "v_max": 2.0, "cov_high": 8.0, "dual_clip": 3.0, "label_smoothing": 0.25, "correction_high": 2.0,
    "fixed_length": 8.0,
}  # fmt: skip


def kinds(op: str) -> dict[str, list[str]]:
    """Every argument of `op` that may be a number -> the types it may have."""
    parameters = inspect.signature(getattr(rlhf_fast, op)).parameters.values()
    split = {p.name: str(p.annotation).split(" | ") for p in parameters}
    return {name: types for name, types in split.items() if {"float", "int"} & set(types)}


NAMES = [name for name in rlhf_fast.__all__ if inspect.isfunction(getattr(rlhf_fast, name))]
TAKEN = [(op, name) for op in NAMES if "rlhf_fast.ops" in getattr(rlhf_fast, op).__module__ for name in kinds(op)]
OTHERS = {
    "ensemble_scores": lambda: {"scores": torch.rand(3, 4), "variant": "pessimistic"},
    "length_adaptive_lambda": lambda: {"lengths": torch.tensor([3, 40])},
    "length_desensitized_weights": lambda: {"mask": torch.ones(2, 3), "other_lengths": torch.tensor([1, 2])},
    "running_reward_shift": lambda: {
        "reward_shift": torch.tensor(0.1),
        "metrics": {"desirable_reward": torch.tensor(0.3), "undesirable_reward": torch.tensor(-0.2)},
    },
}  # fmt: skip


def arguments(op: str, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    if op in OTHERS:
        return OTHERS[op]()
    cases = [case for case in CASES if case.op == op]
    case = next((case for case in cases if name in case.options or name in case.arguments(case.tensors())), cases[0])
    return {**case.arguments(case.tensors()), **case.options}


def call(op: str, given: dict[str, Any], **options: Any) -> list[Tensor]:
    return flatten(getattr(rlhf_fast, op)(**{**given, **options}))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "name"), TAKEN)
def test_every_number_may_be_of_numpy_or_a_tensor(op, name):
    given, types = arguments(op, name), kinds(op)[name]
    if "float" in types:
        value = float(np.float32(NUMBERS.get(name, 0.5)))
        forms = [np.float32(value), np.float64(value), np.array(value), torch.tensor(value, dtype=torch.float64)]
    else:
        value = NUMBERS.get(name, 1)
        forms = [np.int64(value), np.int32(value), torch.tensor(value)]
    expected = call(op, given, **{name: value})
    for form in forms:
        assert same(call(op, given, **{name: form}), expected), repr(form)


def outcome(op: str, given: dict[str, Any]) -> list[Any]:
    """The values, or the words, of a call that may not like what it is given."""
    try:
        return [x.nan_to_num(7.0).tolist() for x in call(op, given)]
    except ValueError as error:
        return [str(error).replace("1.0", "1")]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TAKEN if "float" in kinds(op)[name]])
def test_an_integer_of_numpy_is_a_number(op, name):
    given = arguments(op, name)
    assert outcome(op, {**given, name: np.int64(1)}) == outcome(op, {**given, name: 1})


@pytest.mark.parametrize(("op", "name"), TAKEN)
def test_what_is_no_number_raises_in_one_line(op, name):
    given = arguments(op, name)
    a_tensor = [] if "Tensor" in kinds(op)[name] else [torch.tensor(True)]
    for value in [True, np.True_, "0.5", [0.5], *a_tensor]:
        with pytest.raises(TypeError, match=f"^{name} must be an? (number|integer)[^\n]*$"):
            call(op, given, **{name: value})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TAKEN if "Tensor" not in kinds(op)[name]])
def test_a_tensor_with_a_gradient_or_elsewhere_is_no_number(op, name):
    with pytest.raises(TypeError, match=f"^{name} must be an? (number|integer) without a gradient[^\n]*$"):
        call(op, arguments(op, name), **{name: torch.tensor(0.5, requires_grad=True)})
    with pytest.raises(TypeError, match=f"^{name} must be an? (number|integer), got a tensor on meta[^\n]*$"):
        call(op, arguments(op, name), **{name: torch.tensor(0.5, device="meta")})


OBJECTIVES = [
    (objective, field.name)
    for objective in (PolicyObjective, PreferenceObjective, UnpairedPreferenceObjective)
    for field in dataclasses.fields(objective)
    if "float" in field.type.split(" | ")
]


@pytest.mark.parametrize(("objective", "name"), OBJECTIVES)
def test_every_number_of_an_objective_may_be_of_numpy_or_a_tensor(objective, name):
    value = NUMBERS.get(name, 0.5)
    for number in (np.float32(value), np.float64(value), np.array(value), torch.tensor(value), torch.tensor([value])):
        assert objective(**{name: number}) == objective(**{name: value}), repr(number)


@pytest.mark.parametrize(("objective", "name"), OBJECTIVES)
def test_what_is_no_number_is_none_of_an_objective(objective, name):
    tensors = torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, device="meta")
    for value in (True, np.True_, "0.5", [0.5], *tensors):
        with pytest.raises(TypeError, match=rf"^{name} must be a number[^\n]*$"):
            objective(**{name: value})


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_any_type_of_number_is_one_of_an_objective(number):
    assert PolicyObjective(clip_eps_high=number) == PolicyObjective(clip_eps_high=0.5)
    assert PreferenceObjective(beta=number) == PreferenceObjective(beta=0.5)
    assert PreferenceObjective({"ipo": number}) == PreferenceObjective({"ipo": 0.5})
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    ids, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    objective = PolicyObjective(clip_eps_high=number)
    linear_policy_loss(hidden, weight, ids, None, ones, objective=objective)[0].backward()
    policy_loss(ones, ones, ones, objective=objective, denominator=np.float32(3))
    preference_loss(*torch.zeros(4, 2), objective=PreferenceObjective({"hinge": number}, beta=number))


def test_what_is_no_number_is_no_weight_of_a_variant():
    for value in (torch.tensor(0.5, requires_grad=True), True, "0.5", torch.tensor(0.5, device="meta")):
        with pytest.raises(TypeError, match=r"^variant\['ipo'\] must be a number[^\n]*$"):
            PreferenceObjective({"ipo": value})


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5)], ids=repr)
def test_any_type_of_number_scales_an_adapter_and_weighs_a_reward(number):
    x, weight, a, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    ids = torch.zeros(3, dtype=torch.long)
    layers = [lora_linear(x, weight, [(a, b, scale)], [(0, 3)]) for scale in (0.5, number)]
    assert torch.equal(*layers)
    assert torch.equal(*(linear_logprobs(x, weight, ids, head_lora=(a, b, scale)) for scale in (0.5, number)))
    weighed = [
        group_advantages(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), group_size=2, variant="gdpo",
                         reward_weights=[w, 2 * w])
        for w in (0.5, number)
    ]  # fmt: skip
    assert torch.equal(*weighed)
    for wrong in (True, "0.5", torch.tensor(0.5, requires_grad=True)):
        with pytest.raises(TypeError, match="must be a number"):
            lora_linear(x, weight, [(a, b, wrong)], [(0, 3)])
        with pytest.raises(TypeError, match="must be a number"):
            linear_logprobs(x, weight, ids, head_lora=(a, b, wrong))


def test_a_controller_takes_any_type_of_number():
    plain, other = AdaptiveKLController(0.5, 4.0, 100), AdaptiveKLController(np.float32(0.5), torch.tensor(4.0), 100)
    assert other.update(torch.tensor(4.5), np.int64(8)) == plain.update(4.5, 8)
    assert FixedKLController(np.float32(0.5)).coefficient == 0.5
    for wrong in (True, "4.5", torch.tensor(4.5, device="meta")):
        with pytest.raises(TypeError, match="kl must be a number"):
            plain.update(wrong, 8)
        with pytest.raises(TypeError, match="coefficient must be a number"):
            FixedKLController(wrong)


def masked(case: Case) -> bool:
    return case.tensors().get("mask", torch.ones(())).dim() == 2


@pytest.mark.parametrize(("case", "backend"), each("cpu", "triton", of=masked))
def test_a_mask_of_rows_or_of_places_is_that_of_their_tokens(case, backend):
    tensors = case.inputs("cpu", torch.float32)
    rows, places = tensors["mask"].shape
    by_row, by_place = torch.arange(rows)[:, None] % 4 != 3, torch.arange(places)[None] < places - 2
    for mask in (by_row,) if backend == "triton" else (by_row, by_place.to(torch.uint8), by_row.float()):
        whole = mask.expand(rows, places).contiguous()
        found, expected = (case.call({**tensors, "mask": m}, backend) for m in (mask, whole))
        assert same(found, expected)


@pytest.mark.parametrize(("case", "backend"), each("cpu", "triton", of=masked))
def test_any_other_mask_raises_in_one_line(case, backend):
    tensors = case.inputs("cpu", torch.float32)
    rows, places = tensors["mask"].shape
    for shape in ((rows,), (places,), (rows, places + 1), (1, rows, places), (rows, 2)):
        with pytest.raises(ValueError, match=r"^mask must be [^\n]*$"):
            case.call({**tensors, "mask": torch.ones(shape)}, backend)


def identified(case: Case) -> list[str]:
    names = ("targets", "group_ids", "row_ids", "ranks", "cu_seqlens")
    return [name for name in names if name in case.tensors()]


@pytest.mark.parametrize(("case", "backend"), each("cpu", of=lambda case: bool(identified(case))))
def test_ids_are_of_any_integer_type(case, backend):
    tensors = case.inputs("cpu", torch.float32)
    expected = case.call(tensors, backend)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        found = case.call({**tensors, **{name: tensors[name].to(dtype) for name in identified(case)}}, backend)
        assert same(found, expected), dtype


@pytest.mark.parametrize("case", [case for case in CASES if "targets" in case.tensors()], ids=lambda case: case.name)
def test_targets_that_are_no_integers_raise(case):
    tensors = case.inputs("cpu", torch.float32)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=r"^targets must be int64"):
            case.call({**tensors, "targets": tensors["targets"].to(dtype)}, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if identified(case)], ids=lambda case: case.name)
def test_ids_are_of_any_integer_type_for_triton(case):
    test_ids_are_of_any_integer_type(case, "triton")
