"""Argument checks that every op makes first, with the offending values in the message."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from operator import index
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor

IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floating(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    return tensor


def that(holds: bool, name: str, meaning: str, value: Any) -> None:
    """ValueError where it does not hold that the value called `name` is `meaning`; a tensor's value is its shape."""
    if not holds:
        raise ValueError(f"{name} must be {meaning}, got {tuple(value.shape) if isinstance(value, Tensor) else value}")


def shaped(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    """`tensor` must have exactly `shape`; `meaning` names it, e.g. "(B, T)"."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")
    return tensor


def same_device(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    for name, tensor in others:
        if tensor is not None and tensor.device != first[1].device:
            raise ValueError(f"{name} is on {tensor.device}, {first[0]} on {first[1].device}")


_PLAIN = (float, int, NoneType, torch.SymInt, torch.SymFloat)
_F = TypeVar("_F", bound=Callable[..., Any])


def number(name: str, value: Any, *, integer: bool = False) -> Any:
    """A number of any type (Python's, NumPy's, a CPU tensor of one without a gradient) as a float, or as an int.

    Raises TypeError for anything else: also for a tensor elsewhere, which would have to be waited for.
    """
    kind = "an integer" if integer else "a number"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            raise TypeError(f"{name} must be {kind} without a gradient, got a tensor {tuple(value.shape)}, "
                            f"requires_grad={value.requires_grad}")  # fmt: skip
        if value.device.type != "cpu":
            raise TypeError(f"{name} must be {kind}, got a tensor on {value.device}, whose item() waits for the device")
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if boolean or not hasattr(value, "__index__" if integer else "__float__"):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    try:
        return index(value) if integer else float(value)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, got {value!r}") from None


def _converted(name: str, value: Any, annotation: str) -> Any:
    """`value`, of a parameter with this annotation, in Python's numbers where it is one.

    "Tensor | float" is a tensor as much as a number. "float | Tensor" is a number or a tensor of one per row, so that
    a 0-d one is the number of all rows.
    """
    kinds = annotation.split(" | ")
    if isinstance(value, Tensor) and "Tensor" in kinds:
        every_row = kinds[0] == "float" and value.dim() == 0 and value.device.type == "cpu"
        if not every_row or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return value
    return number(name, value, integer="float" not in kinds)


def takes_number(annotation: str) -> bool:
    return not {"float", "int"}.isdisjoint(annotation.split(" | "))


def takes_numbers(function: _F) -> _F:
    """`function`, whose parameters annotated as float or int take a number of any type, see `number`."""
    parameters = list(inspect.signature(function).parameters.values())
    kinds = {p.name: str(p.annotation) for p in parameters if takes_number(str(p.annotation))}
    plain = {name: _PLAIN if "float" in kind.split(" | ") else _PLAIN[1:-1] for name, kind in kinds.items()}
    order = [p.name for p in parameters]
    first = min((i for i, name in enumerate(order) if name in kinds), default=len(order))  # number by position

    @wraps(function)
    def run(*given: Any, **options: Any) -> Any:
        for name, value in options.items():
            if name in kinds and type(value) not in plain[name]:
                options[name] = _converted(name, value, kinds[name])
        if len(given) > first:
            given = (
                tuple(
                    _converted(name, value, kinds[name]) if name in kinds and type(value) not in plain[name] else value
                    for name, value in zip(order, given, strict=False)
                )
                + given[len(order) :]
            )
        return function(*given, **options)

    return run  # type: ignore[return-value]


def fields(objective: Any) -> None:
    """Makes every number among the fields of a dataclass one of Python's. TypeError for None, or no bool, where the
    field is another type."""
    for name, field in objective.__dataclass_fields__.items():
        value, kind = getattr(objective, name), field.type
        if type(value).__name__ in kind or (value is None and "None" in kind):
            continue
        if isinstance(value, Mapping):
            object.__setattr__(objective, name, {key: number(f"{name}[{key!r}]", x) for key, x in value.items()})
        elif takes_number(kind):
            if value is None or type(value) not in (_PLAIN if "float" in kind else _PLAIN[1:-1]):
                object.__setattr__(objective, name, number(name, value, integer="float" not in kind))
        elif value is None or kind == "bool":
            raise TypeError(f"{name} must be {kind}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence for a `name` that does not exist: "; did you mean 'known'?", or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(name: str, value: str | None, choices: Iterable[str]) -> None:
    """ValueError where `value` is none of `choices`, with the nearest one."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")


