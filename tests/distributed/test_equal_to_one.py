"""A run in several processes is that of one on the same global batch, to rounding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.algorithms.launch import launch
from rlhf_fast.data.reading import read_jsonl
from tests.training.tiny_runs import values_of

CLOCK = {"seconds", "tokens_per_second"}
# Adam divides a gradient by its own size: where that is rounding alone, adam_eps has to be above it.
STEADY = {"adam_eps": 1e-3, "learning_rate": 0.01}


def run(values, resume=None):
    launch(None, values, dry_run=False, resume=resume, overwrite=False)


def lines(folder: Path, name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_jsonl(folder / name)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        found, expected = lines(ours, name), lines(theirs, name)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            numbers = one.get("metrics", one), other.get("metrics", other)
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)
    assert lines(ours, "samples.jsonl") == pytest.approx(lines(theirs, "samples.jsonl"))
    weights = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert weights == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    for path in weights:
        found, expected = load_file(ours / path), load_file(theirs / path)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


CASES = {
    "sft": ("sft", {}),
    "sft in parts": ("sft", {"micro_batch_size": 1, "batch_size": 5}),
    "sft of all weights": ("sft", {"lora_rank": 0, "learning_rate": 0.001}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_run_of_one(case, two, tmp_path):
    algorithm, changes = CASES[case]
    values = values_of(algorithm, **STEADY | changes)
    run({**values, "output_dir": str(tmp_path / "one")})
    two.run(run, {**values, "output_dir": str(tmp_path / "two")})
    assert_same_run(tmp_path / "two", tmp_path / "one")
