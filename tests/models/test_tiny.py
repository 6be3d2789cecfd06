"""The tiny model and its byte-level tokenizer: deterministic, complete, loadable by transformers alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import BOS, EOS, PAD, build_tiny, byte_tokenizer, tiny

TOKENIZER = byte_tokenizer()


@given(st.text().filter(lambda text: not any(special in text for special in (PAD, BOS, EOS))))
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_are_distinct_and_behind_the_bytes():
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (256, 257, 258)
    assert len(TOKENIZER) == 259
    assert TOKENIZER("a")["input_ids"] == [257, 97]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[256, 256, 257, 97], [257, 97, 98, 99]]
    assert batch["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_the_chat_template_ends_an_assistant_turn_with_eos():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "<bos>user: hi\nassistant: yes<eos>"
    asked = TOKENIZER.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<bos>user: hi\nassistant: "


def test_one_seed_gives_one_model_and_another_seed_another():
    first, again, other = (tiny(seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    tiny(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_tiny_model_loads_with_transformers_and_gives_the_same_logits(tmp_path):
    folder = build_tiny(tmp_path / "model", seed=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["The soup was"], return_tensors="pt")["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, tiny(5)[0](input_ids=ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 258
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 256
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        build_tiny(tmp_path / "model", seed=0)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_width_that_rotary_embeddings_cannot_pair_is_rejected():
    with pytest.raises(ValueError, match="got 100 and 8 heads"):
        tiny(0, hidden_size=100, heads=8)
