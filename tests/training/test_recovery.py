"""What a run finds changed, damaged or gone is one line, and the work that was done is kept."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import cli
from rlhf_fast.algorithms import sft
from rlhf_fast.algorithms.launch import launch
from rlhf_fast.errors import UserError
from rlhf_fast.training import inputs
from rlhf_fast.training.files import WriteError, append_record, cut_records, replace_file, writing
from rlhf_fast.training.inputs import check_inputs, hashes
from rlhf_fast.training.run import Run
from tests.training.interruptions import Killed, contents, interrupt, kill, run
from tests.training.tiny_runs import folder, values_of

RECORD = '{"step": %d, "metrics": {"reward": 0.5}, "text": "üb\u2028er"}\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "whole"
    run(values_of("sft", steps=4, save_every=1, output_dir=str(place)))
    return place


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (b"", False),
        ((RECORD % 3).encode()[:-9], False),  # within the ü, which is two bytes
        ((RECORD % 3).encode()[:54], False),
        (b"\0" * 40, False),
        (b"\0" * 40 + b"\n", True),
        (b"\xff\xfe\n" + (RECORD % 3).encode(), True),
        (b"5\n", True),
        (b"{}\n", True),
        (b'{"step": "x"}\n', True),
        (b'{"step": true}\n', True),
        (b'{"step": 3, "samples": [{"prompt": "a", "completion": 5}]}\n', True),
        (b'{"step": 3, "metrics": {"reward": "x"}}\n', True),
        (b"[" * 100_000 + b"\n", True),
    ],
)
def test_records_are_cut_behind_the_last_whole_one(tmp_path, end, told, capsys):
    path = tmp_path / "eval.jsonl"
    good = "".join(RECORD % step for step in (1, 2)).encode()
    path.write_bytes(good + end)
    cut_records(path, 9)
    assert path.read_bytes() == good
    assert ("eval.jsonl is damaged in line 3" in capsys.readouterr().err) == told
    cut_records(path, 1)
    assert path.read_text(encoding="utf-8") == RECORD % 1


def test_a_metric_that_was_not_finite_is_no_damage(tmp_path, capsys):
    path = tmp_path / "eval.jsonl"
    path.write_text(RECORD % 1 + '{"step": 2, "metrics": {"reward": NaN}, "samples": [{"prompt": "a"}]}\n')
    before = path.read_bytes()
    cut_records(path, 9)
    assert path.read_bytes() == before
    assert not capsys.readouterr().err


def test_records_behind_a_link_are_not_written_to(tmp_path):
    (tmp_path / "mine").write_text("mine\n")
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(tmp_path / "mine")
    cut_records(path, 1)
    append_record(path, {"step": 1})
    assert (tmp_path / "mine").read_text() == "mine\n"
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied"),
    RuntimeError("torch"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_line(tmp_path, error):
    if isinstance(error, RuntimeError):
        error.__context__ = OSError(errno.EFBIG, "File too large")
    said = r"x cannot be written: (No space left|Permission denied|File too large)"
    with pytest.raises(WriteError, match=said), writing(tmp_path / "x"):
        raise error
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path / "x"):
        raise RuntimeError("another")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    replace_file(tmp_path / "x", "old")

    def refuse(*paths):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match="x cannot be written: Read-only file system"):
        replace_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_every_kind_of_change_of_an_input_is_named(tmp_path, monkeypatch):
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    rows = [f'{{"prompt": "{i}"}}\n' for i in range(30)]
    data.write_text("".join(rows))
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(3 << 20))
    (tmp_path / "reward.py").write_text("a")
    paths = [data, model, tmp_path / "reward.py", tmp_path / "absent", Path("x" * 300)]
    before = hashes(paths)
    assert check_inputs(before, hashes(paths), 40, allowed=False) == []
    changed = {
        "row 17": [*rows[:16], "{}\n", *rows[17:]], "row 31": [*rows, "{}\n"], "row 30": rows[:-1],
        "row 1": ["{}\n", *rows],
    }  # fmt: skip
    for what, lines in changed.items():
        data.write_text("".join(lines))
        with pytest.raises(UserError, match=f"data.jsonl changed since step 40: {what};.*allow_changed_inputs: true"):
            check_inputs(before, hashes(paths), 40, allowed=False)
    data.write_text("".join(rows))
    (tmp_path / "reward.py").write_text("b")
    (model / "new.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"x")
    lines = check_inputs(before, hashes(paths), 40, allowed=True)
    ends = [line.rpartition("/")[2] for line in lines]
    assert ends == [
        "model.safetensors changed since step 40: its content", "new.json changed since step 40: it is new",
        "reward.py changed since step 40: its content",
    ]  # fmt: skip
    monkeypatch.setattr(inputs, "LIMIT", 1 << 20)
    monkeypatch.setattr(inputs, "BLOCK", 1 << 10)
    large = hashes([model])
    (model / "model.safetensors").write_bytes(bytes(3 << 20))  # its end is another
    assert check_inputs(large, hashes([model]), 1, allowed=True)


def test_a_run_is_not_resumed_on_other_data_and_goes_on_where_that_is_allowed(tmp_path, monkeypatch, capsys):
    shutil.copy(folder() / "sft.jsonl", tmp_path / "sft.jsonl")
    values = values_of("sft", steps=3, save_every=1, data=str(tmp_path / "sft.jsonl"), output_dir=str(tmp_path / "run"))
    interrupt(monkeypatch, 2, kill)
    with pytest.raises(Killed):
        run(values)
    lines = (tmp_path / "sft.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps({"prompt": "other", "completion": "other"}) + "\n"
    (tmp_path / "sft.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=r"sft.jsonl changed since step 2: row 4; bring it back"):
        run(values, resume="auto")
    run({**values, "allow_changed_inputs": True}, resume="auto")
    assert "warning: " in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()


def test_resume_reads_the_config_of_the_run_that_it_names(whole, tmp_path):
    """Alone it goes on with that run; into another folder it refuses whatever would be another run."""
    here = shutil.copytree(whole, tmp_path / "here")
    launch(None, {"steps": 5}, dry_run=False, resume=str(here), overwrite=False)
    assert len(contents(here)["metrics.jsonl"]) == 5
    there = values_of("sft", steps=4, save_every=1, output_dir=str(tmp_path / "there"))
    for key, value in {"learning_rate": 0.01, "seed": 4, "lora_rank": 2, "warmup_steps": 1}.items():
        with pytest.raises(UserError, match=f"cannot resume: {key} is {value}, but {whole}/config.yaml has"):
            run({**there, key: value}, resume=str(whole / "checkpoints" / "step-3"))
    with pytest.raises(UserError, match=r"cannot resume: algorithm is 'dpo', but .* has 'sft'"):
        run({**values_of("dpo"), "output_dir": there["output_dir"]}, resume=str(whole))
    run(there, resume=str(whole / "checkpoints" / "step-3"))
    adapters = [load_file(place / "adapter_model.safetensors") for place in (whole, tmp_path / "there")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    shutil.move(whole / "checkpoints" / "step-3", tmp_path / "step-3")
    with pytest.raises(UserError, match="it lies in no run folder"):
        run(there, resume=str(tmp_path / "step-3"))


def test_what_a_kill_left_behind_the_last_checkpoint_goes_when_the_run_is_resumed(whole, tmp_path):
    here = shutil.copytree(whole, tmp_path / "here")
    (here / "kept" / "step-000003").mkdir(parents=True)
    (here / "kept" / "step-000003" / "gradients.pt").write_text("of the step that the checkpoint has")
    launch(None, {}, dry_run=False, resume=str(here), overwrite=False)
    assert not (here / "kept").exists()


@pytest.mark.parametrize("before", [True, False])
def test_a_run_folder_that_is_removed_costs_no_step(before, whole, tmp_path, monkeypatch, capsys):
    """Before a record is written, which then ends the run behind its step, or before its checkpoint is."""
    place, log = tmp_path / "run", Run.log

    def logged(self, index, metrics, **rest):
        if before and index == 1:
            shutil.rmtree(place)
        log(self, index, metrics, **rest)
        if not before and index == 1:
            shutil.rmtree(place)

    values = values_of("sft", steps=4, save_every=1, output_dir=str(place))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        if before:
            with pytest.raises(UserError, match="No such file or directory; the checkpoint of step 2 is saved"):
                run(values)
        else:
            run(values)
    assert f"output_dir {place} was removed, and is made anew" in capsys.readouterr().err
    if before:
        run(values, resume="auto")
    ours, theirs = contents(place), contents(whole)
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]


def test_a_disk_that_is_full_from_some_step_on_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    place = tmp_path / "run"
    values = values_of("sft", steps=4, save_every=1, keep_checkpoints=1, output_dir=str(place))
    opened = io.open

    def full(path, mode="r", *rest, **options):
        if set(mode) & set("wax") and str(path).startswith(str(place)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *rest, **options)

    interrupt(monkeypatch, 2, lambda: monkeypatch.setattr(io, "open", full))
    with pytest.raises(UserError, match=r"state.pt|step-3 cannot be written: No space left") as error:
        run(values)
    assert str(error.value).endswith(f"; the last good checkpoint is {place}/checkpoints/step-2")
    monkeypatch.setattr(io, "open", opened)
    run(values, resume="auto")
    assert len(contents(place)["metrics.jsonl"]) == 4


def test_updates_that_are_skipped_to_the_end_leave_the_checkpoint_from_before_them(tmp_path, monkeypatch):
    loss_of = sft.loss_of

    def spoilt(job, config):
        loss = loss_of(job, config)

        def times(rows):
            total, metrics = loss(rows)
            return total * (float("nan") if job.counters.get("updates", 0) == 2 else 1.0), metrics

        return times

    monkeypatch.setattr(sft, "loss_of", spoilt)
    place = tmp_path / "run"
    values = values_of("sft", steps=9, save_every=1, keep_checkpoints=2, max_bad_steps=4, output_dir=str(place))
    with pytest.raises(UserError, match="loss is not finite, 4 updates in a row") as error:
        run(values)
    assert str(error.value).endswith(f"; the last good checkpoint is {place}/checkpoints/step-2")


def test_a_stream_without_a_reader_is_told_of_once():
    reader, writer = os.pipe()
    os.close(reader)
    said = []
    with os.fdopen(writer, "w") as broken:
        lasting = cli._Lasting(broken, said.append)
        for _ in range(3):
            assert lasting.write("x") == 1
            lasting.flush()
    assert len(said) == 1
    assert "cannot be written (Broken pipe); the run goes on" in said[0]
