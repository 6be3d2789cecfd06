"""docs/drop_in.md names what patch() replaces, and shows the committed results of the peers' own tests."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from rlhf_fast.integrations import peers

SUITES = Path(__file__).parents[1] / "suites"
sys.path.insert(0, str(SUITES))
import page  # noqa: E402

TEXT = page.PAGE.read_text()
TABLE = yaml.safe_load((SUITES / "suites.yaml").read_text())
NEEDED = {"trl": "trl", "verl": "verl"}  # whose replacements() look at the peer


@pytest.mark.parametrize("peer", [p.name for p in peers()])
def test_the_page_names_what_is_replaced(peer):
    if peer in NEEDED and find_spec(NEEDED[peer]) is None:
        pytest.skip(f"needs {peer} (make peers)")
    said, replaced = page.part(TEXT, f"names of {peer}"), page.names(peer)
    if peer == "openrlhf" and find_spec("vllm") is None:
        assert said == replaced
    assert set(re.findall(r"`([^`]+)`", replaced)) <= set(re.findall(r"`([^`]+)`", said))


def test_the_page_shows_the_committed_results_of_every_suite():
    assert page.part(TEXT, "suites") == page.suites()
    shown = re.findall(r"^\| (\w+) ", page.suites(), re.MULTILINE)
    assert sorted(shown) == sorted(["peer", *TABLE])


@pytest.mark.parametrize("peer", TABLE)
def test_every_suite_is_of_a_peer_and_every_excluded_test_has_a_reason(peer):
    assert import_module(f"rlhf_fast.integrations.{peer}").PEER
    suite = TABLE[peer]
    assert (
        {"copy", "tests"} <= suite.keys() <= {"copy", "tests", "edits", "options", "runs_without_us", "not_applicable"}
    )
    assert all(row["reason"] and row["tests"] for row in suite.get("not_applicable", []))
