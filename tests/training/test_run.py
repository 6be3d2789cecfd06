import io
import json
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from rlhf_fast.algorithms.launch import all_stages, launch, run_stage, single_stage
from rlhf_fast.errors import UserError
from rlhf_fast.signals import Stopped
from rlhf_fast.training import report
from rlhf_fast.training.config import read_yaml
from rlhf_fast.training.run import Run, read_jsonl, write_summary
from tests.training.interruptions import interrupt
from tests.training.tiny_runs import DEVICE, config_of, folder, job_of, values_of

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_metrics_of_an_interrupted_run_are_cut_at_its_checkpoint(tmp_path):
    config = config_of("sft", output_dir=str(tmp_path / "run"), steps=3)
    with Run(config, job_of(config), resume=None, overwrite=False) as run:
        for step in run.steps():
            run.log(step, {"loss": 1.0}, tokens=1)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 2.0}\n{"step": 5, "lo')
    longer = config.model_copy(update={"steps": 6})
    resumed = Run(longer, job_of(longer), resume="auto", overwrite=False)
    assert resumed.start == 3
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_records_with_separators_that_are_no_line_feed_are_kept_across_a_resume(tmp_path):
    config = config_of("sft", output_dir=str(tmp_path / "run"), steps=2)
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    with Run(config, job_of(config), resume=None, overwrite=False) as run:
        for step in run.steps():
            run.log(step, {"loss": 1.0}, tokens=1)
            run.samples(step, [{"prompt": text}])
        run.evaluation(0, {"metrics": {}, "samples": [{"prompt": text}]})
    longer = config.model_copy(update={"steps": 3})
    Run(longer, job_of(longer), resume="auto", overwrite=False)
    lines = (tmp_path / "run" / "samples.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == [text, text]
    write_summary(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == [{"prompt": text}]


def test_a_kill_while_a_run_is_resumed_loses_neither_its_config_nor_its_metrics(tmp_path, monkeypatch):
    config = config_of("sft", output_dir=str(tmp_path / "run"), steps=1)
    with Run(config, job_of(config), resume=None, overwrite=False) as run:
        for step in run.steps():
            run.log(step, {"loss": 1.0}, tokens=1)
    names = ("config.yaml", "metrics.jsonl")
    before = [(tmp_path / "run" / name).read_text() for name in names]

    def killed(path, text, **options):
        path.write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(config.model_copy(update={"steps": 2}), job_of(config), resume="auto", overwrite=False)
    monkeypatch.undo()
    assert [(tmp_path / "run" / name).read_text() for name in names] == before


def test_a_damaged_config_of_a_run_is_one_line(tmp_path):
    config = config_of("sft", output_dir=str(tmp_path / "run"), steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"run/config\.yaml must hold `key: value` lines"):
        Run(config, job_of(config), resume="auto", overwrite=False)


def test_tensorboard_gets_the_metrics(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_of("sft", output_dir=str(tmp_path / "run"), report_to="tensorboard")
    with Run(config, job_of(config), resume=None, overwrite=False) as run:
        run.log(0, {"loss": 1.5}, tokens=1)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5)]


def test_a_checkpoint_folder_can_be_named(tmp_path):
    values = values_of("sft", output_dir=str(tmp_path / "run"), save_every=2)
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    config = config_of("sft", output_dir=str(tmp_path / "run"), save_every=2)
    named = Run(config, job_of(config), resume=str(tmp_path / "run/checkpoints/step-4"), overwrite=False)
    assert named.start == 4
    assert (tmp_path / "run/checkpoints/aside/step-5/state.pt").is_file()
    with pytest.raises(UserError, match="no checkpoint there"):
        Run(config, job_of(config), resume=str(tmp_path / "nowhere"), overwrite=False)
    shorter = config.model_copy(update={"steps": 3})
    with pytest.raises(UserError, match="the checkpoint is at step 4, steps is 3"):
        Run(shorter, job_of(shorter), resume="auto", overwrite=False)


def test_the_report_shows_both_evaluations_and_draws_the_curves(tmp_path):
    rows = [{"step": i, "reward": i / 2, "kl": 0.1, "policy_loss": 0.0} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "say [bold]", "completion": "old", "reward": 0.25}
    evaluations = [
        {"step": 0, "metrics": {"reward": 0.25, "reward_se": 0.125}, "samples": [sample]},
        {"step": 3, "metrics": {"reward": 1.5, "reward_se": 0.0625}, "samples": [{**sample, "completion": "new"}]},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    console = Console(record=True, width=120, file=io.StringIO())
    report.print_report(console, "ppo", tmp_path)
    text = console.export_text()
    for piece in ("0.250 +- 0.125", "1.500 +- 0.062", "say [bold]", "old  [0.25]", "new  [0.25]", "curves.png"):
        assert piece in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def pipeline(tmp_path, **changes):
    """sft of all weights -> reward model -> ppo, as the example has it."""
    keys = ("data", "eval_size", "steps", "batch_size", "learning_rate", "report_to", "seed", "device")

    def own(algorithm, **rest):
        values = values_of(algorithm)
        return {"algorithm": algorithm, **{key: values[key] for key in keys}, **rest}

    values = {
        "output_dir": str(tmp_path / "run"),
        "lora_rank": 4,
        "stages": [
            own("sft", model=str(folder() / "model"), lora_rank=0),
            own("reward_model", model={"from": "sft"}),
            own("ppo", model={"from": "sft"}, reward={"from": "reward_model"}, max_new_tokens=6),
        ],
        **changes,
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def go(path, overrides=None, **options):
    launch(path, overrides or {}, **{"dry_run": False, "resume": None, "overwrite": False, **options})


def test_stages_run_in_order_each_on_what_the_earlier_ones_made(tmp_path):
    go(pipeline(tmp_path), {"ppo.steps": 2})
    run = tmp_path / "run"
    for name in ("sft/model.safetensors", "reward_model/reward_stats.json", "ppo/critic/adapter_model.safetensors",
                 "ppo/reward/adapter_model.safetensors", "ppo/adapter_model.safetensors"):  # fmt: skip
        assert (run / name).is_file(), name
    assert json.loads((run / "ppo/adapter_config.json").read_text())["base_model_name_or_path"] == str(run / "sft")
    assert len(read_jsonl(run / "ppo/metrics.jsonl")) == 2
    assert len(read_jsonl(run / "sft/metrics.jsonl")) == 5


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "..", ".", "", "a b", ".git", "a\\b", "x" * 300, 5, None])
def test_a_stage_is_a_folder_in_the_run_folder(name, tmp_path):
    values = {"output_dir": str(tmp_path / "run"), "stages": [{"algorithm": "sft", "name": name}]}
    with pytest.raises(UserError, match="must be one word without a path"):
        all_stages(values, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "config.yaml"}, "stage name 'config.yaml': output_dir has a file or folder of that name"),
        ({"name": "round-1"}, "stage name 'round-1': output_dir has"),
        ({"output_dir": "../up"}, "stage sft: output_dir '../up': a stage's folder is its name"),
        ({"save_path": "../up"}, "stage sft: output_dir '../up': a stage's folder is its name"),
    ],
)
def test_a_stage_has_no_folder_of_its_own(change, message, tmp_path):
    stage = {"algorithm": "sft", "model": "m", "data": "d", **change}
    with pytest.raises(UserError, match=message):
        all_stages({"output_dir": str(tmp_path / "run"), "stages": [stage]}, {})


