"""What the tests of the losses from hidden states share: a small head, how a loss is run, products and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.head import _logprobs_op, _plan, tiles
from rlhf_fast.ops.head.tiles import Order

D, V, R = 16, 97, 3
PARAMETERS = ("hidden", "weight", "bias", "lora_a", "lora_b")
TRANSFORM: dict[str, Any] = {"temperature": 0.9, "logit_scale": 1.3, "softcap": 5.0}


def head(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """hidden of `shape` and the parameters of a head with a bias and a LoRA."""
    torch.manual_seed(0)
    sizes = {"hidden": (*shape, D), "weight": (V, D), "bias": (V,), "lora_a": (R, D), "lora_b": (V, R)}
    return {name: (torch.randn(size) / (1 if name == "hidden" else 2)).to(dtype) for name, size in sizes.items()}


def run(
    call: Callable[..., tuple], tensors: dict[str, Tensor], trained: tuple[str, ...] = PARAMETERS
) -> dict[str, Tensor]:
    """Loss, metrics and the gradients of `trained`, under an upstream gradient of 1.5.

    call: (hidden, weight, bias=, head_lora=) -> (loss, metrics)
    """
    leaves = {name: x.detach().clone().requires_grad_(name in trained) for name, x in tensors.items()}
    hidden, weight, bias, lora_a, lora_b = leaves.values()
    loss, metrics = call(hidden, weight, bias=bias, head_lora=(lora_a, lora_b, 0.7))
    (1.5 * loss).backward()
    return {"loss": loss.detach(), **metrics, **{f"d {name}": leaves[name].grad for name in trained}}


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64: to rounding."""
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def products(function: Callable[[], Any]) -> int:
    """The multiplications in the matrix products of `function`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    factors = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}
    pairs = [e.input_shapes[factors[e.name]] for e in profile.events() if e.name in factors]
    return sum(a[0] * a[1] * b[1] for a, b in pairs)


def plan_as_on_a_gpu(monkeypatch: Any) -> None:
    """The losses from hidden states plan their rows as on a GPU, where the mask cannot be read."""

    make = _plan.make

    def make_on_a_gpu(coupling: str, shape: Any, cu_seqlens: Any, mask: Any, device: Any, *rest: Any) -> _plan.Plan:
        return make(coupling, shape, cu_seqlens, mask, torch.device("meta"), *rest)

    monkeypatch.setattr(_plan, "make", make_on_a_gpu)
    count_as_on_a_gpu(monkeypatch)


def count_as_on_a_gpu(monkeypatch: Any) -> None:
    """counted_rows gives what it does on a GPU, where it must not look at the mask."""

    def counted_rows(count: int, mask: Tensor | None, mask_count: int | None) -> Order:
        if mask is None or mask_count is None:
            return Order(None, count, masked=mask is not None)
        return Order(mask.argsort(descending=True, stable=True)[:mask_count], min(mask_count, count), masked=True)

    for module in (tiles, _plan, _logprobs_op):
        monkeypatch.setattr(module, "counted_rows", counted_rows)
