"""A run that ends inside of a step, by a kill or a signal, goes on from there: it leaves what one leaves that nothing
disturbs, and what was finished is not done again."""

import signal
from itertools import cycle

import pytest

from rlhf_fast import signals
from rlhf_fast.signals import Stopped
from rlhf_fast.training import kept
from rlhf_fast.training.folder import KEPT
from rlhf_fast.training.run import Run
from tests.algorithms.test_presets import values_of_row
from tests.training.interruptions import PHASES, Killed, contents, interrupt, kill, run, terminate, watched
from tests.training.tiny_runs import folder, values_of

ONE_UPDATE = {
    "reward": f"{folder()}/reward.py:letters", "micro_batch_size": 1, "ppo_epochs": 1, "num_minibatches": 1,
}  # fmt: skip
VALUES = {
    "ppo": values_of("ppo", steps=2, save_every=1, micro_batch_size=1, rollout_chunk=2, eval_every=1),
    "sft": values_of("sft", steps=2, save_every=1, micro_batch_size=2, eval_every=1),
    "dpo": values_of("dpo", steps=2, save_every=1, micro_batch_size=2, eval_every=1),
    "full": values_of("sft", steps=2, save_every=1, micro_batch_size=1, lora_rank=0, learning_rate=0.001),
    "ptx": values_of_row("ppo_ptx", ptx_batch_size=8, **ONE_UPDATE),
    "divergence": values_of_row("on_policy_distillation", **ONE_UPDATE),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each algorithm what a run leaves that is left alone, and how often everything was done in it."""
    found = {}
    for algorithm, values in VALUES.items():
        folder = tmp_path_factory.mktemp(algorithm)
        with pytest.MonkeyPatch.context() as patch:
            calls = watched(patch)
            run({**values, "output_dir": str(folder)})
        found[algorithm] = contents(folder), dict(calls)
    return found


CASES = [
    ("ppo", "tokens", kill), ("ppo", "tokens", terminate), ("ppo", "scores", terminate), ("ppo", "rewards", kill),
    ("ppo", "micro_batches", terminate), ("ppo", "updates", kill), ("ppo", "savings", terminate),
    ("sft", "micro_batches", terminate), ("sft", "batches", kill), ("sft", "evaluations", kill),
    ("dpo", "references", terminate), ("dpo", "micro_batches", kill), ("dpo", "evaluations", terminate),
    ("dpo", "savings", kill), ("full", "micro_batches", terminate),
    ("ptx", "micro_batches", terminate), ("divergence", "micro_batches", kill),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "phase", "by"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_run_that_ends_anywhere_goes_on_from_there(algorithm, phase, by, whole, tmp_path, monkeypatch):
    expected, counts = whole[algorithm]
    values = {**VALUES[algorithm], "output_dir": str(tmp_path)}
    calls = watched(monkeypatch)
    # In the second half: behind the first step, and of what is done once, there.
    calls.at(phase, counts[phase] // 2 + 1, by)
    with pytest.raises(Killed if by is kill else Stopped):
        run(values)
    first = dict(calls)
    calls.at("", 0, None)
    run(values, resume="auto")
    assert contents(tmp_path) == expected
    assert not (tmp_path / KEPT).exists()
    for name, (_, often) in PHASES.items():
        if name not in ("evaluations", "savings"):
            twice = first.get(name, 0) + calls[name] - counts.get(name, 0)
            assert 0 <= twice <= often, f"{name}: {twice} of {counts[name]} were done twice"


def test_the_rollouts_of_all_steps_since_the_last_checkpoint_are_kept(whole, tmp_path, monkeypatch):
    values = {**VALUES["ppo"], "save_every": 50, "output_dir": str(tmp_path)}
    calls = watched(monkeypatch)
    calls.at("updates", 7, kill)
    with pytest.raises(Killed):
        run(values)
    calls.at("", 0, None)
    run(values, resume="auto")
    assert contents(tmp_path) == whole["ppo"][0]
    assert not calls.keys() & {"tokens", "scores", "rewards"}


def test_what_is_damaged_or_of_something_else_is_made_again(whole, tmp_path, monkeypatch):
    values = {**VALUES["ppo"], "output_dir": str(tmp_path)}
    calls = watched(monkeypatch)
    calls.at("updates", 7, kill)
    with pytest.raises(Killed):
        run(values)
    damages = [
        lambda path, data: path.write_bytes(data[:-9]),
        lambda path, data: path.write_bytes(data[:-9] + bytes(9)),
        lambda path, data: kept.write(path, "another state", {"value": {}, "random": {}}),
    ]
    paths = sorted((tmp_path / KEPT).rglob("*.pt"))
    assert len(paths) > 5
    for path, damage in zip(paths, cycle(damages), strict=False):
        damage(path, path.read_bytes())
    calls.at("", 0, None)
    run(values, resume="auto")
    assert contents(tmp_path) == whole["ppo"][0]
    assert calls["tokens"] == whole["ppo"][1]["tokens"] // 2


def test_a_signal_says_in_one_line_where_it_ended_the_run_and_what_is_saved(tmp_path, monkeypatch):
    values = {**VALUES["ppo"], "output_dir": str(tmp_path / "run")}
    calls = watched(monkeypatch)
    calls.at("tokens", 7, lambda: signal.raise_signal(signal.SIGHUP))
    saved = "saved: the checkpoint of step 1 and what was made in it; the same command with --resume auto continues"
    with pytest.raises(Stopped, match=f"^stopped in step 2 of 2 by SIGHUP; {saved}$") as info:
        run(values)
    assert info.value.exit_code == 128 + signal.SIGHUP
    assert calls["tokens"] == 7, "not one token more"


def test_gradients_as_large_as_the_model_are_kept_where_they_took_longer_than_that(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    for name, speed, saved in [("slow", 1.0, ""), ("fast", 1e12, " and what was made in it")]:
        monkeypatch.setattr(kept, "SPEED", speed)
        calls.at("micro_batches", 7, terminate)
        with pytest.raises(Stopped, match=f"saved: the checkpoint of step 1{saved}; the same"):
            run({**VALUES["full"], "output_dir": str(tmp_path / name)})


def test_sigusr1_saves_a_checkpoint_and_the_run_goes_on(whole, tmp_path, monkeypatch, capsys):
    values = {**VALUES["sft"], "save_every": 50, "output_dir": str(tmp_path)}
    saved, save = [], Run._save

    def noted(self):
        saved.append(self._done)
        save(self)

    monkeypatch.setattr(Run, "_save", noted)
    interrupt(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGUSR1))
    run(values)
    assert saved == [1, 2]
    assert "SIGUSR1: the checkpoint of step 1 is saved" in capsys.readouterr().err
    assert contents(tmp_path) == whole["sft"][0]


def test_a_checkpoint_is_saved_when_so_many_minutes_have_passed(tmp_path):
    run({**VALUES["sft"], "steps": 3, "save_every": 50, "save_minutes": 1e-6, "output_dir": str(tmp_path / "often")})
    assert sorted(path.name for path in (tmp_path / "often/checkpoints").iterdir()) == ["step-2", "step-3"]
    run({**VALUES["sft"], "steps": 3, "save_every": 50, "save_minutes": 60, "output_dir": str(tmp_path / "rarely")})
    assert sorted(path.name for path in (tmp_path / "rarely/checkpoints").iterdir()) == ["step-3"]


def test_the_second_signal_has_its_default_action():
    with signals.listening():
        signals.hold(lambda: True)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_waits_until_a_step_can_be_left():
    ready = False
    with signals.listening():
        signals.hold(lambda: ready)
        signal.raise_signal(signal.SIGTERM)
        signals.heed()
        ready = True
        with pytest.raises(signals.Interrupted, match="SIGTERM"):
            signals.heed()


def test_a_signal_that_the_program_was_started_to_ignore_stays_ignored():
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            signal.raise_signal(signal.SIGHUP)
            assert signals.caught() == 0
            with pytest.raises(signals.Interrupted):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
