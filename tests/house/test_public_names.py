"""Every public op is exported, and its module's docstring holds the formula, its derivative, cost and sources."""

from __future__ import annotations

import inspect
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[2]
OPS = sorted(table())


def module_of(op: str):
    return import_module(getattr(rlhf_fast, op).__module__)


def test_every_op_is_exported():
    assert set(OPS) - set(rlhf_fast.__all__) == set()


def test_all_is_sorted_and_names_what_exists():
    assert list(rlhf_fast.__all__) == sorted(rlhf_fast.__all__)
    assert [name for name in rlhf_fast.__all__ if not hasattr(rlhf_fast, name)] == []


@pytest.mark.parametrize("op", OPS)
def test_the_docstring_of_the_module_has_formula_derivative_cost_and_sources(op):
    doc = inspect.getdoc(module_of(op)) or ""
    missing = [
        what
        for what, pattern in {
            "a first line that names what it is": r"\A\w.*: .+",
            "an indented formula": r"\n    .*=",
            "a derivative": r"\bd \w+|derivative|gradient",
            "the cost": r"(?i)\bcost\b",
            "sources": r"(?i)\bsources?:",
        }.items()
        if not re.search(pattern, doc)
    ]
    assert missing == []


@pytest.mark.parametrize("op", OPS)
def test_a_module_reads_public_function_then_reference_then_backends(op):
    source = inspect.getsource(module_of(op))
    marks = {f"def {op}": rf"^def {op}\(", "a reference": r"^def \w*reference\w*\(", "OPS": r"^OPS\b"}
    matches = {what: re.search(pattern, source, re.MULTILINE) for what, pattern in marks.items()}
    assert [what for what, match in matches.items() if match is None] == []
    places = [match.start() for match in matches.values() if match]
    assert places == sorted(places)


@pytest.mark.parametrize("op", OPS)
def test_hyperparameters_are_keyword_only_and_the_backend_comes_last(op):
    parameters = list(inspect.signature(getattr(rlhf_fast, op)).parameters.values())
    assert parameters[-1].name == "backend"
    defaults = [p.name for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    # optional tensors that belong to the op's data: a mask, and the reference that some losses do without
    assert defaults == {"whiten": ["mask"], "preference_loss": ["ref_chosen", "ref_rejected"]}.get(op, [])
    assert [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] == []


def test_no_file_names_a_path_of_somebody_s_machine():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(rb"(?<![\w.])/(?:work|home|Users|root)\b|/tmp/brief|\.\./shared")
    named = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        named += [f"{name}: {hit.group().decode()}" for hit in private.finditer(path.read_bytes())]
    assert named == []
