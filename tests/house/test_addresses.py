"""No address of a tensor goes anywhere without what says where its elements are: backends alone takes one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from rlhf_fast.backends import packed, plane, strided

PACKAGE = Path(__file__).parents[2] / "rlhf_fast"
# What compares addresses and hands none on: whether prepared calls still stand, whether two names share a storage.
COMPARES = {"models/lora.py"}


def addresses_taken(source: str) -> list[tuple[str, int]]:
    """(innermost function, line) of every address that is taken from a tensor or a storage."""
    places: list[tuple[str, int]] = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Attribute) and node.attr in ("data_ptr", "_data_ptr", "const_data_ptr"):
            places.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "")
    return places


def test_only_one_function_takes_the_address_of_a_tensor():
    functions = {
        (path.relative_to(PACKAGE).as_posix(), function)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in COMPARES
        for function, _ in addresses_taken(path.read_text())
    }
    assert functions == {("backends.py", "_address")}


def test_the_walk_finds_an_address_wherever_it_is_taken():
    assert addresses_taken("def f(x):\n    g = lambda: x.data_ptr()\n    return x.data_ptr") == [("f", 2), ("f", 3)]


X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("x", [X.t(), X[:, ::2], X[:1].expand(3, 4), X[:, 1:]], ids=lambda x: str(x.stride()))
def test_an_address_alone_is_that_of_a_contiguous_tensor(x):
    with pytest.raises(ValueError, match="contiguous tensor here, got a tensor"):
        packed(x)


def test_rows_have_the_last_stride_1():
    assert strided(X[:, 1:]) == (X.data_ptr() + 4, 0, (3, 4))
    with pytest.raises(ValueError, match="last stride 1 here, got a tensor"):
        strided(X.t())


@pytest.mark.parametrize("hand_over", [packed, plane, strided])
def test_a_negated_view_has_no_address(hand_over):
    with pytest.raises(ValueError, match="a negated view"):
        hand_over(torch._neg_view(X))
