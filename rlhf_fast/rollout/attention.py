"""Attention of one new token per row to a cache of slots, on the CPU.

transformers' layers find it by its name, as they find any other attention; prompts go to PyTorch's, as without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_fast.backends import DTYPE_CODES, native, packed, strided, threads
from rlhf_fast.models.architecture import text_config
from rlhf_fast.models.packing import check_known

NAME = "rlhf_fast_slots"
_STARTS: ContextVar[Tensor | None] = ContextVar("rlhf_fast_starts", default=None)


@contextmanager
def slot_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's layers use it inside, for passes within `reading`, where they can."""
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def reading(starts: Tensor) -> Iterator[None]:
    """Each row, (B,) int64, reads from its start on."""
    token = _STARTS.set(starts)
    try:
        yield
    finally:
        _STARTS.reset(token)


def is_usable(model: PreTrainedModel) -> bool:
    """Whether all attention of the model goes through transformers' interface, and PyTorch's is what it would use."""
    return (
        model.device.type == "cpu"
        and model._supports_attention_backend
        and text_config(model)._attn_implementation == "sdpa"
        and model.dtype in DTYPE_CODES
    )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(B, heads, 1, D), (B, key heads, columns, D), (B, key heads, columns, E) -> (B, 1, heads, E)."""
    starts = _STARTS.get()
    if starts is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap, **others,
        )  # fmt: skip
    check_known(others)
    query_at, code, (rows, heads, _, *query_strides, _) = strided(query)
    keys_at, _, (_, key_heads, columns, *key_strides) = strided(key)
    values_at, _, (_, _, _, *value_strides) = strided(value)
    width, value_width = query.shape[3], value.shape[3]
    out = query.new_empty(rows, 1, heads, value_width)
    native().slot_attention(
        (query_at, keys_at, values_at, packed(starts), packed(out)),
        code,
        (rows, heads, key_heads, columns, width, value_width, sliding_window or columns),
        (*query_strides, *key_strides, *value_strides),
        width**-0.5 if scaling is None else scaling,
        softcap or 0.0,
        threads(),
    )
    return out, None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*args, **options) if _STARTS.get() is None else None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
