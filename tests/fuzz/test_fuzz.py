"""A sample of `make fuzz`, and that the harness sees what it looks for."""

import sys
import tempfile
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import harness
from tests.fuzz.inputs import KINDS


@pytest.fixture(scope="module")
def source():
    harness.warm_up()
    with harness.valid_things() as place:
        yield place


@given(kind=st.sampled_from(list(KINDS)), random=st.randoms(use_true_random=False))
@settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)  # fmt: skip
def test_whatever_the_command_is_given_it_says_one_thing_and_ends(source, kind, random):
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        outcome = harness.tried(kind, random, Path(name), source)
    assert outcome.finding is None, f"{outcome.arguments}: {outcome.finding}\n{outcome.stderr}"


def _fails():
    raise KeyError("x")


def _hangs():
    while True:
        time.sleep(0.01)


def _computes():
    while True:
        pass


def _grows():
    _grows.kept = bytearray(harness.GROWTH + (50 << 20))


def _takes_all():
    _takes_all.kept = [bytearray(1 << 26) for _ in range(40)]


def _chats():
    print("x\n" * 30, file=sys.stderr)
    raise SystemExit(2)


def _is_silent():
    raise SystemExit(2)


def _dies():
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("does", "finding"),
    [
        (_fails, "traceback: KeyError: 'x'"), (_hangs, "hang"), (_computes, "hang"), (_grows, "growth of "),
        (_takes_all, "traceback: MemoryError"), (_chats, "31 lines"), (_is_silent, "refused without a word"),
        (_dies, "status 3"), (lambda: None, None),
    ],
    ids=["raises", "sleeps", "computes", "grows", "takes all", "chats", "is silent", "dies", "is fine"],
)  # fmt: skip
def test_the_harness_sees_it(does, finding, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.__main__.main", does)
    monkeypatch.setattr(harness, "SECONDS", 1 if does in (_hangs, _computes) else 10)
    monkeypatch.setattr(harness, "GROWTH", 256 << 20)
    (tmp_path / "place").mkdir()
    outcome = harness.judged([], *harness.ran([], tmp_path / "place"))
    assert outcome.finding == finding or (finding and outcome.finding.startswith(finding))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_are_the_same_input(kind, source, tmp_path):
    made = []
    for name in ("one", "other"):
        place = tmp_path / name
        place.mkdir()
        words = KINDS[kind](Random(7), place, source)
        files = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        made.append((words, {name: content for name, content in files.items() if name.suffix != ".parquet"}))
    assert made[0] == made[1]
