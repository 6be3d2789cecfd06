"""Policy losses."""

from __future__ import annotations

from benchmarks.op_cases.case import Case, logprobs, mask, plane

CASES = [
    Case(
        "policy_loss",
        lambda: {"logprobs": logprobs(), "old_logprobs": logprobs(), "advantages": plane(), "mask": mask()},
        {"dual_clip": 3.0},
        ("logprobs",),
    ),
]
