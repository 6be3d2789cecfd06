"""Every Triton kernel compiles ahead of time for every GPU of the list, on a machine without one.

What the record of the installed Triton holds with the fingerprint of today's sources is not compiled again.
RLHF_FAST_AOT_TRITON names a folder with another Triton to compile with (`make aot` fetches the oldest and the newest).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.occupancy import blocks_per_sm

ROOT = Path(__file__).parents[2]
RECORDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("aot_*.json")}
COMMAND = "make aot"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

# What ptxas keeps in local memory so that another block fits a multiprocessor: accesses, by version of Triton.
SPILLED = {
    "3.6": {
        ("sample_tokens._sample_kernel", "sample_tokens-top_k-bf16", "sm_90"): 2,
        ("sample_tokens._sample_kernel", "sample_tokens-top_k, top_p, min_p-bf16", "sm_90"): 2,
        ("token_kl._backward_kernel", "token_kl-forward-transformed-bf16", "sm_90"): 11,
        ("token_kl._backward_kernel", "token_kl-js-transformed-bf16", "sm_90"): 3,
        ("token_kl._backward_kernel", "token_kl-reverse-transformed-bf16", "sm_90"): 7,
        ("token_kl._forward_kernel", "token_kl-js-bf16", "sm_90"): 3,
        ("token_kl._forward_kernel", "token_kl-js-transformed-bf16", "sm_90"): 6,
        ("token_kl._forward_kernel", "token_kl-reverse-f64", "sm_90"): 3,
    },
    "3.9": {
        ("losses._elements_kernel", "unpaired_preference_loss-bco-bf16", "sm_90"): 2,
        ("sample_tokens._sample_kernel", "production: sample_tokens, top_p 0.95", "sm_90"): 20,  # 12 % faster so
    },
}

# (kernel, call of benchmarks/production.py): the most registers per thread, which are handed out in eights, and the
# fewest blocks per multiprocessor of sm_90.
BARS = {
    ("distributional_value_loss._distributional_value_loss_kernel", "distributional_value_loss"): (80, 6),
    ("gae._gae_kernel", "discounted_returns"): (80, 6),
    ("gae._gae_kernel", "gae + whiten"): (88, 5),
    ("gae._gae_kernel", "gae, no mask"): (80, 6),
    ("gae._gae_kernel", "gae, ragged mask"): (88, 5),
    ("group_advantages._group_advantages_kernel", "group_advantages, grpo"): (32, 32),
    ("kl_estimate._kernel", "kl_estimate, k3"): (48, 10),
    ("linear_value_loss._linear_value_loss_kernel", "linear_value_loss"): (176, 1),
    ("linear_value_loss._sum_parts_kernel", "distributional_value_loss"): (24, 16),
    ("linear_value_loss._sum_parts_kernel", "linear_value_loss"): (72, 7),
    ("lora_linear._expand_kernel", "lora_linear"): (56, 4),
    ("lora_linear._gradient_kernel", "lora_linear"): (56, 9),
    ("lora_linear._shrink_kernel", "lora_linear"): (64, 8),
    ("losses._elements_kernel", "policy_loss + value_loss"): (96, 5),
    ("losses._elements_kernel", "preference_loss, sigmoid"): (72, 7),
    ("losses._elements_kernel", "reward_loss"): (80, 6),
    ("losses._elements_kernel", "step_reward_loss"): (160, 3),
    ("losses._elements_kernel", "unpaired_preference_loss, kto"): (168, 3),
    ("losses._elements_kernel", "value_loss"): (96, 5),
    ("losses._means_kernel", "policy_loss + value_loss"): (40, 6),
    ("losses._means_kernel", "preference_loss, sigmoid"): (40, 6),
    ("losses._means_kernel", "reward_loss"): (40, 6),
    ("losses._means_kernel", "step_reward_loss"): (40, 6),
    ("losses._means_kernel", "unpaired_preference_loss, kto"): (40, 6),
    ("losses._means_kernel", "value_loss"): (40, 6),
    ("policy_loss._metrics_kernel", "policy_loss"): (64, 4),
    ("policy_loss._metrics_kernel", "policy_loss + value_loss"): (64, 4),
    ("policy_loss._tokens_kernel", "policy_loss"): (112, 4),
    ("policy_loss._tokens_kernel", "policy_loss + value_loss"): (112, 4),
    ("ranking_loss._pull_kernel", "ranking_loss"): (40, 12),
    ("ranking_loss._ranking_kernel", "ranking_loss"): (40, 12),
    ("sample_tokens._sample_kernel", "sample_tokens, top_p 0.95"): (120, 1),
    ("shaped_rewards._shaped_rewards_kernel", "shaped_rewards"): (48, 10),
    ("token_kl._backward_kernel", "token_kl"): (56, 9),
    ("token_kl._backward_kernel", "token_kl of a head"): (64, 8),
    ("token_kl._forward_kernel", "token_kl"): (72, 7),
    ("token_kl._forward_kernel", "token_kl of a head"): (72, 7),
    ("token_logprobs._backward_kernel", "token_logprobs, backward in place"): (32, 8),
    ("token_logprobs._forward_kernel", "token_kl"): (72, 7),
    ("token_logprobs._forward_kernel", "token_kl of a head"): (72, 7),
    ("token_logprobs._forward_kernel", "token_logprobs"): (72, 7),
    ("token_logprobs._forward_kernel", "token_logprobs of a head, gradient in forward"): (72, 7),
    ("token_logprobs._forward_kernel", "token_logprobs, backward in place"): (72, 7),
    ("token_logprobs._forward_kernel", "token_logprobs, entropy"): (96, 5),
    ("vtrace._vtrace_kernel", "vtrace"): (112, 4),
    ("whiten._moments_kernel", "gae + whiten"): (64, 4),
    ("whiten._moments_kernel", "whiten"): (64, 4),
    ("whiten._whiten_kernel", "gae + whiten"): (64, 4),
    ("whiten._whiten_kernel", "whiten"): (64, 4),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["MALLOC_PERTURB_"] = "255"  # fresh memory is 0: what is compiled must not depend on it
    if "RLHF_FAST_AOT_TRITON" in environment:
        environment["PYTHONPATH"] = environment["RLHF_FAST_AOT_TRITON"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text())


@pytest.fixture(params=["compiled here", *RECORDS])
def compiled(request):
    """What is compiled of today's sources, and each of the committed records."""
    return RECORDS[request.param] if request.param in RECORDS else request.getfixturevalue("report")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(compiled, target):
    found = {row["kernel"] for row in compiled["rows"] if row["target"] == target}
    missing = sorted(set(compiled["kernels"]) - found)
    assert missing == [], f"no case of rlhf_fast/testing/cases launches {missing}"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
