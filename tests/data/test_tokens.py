"""Plain prompts and completions. The oracle is the whole text, tokenised once by transformers, with its offsets."""

import json

import pytest

from rlhf_fast.data.encoding import Encoder, load_tokenizer
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from tests.data.chat import TOKENIZERS, tokenizer_of

PAIRS = [
    ("What is the cap", "ital of Italy?"), ("hello", " world"), ("hello ", "world"), ("say yes or no: ", "yes it is"),
    ("a  ", " warm"), ("x ab ", "b"), ("a", "b"), ("The", "The"), ("It is:\n", "Rome"), ("", "Paris"),
]  # fmt: skip


def encoder(kind: str, template: str | None = None) -> Encoder:
    return Encoder(tokenizer_of(kind, template), 200, 200)


def row(**values) -> Row:
    return Row("a.jsonl:7", values)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_are_tokenised_as_one_text(kind, prompt, completion):
    one = encoder(kind)
    tokenizer = one.tokenizer
    whole = tokenizer(prompt + completion)["input_ids"]
    if whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    alone = tokenizer(prompt)["input_ids"]
    alone = alone[:-1] if alone[-1:] == [tokenizer.eos_token_id] else alone
    example = one.completion(row(prompt=prompt, completion=completion))
    assert example.ids == whole
    notes = " ".join(one.report(1))
    if whole[: len(alone)] == alone:
        assert example.start == len(alone)
        assert "spans" not in notes
    else:
        assert "1 of 1 rows: a token spans the end of the prompt" in notes
        if tokenizer.is_fast:
            encoded = tokenizer(prompt + completion, return_offsets_mapping=True, return_special_tokens_mask=True)
            inside = [end <= len(prompt) for _, end in encoded["offset_mapping"]]
            assert example.start == inside.index(False)
    assert example.learnt == [int(i >= example.start) for i in range(len(whole))]
    if prompt:
        assert one.prompt(row(prompt=prompt)).ids == alone


def test_a_token_that_spans_the_boundary_in_one_answer_of_a_pair_is_cut_from_both():
    one = encoder("slow")
    chosen, rejected = one.pair(row(prompt="xa", chosen="b", rejected="c"))
    assert one.tokenizer.convert_ids_to_tokens(chosen.ids) == ["x", "ab", "</s>"]
    assert one.tokenizer.convert_ids_to_tokens(rejected.ids) == ["x", "a", "c", "</s>"]
    assert (chosen.start, rejected.start) == (1, 1)
    assert (chosen.learnt, rejected.learnt) == ([0, 1, 1], [0, 1, 1, 1])


def test_a_word_that_is_cut_in_two_stays_one_word():
    one = encoder("llama")
    example = one.completion(row(prompt="The cap", completion="ital of France"))
    assert one.tokenizer.decode(example.ids[1:-1]) == "The capital of France"
    assert example.ids[:-1] == one.tokenizer("The capital of France")["input_ids"]


def test_a_tokenizer_that_fails_in_use_is_one_line(tmp_path):
    """transformers asks for the id of its unknown token, which it does not know, for ever."""
    tokenizer_of("byte level").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": ""}))
    with pytest.raises(UserError, match=r"no tokenizer in .*recursion"):
        load_tokenizer(str(tmp_path))
