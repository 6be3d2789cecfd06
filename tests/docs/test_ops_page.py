"""docs/ops.md is run and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast.ops import _policy, _preference, table
from rlhf_fast.ops.group_advantages import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_examples_run_from_top_to_bottom():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/ops.md", "exec"), names)


@pytest.mark.parametrize("name", sorted(set(rlhf_fast.__all__) | set(table())))
def test_every_public_name_is_on_the_page(name):
    assert re.search(rf"`{name}`|rf\.{name}\b", PAGE)


@pytest.mark.parametrize("variant", [*_policy.VARIANTS, *_preference.VARIANTS, *KINDS])
def test_every_variant_is_on_the_page(variant):
    assert f"`{variant}`" in PAGE
