"""The imports of the tree: which layer may use which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import rlhf_fast

ROOT = Path(__file__).parents[2]

# Imports go to a later line or stay on their own; modules of one line may use each other.
LAYERS = [
    {"cli", "__main__"},
    {"commands"},
    {"algorithms"},
    {"training", "rollout", "rewards", "data"},
    {"models"},
    {"integrations"},
    {"ops"},
    {"backends"},
    {"kernels", "_native", "http", "errors", "signals"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
USES_TRANSFORMERS = ("models", "rollout", "data")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(dotted name below rlhf_fast, tree) of every module, packages by their own name."""
    for base, prefix in ((ROOT / "rlhf_fast", ()), (ROOT / "kernels" / "src", ("kernels",))):
        for path in sorted(base.rglob("*.py")):
            parts = (*prefix, *path.relative_to(base).with_suffix("").parts)
            name = ".".join(part for part in parts if part != "__init__")
            yield name, ast.parse(path.read_text(), str(path))


MODULES = dict(modules())


def imported(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def ours(tree: ast.Module) -> Iterator[str]:
    """Dotted names below rlhf_fast that are imported, "" for the package itself."""
    for module, name in imported(tree):
        if module == "rlhf_fast":
            yield name or ""
        elif module.startswith("rlhf_fast."):
            below = module.removeprefix("rlhf_fast.")
            yield f"{below}.{name}" if name and f"{below}.{name}" in MODULES else below


def layer(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", [n for n in MODULES if n and layer(n) not in ("integrations", "testing")])
def test_imports_go_only_to_lower_layers(name):
    assert layer(name) in RANK, f"{name}: no layer of LAYERS"
    for used in ours(MODULES[name]):
        assert layer(used) in RANK, f"{name} imports rlhf_fast.{used}, which is in no layer"
        assert RANK[layer(used)] >= RANK[layer(name)], f"{name} imports rlhf_fast.{used}, a higher layer"


def test_nothing_uses_what_tests_and_benchmarks_share():
    users = {name for name, tree in MODULES.items() if any(layer(used) == "testing" for used in ours(tree))}
    assert {name for name in users if layer(name) != "testing"} == set()


def test_integrations_use_ops_only():
    allowed = ("ops", "backends", "errors", "integrations", "", *rlhf_fast.__all__)
    users = {name: tree for name, tree in MODULES.items() if layer(name) == "integrations"}
    assert {(n, used) for n, tree in users.items() for used in ours(tree) if layer(used) not in allowed} == set()


@pytest.mark.parametrize("name", [n for n in MODULES if layer(n) == "kernels"])
def test_kernels_import_nothing_of_ours_but_kernels(name):
    assert [used for used in ours(MODULES[name]) if layer(used) != "kernels"] == []


def family(name: str) -> str:
    """The family of a module below rlhf_fast, "" outside the ops."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ops" and len(parts) > 1 else ""


OPS = [name for name in MODULES if family(name)]


@pytest.mark.parametrize("name", OPS)
def test_an_op_uses_no_private_part_of_another(name):
    """Neither a private module of another family, nor a private name of another module."""
    modules = {}  # local name -> op module
    private = []
    for module, taken in imported(MODULES[name]):
        source = f"{module}.{taken}" if f"{module}.{taken}".removeprefix("rlhf_fast.") in MODULES else module
        below = source.removeprefix("rlhf_fast.")
        if not family(below):
            continue
        modules[(taken or module).split(".")[-1]] = source
        if family(below) != family(name) and below.split(".")[-1].startswith("_"):
            private.append(source)
        if source == module and taken is not None and taken.startswith("_"):
            private.append(f"{source}.{taken}")
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if node.value.id in modules and is_private:
                private.append(f"{modules[node.value.id]}.{node.attr}")
    assert private == []


def test_what_every_op_stands_on_knows_no_op():
    users = [name for name in OPS if family(name) == "core"]
    assert [(name, used) for name in users for used in ours(MODULES[name]) if family(used) not in ("", "core")] == []


def test_families_import_each_other_in_no_circle():
    arrows = {(family(name), family(used)) for name in OPS for used in ours(MODULES[name]) if family(used)}
    arrows = {(user, used) for user, used in arrows if user != used}
    while arrows:
        users = {user for user, _ in arrows}
        ground = {(user, used) for user, used in arrows if used not in users}
        assert ground, f"a circle among {sorted(users)}"
        arrows -= ground


def test_transformers_is_imported_where_models_are_and_nowhere_else():
    users = {n for n, tree in MODULES.items() if any(m.split(".")[0] == "transformers" for m, _ in imported(tree))}
    assert {n for n in users if layer(n) not in USES_TRANSFORMERS} == set()


def test_native_sources_know_neither_torch_nor_python():
    below = {
        "math": ("math", "native.h"),
        "cpu": ("cpu", "math", "native.h"),
        "cuda": ("cuda", "cpu", "math", "native.h"),
    }
    for folder, allowed in below.items():
        for path in sorted((ROOT / "csrc" / folder).iterdir()):
            text = path.read_text()
            for include in re.findall(r'#include "([^"]+)"', text):
                assert include.split("/")[0] in allowed, f"{path.relative_to(ROOT)} includes {include}"
            for include in re.findall(r"#include <([^>]+)>", text):
                assert not re.match(r"torch|ATen|c10|pybind11|Python", include), f"{path.name} includes {include}"


@pytest.mark.parametrize(
    ("folder", "other", "exceptions"),
    # Tests of the benchmarks, of the pages made from their results, of formulas beside what is counted; attacks, whose
    # counts are a page's.
    [("tests", "benchmarks", {"attack", "benchmarks", "docs", "distributed"}), ("benchmarks", "tests", set())],
)
def test_tests_and_benchmarks_do_not_import_each_other(folder, other, exceptions):
    users = set()
    for path in (ROOT / folder).rglob("*.py"):
        if any(module.split(".")[0] == other for module, _ in imported(ast.parse(path.read_text(), str(path)))):
            users.add(path.relative_to(ROOT / folder).parts[0])
    assert users == exceptions


def test_import_rlhf_fast_brings_torch_and_nothing_else():
    code = "import torch, sys; before = set(sys.modules); import rlhf_fast; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "triton", "pydantic", "peft", "typer", "rich", "datasets", "accelerate", "matplotlib"}
    assert heavy & {name.split(".")[0] for name in run.stdout.split()} == set()
    assert "rlhf_fast.testing" not in run.stdout.split()


def test_the_folder_kernels_never_hides_the_package_kernels(tmp_path):
    assert not list((ROOT / "kernels").glob("*.py")), "kernels/ holds a README and src/, no module"
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    # A folder without __init__.py is at most a namespace package, which any installed package comes before.
    answers = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder).stdout
        for folder in (ROOT, tmp_path)
    ]
    assert answers[0] == answers[1]
    spec = find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
