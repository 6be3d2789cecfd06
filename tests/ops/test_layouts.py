"""Where a tensor stands in memory changes nothing: every layout of every tensor argument of every op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.op_inputs import each, missing


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


def _variants(case):
    """(argument, layout, inputs with that argument so, inputs with a contiguous copy of it) of every one there is."""
    for argument in case.tensors():
        for layout in LAYOUTS:
            yield argument, layout


def _compare(case, backend: str, dtype: torch.dtype, layouts=LAYOUTS) -> None:
    for argument in case.tensors():
        for layout in layouts:
            inputs = case.inputs("cpu", dtype)
            with torch.no_grad():
                laid = _laid_out(inputs[argument], layout)
                if laid is None:
                    continue
                copy = laid.resolve_neg().clone(memory_format=torch.contiguous_format)
            expected, found = (
                case.run({**case.inputs("cpu", dtype), argument: x.requires_grad_(argument in case.grads)}, backend)
                for x in (copy, laid)
            )
            for name, value in expected.items():
                what = f"{argument}, {layout}: {name}"
                torch.testing.assert_close(found[name], value, equal_nan=True, msg=lambda m, what=what: f"{what}\n{m}")


def test_every_tensor_argument_of_every_op_is_given_by_a_case():
    assert missing() == {}


@pytest.mark.parametrize(("case", "backend"), each("reference", "cpu"))
def test_every_layout_of_every_argument_gives_what_its_contiguous_copy_gives(case, backend):
    _compare(case, backend, torch.float32)
