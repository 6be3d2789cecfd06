"""A computation on parameters that DeepSpeed ZeRO-3 keeps in parts on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_whole_heads(compute: Callable[..., Any], differentiable: int, *tensors: Tensor | None) -> Any:
    """compute(*tensors), also where some are in parts; of its results, the first `differentiable` have a gradient."""
    if any(hasattr(x, "ds_id") for x in tensors):  # DeepSpeed's mark on a parameter
        return _Regathered.apply(compute, differentiable, *tensors)
    return compute(*tensors)


class _Regathered(torch.autograd.Function):
    """compute(*tensors) for parameters that are whole only while they are gathered: nothing that forward reads of them
    can be kept, so backward gathers them and computes again."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], differentiable: int, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        with _gathered(tensors):
            results = compute(*tensors)
        ctx.mark_non_differentiable(*(x for x in results[differentiable:] if x is not None))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors
        with _gathered(tensors), torch.enable_grad():
            inputs = [x if x is None else x.detach() for x in tensors]
            needed = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if x is not None and need]
            pairs = [(x, g) for x, g in zip(ctx.compute(*inputs), grads, strict=True) if g is not None]
            results, upstream = zip(*pairs, strict=True)
            gradients = iter(torch.autograd.grad(results, needed, upstream, allow_unused=True))
        return None, None, *(next(gradients) if need else None for need in needs)


def _gathered(tensors: tuple[Tensor | None, ...]) -> Any:
    """TRL's own context, which knows when a parameter is gathered already."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    parameters = [x for x in tensors if isinstance(x, torch.nn.Parameter) and hasattr(x, "ds_id")]
    return maybe_gather_lm_head_ctx(*parameters)
