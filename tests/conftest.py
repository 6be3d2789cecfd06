"""Triton kernels run in the interpreter where there is no GPU; this must be set before triton is imported."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Started by nohup, tests would find SIGHUP ignored, which the program then leaves so.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The files that take longest, in the order in which they start: one that came last would leave the other worker idle.
LONGEST = (
    "ops/test_contract.py", "docs/test_code_blocks.py", "house/test_packaging.py", "ops/test_nan.py",
    "training/test_resume.py", "ops/policy/test_policy_loss.py", "ops/tokens/test_token_kl.py",
    "ops/tokens/test_token_logprobs.py", "ops/tokens/test_sample_tokens.py", "ops/head/test_linear_preference_loss.py",
    "ops/head/test_linear_policy_loss.py", "benchmarks/test_aot.py", "benchmarks/test_ptxas.py",
    "benchmarks/test_command.py", "ops/head/test_linear_kl.py", "ops/test_extremes.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files come first; tests marked `gpu` are skipped where PyTorch finds no GPU."""
    rank = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
