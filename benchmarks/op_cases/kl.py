"""KL."""

from __future__ import annotations

from benchmarks.op_cases.case import Case, logprobs

CASES = [
    *(
        Case(
            "kl_estimate", lambda: {"logprobs": logprobs(), "ref_logprobs": logprobs()}, {"estimator": k}, ("logprobs",)
        )
        for k in ("k1", "k2", "k3")
    ),
]
