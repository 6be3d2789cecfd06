"""What the command line does with finished runs, against transformers and PEFT on the same files."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlhf_fast.algorithms import ilql
from rlhf_fast.cli import app
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.merging import merge
from rlhf_fast.models.peft_io import save_adapter
from tests.training.tiny_runs import folder, scramble, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def invoke(*words: str, **options):
    return CliRunner().invoke(app, list(map(str, words)), **options)


@cache
def base() -> Path:
    return folder() / "model"


def adapter(path: Path, *, seed: int = 0, template: str | None = None, **options) -> Path:
    """A folder with an adapter that does something, and its tokenizer, as a run leaves them."""
    torch.manual_seed(seed)
    backbone = Backbone(load_model(base(), dtype=torch.float32))
    backbone.add_adapter("policy", **{"rank": 3, "alpha": 5, **options})
    scramble(backbone)
    save_adapter(backbone, "policy", path)
    tokenizer = AutoTokenizer.from_pretrained(base())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    (path / "config.yaml").write_text("algorithm: grpo\nreward: gone.py:score\nmax_new_tokens: 6\ntemperature: 0.7\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return adapter(tmp_path_factory.mktemp("runs") / "run")


def test_the_q_adapters_of_a_run_of_ilql_steer_its_samples(tmp_path):
    run, beta = adapter(tmp_path / "run"), 3.0
    for i, role in enumerate(ilql.QS, 1):
        adapter(run / role, seed=i)
    (run / "config.yaml").write_text(f"algorithm: ilql\ndecode_beta: {beta}\nmax_new_tokens: 5\n")
    out = tmp_path / "out.jsonl"
    result = invoke("sample", run, "--prompt", "ab", "--temperature", 0, "--out", out)
    assert result.exit_code == 0, result.output
    plain = AutoModelForCausalLM.from_pretrained(base()).eval()
    models = [peft_model(run), *(peft_model(run / role) for role in ilql.QS)]
    tokenizer = AutoTokenizer.from_pretrained(base())

    @torch.no_grad()
    def decoded(weight):
        ids = torch.tensor([tokenizer("ab").input_ids])
        start = ids.shape[1]
        for _ in range(5):
            policy, *qs = (model(ids).logits[0, -1] for model in models)
            least = torch.minimum(*(q - plain(ids).logits[0, -1] for q in qs))
            ids = torch.cat([ids, (policy.log_softmax(-1) + weight * least).argmax()[None, None]], 1)
        return tokenizer.decode(ids[0, start:], skip_special_tokens=True)

    (row,) = read_jsonl(out)
    assert row["after"] == [{"completion": decoded(beta)}]
    assert decoded(beta) != decoded(0)


def peft_model(path: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), path).eval()


def greedy(model, text: str, count: int = 6) -> str:
    """transformers' own likeliest continuation of a text without special tokens of its own."""
    tokenizer = AutoTokenizer.from_pretrained(base())
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 80, 33, 61, 17, 100]])).logits


