"""What a process that fails, or is lost, leaves: one line, in seconds, and a run that goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from rlhf_fast.errors import UserError
from rlhf_fast.training import ranks
from tests.distributed.cases import STEADY
from tests.distributed.runs import assert_same_run, run
from tests.training.tiny_runs import values_of

# A launch in which process 1 is killed between the backward pass of its third step and the sum of the gradients.
KILLED = """
import os, signal, sys
from rlhf_fast.__main__ import main
from rlhf_fast.training import ranks

summed, calls = ranks.sum_gradients, []

def killed(parameters):
    calls.append(0)
    if len(calls) == 3 and ranks.rank() == 1 and not ranks.started_again():
        os.kill(os.getpid(), signal.SIGKILL)
    summed(parameters)

ranks.sum_gradients = killed
sys.argv = ["rlhf_fast", "train", sys.argv[1]]
main()
"""


def failing(values, error, told_by=None):
    """Process 1 raises in its second step, process 0 tells. told_by: a signal that comes when it begins to."""
    summed, calls = ranks.sum_gradients, []

    def raises(parameters):
        calls.append(0)
        if len(calls) == 2 and ranks.rank() == 1:
            raise error
        summed(parameters)

    ranks.sum_gradients = raises
    tell = ranks._Group.tell

    def interrupted(group):
        if told_by is not None:
            signal.raise_signal(told_by)
        tell(group)

    ranks._Group.tell = interrupted
    start = time.monotonic()
    try:
        run(values)
    except (UserError, SystemExit) as ended:
        return type(ended).__name__, str(ended), time.monotonic() - start
    finally:
        ranks.sum_gradients, ranks._Group.tell = summed, tell
    return None


@pytest.mark.parametrize(
    ("error", "told_by"), [(UserError("the reward is NaN"), None), (ValueError("a bug"), signal.SIGTERM)], ids=str
)
def test_what_one_process_fails_with_ends_all_and_is_said_once(error, told_by, two, tmp_path):
    """Also where torchrun's SIGTERM comes while it is said."""
    values = values_of("sft", **STEADY, save_every=10, output_dir=str(tmp_path / "run"))
    (first, message, seconds), (second, code, _) = two.run(failing, values, error, told_by)
    assert (first, second, code) == ("UserError", "SystemExit", "2")
    assert message == f"process 1: {error}; the checkpoint of step 1 is saved: --resume auto continues"
    assert seconds < 60
    run(values, resume="auto")
    run({**values, "output_dir": str(tmp_path / "one")})
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_what_all_fail_with_is_said_once(two, tmp_path):
    values = values_of("sft", output_dir=str(tmp_path / "run"), data=str(tmp_path / "absent.jsonl"))
    (first, message, _), (second, _, _) = two.run(failing, values, None)
    assert (first, second) == ("UserError", "SystemExit")
    assert "absent.jsonl" in message
    assert "process" not in message


def test_a_run_goes_on_in_another_number_of_processes(two, four, tmp_path):
    values = values_of("ppo", **STEADY, lora_dropout=0.0)
    run({**values, "output_dir": str(tmp_path / "one")})
    changing = {**values, "output_dir": str(tmp_path / "changing"), "keep_checkpoints": 9}
    two.run(run, {**changing, "steps": 1})
    run({**changing, "steps": 2}, "auto")
    four.run(run, changing, "auto")
    assert_same_run(tmp_path / "changing", tmp_path / "one")


def test_a_killed_process_ends_the_job_which_accelerate_then_starts_again(tmp_path):
    """It hands the job to torchrun. One line and a checkpoint; then the run goes on to its end by itself."""
    (tmp_path / "job.py").write_text(KILLED)
    values = values_of("sft", **STEADY, save_every=1, output_dir=str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1",
               "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", "--max_restarts=1",
               "--rdzv_backend=c10d",
               str(tmp_path / "job.py"), str(tmp_path / "run.yaml")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    lost = [line for line in ended.stderr.splitlines() if "a process of the run was lost" in line]
    assert len(lost) == 1
    assert "the checkpoint of step 2 is saved: --resume auto continues" in lost[0]
    run({**values, "output_dir": str(tmp_path / "one")})
    assert_same_run(tmp_path / "run", tmp_path / "one")
