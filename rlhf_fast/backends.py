"""Which implementation of an op runs, and why another one cannot.

Backends: ``reference`` (plain PyTorch, any device), ``cpu`` (C++), ``triton``, ``cuda`` (C++).
Precedence: argument ``backend=`` > ``use_backend(...)`` > environment ``RLHF_FAST_BACKEND`` > automatic by device.
A backend that was asked for and cannot run raises and says why; automatic choice never skips a broken one, and takes
CUDA C++ before Triton only where it is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType
from typing import Any, TypeVar

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Automatic order per device type.
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# Ops whose CUDA C++ is taken before Triton where it is built: it measured faster (kernels/LOG.md).
_CUDA_FIRST = ("gae",)
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts
_HUGE = 4 << 20  # bytes from which on a tensor gains by huge pages of 2 MiB
_override: ContextVar[str | None] = ContextVar("rlhf_fast_backend", default=None)
_meta_device: ContextVar[str] = ContextVar("rlhf_fast_meta_device", default="meta")


class BackendError(RuntimeError):
    """The backend that was asked for does not exist or cannot run here; the message says why."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend `name` for every op inside the block that is not given ``backend=``."""
    token = _override.set(_checked(name))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """Ops on the meta device, where memory is counted, choose their backend inside as on a device of this type."""
    token = _meta_device.set(device)
    try:
        yield
    finally:
        _meta_device.reset(token)


def device_type(tensor: torch.Tensor) -> str:
    """Of the device that it is on, or that the meta device stands for."""
    kind = tensor.device.type
    return _meta_device.get() if kind == "meta" else kind


def resolve(op: str, impls: Collection[str], device: torch.device, backend: str | None = None) -> str:
    """The name of the backend that runs `op` on `device`, out of `impls` and "reference".

    Raises BackendError where the one asked for is unknown or cannot run.
    """
    if device.type == "meta" and _meta_device.get() != "meta":
        return next(name for name in _AUTOMATIC[_meta_device.get()] if name == "reference" or name in impls)
    return _resolve(op, tuple(impls), device.type, backend)


def _resolve(op: str, impls: tuple[str, ...], device: str, backend: str | None) -> str:
    name = backend or _override.get() or os.environ.get("RLHF_FAST_BACKEND")
    if name is None:
        if device == "cpu" and "cpu" in impls and _native_error() is None:
            return "cpu"
        order = _AUTOMATIC.get(device, ("reference",))
        if device == "cuda" and op in _CUDA_FIRST and why_not(op, impls, device, "cuda") is None:
            order = ("cuda",)
        name = next(n for n in order if n == "reference" or n in impls)
    reason = why_not(op, impls, device, _checked(name))
    if reason is not None:
        raise BackendError(f"{op}: backend {name!r} cannot run on {device}: {reason}")
    return name


# The choice is made once, while torch.compile traces; the compiled graph shows it as an argument of the op.
# This is all that torch.compiler.assume_constant_result does, but that imports torch._dynamo, for seconds.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(op: str, impls: Collection[str], device: str, name: str) -> str | None:
    """None where backend `name` can run `op` on this device type, else the reason why not."""
    if name == "reference":
        return None
    if name not in impls:
        return f"it has no {name} implementation"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cpu" and not interpreting():
            return "Triton needs a GPU (set TRITON_INTERPRET=1 to interpret its kernels on the CPU)"
        return None if device in ("cpu", "cuda", "xpu") else f"Triton does not run on {device}"
    if device != name:
        return f"it runs on {name} tensors"
    reason = _native_error()
    if reason is None and name == "cuda" and not native().with_cuda:
        reason = "rlhf_fast was built without a CUDA compiler"
    return reason


def interpreting() -> bool:
    """Whether Triton interprets its kernels (on the CPU) in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def native() -> ModuleType:
    """The compiled module. Raises ImportError with the loader's own message where it cannot be loaded."""
    return importlib.import_module("rlhf_fast._native")


@cache
def triton_kernels(module: str) -> ModuleType:
    """That module of the Triton kernels, which the first call of one imports."""
    return importlib.import_module(f"rlhf_fast.kernels.{module}")


@cache
def _native_error() -> str | None:
    try:
        native()
    except ImportError as error:
        return f"the native module does not load: {error}"
    return None


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_F = TypeVar("_F", bound=Callable[..., Any])


def without_autocast(function: _F) -> _F:
    """`function`, whose first argument is a tensor, or a tuple that begins with one: its products are in the types it
    asks for, inside autocast too."""

    @wraps(function)
    def run(first: Any, *others: Any, **options: Any) -> Any:
        device = (first[0] if isinstance(first, tuple) else first).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(first, *others, **options)
        with torch.autocast(device, enabled=False):
            return function(first, *others, **options)

    return run  # type: ignore[return-value]


def operands(first: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """The operands of a product: in autocast's type inside autocast, as those of F.linear, else as they are."""
    tensors, device = [first, *others], first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    with torch.enable_grad():  # ops read from requires_grad what is trained, whatever the grad mode
        return [x if x is None or x.dtype not in _ROUNDED else x.to(dtype) for x in tensors]


# --- How a tensor is handed to the native module: never an address without what says where its elements are -----------

DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # DType in csrc/native.h


def packed(tensor: torch.Tensor | None) -> int:
    """The address of a contiguous tensor, 0 for None and for no element. Raises ValueError for any other layout."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel takes a contiguous tensor here, got {_layout(tensor)}")
    return _address(tensor)


def plane(tensor: torch.Tensor | None) -> tuple[int, int, int, int]:
    """(address, type code, row stride, column stride) of (rows, columns), or of (columns,) as one row; 0s for None."""
    if tensor is None:
        return 0, 0, 0, 0
    row, column = tensor.stride() if tensor.dim() == 2 else (0, *tensor.stride())
    return _address(tensor), DTYPE_CODES[tensor.dtype], row, column


def strided(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """(address, type code, the sizes and then the strides of all dimensions but the last one, whose stride must be 1).

    Strides are in elements. Raises ValueError for another last stride.
    """
    *strides, last = tensor.stride()
    if last != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(f"a kernel takes a tensor with the last stride 1 here, got {_layout(tensor)}")
    return _address(tensor), DTYPE_CODES[tensor.dtype], (*tensor.shape[:-1], *strides)


def _address(tensor: torch.Tensor) -> int:
    """Raises ValueError where memory holds no elements, or not these but their negatives."""
    address = tensor.data_ptr()
    if tensor.is_neg() or (address == 0 and tensor.numel()):
        raise ValueError(f"a kernel takes a tensor whose elements are in memory, got {_layout(tensor)}")
    return address


def _layout(tensor: torch.Tensor) -> str:
    kind = "a negated view" if tensor.is_neg() else "a tensor"
    return f"{kind} {tuple(tensor.shape)} with the strides {tensor.stride()}"


def threads() -> int:
    """How many threads a native CPU kernel uses: as many as PyTorch."""
    return torch.get_num_threads()


def stream(device: torch.device) -> int:
    """The address of the current CUDA stream of `device`."""
    return torch.cuda.current_stream(device).cuda_stream


def prefer_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """`fresh`, unwritten. On the CPU, where the system has huge pages, the first touch then costs a quarter."""
    real = type(fresh) is torch.Tensor and fresh.device.type == "cpu"  # not what torch.compile traces with
    if real and fresh.nbytes >= _HUGE and _native_error() is None:
        native().prefer_huge_pages(packed(fresh), fresh.nbytes)
    return fresh