def test_sample_shows_before_and_after_as_transformers_and_peft_continue(run, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "ab"}, {"prompt": "xyz"}])
    words = ("sample", run, "--prompts", tmp_path / "p.jsonl", "--prompt", "q", "--temperature", 0, "--out")
    result = invoke(*words, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == ["q", "ab", "xyz"]
    plain, trained = AutoModelForCausalLM.from_pretrained(base()), peft_model(run)
    for row in rows:
        assert row["before"] == [{"completion": greedy(plain, row["prompt"])}]
        assert row["after"] == [{"completion": greedy(trained, row["prompt"])}]
    assert any(row["before"] != row["after"] for row in rows)
    shown = invoke("sample", run, "--prompt", "q", "--n", 2, "--no-before").stdout
    assert "after" in shown
    assert "before" not in shown


def test_a_run_of_all_weights_is_shown_beside_the_model_that_it_started_from(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base())
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.3 * torch.randn_like(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(base()).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"algorithm: sft\nmodel: {base()}\nlora_rank: 0\n")
    words = ("--prompt", "ab", "--temperature", 0, "--max-new-tokens", 6, "--out", tmp_path / "out.jsonl")
    result = invoke("sample", tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["after"] == [{"completion": greedy(model, "ab")}]
    assert row["before"] == [{"completion": greedy(AutoModelForCausalLM.from_pretrained(base()), "ab")}]
    assert row["after"] != row["before"]


def test_a_reference_that_is_an_adapter_is_what_was_before(run, tmp_path):
    path = adapter(tmp_path / "run", seed=5)
    adapter(path / "reference", seed=6)
    words = ("--prompt", "ab", "--temperature", 0, "--out", tmp_path / "out.jsonl")
    assert invoke("sample", path, *words).exit_code == 0
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["before"] == [{"completion": greedy(peft_model(path / "reference"), "ab")}]
    assert row["after"] == [{"completion": greedy(peft_model(path), "ab")}]


def test_sample_prints_the_best_of_n_with_its_reward_and_bound(run, tmp_path):
    (tmp_path / "paid.py").write_text(
        "def letters(completions):\n    return [float(len(set(c))) for c in completions]\n"
    )
    words = ("sample", run, "--prompt", "ab", "--n", 2, "--reward", f"{tmp_path}/paid.py:letters", "--out")
    means = {}
    for count in (1, 8):
        result = invoke(*words, tmp_path / "out.jsonl", "--best-of", count)
        assert result.exit_code == 0, result.output
        (row,) = read_jsonl(tmp_path / "out.jsonl")
        for when in ("before", "after"):
            assert len(row[when]) == 2
            for answer in row[when]:
                assert answer["reward"] == len(set(answer["completion"]))
        means[count] = sum(answer["reward"] for answer in row["after"])
    assert means[8] > means[1]
    bound = math.log(8) - 7 / 8
    assert f"best of 8: at most {bound:.3g} nats" in result.stdout


def test_chat_continues_the_text_where_there_is_no_template(run):
    result = invoke("chat", run, "--temperature", 0, input="ab\nq\n/reset\nab\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    model = peft_model(run)
    first = greedy(model, "ab")
    assert result.stdout == f"{first}\n{greedy(model, 'ab' + first + 'q')}\n{first}\n"


def test_chat_reads_what_is_not_utf_8(run):
    result = invoke("chat", run, "--temperature", 0, input=b"a\xffb\n")
    assert (result.exit_code, result.stdout) == (0, greedy(peft_model(run), "a\ufffdb") + "\n"), result.output


def test_chat_asks_through_the_template_with_the_turns_before(tmp_path):
    path = adapter(tmp_path / "run", template=TEMPLATE)
    result = invoke("chat", path, "--temperature", 0, "--system", "s", input="ab\nq\n")
    assert result.exit_code == 0, result.output
    tokenizer, model = AutoTokenizer.from_pretrained(path), peft_model(path)
    messages, expected = [{"role": "system", "content": "s"}], ""
    for line in ("ab", "q"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        size = ids["input_ids"].shape[1]
        out = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, size:]
        messages.append({"role": "assistant", "content": tokenizer.decode(out, skip_special_tokens=True)})
        expected += messages[-1]["content"] + "\n"
    assert result.stdout == expected


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "top_layers": 1}])
def test_merged_weights_give_the_logits_of_the_adapter(options, tmp_path):
    path = adapter(tmp_path / "run", **options)
    result = invoke("export", path, "--to", "merged", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    expected = logits(peft_model(path))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base()))).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab") == AutoTokenizer.from_pretrained(path)("ab")


def test_merged_weights_are_rounded_once_and_to_the_type_that_is_asked_for(run, tmp_path):
    for dtype in ("float32", "bfloat16"):
        result = invoke("export", run, "--to", "merged", "--out", tmp_path / dtype, "--dtype", dtype)
        assert result.exit_code == 0, result.output
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.bfloat16()), name
    assert "by rounding" in result.stdout


def test_an_exported_adapter_is_the_runs(run, tmp_path):
    result = invoke("export", run, "--out", tmp_path / "peft")
    assert result.exit_code == 0, result.output
    assert str(base()) in result.stdout
    assert torch.equal(logits(peft_model(tmp_path / "peft")), logits(peft_model(run)))


