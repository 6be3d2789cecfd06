"""The command line: every mistake is one line, exit status 2, and an existing run stays as it was."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rlhf_fast import __main__, __version__
from rlhf_fast.algorithms import ALGORITHMS as ROWS
from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.cli import app
from rlhf_fast.training.config import keys_of
from tests.house.test_packaging import PROJECT
from tests.training.tiny_runs import ALGORITHMS, folder, values_of, write_jsonl


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def words_of(algorithm: str, **changes) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values_of(algorithm, **changes).items()]


def fingerprint(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    result = invoke("train", *words_of("grpo", steps=1, output_dir=str(path)))
    assert result.exit_code == 0, result.output
    return path


def test_a_run_leaves_adapters_metrics_samples_curves_and_a_table(finished):
    names = set(fingerprint(finished))
    assert {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "metrics.jsonl", "samples.jsonl",
            "eval.jsonl", "curves.png", "summary.json", "reference/adapter_model.safetensors",
            "checkpoints/step-1/state.pt"} <= names  # fmt: skip


def bad_inputs(tmp: Path) -> dict[str, tuple[list[str], str]]:
    """name -> (changed keys as words, what the line must say)."""
    write_jsonl(tmp / "long.jsonl", [{"prompt": "x" * 200} for _ in range(8)])
    write_jsonl(tmp / "columns.jsonl", [{"text": "x"} for _ in range(8)])
    write_jsonl(tmp / "number.jsonl", [{"prompt": "x"}, {"prompt": 3}])
    (tmp / "empty.jsonl").write_text("")
    (tmp / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp / "odd").mkdir()
    (tmp / "odd" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    (tmp / "bad.py").write_text(
        "def raises(completions):\n    raise KeyError('label')\n"
        "def nan(completions):\n    return [float('nan')] * len(completions)\n"
        "def none(completions):\n    return [None] * len(completions)\n"
        "def huge(completions):\n    return [1e300] * len(completions)\n"
        "def leaves(completions):\n    raise SystemExit(0)\n"
        "def short(completions):\n    return [1.0]\n"
        "def wants(completions, answer):\n    return [1.0]\n"
    )
    return {
        "missing data": ([f"data={tmp}/none.jsonl"], "none.jsonl does not exist"),
        "empty data": ([f"data={tmp}/empty.jsonl"], "empty.jsonl has no examples"),
        "not JSON": ([f"data={tmp}/broken.jsonl"], "broken.jsonl:2: not JSON"),
        "wrong columns": ([f"data={tmp}/columns.jsonl"], "columns.jsonl:1: grpo needs the columns prompt; found: text"),
        "wrong type": ([f"data={tmp}/number.jsonl"], "number.jsonl:2: column 'prompt' must be text"),
        "long prompt": ([f"data={tmp}/long.jsonl"], "long.jsonl:1: the prompt has 201 tokens, the budget is 121"),
        "no model": ([f"model={tmp}/nothing"], "there is no such folder"),
        "architecture": ([f"model={tmp}/odd"], "odd"),
        "reward raises": ([f"reward={tmp}/bad.py:raises"], "raises raised KeyError: 'label' (example 0"),
        "reward NaN": ([f"reward={tmp}/bad.py:nan"], "nan returned nan for example 0"),
        "reward None": ([f"reward={tmp}/bad.py:none"], "none returned None for example 0"),
        "reward overflow": ([f"reward={tmp}/bad.py:huge"], "huge returned 1e+300 for example 0"),
        "reward exit": ([f"reward={tmp}/bad.py:leaves"], "leaves raised SystemExit: 0"),
        "reward twice": ([f"reward=[{tmp}/bad.py:short, {tmp}/bad.py:short]"], "bad.py:short twice; give it a weight"),
        "no reward": (["reward=[]"], "reward names none"),
        "weights": (["reward_weights=[]"], "reward_weights has 0 entries for 1 rewards"),
        "reward length": ([f"reward={tmp}/bad.py:short"], "short returned 1 values for 2 completions"),
        "reward column": ([f"reward={tmp}/bad.py:wants"], "wants needs 'answer', which is no column"),
        "reward name": ([f"reward={tmp}/bad.py:absent"], "has no function 'absent'"),
        "reward nowhere": (["reward=nowhere"], "reward 'nowhere' is neither"),
        "unknown key": (["learnin_rate=1"], "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
        "bad value": (["learning_rate=fast"], "learning_rate: Input should be a valid number"),
        "batch": (["batch_size=3"], "batch_size 3 must be a multiple of num_generations 2"),
        "algorithms": (["algorithm=[grpo]"], "unknown algorithm ['grpo']"),
        "algorithm": (["algorithm=gpro"], "unknown algorithm 'gpro'"),
        "config": (["nonsense"], "config file nonsense does not exist"),
        "device": (["device=cuda:77"], "device 'cuda:77' cannot be used"),
    }


BAD_INPUTS = (
    "missing data", "empty data", "not JSON", "wrong columns", "wrong type", "long prompt", "no model", "architecture",
    "reward raises", "reward NaN", "reward None", "reward overflow", "reward exit", "reward twice", "no reward",
    "weights", "algorithms", "reward length", "reward column", "reward name", "reward nowhere",
    "unknown key", "bad value", "batch", "algorithm", "config", "device",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_an_existing_run_stays_untouched(name, tmp_path, finished):
    before = fingerprint(finished)
    cases = bad_inputs(tmp_path)
    assert set(cases) == set(BAD_INPUTS)
    changed, message = cases[name]
    first, rest = (changed, []) if "=" not in changed[0] else ([], changed)
    result = invoke("train", *first, *words_of("grpo", output_dir=str(finished)), *rest, "--overwrite")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert fingerprint(finished) == before


def test_a_used_folder_needs_resume_or_overwrite(finished):
    before = fingerprint(finished)
    result = invoke("train", *words_of("grpo", output_dir=str(finished)))
    assert result.exit_code == 2
    assert "is not empty: continue with --resume auto, replace it with --overwrite" in result.stderr
    assert fingerprint(finished) == before


def test_overwrite_replaces_a_run_but_no_other_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    result = invoke("train", *words_of("sft", steps=1, output_dir=str(tmp_path / "photos")), "--overwrite")
    assert result.exit_code == 2
    assert "is no run folder" in result.stderr
    assert fingerprint(tmp_path / "photos").keys() == {"cat.png"}
    words = words_of("sft", steps=1, output_dir=str(tmp_path / "run"))
    assert invoke("train", *words).exit_code == 0
    (tmp_path / "run" / "left-over").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").write_text("old\n")
    assert invoke("train", *words, "--overwrite").exit_code == 0
    assert "left-over" in fingerprint(tmp_path / "run")
    assert "old" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("place", ["model", "data", "config", "reward", "cwd", "stages"])
def test_overwrite_never_touches_what_the_run_reads_or_where_it_is_called(place, tmp_path, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(folder(), work)
    for name in ("config.yaml", "model/config.yaml"):
        (work / name).write_text(json.dumps(values_of("grpo")))
    for path in (work, work / "model"):
        (path / ".rlhf_fast_run").write_text('{"stages": [], "saved": ["model.safetensors", "prompts.jsonl"]}')
    changes = {"model": str(work / "model")} if place == "model" else {}
    changes |= {"data": str(work / "prompts.jsonl")} if place == "data" else {}
    changes |= {"reward": f"{work}/reward.py:score"} if place == "reward" else {}
    words = words_of("grpo", output_dir=str(work / "model" if place == "model" else work), **changes)
    if place == "config":
        words = [str(work / "config.yaml"), f"output_dir={work}"]
    if place == "cwd":
        monkeypatch.chdir(work)
        words = ["config.yaml", "output_dir=."]
    if place == "stages":
        keys = {key: value for key, value in values_of("sft").items() if key not in ("model", "algorithm")}
        values = {"output_dir": str(work), "stages": [{"algorithm": "sft", **keys, "model": str(work / "model")}]}
        (tmp_path / "stages.yaml").write_text(json.dumps(values))
        words = [str(tmp_path / "stages.yaml")]
    before = fingerprint(work)
    result = invoke("train", *words, "--overwrite")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "--overwrite does not replace that" in result.stderr or "which this run reads" in result.stderr
    assert fingerprint(work) == before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_weights_that_are_not_finite_end_every_algorithm_with_the_name_of_the_first(algorithm, bad, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder() / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = invoke("train", *words_of(algorithm, model=str(model), output_dir=str(tmp_path / "run"), steps=2))
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "not finite numbers, the first in model.layers.1.mlp.up_proj.weight" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_whose_passes_overflow_ends_every_algorithm_with_an_error(algorithm, tmp_path):
    """Every weight is finite, the products are not; and there are fewer steps than max_bad_steps."""
    model = tmp_path / "model"
    shutil.copytree(folder() / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = invoke("train", *words_of(algorithm, model=str(model), output_dir=str(tmp_path / "run"), steps=2))
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "finite" in result.stderr or " is nan" in result.stderr


@pytest.mark.parametrize("what", ["config", "tokenizer", "classifier"])
def test_code_in_a_model_folder_is_never_run_nor_asked_for(what, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(folder() / "model", model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    name = "tokenizer_config.json" if what == "tokenizer" else "config.json"
    classes = {
        "tokenizer": {"AutoTokenizer": ["evil.Evil", None]},
        "config": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "classifier": {"AutoModelForSequenceClassification": "evil.Evil"},
    }
    values = json.loads((model / name).read_text()) | {"auto_map": classes[what]}
    values |= {"model_type": "unheard_of"} if what == "config" else {}
    values |= {"tokenizer_class": "Evil"} if what == "tokenizer" else {}
    (model / name).write_text(json.dumps(values))

    def asked(*_):
        raise AssertionError("input() was called")

    monkeypatch.setattr("builtins.input", asked)
    keys = {"reward": str(model)} if what == "classifier" else {"model": str(model)}
    result = CliRunner().invoke(
        app, ["train", *words_of("grpo", output_dir=str(tmp_path / "run"), steps=1, **keys)], input="y\ny\ny\n"
    )
    assert not isinstance(result.exception, AssertionError)
    assert not (tmp_path / "ran").exists()
    assert result.exit_code in (0, 2)
    assert len(result.stderr.splitlines()) == (1 if result.exit_code else 0)


def test_names_of_other_trainers_are_said_in_one_line(tmp_path):
    result = invoke("train", *words_of("sft", output_dir=str(tmp_path / "run")), "--dry-run", "--num_train_epochs", "2")
    assert result.exit_code == 2
    assert "epochs and steps exclude each other" in result.stderr
    words = [
        word for word in words_of("sft", output_dir=str(tmp_path / "run")) if not word.startswith(("steps", "learn"))
    ]
    result = invoke("train", *words, "--dry-run", "--num_train_epochs", "2", "lr=0.5")
    assert result.exit_code == 0, result.output
    assert "sft: num_train_epochs -> epochs, lr -> learning_rate\n" in result.stdout
    assert "steps: 4" in result.stdout


@pytest.mark.parametrize(("place", "message"), [("file/run", "file is a file"), ("/dev/null/run", "is a file")])
def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, place, message):
    (tmp_path / "file").write_text("")
    result = invoke("train", *words_of("sft", output_dir=str(tmp_path / place)), "--dry-run")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert message in result.stderr


def test_a_run_folder_that_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = invoke("train", *words_of("sft", output_dir=str(tmp_path / "run")))
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: output_dir {tmp_path}/run cannot be written: Permission denied\n",
    )


def test_resume_with_another_config_is_refused(finished):
    before = fingerprint(finished)
    result = invoke("train", *words_of("grpo", steps=1, output_dir=str(finished), temperature=0.5), "--resume", "auto")
    assert result.exit_code == 2
    assert "cannot resume: temperature is 0.5" in result.stderr
    assert fingerprint(finished) == before


def test_a_reward_that_fails_while_training_leaves_its_traceback_in_the_run_folder(tmp_path):
    (tmp_path / "later.py").write_text(
        "calls = []\n"
        "def score(completions):\n    calls.append(1)\n"
        "    if len(calls) >= 4:\n        raise RuntimeError('no more')\n    return [0.0] * len(completions)\n"
    )
    run = tmp_path / "run"
    result = invoke("train", *words_of("grpo", reward=f"{tmp_path}/later.py:score", output_dir=str(run)))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "raised RuntimeError: no more" in result.stderr
    assert "later.py" in (run / "error.log").read_text()


def test_dry_run_prints_plan_and_bytes_and_writes_nothing(tmp_path):
    result = invoke("train", *words_of("ppo", output_dir=str(tmp_path / "run")), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "adapter:critic" in result.stdout
    assert "optimizers" in result.stdout
    assert "micro_batch_size 2, gradient_checkpointing false (as given)" in result.stdout
    assert not (tmp_path / "run").exists()


def test_flags_and_keys_have_the_same_names_and_flags_win(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values_of("ppo", output_dir=str(tmp_path / "run"))))
    result = invoke(
        "train", str(path), "--gamma", "0.9", "lam=0.5", "--objective.clip-eps-high=0.3", "--seed", "8", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    for line in ("gamma: 0.9", "lam: 0.5", "clip_eps_high: 0.3", "seed: 8"):
        assert line in result.stdout


@pytest.mark.parametrize(("data", "found"), [("pairs.jsonl", "dpo"), ("sft.jsonl", "sft")])
def test_the_algorithm_follows_from_the_columns(data, found, tmp_path):
    result = invoke("train", "--model", str(folder() / "model"), "--data", str(folder() / data), "--dry-run",
                    "--output_dir", str(tmp_path / "run"), "--eval_size", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"algorithm: {found}" in result.stdout


def test_mapped_columns_name_the_algorithm_too(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(4)])
    words = ("--model", str(folder() / "model"), "--data", str(tmp_path / "d.jsonl"), "--dry-run", "--output_dir",
             str(tmp_path / "run"))  # fmt: skip
    result = invoke("train", *words, "columns.prompt=question", "--columns.completion", "answer")
    assert result.exit_code == 0, result.output
    assert "algorithm: sft" in result.stdout
    for wrong in ("columns.prompt=qestion", "columns=question", "columns={prompt: [question]}"):
        result = invoke("train", *words, wrong)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "columns" in result.stderr


def test_a_known_data_set_is_named(tmp_path):
    pair = {"chosen": "\n\nHuman: {}\n\nAssistant: Yes.", "rejected": "\n\nHuman: {}\n\nAssistant: No."}
    write_jsonl(tmp_path / "d.jsonl", [{k: v.format(i) for k, v in pair.items()} for i in range(4)])
    result = invoke("train", "--model", str(folder() / "model"), "--data", str(tmp_path / "d.jsonl"), "--dry-run",
                    "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/d.jsonl: Anthropic HH pairs -> prompt, chosen, rejected\n" in result.stdout
    assert "algorithm: dpo" in result.stdout


def test_prompts_alone_do_not_decide_the_algorithm(tmp_path):
    result = invoke("train", "--model", "m", "--data", str(folder() / "prompts.jsonl"))
    assert result.exit_code == 2
    assert "choose algorithm ppo or grpo" in result.stderr


@pytest.mark.parametrize("name", ["cuda", "fast"])
def test_a_backend_that_cannot_run_here_is_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setenv("RLHF_FAST_BACKEND", name)
    result = invoke("train", *words_of("grpo", output_dir=str(tmp_path / "run")))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"'{name}'" in result.stderr


def test_several_processes_need_their_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("train", *words_of("grpo", output_dir=str(tmp_path / "run")))
    assert result.exit_code == 2
    assert "WORLD_SIZE is 2, but RANK is not set" in result.stderr


def test_the_version_is_that_of_the_package():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"rlhf_fast {__version__}\n")


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "NEEDED", ("typer", "absent_a", "absent_b"))
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: the command needs absent_a, absent_b: pip install 'rlhf_fast[train]'\n")


def test_the_command_asks_for_what_the_extra_installs():
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["optional-dependencies"]["train"]}
    assert {name.replace("pyyaml", "yaml") for name in names} == set(__main__.NEEDED)


def test_doctor_lists_every_op_and_says_why_a_backend_cannot_run():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for op in ("linear_logprobs", "gae", "policy_loss"):
        assert op in result.stdout


def cells(output: str) -> list[list[str]]:
    """The rows of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]