def positive(name: str, value: Any) -> float:
    converted: float = number(name, value)
    if not converted > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return converted


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last stride is not 1: kernels on rows take any other one."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows(tensor: Tensor) -> Tensor:
    """(N, D): the leading dimensions of (..., D) as one; of no element as well, where -1 would be ambiguous."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def flat(tensor: Tensor) -> Tensor:
    """(N,): all elements in order, contiguous."""
    return tensor.contiguous().view(-1)


def apart(name: str, tensor: Tensor) -> None:
    """ValueError where two elements of the tensor may be one in memory: what is written into it would be lost."""
    reach = 0  # of the elements of the dimensions so far, from the first to the last one
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            layout = f"{tuple(tensor.shape)} with the strides {tensor.stride()}"
            raise ValueError(f"{name} must not share memory among their elements, got {layout}")
        reach += max(size - 1, 0) * stride


def ids(name: str, tensor: Tensor) -> Tensor:
    """Token ids as contiguous int64."""
    if tensor.dtype not in IDS:
        raise TypeError(f"{name} must be int64, int32, int16, int8 or uint8, got {tensor.dtype}")
    return tensor.to(torch.int64).contiguous()


def mask_bytes(mask: Tensor | None, shape: tuple[int, ...], meaning: str) -> Tensor | None:
    """A mask (any dtype, nonzero counts) as contiguous uint8 0/1 of `shape`, to which (B, 1) and (1, T) broadcast."""
    if mask is None:
        return None
    if mask.dim() == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        mask = mask.expand(shape)
    shaped("mask", mask, shape, meaning)
    return mask.to(torch.bool).contiguous().view(torch.uint8)  # a conversion; `mask != 0` takes ten times as long


def looks_at_values(device: torch.device) -> bool:
    """Whether ops check values on `device`: always on the CPU, elsewhere with RLHF_FAST_DEBUG=1, as they must wait.

    Not within torch.func, where a value may be one of many.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return device.type == "cpu" or os.environ.get("RLHF_FAST_DEBUG") == "1"


def mask_count(mask: Tensor | None, count: int | None) -> None:
    """ValueError for a bound of the rows that a mask counts where it can be none."""
    that(count is None or count >= 0, "mask_count", ">= 0", count)
    if count is not None and mask is None:
        raise ValueError(f"mask_count = {count} counts the rows of a mask, but none is given")


def counted_within(mask: Tensor | None, count: int | None) -> None:
    """ValueError for a mask that counts more than `count` rows, where values are looked at."""
    if mask is None or count is None or not looks_at_values(mask.device):
        return
    counted = int((mask != 0).sum())
    if counted > count:
        raise ValueError(f"mask counts {counted} rows, more than mask_count = {count}")


def targets_inside(targets: Tensor, mask: Tensor | None, vocabulary: int, per_row: int = 1) -> None:
    """IndexError that names the row of a counted target outside [0, vocabulary), where values are looked at.

    targets: any shape, `per_row` consecutive ids for each element of the mask.
    """
    if not looks_at_values(targets.device):
        return
    ids = targets.reshape(-1, per_row)
    outside = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        outside &= mask.reshape(-1, 1) != 0
    if outside.any():
        row, k = outside.nonzero()[0].tolist()
        raise IndexError(f"targets: row {row} is {ids[row, k].item()}, outside [0, {vocabulary})")


def positive_rows(name: str, values: Tensor | None, mask: Tensor | None) -> None:
    """ValueError that names the row of a counted value that is not > 0, where values are looked at."""
    if values is None or not looks_at_values(values.device):
        return
    bad = ~(values.reshape(-1) > 0)
    if mask is not None:
        bad &= mask.reshape(-1) != 0
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be > 0, row {row} is {values.reshape(-1)[row].item()}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which results are computed and returned: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