def test_weights_that_another_module_uses_are_not_merged():
    model = load_model(base(), dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    backbone = Backbone(model)
    backbone.add_adapter("policy", rank=2, targets=["up_proj"], top_layers=1)
    with pytest.raises(UserError, match=r"1\.mlp\.up_proj\.weight is model\.layers\.0\.mlp\.up_proj\.weight too"):
        merge(backbone, "policy")


CONVERTER = """
import pathlib, sys
model, *flags = sys.argv[1:]
(_, out), (_, kind) = options = list(zip(flags[::2], flags[1::2], strict=True))
assert [name for name, _ in options] == ["--outfile", "--outtype"] and kind in ("f32", "f16")
assert (pathlib.Path(model) / "config.json").is_file() and (pathlib.Path(model) / "tokenizer.json").is_file()
if pathlib.Path(__file__).with_name("broken").exists():
    sys.exit("unknown pre-tokenizer")
pathlib.Path(out).write_bytes(kind.encode() + (pathlib.Path(model) / "model.safetensors").read_bytes())
"""


def test_gguf_is_what_the_converter_makes_of_the_merged_model(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    words = ("export", run, "--to", "gguf", "--out", tmp_path / "out")
    result = invoke(*words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "needs convert_hf_to_gguf.py of llama.cpp, and it is not on the PATH" in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    (tmp_path / "llama" / "broken").touch()
    result = invoke(*words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "failed (1): unknown pre-tokenizer" in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "llama" / "broken").unlink()
    assert invoke(*words).exit_code == 0
    assert invoke("export", run, "--to", "merged", "--out", tmp_path / "merged").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    expected = b"f32" + (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.gguf").read_bytes() == expected
    assert invoke(*words[:-1], tmp_path / "half", "--dtype", "float16").exit_code == 0
    assert (tmp_path / "half" / "model.gguf").read_bytes().startswith(b"f16")


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Module -> scale B A in float64, by PEFT's rules."""
    config, tensors = (
        json.loads((path / "adapter_config.json").read_text()),
        load_file(path / "adapter_model.safetensors"),
    )
    found = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = config["rank_pattern"].get(module, config["r"]), config["alpha_pattern"].get(module)
            assert rank == len(a)
            scale = (config["lora_alpha"] if alpha is None else alpha) / (rank**0.5 if config["use_rslora"] else rank)
            found[module] = scale * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def test_a_soup_is_the_weighted_sum_of_the_deltas_and_peft_adds_it(tmp_path):
    """Of other ranks, scales, layers and kinds of scale."""
    parts = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1, rank=2, top_layers=1, use_rslora=True),
             adapter(tmp_path / "c", seed=2, rank=1, targets=["q_proj"])]  # fmt: skip
    weights = (0.5, -0.25, 1.5)
    result = invoke("soup", *parts, "--weights", *weights, "--out", tmp_path / "soup")
    assert result.exit_code == 0, result.output
    expected: dict[str, torch.Tensor] = {}
    for weight, part in zip(weights, parts, strict=True):
        for module, delta in deltas(part).items():
            expected[module] = expected.get(module, 0) + weight * delta
    found = deltas(tmp_path / "soup")
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-6 * float(delta.abs().max()))
    model = AutoModelForCausalLM.from_pretrained(base())
    with torch.no_grad():
        for module, delta in expected.items():
            model.get_submodule(module).weight += delta.float()
    torch.testing.assert_close(logits(peft_model(tmp_path / "soup")), logits(model), rtol=1e-4, atol=1e-4)
    # The same from one word; without weights, the mean.
    assert invoke("soup", *parts, "--weights", "0.5,-0.25,1.5", "--out", tmp_path / "again").exit_code == 0
    assert torch.equal(logits(peft_model(tmp_path / "again")), logits(peft_model(tmp_path / "soup")))
    assert invoke("soup", parts[0], parts[0], "--out", tmp_path / "same").exit_code == 0
    for module, delta in deltas(tmp_path / "same").items():
        torch.testing.assert_close(delta, deltas(parts[0])[module], rtol=1e-5, atol=1e-7)


def test_the_frontier_is_reward_over_the_root_of_kl(tmp_path):
    from rlhf_fast.training.report import frontier

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [
            {"step": i, "metrics": {"kl": kl, "reward": i / 4, "reward_se": 0.1}} for i, kl in enumerate((-1, 4, 9))
        ]
        write_jsonl(tmp_path / name / "eval.jsonl", [*rows, {"step": 9, "metrics": {"loss": 1.0}}])
    assert frontier(tmp_path / "a") == [(0, 0.0, 0.0, 0.1), (1, 2.0, 0.25, 0.1), (2, 3.0, 0.5, 0.1)]
    result = invoke("frontier", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "f.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    result = invoke("frontier", tmp_path, "--out", tmp_path / "g.png")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "has no evaluations with a reward and a KL" in result.stderr


@pytest.mark.parametrize(
    "damage",
    [{"reward": "x"}, {"reward": None}, {"kl": []}, {"reward_se": "a"}, {"reward_se": -1}, {"kl": 10**400}],
    ids=str,
)
def test_the_frontier_of_a_damaged_run_is_refused_in_a_line(damage, tmp_path):
    write_jsonl(tmp_path / "eval.jsonl", [{"step": 1, "metrics": {"kl": 1.0, "reward": 1.0, **damage}}])
    result = invoke("frontier", tmp_path, "--out", tmp_path / "g.png")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert "eval.jsonl is damaged" in result.stderr


MISTAKES = {
    "no folder": ("sample {tmp}/none --prompt a", "there is no such folder"),
    "unfinished": ("sample {tmp}/begun --prompt a", "it is not finished"),
    "stages": ("sample {tmp}/staged --prompt a", "holds the stages sft, dpo: name one, such as {tmp}/staged/dpo"),
    "no prompt": ("sample {run}", "give --prompts FILE or --prompt TEXT"),
    "columns": ("sample {run} --prompts {tmp}/text.jsonl", "sample needs the columns prompt; found: words"),
    "best of what": ("sample {run} --prompt a --best-of 4", "--best-of 4 needs --reward"),
    "none": ("sample {run} --prompt a --n 0", "--n must be at least 1, got 0"),
    "reward": ("sample {run} --prompt a --reward nowhere", "reward 'nowhere' is neither"),
    "temperature": (
        "sample {run} --prompt a --temperature -1",
        "temperature: Input should be greater than 0",
    ),
    "out": ("sample {run} --prompt a --out {tmp}/none/x.jsonl", "x.jsonl cannot be written: No such file"),
    "format": ("export {run} --to onnx --out {tmp}/x", "--to must be one of peft, merged, gguf, got 'onnx'"),
    "type": (
        "export {run} --to merged --dtype int3 --out {tmp}/x",
        "--dtype must be one of float32, bfloat16, float16, got 'int3'",
    ),
    "full folder": ("export {run} --out {run}", "is not empty: choose another folder"),
    "whole weights": ("export {model} --out {tmp}/x", "holds whole weights already"),
    "one": ("soup {run} --out {tmp}/x", "soup averages two or more adapters, got 1"),
    "weights": ("soup {run} {run} --weights 1 --out {tmp}/x", "--weights has 1 numbers for 2 adapters"),
    "no weight": ("soup {run} {run} --weights nan,1 --out {tmp}/x", "--weights must be finite numbers, got 'nan'"),
    "no adapter": ("soup {run} {model} --out {tmp}/x", "is not an adapter"),
    "chat": ("chat {tmp}/none", "there is no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, run, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("algorithm: grpo\n")
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "config.yaml").write_text("stages: [{algorithm: sft}, {algorithm: dpo}]\n")
    write_jsonl(tmp_path / "text.jsonl", [{"words": "a"}])
    words, message = (text.format(tmp=tmp_path, run=run, model=base()) for text in MISTAKES[name])
    result = invoke(*words.split())
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_reward_model_is_not_merged_or_averaged(tmp_path):
    backbone = Backbone(load_model(base(), dtype=torch.float32))
    backbone.add_adapter("reward", rank=2)
    backbone.add_head("reward")
    save_adapter(backbone, "reward", tmp_path / "reward")
    path = str(tmp_path / "reward")
    for words in (("export", path, "--to", "merged"), ("soup", path, path)):
        result = invoke(*words, "--out", tmp_path / "x")
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "has a score head" in result.stderr