def test_a_link_out_of_the_run_folder_is_no_stage(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft").symlink_to(tmp_path / "elsewhere")
    config = tmp_path / "pipeline.yaml"
    keys = {**values_of("sft"), "output_dir": str(tmp_path / "run")}
    config.write_text(json.dumps({**keys, "stages": [{"algorithm": "sft"}]}))
    with pytest.raises(UserError, match=r"stage sft: .*run/sft is a link out of output_dir"):
        launch(str(config), {}, dry_run=True, resume="auto", overwrite=False)


def test_a_run_folder_loads_from_anywhere_by_itself(tmp_path, monkeypatch):
    """The base under a relative path, the tokenizer and its chat template beside the adapter; judged by PEFT."""
    shutil.copytree(folder() / "model", tmp_path / "here" / "model")
    (tmp_path / "here" / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
    monkeypatch.chdir(tmp_path / "here")
    values = values_of("sft", model="model", output_dir="run", steps=2)
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    shutil.move("run", tmp_path / "moved")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    model = peft.AutoPeftModelForCausalLM.from_pretrained("../moved").eval().to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained("../moved")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    ids = tokenizer("hello", return_tensors="pt").input_ids.to(DEVICE)
    job = job_of(config_of("dpo", model="../moved"), scrambled=False)
    assert job.encoder.tokenizer.chat_template == tokenizer.chat_template
    hidden = job.backbone.hidden(ids, torch.ones_like(ids), ["policy"])["policy"]
    torch.testing.assert_close(hidden @ job.backbone.lm_head_weight.T, model(ids).logits, rtol=1e-4, atol=1e-5)
    shutil.move(tmp_path / "here" / "model", tmp_path / "here" / "gone")
    with pytest.raises(
        UserError, match=r"moved/adapter_config\.json: the base model .*here/model is not there any more"
    ):
        job_of(config_of("sft", model="../moved"))


def test_interrupted_stages_resume_where_they_were(tmp_path, monkeypatch):
    path = pipeline(tmp_path)
    log, calls = Run.log, []

    def logged(self, step, metrics, **rest):
        log(self, step, metrics, **rest)
        calls.append((self.config.algorithm, step))
        if calls[-1] == ("reward_model", 1) and not stopped:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", logged)
    stopped = 0
    with pytest.raises(Stopped):
        go(path)
    stopped = len(calls)
    go(path, resume="auto")
    assert calls[stopped:] == [("reward_model", i) for i in (2, 3, 4)] + [("ppo", i) for i in range(5)]
    stopped = len(calls)
    go(path, {"ppo.steps": 6}, resume="auto")
    assert calls[stopped:] == [("ppo", 5)]
    stale = [tmp_path / "run" / name for name in ("reward_model", "ppo")]
    places = f"{stale[0]} and {stale[1]}"
    message = f"sft is to go on, but reward_model and ppo, made of it, finished before: remove {places}"
    with pytest.raises(UserError, match=f"^{message} to make that anew, or keep what is there by allow_changed_inputs"):
        go(path, {"sft.steps": 6}, resume="auto")
    stopped = len(calls)
    go(path, {"sft.steps": 6, "allow_changed_inputs": True}, resume="auto")
    assert calls[stopped:] == [("sft", 5)]
    for place in stale:
        shutil.rmtree(place)
    stopped = len(calls)
    go(path, {"sft.steps": 7}, resume="auto")
    assert calls[stopped:] == [("sft", 6)] + [(name, i) for name in ("reward_model", "ppo") for i in range(5)]


def test_a_dry_run_of_stages_writes_nothing(tmp_path, capsys):
    go(pipeline(tmp_path), dry_run=True)
    assert not (tmp_path / "run").exists()
    assert "adapter:reward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ppo.kl_ceof": 1}, "unknown key 'ppo.kl_ceof'; did you mean 'ppo.kl_coef'"),
        ({"sead": 1}, "unknown key 'sead'; did you mean 'seed'"),
        ({"ppo.lam": 7}, "stage ppo: lam: Input should be less than or equal to 1, got 7"),
        ({"reward_model.model": {"from": "ppo"}}, "stage reward_model: from: ppo is no earlier stage"),
        ({"ppo.data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"sft.columns.prompt": "qromt"}, "there is no column 'qromt' to become 'prompt'"),
        ({"columns.prompt": "qromt"}, "there is no column 'qromt' to become 'prompt'"),
        ({"sft.column.prompt": "x"}, "unknown key 'sft.column.prompt'"),
    ],
)
def test_a_mistake_in_a_late_stage_is_found_before_the_first_one_runs(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        go(pipeline(tmp_path), overrides)
    assert not (tmp_path / "run").exists()


def test_interrupting_a_run_does_not_leave_its_signal_handlers(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        run_stage(Console(quiet=True), single_stage(values_of("sft", output_dir=str(tmp_path / "run"))),
                  resume=None, overwrite=False)  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid_configs(path):
    values = read_yaml(path)
    stages = all_stages(values, {}) if "stages" in values else [single_stage(values)]
    assert all(stage.config.output_dir for stage in stages)


def test_the_tiny_example_can_be_planned(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(EXAMPLES.parent)
    go(str(EXAMPLES / "tiny_rlhf.yaml"), {"output_dir": str(tmp_path / "run")}, dry_run=True)
    assert "ppo: 192 examples, 48 held out" in capsys.readouterr().out
