"""What a launch of a Triton kernel is compiled from, as a short hash, the same for every version of Triton.

benchmarks/aot.py keeps it beside what it measured, and compiles again only where it changed.
"""

from __future__ import annotations

import ast
import hashlib
from types import ModuleType
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction


def digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def of_launch(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The code that the kernel reaches and what it is specialised by; numbers and options as they are."""
    given = [*map(described, arguments), *(f"{name}={described(value)}" for name, value in sorted(options.items()))]
    return digest([code(kernel), *given])


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}, {'aligned' if value.data_ptr() % 16 == 0 else 'unaligned'}"
    if isinstance(value, JITFunction):
        return code(value)
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(described, value))})"
    return repr(value)


def code(function: JITFunction) -> str:
    """The code of a function and of all that it reaches by name, without comments and layout."""
    reached: dict[str, str] = {}
    _reach(function, reached)
    return "\n".join(f"{name}: {text}" for name, text in sorted(reached.items()))


def _reach(function: JITFunction, reached: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__name__}"
    if name in reached:
        return
    tree = ast.parse(function.src)
    reached[name] = ast.dump(tree)
    of_module = {n: x for n, x in function.fn.__globals__.items() if n not in function.fn.__code__.co_varnames}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in of_module:
            value = of_module[node.id]
            if isinstance(value, JITFunction):
                _reach(value, reached)
            elif isinstance(value, type):
                fields = (getattr(value, "_fields", ()), getattr(value, "_field_defaults", {}))
                reached[f"{name} {node.id}"] = f"{value.__name__} {fields}"
            elif isinstance(value, ModuleType):  # Triton's own functions alone are reached by their module's name
                assert not value.__name__.startswith("rlhf_fast"), f"{name} reaches {value.__name__}"
            else:
                reached[f"{name} {node.id}"] = repr(value)