def test_keys_lists_what_a_config_may_hold_with_the_defaults_of_a_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    shown = {name: (kind, default) for name, kind, default, _ in cells(invoke("keys", "dapo").stdout)}
    assert shown["kl_target"] == ("float", "-")
    assert shown["data"] == ("str or {from: STAGE} or list", "(required)")
    assert shown["objective"] == ("name or mapping", "dapo")
    assert (shown["objective.clip_eps_low"], shown["objective.clip_eps_high"]) == (("float", "0.2"), ("float", "0.28"))
    assert (shown["engine"], shown["engine.kind"][1]) == (("name or mapping", "local"), "local")
    assert set(shown) == set(keys_of(load_algorithm("dapo").AlgorithmConfig))


def test_keys_alone_lists_every_algorithm(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    rows = {name: (module, sets) for name, module, sets in cells(invoke("keys").stdout)}
    assert set(rows) == set(ROWS)
    assert rows["simpo"] == ("preference", "objective.variant: simpo, objective.beta: 2.0, objective.gamma: 1.0")
    result = invoke("keys", "dr_gropo")
    assert result.exit_code == 2
    message = "unknown algorithm 'dr_gropo'; did you mean 'dr_grpo'? (`rlhf_fast keys` lists them)"
    assert result.stderr == f"error: {message}\n"


def test_help_says_of_a_flag_what_keys_says_of_the_key(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    listed = {row[0]: row[1:] for row in cells(invoke("keys", "ppo").stdout)}
    train_help = invoke("train", "--help").stdout
    for name in ("steps", "batch_size", "objective", "kl_coef", "lora_rank", "output_dir"):
        kind, _, description = listed[name]
        (line,) = [line for line in train_help.splitlines() if re.match(rf"│ --{name}[, ]", line)]
        _, found_kind, found_description = re.split(r"\s{2,}", line.strip("│ "))
        assert (found_kind, found_description) == (kind, description)


def test_a_flag_is_read_as_the_key_is(tmp_path):
    words = words_of("dpo", output_dir=str(tmp_path / "run"))
    for objective in (["--objective", "{variant: ipo, beta: 0.25}"], ["objective={variant: ipo, beta: 0.25}"]):
        result = invoke("train", *words, *objective, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "variant: ipo\n  beta: 0.25\n" in result.stdout


def test_help_is_quick_and_names_the_common_flags():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch_seconds = time.perf_counter() - start
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "rlhf_fast", "train", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert shown.returncode == 0, shown.stderr
    for flag in ("--algorithm", "--reward", "--dry-run", "--resume", "--overwrite"):
        assert flag in shown.stdout
    # transformers alone takes longer than this to import.
    assert seconds < torch_seconds + 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "x" * 300}, "error: 'xxx.*File name too long"),
        ({"reward": "x" * 300}, "error: 'xxx.*File name too long"),
        ({"lora_rank": 97}, "error: lora_rank 97 is more than the widest linear of this model has, 96"),
        ({"data": "x" * 5000}, r"error: data file x+\.\.\."),
    ],
    ids=["output_dir", "reward", "lora_rank", "data"],
)
def test_sizes_and_names_out_of_all_bounds_are_one_line(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *words_of("grpo", **{"output_dir": "run", **changes}), "--dry-run")
    assert result.exit_code == 2
    assert re.fullmatch(message, result.stderr.strip()), result.stderr
    assert len(result.stderr) < 2100


def test_names_in_brackets_are_names(tmp_path, monkeypatch):
    """Not the markup of the library that prints tables, of which [/red] closes what was never opened."""
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *words_of("sft", output_dir="[/red]:smile:[bold]"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "into [/red]:smile:[bold]" in result.output.replace("\n", "")
