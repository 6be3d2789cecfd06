"""Rows of several experiences as one, whatever these are made of: dataclasses, tuples, mappings, lists, tensors."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def joined(values: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """The chosen rows (on the CPU) of each of several experiences, in order, padded with 0 to one length.

    values: experiences, or what they are made of: what has rows are tensors (B, ...) and lists.
    """
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Tensor):
        chosen = [value[index] for value, index in zip(values, rows, strict=True)]
        if first.dim() > 1:
            length = max(value.shape[1] for value in chosen)
            chosen = [pad(v, (0, 0) * (v.dim() - 2) + (0, length - v.shape[1])) for v in chosen]
        return torch.cat(chosen)
    if isinstance(first, list):
        return [value[i] for value, index in zip(values, rows, strict=True) for i in index.tolist()]
    if isinstance(first, dict):
        return {name: joined([value[name] for value in values if name in value], rows) for name in first}
    names = _names(first)
    if not names:
        return first
    return type(first)(*(joined([getattr(value, name) for value in values], rows) for name in names))


def on_device(value: Any, like: Any) -> Any:
    """`value` with each tensor on the device of its counterpart in `like`, which is made of the same things, or on the
    one device `like`."""
    if isinstance(value, Tensor):
        return value.to(like.device if isinstance(like, Tensor) else like)
    if isinstance(value, dict):
        return {name: on_device(part, like[name] if isinstance(like, dict) else like) for name, part in value.items()}
    names = _names(value)
    if not names:
        return value
    return type(value)(
        *(on_device(getattr(value, name), getattr(like, name) if _names(like) else like) for name in names)
    )


def _names(value: Any) -> Sequence[str]:
    """Those of the fields of a dataclass or a named tuple."""
    return [f.name for f in fields(value)] if is_dataclass(value) else getattr(value, "_fields", ())
