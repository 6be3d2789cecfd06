"""OpenRLHF without what its packages import and never call here: a GPU's libraries, a cluster, vLLM."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import MagicMock

ABSENT = (
    "deepspeed", "ray", "openrlhf.models.actor", "openrlhf.models.model", "openrlhf.trainer.ray", "openrlhf.utils",
)  # fmt: skip


class StandIn(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of ABSENT and below."""

    def find_spec(self, name, path, target=None):
        below = any(f"{name}.".startswith(f"{absent}.") for absent in ABSENT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if below else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def stand_ins() -> Iterator[None]:
    """What is imported of OpenRLHF meanwhile finds a stand-in for every module of ABSENT."""
    finder = StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if getattr(m, "__loader__", None) is finder]:
            del sys.modules[name]
