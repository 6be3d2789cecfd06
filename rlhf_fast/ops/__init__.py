"""The ops: one module each, all to the same contract (see any of them and docs/ops.md)."""

from importlib import import_module
from pkgutil import iter_modules

from rlhf_fast.backends import BACKENDS, why_not


def table() -> dict[str, tuple[str, ...]]:
    """Public op name -> names of its implementations besides "reference"."""
    names = {}
    for info in iter_modules(__path__):
        if not info.name.startswith("_"):
            names.update(import_module(f"{__name__}.{info.name}").OPS)
    return names


def report(device: str) -> dict[str, dict[str, str | None]]:
    """op -> backend -> None (it runs on `device`) or the reason why not."""
    return {op: {name: why_not(op, impls, device, name) for name in BACKENDS} for op, impls in table().items()}
