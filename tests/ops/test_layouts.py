"""Where a tensor stands in memory changes nothing: every layout of every tensor argument of every op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.op_inputs import FIRST, each, missing


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_second_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


def _every_third_column(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, -1)[..., ::3]


def _a_column_of_a_table(x: Tensor) -> Tensor:
    return torch.stack([x, torch.ones_like(x)], -1)[..., 0]


def _expanded_over_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def _expanded_over_columns(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


def _at_an_offset(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(3).to(x.dtype), x.reshape(-1)])[3:].view(x.shape)


def _backwards(x: Tensor) -> Tensor:  # its storage holds -x
    return torch._neg_view(-x)


def _of_a_conjugate(x: Tensor) -> Tensor:  # strided by 2, its storage holds -x
    return torch.complex(torch.ones_like(x), -x).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "every second row": _every_second_row,
    "every third column": _every_third_column,
    "a column of a table": _a_column_of_a_table,
    "expanded over rows": _expanded_over_rows,
    "expanded over columns": _expanded_over_columns,
    "at an offset": _at_an_offset,
    "a negated view": _backwards,
    "of a conjugate": _of_a_conjugate,
}


def _laid_out(x: Tensor, layout: str) -> Tensor | None:
    """x, or a tensor of its shape where it is expanded, in that layout; None where it cannot be."""
    if (x.dim() == 0 and layout in ("transposed", "every second row", "every third column")) or (
        "expanded" in layout and (x.dim() == 0 or not x.is_floating_point())
    ):
        return None
    if layout in ("a negated view", "of a conjugate") and not x.is_floating_point():
        return None
    if layout == "of a conjugate" and x.dtype == torch.bfloat16:  # PyTorch has no such complex type
        return None
    return LAYOUTS[layout](x)


def _copied(x: Tensor) -> Tensor:
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)


def _assert_same(case, backend: str, laid: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """A call with some arguments as `laid` gives `expected`."""
    given = {name: x.requires_grad_(name in case.grads) for name, x in laid.items()}
    found = case.run({**case.inputs("cpu", torch.float32), **given}, backend)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True), f"{what}: {name}"


def test_every_tensor_argument_of_every_op_is_given_by_a_case():
    assert missing() == {}


@pytest.mark.parametrize(("case", "backend"), each("cpu"))
def test_every_layout_of_every_argument_gives_what_its_contiguous_copy_gives(case, backend):
    unchanged = case.run(case.inputs("cpu", torch.float32), backend)
    for argument, x in case.inputs("cpu", torch.float32).items():
        for layout in LAYOUTS:
            laid = _laid_out(x.detach(), layout)
            if laid is None:
                continue
            expected = unchanged
            if "expanded" in layout:
                copy = _copied(laid).requires_grad_(argument in case.grads)
                expected = case.run({**case.inputs("cpu", torch.float32), argument: copy}, backend)
            _assert_same(case, backend, {argument: laid}, expected, f"{argument}, {layout}")


@pytest.mark.parametrize(("case", "backend"), each("reference", "triton", of=lambda case: case in FIRST))
def test_arguments_of_several_layouts_at_once_give_what_contiguous_copies_give(case, backend):
    few = ("a column of a table", "every second row", "a negated view", "transposed")
    drawn = {name: x.detach() for name, x in case.inputs("cpu", torch.float32).items()}
    every = {name: _laid_out(x, few[i % len(few)]) for i, (name, x) in enumerate(drawn.items())}
    laid = {name: x for name, x in every.items() if x is not None}
    _assert_same(case, backend, laid, case.run(case.inputs("cpu", torch.float32), backend), "several at once")
