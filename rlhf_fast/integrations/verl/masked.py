"""verl's sums, means and variances of what a mask counts, and its whitening.

A mask is a tensor of the values' shape, or one that broadcasts to it: bool, or numbers that weigh. What it does not
count is not looked at, NaN included. Computed in float32 at least, returned in the type of verl's own result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.integrations._tensors import moments, wide

Axis = int | tuple[int, ...] | None


def masked_sum(values: Tensor, mask: Tensor, axis: Axis = None) -> Tensor:
    """The sum of values * mask over all, or along `axis`."""
    dtype = _product_type(values, mask)
    return _weighed_sum(values, mask, axis).to(dtype)


def masked_mean(values: Tensor, mask: Tensor, axis: Axis = None) -> Tensor:
    """That sum over the mask's own; 0 where it counts nothing."""
    total = mask.sum() if axis is None else mask.sum(dim=axis)
    mean = _weighed_sum(values, mask, axis) / torch.where(total == 0, 1, total)
    return mean.to(_quotient_type(values, mask))


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """The variance, (), over n - 1 with `unbiased`, which raises ValueError on the CPU for fewer than two counted."""
    centred = wide(values) - masked_mean(wide(values), mask)
    variance = masked_mean(centred.square(), mask)
    if unbiased:
        check_two_counted(mask)
        total = mask.sum()
        variance = variance * (total / (total - 1))
    return variance.to(_quotient_type(values, mask))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) (+ mean without shift_mean), by the moments of what the mask counts.

    What it does not count is mapped alike, as verl does and `whiten`, which gives 0 there, does not. The type of the
    values; the moments are float64. Raises ValueError on the CPU for a mask that counts fewer than two; a GPU would
    have to wait for that, and gives the counted value its mean.
    """
    check_two_counted(mask)
    mean, variance = moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).to(values.dtype)


def check_two_counted(mask: Tensor) -> None:
    if mask.device.type != "cpu" or mask.sum() > 1:
        return
    said = "At least one element in the mask has to be 1" if mask.sum() == 0 else "The sum of the mask is one"
    raise ValueError(f"{said}: a variance needs a mask that counts two at least, got {int(mask.sum())}")


def _weighed_sum(values: Tensor, mask: Tensor, axis: Axis) -> Tensor:
    counted = torch.where(mask.bool(), values, 0)
    dtype = torch.promote_types(_product_type(values, mask), torch.float32) if values.is_floating_point() else None
    weighed = (counted if dtype is None else counted.to(dtype)) * mask
    return weighed.sum() if axis is None else weighed.sum(dim=axis)


def _product_type(values: Tensor, mask: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, mask.dtype)


def _quotient_type(values: Tensor, mask: Tensor) -> torch.dtype:
    """That of a sum over a count, in which a count of integers is a float of the default type."""
    count = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    return torch.promote_types(_product_type(values, mask), count)


FUNCTIONS = (masked_sum, masked_mean, masked_var, masked_whiten)
