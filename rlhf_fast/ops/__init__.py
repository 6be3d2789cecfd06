"""The ops: one module each, all to the same contract (see any of them and docs/ops.md)."""

from importlib import import_module
from pkgutil import iter_modules


def table() -> dict[str, tuple[str, ...]]:
    """Public op name -> names of its implementations besides "reference"."""
    names = {}
    for info in iter_modules(__path__):
        if not info.name.startswith("_"):
            names.update(import_module(f"{__name__}.{info.name}").OPS)
    return names
