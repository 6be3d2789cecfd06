"""Every op x variant x backend x dtype of rlhf_fast/testing/cases keeps the op contract; what an op does beyond it is
tested in the op's own file."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.testing.cases import CASES
from tests.op_table import DTYPES, OPS, assert_keeps_contract, case_backend_pairs

# The CPU stands in for a GPU through Triton's interpreter (tests/conftest.py).
PAIRS = case_backend_pairs("cpu", "triton")
FIRST_OF_OP = list({case.op: case for case in reversed(CASES)}.values())


def test_every_op_has_a_case():
    assert set(OPS) - {case.op for case in CASES} == set()


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)


def result(case, backend):
    """What `case` gives in float32, run once; the tests of its bits run it again."""
    if (case.name, backend) not in RESULTS:
        RESULTS[case.name, backend] = case.run(case.inputs("cpu", torch.float32), backend)
    return RESULTS[case.name, backend]


RESULTS: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

# Interpreted, float16 differs from bfloat16 in what is read and written alone: a kernel's first case shows that.
IN_TYPES = [
    pytest.param(*pair.values, dtype, id=f"{pair.id}-{dtype}")
    for pair in PAIRS
    for dtype in DTYPES
    if not (pair.values[1] == "triton" and dtype == torch.float16 and pair.values[0] not in FIRST_OF_OP)
]


@pytest.mark.parametrize(("case", "backend", "dtype"), IN_TYPES)
def test_values_and_gradients_keep_the_numerics_contract(case, backend, dtype):
    assert_keeps_contract(case, "cpu", backend, dtype)


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_the_same_inputs_give_the_same_bits(case, backend):
    first, again = result(case, backend), case.run(case.inputs("cpu", torch.float32), backend)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("case", "backend"), [p for p in PAIRS if p.values[0].grads])
def test_a_pass_without_gradients_gives_the_same_bits(case, backend):
    with torch.no_grad():
        again = case.call(case.inputs("cpu", torch.float32), backend)
    with_gradients = [x for name, x in result(case, backend).items() if name.startswith("result")]
    assert all(torch.equal(a, b) for a, b in zip(with_gradients, again, strict=True))


# Ops without products whose operands autocast rounds: see test_autocast for the others.
IN_FLOAT32 = [case for case in FIRST_OF_OP if case.op == "linear_value_loss" or "weight" not in case.tensors()]


@pytest.mark.parametrize("case", [case for case in IN_FLOAT32 if "cpu" in OPS[case.op]], ids=lambda case: case.name)
def test_autocast_changes_neither_values_nor_gradients(case):
    expected = result(case, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(case.inputs("cpu", torch.float32), "cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", IN_FLOAT32, ids=lambda case: case.name)
def test_autocast_does_not_change_the_reference(case):  # its backward is PyTorch's, which belongs outside autocast
    expected = case.call(case.inputs("cpu", torch.float32), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.call(case.inputs("cpu", torch.float32), "reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


MASKED = [p for p in PAIRS if "mask" in p.values[0].tensors()]


@pytest.mark.parametrize(("case", "backend"), MASKED)
def test_nothing_behind_the_mask_is_looked_at(case, backend):
    poisoned = case.inputs("cpu", torch.float32)
    mask = poisoned["mask"] != 0
    with torch.no_grad():
        for name, x in poisoned.items():
            if name != "mask" and x.shape[: mask.dim()] == mask.shape:
                x[~mask] = float("nan") if x.is_floating_point() else -1
    expected, found = result(case, backend), case.run(poisoned, backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Recorder(TorchDispatchMode):
    """Notes the calls of our registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_fast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in CASES if "cpu" in OPS[case.op]], ids=lambda case: case.name)
def test_registered_ops_pass_opcheck(case):
    with Recorder() as recorder:
        case.run(case.inputs("cpu", torch.float32), "cpu")
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", FIRST_OF_OP, ids=lambda case: case.name)
def test_ops_compile_into_one_graph(case):
    backend = OPS[case.op][0]
    torch.compiler.reset()  # one code object for all cases would reach the limit of recompilations
    expected = case.call(case.inputs("cpu", torch.float32), backend)
    compiled = torch.compile(lambda inputs: case.call(inputs, backend), fullgraph=True, backend="aot_eager")
    found = compiled(case.inputs("cpu", torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
