"""A run in several processes is that of one on the same global batch, to rounding.

Here are some of the cases, of each kind of loop, of pass and of statistic one; `python -m tests.distributed` tries all,
in more kinds of launches.
"""

import pytest

from rlhf_fast.training.folder import SUMMARY_FILE
from tests.distributed.cases import values_of_case
from tests.distributed.runs import assert_same_run, run, run_killed

IN_TWO = [
    "sft of all weights", "an ensemble with its bound", "dpo with DoRA", "aot in parts, whose pairs are compared",
    "kto in parts", "hpo paid by an adapter", "ilql paid by a function", "label",
    "the policy scored in the first minibatch", "clip_cov in parts, whose tokens are compared", "dynamic sampling",
    "unfinished completions", "costs with a test", "ppo in parts", "ppo_ptx", "a hint", "spin",
    "policy_gradient_distillation", "sdpo",
]  # fmt: skip


# Of each kind of loop one, whose two processes are lost in the second step: one process goes on from there.
THEN_ONE = {
    "sft of all weights", "an ensemble with its bound", "dpo with DoRA", "kto in parts", "hpo paid by an adapter",
    "ilql paid by a function", "dynamic sampling", "ppo_ptx", "spin", "sdpo",
}  # fmt: skip


@pytest.mark.parametrize("case", IN_TWO)
def test_two_processes_make_the_run_of_one(case, two, tmp_path):
    values = values_of_case(case)
    run({**values, "output_dir": str(tmp_path / "one")})
    there = {**values, "output_dir": str(tmp_path / "two")}
    if case in THEN_ONE:
        two.run(run_killed, {**there, "save_every": 1})
        assert not (tmp_path / "two" / SUMMARY_FILE).exists()
        run({**there, "save_every": 1}, "auto")
    else:
        two.run(run, there)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_of_four_processes_some_have_no_rows(four, tmp_path):
    """Three prompts, of which each has two completions; two held-out ones."""
    values = {**values_of_case("an exact KL in the loss"), "batch_size": 6, "num_minibatches": 3}
    run({**values, "output_dir": str(tmp_path / "one")})
    four.run(run, {**values, "output_dir": str(tmp_path / "four")})
    assert_same_run(tmp_path / "four", tmp_path / "one")
