"""A run, and how far one is from another."""

import contextlib
import io
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from rlhf_fast.algorithms.launch import launch
from rlhf_fast.data.reading import read_jsonl
from tests.training.interruptions import Killed, interrupt, kill

BAR = 1e-4  # of each difference: what float32 leaves of sums in another order, after a few steps of Adam
# What has no equal: clocks, and ranks, which rounding decides between answers of one score.
UNEQUAL = {"seconds", "tokens_per_second", "spearman_length"}


def run(values: dict[str, Any], resume: str | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        launch(None, values, dry_run=False, resume=resume, overwrite=False)


def run_killed(values: dict[str, Any]) -> None:
    """A run that is lost at the end of its second step, before what is saved there."""
    with pytest.MonkeyPatch.context() as patch, suppress(Killed, Exception, SystemExit):
        interrupt(patch, 1, kill)
        run(values)


class Difference(NamedTuple):
    """The largest |a - b| / (|b| + 0.1) of the numbers that two runs tell, and of the weights that they leave."""

    told: float
    weights: float


def assert_same_run(ours: Path, theirs: Path) -> None:
    found = difference(ours, theirs)
    assert max(found) <= BAR, found


def difference(ours: Path, theirs: Path) -> Difference:
    """AssertionError where texts, data or the names of things differ."""
    told, left = [0.0], [0.0]
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        found, expected = _lines(ours, name), _lines(theirs, name)
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            told.append(_apart(name, one, other))
    for path in (path for path in (theirs / "data").rglob("*") if path.is_file()):
        assert path.read_bytes() == (ours / path.relative_to(theirs)).read_bytes(), path
    weights = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert weights == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    for path in weights:
        found, expected = load_file(ours / path), load_file(theirs / path)
        assert found.keys() == expected.keys(), path
        left += [float(((found[name] - b).abs() / (b.abs() + 0.1)).max()) for name, b in expected.items()]
    return Difference(max(told), max(left))


def _lines(place: Path, name: str) -> list[dict[str, Any]]:
    lines = read_jsonl(place / name) if (place / name).exists() else []
    return [_comparable({**row.pop("metrics", {}), **row}, after=name == "eval.jsonl") for row in lines]


def _comparable(row: dict[str, Any], *, after: bool) -> dict[str, Any]:
    """after: the row tells of the policy after its step, not of the one before it."""
    # Rounding alone decides the sign of margins that are 0, those of a policy that is still its reference: in the first
    # of a step's updates, whatever the margin is in the others.
    still = row["step"] == (0 if after else 1)
    even = {"accuracy"} if still or abs(row.get("margin", 1.0)) < 1e-6 else set()
    return {key: value for key, value in row.items() if key not in UNEQUAL | even}


def _apart(what: str, a: Any, b: Any) -> float:
    if isinstance(a, float | int) and isinstance(b, float | int):
        return abs(a - b) / (abs(b) + 0.1) if a != b else 0.0
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((_apart(what, *pair) for pair in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, dict) and isinstance(b, dict):
        return max((_apart(f"{what} {key}", a.get(key), b.get(key)) for key in a.keys() | b.keys()), default=0.0)
    assert a == b, f"{what}: {a!r} and {b!r}"
    return 0.0
