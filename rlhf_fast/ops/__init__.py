"""The ops, by family: one module each, all to the same contract (see any of them and docs/ops.md).

core is what every op stands on. A module whose name starts with an underscore belongs to its family alone.
"""

from importlib import import_module
from pkgutil import iter_modules

from rlhf_fast.backends import BACKENDS, why_not

FAMILIES = ("tokens", "head", "advantages", "policy", "preference", "rewards", "values", "lora")


def table() -> dict[str, tuple[str, ...]]:
    """Public op name -> names of its implementations besides "reference"."""
    names: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES:
        package = f"{__name__}.{family}"
        for info in iter_modules(import_module(package).__path__):
            names.update(getattr(import_module(f"{package}.{info.name}"), "OPS", {}))
    return dict(sorted(names.items()))


def report(device: str) -> dict[str, dict[str, str | None]]:
    """op -> backend -> None (it runs on `device`) or the reason why not."""
    return {op: {name: why_not(op, impls, device, name) for name in BACKENDS} for op, impls in table().items()}
