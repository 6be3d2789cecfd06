"""--overwrite removes what an earlier run made, and nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_fast.errors import UserError
from rlhf_fast.training.checkpoint import save_checkpoint
from rlhf_fast.training.folder import (
    MARKER,
    REMOVED,
    REPLACED,
    check_folder,
    claim_folder,
    forget_replaced,
    saving,
    take_folder,
)
from rlhf_fast.training.inputs import inputs_of
from rlhf_fast.training.lock import LOCK, FolderLock
from tests.training.tiny_runs import config_of


def made(folder: Path, stages=()) -> Path:
    """A run folder with a saved adapter, a checkpoint and metrics."""
    claim_folder(folder, {"algorithm": "sft"}, resume=False, overwrite=False, stages=stages)
    for name in ("metrics.jsonl", "checkpoints/step-1/state.pt", "tensorboard/events.out.tfevents.1.2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    with saving(folder) as place:
        (place / "adapter_model.safetensors").write_text("old")
        (place / "critic").mkdir()
        (place / "critic" / "adapter_model.safetensors").write_text("old")
    return folder


def overwrite(folder: Path, *inputs: Path) -> None:
    """By a run that gets a checkpoint."""
    take_folder(folder, resume=False, overwrite=True, inputs=inputs).release(remove=True)
    claim_folder(folder, {"algorithm": "sft"}, resume=False, overwrite=True)
    forget_replaced(folder)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_is_replaced_and_files_that_no_run_made_stay(tmp_path, capsys):
    run = made(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "critic" / "notes.txt").write_text("mine")
    (run / "empty").mkdir()
    overwrite(run)
    assert names(run) == {MARKER, "config.yaml", "notes.txt", "critic", "critic/notes.txt", "empty"}
    assert f"left in {run}, because no run made it: critic, empty, notes.txt" in capsys.readouterr().err


def test_the_stages_of_a_run_are_replaced_with_it_and_another_run_beside_them_stays(tmp_path):
    run = made(tmp_path / "run", stages=["sft", "second", "round-1/ppo", "round-2/ppo"])
    for name in ("sft", "second", "round-1/ppo", "round-2/ppo", "another"):
        made(run / name)
    overwrite(run)
    assert {path.name for path in run.iterdir()} == {MARKER, "config.yaml", "another"}
    assert (run / "another" / "metrics.jsonl").is_file()


def test_links_in_a_run_folder_are_not_followed(tmp_path):
    run = made(tmp_path / "run", stages=["sft"])
    elsewhere = made(tmp_path / "elsewhere")
    (run / "sft").symlink_to(elsewhere)
    (run / "summary.json").symlink_to(elsewhere / "metrics.jsonl")
    before = names(elsewhere)
    overwrite(run)
    assert names(elsewhere) == before


@pytest.mark.parametrize("place", [".", "..", "../..", "{cwd}", "/", "~", "link"])
def test_the_working_directory_the_home_directory_and_all_above_are_never_replaced(place, tmp_path, monkeypatch):
    home = tmp_path / "home" / "user"
    work = home / "project" / "work"
    work.mkdir(parents=True)
    (home / "project" / "link").symlink_to(home / "project")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for folder in (work, work.parent, home, home.parent):
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / MARKER).write_text('{"stages": [], "saved": []}')
    path = {"{cwd}": work, "~": home, "link": home / "project" / "link"}.get(place, Path(place))
    with pytest.raises(UserError, match="--overwrite does not replace that"):
        check_folder(path, resume=False, overwrite=True)


@pytest.mark.parametrize("kind", ["inside", "itself", "above", "linked", "relative", "link to the run"])
def test_a_folder_that_holds_or_lies_in_an_input_is_not_replaced(kind, tmp_path, monkeypatch):
    (tmp_path / "outer").mkdir()
    run = made(tmp_path / "outer" / "run")
    (run / "data.jsonl").write_text("{}")
    (tmp_path / "data_link").symlink_to(run / "data.jsonl")
    (tmp_path / "run_link").symlink_to(run)
    monkeypatch.chdir(tmp_path / "outer")
    folder, given = {
        "inside": (run, run / "data.jsonl"),
        "itself": (run, run),
        "above": (run, tmp_path / "outer"),
        "linked": (run, tmp_path / "data_link"),
        "relative": (Path("run"), Path("./run/../run/data.jsonl")),
        "link to the run": (tmp_path / "run_link", run / "data.jsonl"),
    }[kind]
    before = names(run)
    with pytest.raises(UserError, match="which this run reads: choose another one"):
        overwrite(folder, given)
    assert names(run) == before


@pytest.mark.parametrize("content", [None, "", "[]", '{"stages": [], "saved": ["../../precious"]}',
                                     '{"stages": ["/"], "saved": []}'])  # fmt: skip
def test_a_folder_without_a_marker_of_ours_is_left_as_it_is(content, tmp_path):
    """A config.yaml alone says nothing, and a marker names nothing outside its folder."""
    (tmp_path / "precious").write_text("x")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("algorithm: sft\n")
    if content is not None:
        (folder / MARKER).write_text(content)
    with pytest.raises(UserError, match="left as it is") as error:
        overwrite(folder)
    assert "\n" not in str(error.value)
    assert (folder / "config.yaml").is_file()
    assert (tmp_path / "precious").is_file()


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number: int) -> None:
    """The next call of os.replace with this number (from 1) never happens."""
    replace, count = os.replace, []

    def killed(*paths):
        count.append(paths)
        if len(count) == number:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)


def text(folder: Path) -> dict[str, str]:
    """What every file holds, but for locks and what a kill left half written."""
    files = [folder / name for name in sorted(names(folder))]
    whole = [path for path in files if path.is_file() and path.name != LOCK and not path.name.startswith(".new.")]
    return {str(path.relative_to(folder)): path.read_text() for path in whole}


def test_a_run_that_is_replaced_waits_until_the_new_one_has_a_checkpoint(tmp_path):
    run = made(tmp_path / "run")
    before = text(run)
    take_folder(run, resume=False, overwrite=True).release()
    claim_folder(run, {"algorithm": "sft", "seed": 1}, resume=False, overwrite=True)
    assert text(run / REPLACED) == before
    with pytest.raises(UserError, match=f"seed is None, but .* has 1; the run that it replaced is in .*{REPLACED}"):
        claim_folder(run, {"algorithm": "sft"}, resume=True, overwrite=False)
    # A second one replaces the first, which has done nothing; the finished one still waits.
    claim_folder(run, {"algorithm": "sft", "seed": 2}, resume=False, overwrite=True)
    assert text(run / REPLACED) == before
    save_checkpoint(run / "checkpoints", 1, {}, keep=1)
    forget_replaced(run)
    assert {MARKER, "config.yaml", "checkpoints/step-1/state.pt"} <= names(run)
    assert not any(name.startswith(".rlhf_fast_re") for name in names(run))


def test_a_kill_anywhere_while_a_run_is_put_away_leaves_it_whole_for_resume_and_overwrite(tmp_path, monkeypatch):
    """With stages; each file is moved by itself."""
    for number in range(1, 99):
        run = made(tmp_path / f"{number}", stages=["sft"])
        made(run / "sft")
        before = text(run)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                claim_folder(run, {"algorithm": "ppo"}, resume=False, overwrite=True)
            except Killed:
                pass
            else:
                break
        copy = shutil.copytree(run, tmp_path / f"{number} copy")
        take_folder(run, resume=True, overwrite=False).release(remove=True)
        began = yaml.safe_load((run / "config.yaml").read_text())["algorithm"] == "ppo"
        assert began or text(run) == before, number
        overwrite(copy)
        assert set(text(copy)) == {MARKER, "config.yaml"}, number
    assert number > 12


def test_a_kill_anywhere_while_a_run_is_brought_back_loses_nothing(tmp_path, monkeypatch):
    for number in range(1, 99):
        run = made(tmp_path / f"{number}")
        before = text(run)
        with monkeypatch.context() as patch:
            kill_at(patch, 8)  # all is put away, and the new marker is not written yet
            with pytest.raises(Killed):
                claim_folder(run, {"algorithm": "ppo"}, resume=False, overwrite=True)
        assert set(text(run)) - {f"{REPLACED}/{name}" for name in before} == set()
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                take_folder(run, resume=True, overwrite=False)
            except Killed:
                take_folder(run, resume=True, overwrite=False).release(remove=True)
                assert text(run) == before
            else:
                break
    assert number > 5


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, f".new.{MARKER}"], [REMOVED]])
def test_a_folder_left_before_it_had_a_marker_is_taken_by_all(left, tmp_path):
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        run = tmp_path / str(flags)
        run.mkdir()
        for name in left:
            (run / name).touch()
        lock = take_folder(run, **{"resume": False, "overwrite": False, **flags})
        assert lock.holds()
        lock.release()


def test_a_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom rlhf_fast.training.lock import FolderLock\n"
        f"lock = FolderLock(Path({str(tmp_path / 'run')!r}))\n"
        "child = os.fork()\nif child == 0:\n    signal.pause()\n"  # it outlives its parent
        "print(child, flush=True)\nsys.stdin.readline()\nos.kill(os.getpid(), 9)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as holder:
        child = int(holder.stdout.readline())
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"is in use by another run, process {holder.pid}"):
                take_folder(tmp_path / "run", **{"resume": False, "overwrite": False, **flags})
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.wait()
        try:
            take_folder(tmp_path / "run", resume=False, overwrite=False).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_stage_that_another_process_trains_is_not_replaced(tmp_path):
    run = made(tmp_path / "run", stages=["sft"])
    made(run / "sft")
    code = (
        "import sys\nfrom pathlib import Path\nfrom rlhf_fast.training.lock import FolderLock\n"
        f"lock = FolderLock(Path({str(run / 'sft')!r}))\nprint('locked', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        before = names(run)
        with pytest.raises(UserError, match="sft is in use by another run"):
            overwrite(run)
        assert names(run) - {LOCK} == before
        holder.stdin.close()


@pytest.mark.parametrize("kind", ["link", "folder", "dangling"])
def test_a_lock_that_is_something_else_is_one_line(kind, tmp_path):
    (tmp_path / "mine").write_text("precious")
    target = tmp_path / LOCK
    if kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    with pytest.raises(UserError, match="cannot be written"):
        FolderLock(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_that_cannot_come_into_being_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(UserError, match="output_dir run cannot be made"):
        FolderLock(Path("run"))


@pytest.mark.parametrize("stages", [[""], ["."], ["a", "../x"], ["a\0b"], [3], "abc", None])
def test_a_marker_that_somebody_wrote_is_one_line_or_harmless(stages, tmp_path):
    run = made(tmp_path / "run")
    marker = json.loads((run / MARKER).read_text()) | {"stages": stages}
    (run / MARKER).write_text(json.dumps(marker))
    if stages == "abc":  # names of folders that are not there
        overwrite(run)
        return
    with pytest.raises(UserError, match=r"^[^\n]*left as it is$"):
        overwrite(run)


def test_the_inputs_of_a_run_are_its_model_and_that_ones_base_its_data_and_its_rewards(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/the/base"}))
    config = config_of(
        "grpo", model=str(tmp_path / "adapter"), data="d.jsonl", eval_data="sub/e.jsonl",
        reward=["sub/file.py:f", "package.module:g", "reward_folder"],
    )  # fmt: skip
    expected = ("d.jsonl", "sub/e.jsonl", "sub/file.py", "package/module.py", "reward_folder", "/the/base")
    found = inputs_of(config)
    assert {Path(name) for name in expected} | {tmp_path / "adapter"} <= set(found)
    assert not any(os.fspath(path) in ("", ".", "/") for path in found)
