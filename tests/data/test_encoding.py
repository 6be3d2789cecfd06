import pytest

from rlhf_fast.data.encoding import Encoder, load_tokenizer, pad_id
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import byte_tokenizer

BOS, EOS = 257, 258
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def encoder(**changes) -> Encoder:
    return Encoder(**{"tokenizer": byte_tokenizer(), "max_prompt_tokens": 40, "max_tokens": 50, **changes})


def row(**values) -> Row:
    return Row("a.jsonl:7", values)


def test_a_completion_ends_with_eos_and_a_prompt_does_not():
    assert encoder().prompt(row(prompt="ab")).ids == [BOS, 97, 98]
    example = encoder().pair(row(prompt="ab", completion="c"), "completion")
    assert example.ids == [BOS, 97, 98, 99, EOS]
    assert example.ids[example.start :] == [99, EOS]


def test_text_counts_from_its_start():
    example = encoder().text(row(text="ab"))
    assert (example.ids, example.start) == ([BOS, 97, 98, EOS], 0)


def test_a_conversation_goes_through_the_chat_template_without_a_second_bos():
    prompt = encoder().prompt(row(prompt=[USER], label=3))
    assert prompt.text == "<bos>user: hi\nassistant: "
    assert prompt.ids.count(BOS) == 1
    assert prompt.columns == {"prompt": [USER], "label": 3}


def test_the_last_message_is_the_completion():
    apart = encoder().pair(row(prompt=[USER], chosen=[ANSWER]), "chosen")
    joined = encoder().pair(row(chosen=[USER, ANSWER]), "chosen")
    assert apart == joined
    assert bytes(apart.ids[apart.start : -1]) == b"yo"


def test_a_whole_conversation_wins_over_the_prompt_that_it_begins_with():
    expected = encoder().pair(row(chosen=[USER, ANSWER]), "chosen")
    for prompt in ("hi", [USER]):
        assert encoder().pair(row(prompt=prompt, chosen=[USER, ANSWER]), "chosen") == expected
        assert encoder().conversation(row(prompt=prompt, messages=[USER, ANSWER])) == expected
    with pytest.raises(UserError, match=r"a\.jsonl:7: chosen is a conversation that the prompt is no part of"):
        encoder().pair(row(prompt="bye", chosen=[USER, ANSWER]), "chosen")


def test_messages_must_be_a_list_that_ends_with_an_answer():
    with pytest.raises(UserError, match=r"a\.jsonl:7: a conversation must be a list"):
        encoder().conversation(row(messages="hi"))
    with pytest.raises(UserError, match=r"a\.jsonl:7: the last message must be an answer, but its role is 'user'"):
        encoder().conversation(row(messages=[USER, ANSWER, USER]))


def test_chat_decides_what_happens_to_plain_prompts_and_to_messages():
    assert encoder(chat=True).prompt(row(prompt="hi")).text == "<bos>user: hi\nassistant: "
    assert encoder(chat="auto").prompt(row(prompt="hi")).text == "hi"
    with pytest.raises(UserError, match=r"a\.jsonl:7: found a list of messages, but chat is false"):
        encoder(chat=False).prompt(row(prompt=[USER]))


def test_messages_without_role_or_template_are_refused():
    with pytest.raises(UserError, match=r"must be a list of \{role, content\} messages"):
        encoder().prompt(row(prompt=[{"content": "hi"}]))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template"):
        encoder(tokenizer=tokenizer).prompt(row(prompt=[USER]))


def test_a_long_prompt_is_refused_with_its_length_or_loses_its_start():
    long = row(prompt="x" * 40 + "end")
    with pytest.raises(UserError, match=r"a\.jsonl:7: the prompt has 44 tokens, the budget is 40.*truncate_prompts"):
        encoder().prompt(long)
    kept = encoder(truncate_prompts=True).prompt(long).ids
    assert len(kept) == 40
    assert bytes(kept).endswith(b"xend")


def test_prompt_and_completion_share_the_budget():
    with pytest.raises(UserError, match="the prompt has 31 tokens, the budget is 29"):
        encoder().pair(row(prompt="x" * 30, completion="y" * 20), "completion")
    with pytest.raises(UserError, match="completion has 61 tokens, the budget"):
        encoder().pair(row(prompt="x", completion="y" * 60), "completion")
    with pytest.raises(UserError, match="text has 62 tokens"):
        encoder().text(row(text="y" * 60))
    short = encoder(truncate_prompts=True).pair(row(prompt="x" * 30, completion="y" * 20), "completion")
    assert len(short.ids) == 50
    assert short.start == 29


def test_an_empty_prompt_cannot_be_completed():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(UserError, match="the prompt is empty"):
        encoder(tokenizer=tokenizer).prompt(row(prompt=[USER]))


def test_padding_is_never_eos():
    tokenizer = byte_tokenizer()
    assert pad_id(tokenizer) == 256
    tokenizer.pad_token = tokenizer.eos_token
    assert pad_id(tokenizer) != EOS


def test_a_folder_without_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