def test_every_kernel_is_compiled_in_every_type(compiled, dtype):
    found = {row["kernel"] for row in compiled["rows"] if row["case"].endswith(f"-{dtype}")}
    assert sorted(set(compiled["kernels"]) - found) == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_registers(compiled, target):
    known = SPILLED.get(compiled["triton"].rsplit(".", 1)[0], {})
    rows = [row for row in compiled["rows"] if row["target"] == target and row["spills"]]
    assert [r for r in rows if r["spills"] > known.get((r["kernel"], r["case"], r["target"]), 0)] == []


def test_at_the_shapes_of_training_registers_and_blocks_per_multiprocessor_keep_their_bars(compiled):
    rows = {
        (row["kernel"], row["case"].removeprefix("production: ")): row
        for row in compiled["rows"]
        if row["case"].startswith("production: ")
    }
    assert set(rows) == set(BARS)
    missed = {
        what: (rows[what]["registers"], rows[what]["blocks"])
        for what, (registers, blocks) in BARS.items()
        if rows[what]["registers"] > registers or rows[what]["blocks"] < blocks
    }
    assert missed == {}


def test_the_records_are_those_of_the_oldest_triton_that_was_tried_and_of_a_newer_one():
    assert {record["triton"].rsplit(".", 1)[0] for record in RECORDS.values()} == {"3.6", "3.9"}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_holds_every_kernel_case_and_target_as_they_are_in_the_sources(report, name):
    def fingerprints(of):
        return {(row["kernel"], row["case"], row["target"]): row["fingerprint"] for row in of["rows"]}

    assert fingerprints(RECORDS[name]) == fingerprints(report), f"regenerate the records: {COMMAND}"


# What NVIDIA's occupancy calculator gives for compute capability 9.0, whose multiprocessor has 2048 threads.
@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (32, 8, 0, 8),  # all 64 warps
        (33, 8, 0, 6),  # 40 registers are handed out
        (64, 8, 0, 4),
        (80, 8, 0, 3),
        (81, 8, 0, 2),
        (128, 8, 0, 2),
        (255, 8, 0, 1),
        (16, 1, 0, 32),  # no more blocks, whatever they take
        (65, 1, 0, 28),  # 7 warps of 2304 registers at each of four schedulers
        (32, 4, 64 << 10, 3),  # shared memory: 65 KiB each
        (32, 4, 227 << 10, 1),
    ],
)
def test_blocks_per_multiprocessor_are_those_of_the_occupancy_calculator(registers, warps, shared, blocks):
    assert blocks_per_sm(registers, warps, shared) == blocks
