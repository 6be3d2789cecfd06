"""What docs/drop_in.md names is replaced wherever a peer's module holds it, and given back: objects, not names, are
looked for, in modules, their containers and their classes."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_fast.integrations import patched
from rlhf_fast.testing.stand_ins import stand_ins

PAGE = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
# Packages whose modules import from the defining ones.
IMPORTERS = {
    "liger": ("liger_kernel.chunked_loss", "liger_kernel.ops", "liger_kernel.transformers"),
    "openrlhf": ("openrlhf.models",),
    "torchrl": ("torchrl.objectives",),
    "torchtune": ("torchtune.rlhf", "torchtune.training"),
    "trl": ("trl.trainer", "trl.kernels"),
    "verl": ("verl.trainer.ppo", "verl.utils", "verl.workers"),
}


def named(peer: str) -> list[str]:
    """The dotted names on the page, but entries of registries, which patch() adds."""
    (part,) = re.findall(rf"<!-- names of {peer} -->(.*?)<!-- end", PAGE, re.DOTALL)
    places = re.findall(r"^  - `([^`]+)`: (.*)$", part, re.MULTILINE)
    return [f"{place}.{name}" for place, names in places for name in re.findall(r"`([^`]+)`", names)
            if not place.endswith("_REGISTRY")]  # fmt: skip


def load(packages: tuple[str, ...]) -> None:
    """Every module below that can be imported here."""
    for package in packages:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}.", onerror=lambda name: None):
            try:
                importlib.import_module(found.name)
            except Exception:  # noqa: BLE001  # another device's, or of a package that is not here: it holds nothing then
                continue


def held(root: str, objects: dict[int, str]) -> Iterator[str]:
    """Where modules of a package, their containers and their classes have one of the objects."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.split(".")[0] == root:
            for key, value in list(vars(module).items()):
                for inner in (value, *contained(value, root)):
                    if id(inner) in objects:
                        yield f"{name}.{key} has {objects[id(inner)]}"


def contained(value: Any, root: str) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return list(vars(value).values()) if isinstance(value, type) and value.__module__.split(".")[0] == root else []


def resolved(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("peer", IMPORTERS)
def test_what_the_page_names_is_replaced_wherever_it_is_held_and_given_back(peer):
    root = IMPORTERS[peer][0].split(".")[0]
    if find_spec(root) is None:
        pytest.skip(f"needs {root} (make peers)")
    with stand_ins() if peer == "openrlhf" else nullcontext():
        load(IMPORTERS[peer])
        names = named(peer)
        assert names
        theirs = {name: resolved(name) for name in names}
        objects = {id(x): name for name, x in theirs.items()}
        before = sorted(held(root, objects))
        assert len(before) >= len(names)
        with patched(peer) as replaced:
            assert set(names) <= set(replaced)
            assert list(held(root, objects)) == []
            assert [name for name in names if resolved(name) is theirs[name]] == []
        assert sorted(held(root, objects)) == before
