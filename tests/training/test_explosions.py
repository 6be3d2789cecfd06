"""Runs that blow up end with the checkpoint from before; runs whose metrics jump once, or start near 0, go on."""

import math

import pytest
from rich.console import Console

from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.errors import UserError
from rlhf_fast.training.checkpoint import list_checkpoints
from rlhf_fast.training.explosions import Explosions
from rlhf_fast.training.run import Run
from tests.training.tiny_runs import config_of, values_of


def seen(steps, algorithm="grpo", **changes):
    return Explosions(config_of(algorithm, **changes), steps).seen


def kl(per_token):
    return {"kl": 30.0 * per_token, "completion_length": 30.0}


CALM = [{"loss": 3.0, "grad_norm_policy": 40.0}] * 5
HEALTHY = {
    "a start at nothing": [{"loss": 0.0, "grad_norm_policy": 0.0}] * 9 + [{"loss": 19.0, "grad_norm_policy": 99.0}] * 9,
    "one bad batch in five": [*CALM, {"loss": 900.0, "grad_norm_policy": 1e6}, *CALM[:4]] * 3,
    "large from the start": [{"loss": 5e5, "grad_norm_policy": 9e4}] * 20,
    "too early to say": [{"loss": 3.0}] * 4 + [{"loss": 900.0}] * 5,
    "far from the reference": [kl(11.0)] * 20,
    "a single batch that is gibberish": [*[kl(0.1)] * 9, kl(50.0), *[kl(0.1)] * 4],
    "an update that was skipped": [*CALM, {"loss": math.nan, "grad_norm_policy": math.inf}, *CALM],
    "growth that a policy's loss did not have": [{"policy_loss": 0.1, "loss": 1.0}] * 9 + [
        {"policy_loss": 0.1, "loss": 400.0}] * 9,
}  # fmt: skip
EXPLODED = {
    "loss is 31, and was above 10 times its largest before, 3, for 5 steps (max_loss_growth)":
        [{"loss": 3.0}] * 5 + [{"loss": 31.0}] * 5,
    "loss is 31, and was above 10 times its largest before, 2, for 5 steps (max_loss_growth)":
        [{"loss": -2.0}] * 5 + [{"loss": -900.0}, {"loss": math.nan}, *[{"loss": -31.0}] * 3],
    "grad_norm_critic is 4001, and was above 100 times its largest before, 40, for 5 steps (max_norm_growth)":
        [{"grad_norm_critic": 40.0}] * 6 + [{"grad_norm_critic": 4001.0}] * 5,
    "kl is 21 nats per token, and was above 20 for 5 steps (max_kl)": [kl(21.0)] * 5,
    "kl is inf nats per token, and was above 20 for 5 steps (max_kl)": [kl(math.nan)] * 5,
}  # fmt: skip


@pytest.mark.parametrize("steps", HEALTHY.values(), ids=HEALTHY)
def test_healthy_runs_go_on(steps):
    for end in range(len(steps) + 1):
        assert seen(steps[:end]) is None


@pytest.mark.parametrize("said", EXPLODED)
def test_what_exploded_is_seen_in_the_last_of_the_steps_and_not_before(said):
    steps = EXPLODED[said]
    assert seen(steps) == said
    assert seen(steps[:-1]) is None
    assert seen([*steps, {"loss": 0.5, "grad_norm_critic": 1.0, **kl(0.1)}]) is None
    assert seen(steps, max_kl=None, max_loss_growth=None, max_norm_growth=None) is None


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_run_that_explodes_ends_with_the_checkpoint_from_before_it(algorithm, tmp_path, monkeypatch):
    log = Run.log

    def logged(self, step, metrics, **rest):
        log(self, step, {**metrics, "loss": 1e3 if step >= 4 else 1.0}, **rest)

    monkeypatch.setattr(Run, "log", logged)
    values = values_of(
        algorithm, steps=9, save_every=1, keep_checkpoints=1, explosion_steps=3, output_dir=str(tmp_path / "run")
    )
    good = tmp_path / "run" / "checkpoints" / "step-4"
    with pytest.raises(UserError, match=r"loss is 1000, .*max_loss_growth.*; the last good checkpoint is") as error:
        run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    assert str(error.value).endswith(f"the last good checkpoint is {good}")
    assert [path.name for path in list_checkpoints(good.parent)] == ["step-6", "step-4"]
