"""Bytes that a pass of a model takes, counted without that memory: tensors of the meta device have shapes alone.

`peak_of` runs a function there and watches every storage that an operation makes, and when it is freed. What runs is
the pass itself: layers of transformers, adapters and heads, forward and backward. Two things are told, not run:

- attention is a fused kernel, which keeps queries, keys, values, its result and a number per row for its backward
  (FlashAttention-2, Dao 2023, arXiv 2307.08691); a mask that SDPA adds to the scores has the type of the queries;
- what ops on a head hold of logits inside of a call is `tiles.scratch_of`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.backends import meta_stands_for
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.quantized import quantization_state
from rlhf_fast.ops.head.tiles import TILE_BYTES, Scratch, scratch_of


def twin_of(backbone: Backbone) -> Backbone:
    """The same backbone with its roles, whose tensors are on the meta device. The original is not touched.

    Raises whatever the code of a model raises that cannot be copied.
    """
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    for name in {*backbone.adapters, *backbone.heads}:
        tensors += backbone.parameters_of(name)
    packed = {module.weight: module for module in backbone.quantized.values()}
    tensors += [state for module in packed.values() for state in quantization_state(module)]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor.detach().as_subclass(Tensor), device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    for weight in packed:  # of bitsandbytes
        if getattr(weight, "quant_state", None) is not None:
            memo[id(weight)].quant_state = copy.deepcopy(weight.quant_state, memo)
        if getattr(weight, "SCB", None) is not None:
            memo[id(weight)].SCB = copy.deepcopy(weight.SCB, memo)
    return copy.deepcopy(backbone, memo)


class Allocations(TorchDispatchMode):
    """Storages that operations inside make. alive, peak: their bytes now, and the most so far.

    device: the type of the one that the meta device stands for. padded: whether rows are taken to have padding, which
    the model asks for where it decides on a mask.
    """

    def __init__(self, device: str, *, padded: bool) -> None:
        super().__init__()
        self.device, self.padded = device, padded
        self.alive = self.peak = 0
        self._seen: set[int] = set()
        self._kept = 0  # of the tile that the CPU keeps from call to call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return int(not self.padded)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "rlhf_fast":
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            self._compute(scratch_of(func._opname, given, self.device))
        taken = {tensor.untyped_storage()._cdata for tensor in _tensors((args, *(kwargs or {}).values()))}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in taken:
                self._watch(tensor.untyped_storage())
        return result

    def _compute(self, scratch: Scratch) -> None:
        """The CPU keeps a tile from call to call."""
        logits = scratch.logits
        if self.device == "cpu" and logits <= TILE_BYTES["cpu"]:
            more = max(0, logits - self._kept)
            self._kept, self.alive, logits = self._kept + more, self.alive + more, 0
        self.peak = max(self.peak, self.alive + logits + scratch.hidden)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, time, _ = query.shape
        result = query.new_empty(batch, time, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty(batch, heads, time, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return *(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)), None


@contextmanager
def fused_attention() -> Iterator[None]:
    """SDPA of tensors on the meta device, where PyTorch would take the plain one."""
    own = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *a: Any, **k: Any) -> Tensor:
        if query.device.type != "meta":
            return own(query, key, value, attn_mask, *a, **k)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = query.new_empty(attn_mask.shape)
        return _Attention.apply(query, key, value, attn_mask)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def peak_of(function: Callable[[], Any], device: str, *, padded: bool = False) -> int:
    """The most bytes that `function`, which computes on the meta device, has at a time of what it makes. See
    `Allocations`."""
    with meta_stands_for(device), fused_attention(), Allocations(device, padded=padded) as made:
        function()
    return made.peak
