"""Linear layers of bitsandbytes, whose frozen weight is stored in 4 bits (NF4, FP4) or in int8.

    y = x @ W^T + bias,    dx = dy @ W,    W = dequantised(weight) in the type of x

W is made for each product and again for its backward, so no layer's W outlives its product. The layer's own forward is
not used, because a frozen backbone is in eval mode, where (bitsandbytes 0.50)

- int8 layers quantise x as well, with outlier columns chosen over all rows: a sequence would depend on its batch;
- 4-bit layers on a CPU with AVX512-BF16 are packed anew at the first pass without gradients, which changes the
  results of later passes and cuts the gradient of x.

Sources: QLoRA, Dettmers et al. 2023 (arXiv 2305.14314, section 3); int8 rows: LLM.int8(), Dettmers et al. 2022
(arXiv 2208.07339, section 2).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast.errors import UserError


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes with a quantised weight."""
    # Without the library in the process there can be no such layer.
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return False
    if isinstance(module, library.nn.Linear4bit):
        return _state_of_4_bits(module) is not None
    return isinstance(module, library.nn.Linear8bitLt) and module.weight.dtype == torch.int8


def dequantized(layer: Any) -> Tensor:
    """(out, in): a new matrix of what the weight of a quantised layer stands for."""
    functional = sys.modules["bitsandbytes"].functional
    state = _state_of_4_bits(layer)
    if state is not None:
        return functional.dequantize_4bit(layer.weight.data, state)
    return functional.int8_vectorwise_dequant(layer.weight.data, _row_scales(layer))


def quantization_state(layer: Any) -> list[Tensor]:
    """The tensors besides weight and bias that a quantised layer holds; they are neither parameters nor buffers."""
    outer = _state_of_4_bits(layer)
    if outer is None:
        return [_row_scales(layer)]
    states = [outer] if outer.state2 is None else [outer, outer.state2]
    tensors = [tensor for state in states for tensor in (state.absmax, state.code)]
    return tensors if outer.offset is None else [*tensors, outer.offset]


def make_plain(layer: Any) -> None:
    """Keeps the scales in the layer, and of its weight the bytes alone: an ordinary parameter, which may be split."""
    layer.quant_state = getattr(layer.weight, "quant_state", None)
    if layer.quant_state is None:
        layer.state.SCB = _row_scales(layer)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Tensor), requires_grad=False)


def _state_of_4_bits(layer: Any) -> Any:
    """None for a layer of int8, and for one whose weight is not quantised."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _row_scales(layer: Any) -> Tensor:
    # The layer's own forward moves them from the weight to its state.
    return layer.weight.SCB if layer.state.SCB is None else layer.state.SCB


class QuantizedForward:
    """The forward of a quantised layer. It takes the place of the instance's `forward`, like `LoRALinear`.

    Raises UserError for a 4-bit layer that was packed anew by its own forward.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        state = _state_of_4_bits(layer)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(f"{name} was packed for inference by a pass of the model: load it again")
        self.layer = layer
        layer.forward = self  # type: ignore[assignment, method-assign]

    def __call__(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.layer)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, dequantized(layer).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantized(ctx.layer).to(grad.dtype), None
