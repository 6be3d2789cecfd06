import pytest

from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import MANY, Encoder, TooLong, load_tokenizer, pad_id
from rlhf_fast.data.reading import Row
from rlhf_fast.data.tokens import Tokens
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
    example = encoder().completion(row(prompt="ab", completion="c"))
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
    apart = encoder().completion(row(prompt=[USER], completion=[ANSWER]))
    joined = encoder().completion(row(completion=[USER, ANSWER]))
    assert apart == joined
    assert bytes(apart.ids[apart.start : -1]) == b"yo"


def test_a_whole_conversation_wins_over_the_prompt_that_it_begins_with():
    expected = encoder().completion(row(completion=[USER, ANSWER]))
    for prompt in ("hi", " hi\n", [USER]):
        assert encoder().completion(row(prompt=prompt, completion=[USER, ANSWER])) == expected
        assert encoder().conversation(row(prompt=prompt, messages=[USER, ANSWER])) == expected
    with pytest.raises(UserError, match=r"a\.jsonl:7: completion is a conversation that the prompt is no part of"):
        encoder().completion(row(prompt="bye", completion=[USER, ANSWER]))


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
    with pytest.raises(UserError, match=r"a\.jsonl:7: the prompt has 44 tokens, the budget is 40.*too_long"):
        encoder().prompt(long)
    kept = encoder(too_long="truncate").prompt(long).ids
    assert len(kept) == 40
    assert kept[0] == BOS
    assert bytes(kept[1:]) == b"x" * 36 + b"end"


def test_prompt_and_completion_share_the_budget():
    with pytest.raises(UserError, match="the prompt has 31 tokens, the budget is 29"):
        encoder().completion(row(prompt="x" * 30, completion="y" * 20))
    with pytest.raises(UserError, match="completion has 61 tokens, the budget"):
        encoder().completion(row(prompt="x", completion="y" * 60))
    with pytest.raises(UserError, match="text has 62 tokens"):
        encoder().text(row(text="y" * 60))
    short = encoder(too_long="truncate").completion(row(prompt="x" * 30, completion="y" * 20))
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


def turns(*contents: str):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_chosen_and_rejected_keep_the_same_prompt_when_it_is_cut():
    chosen, rejected = encoder(too_long="truncate").pair(row(prompt="abc" * 13, chosen="y" * 20, rejected="n"))
    assert chosen.ids[: chosen.start] == rejected.ids[: rejected.start]
    assert bytes(chosen.ids[1 : chosen.start]) == (b"abc" * 13)[-28:]
    assert (chosen.ids[0], len(chosen.ids)) == (BOS, 50)
    assert rejected.ids[rejected.start :] == [ord("n"), EOS]


def test_whole_early_turns_go_first_and_the_system_message_stays():
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *turns("one", "two", "three", "four", "five")]
    whole = encoder(max_prompt_tokens=500, max_tokens=500)
    for left in ([system, *messages[3:]], [system, messages[5]]):
        oracle = whole.prompt(row(prompt=left))
        small = encoder(max_prompt_tokens=len(oracle.ids), max_tokens=500, too_long="truncate")
        cut = small.prompt(row(prompt=messages))
        assert (cut.ids, cut.text) == (oracle.ids, oracle.text)
        assert small.report(3) == ["1 of 3 rows: longer than the budget, and cut to it (first: a.jsonl:7)"]


def test_the_last_question_is_cut_behind_the_beginning_of_the_template():
    messages = [{"role": "system", "content": "Be brief."}, *turns("x" * 30 + "end?")]
    cut = encoder(too_long="truncate", max_prompt_tokens=50, max_tokens=90).prompt(row(prompt=messages))
    assert cut.ids[0] == BOS
    assert bytes(cut.ids[1:]) == b"system: Be brief.\nuser: " + b"x" * 9 + b"end?\nassistant: "
    assert cut.text == "<bos>system: Be brief.\nuser: xxxxxxxxxend?\nassistant: "
    with pytest.raises(TooLong, match=r"cannot be cut to 30 tokens: its template alone takes them"):
        encoder(too_long="truncate", max_prompt_tokens=30, max_tokens=90).prompt(row(prompt=messages))


def test_an_answer_that_is_too_long_loses_its_end_once_the_prompt_has_half_of_the_budget():
    example = encoder(too_long="truncate").completion(row(prompt="p" * 39, completion="c" * 80))
    assert (example.ids[0], example.start, len(example.ids)) == (BOS, 25, 50)
    assert bytes(example.ids[25:]) == b"c" * 25
    short = encoder(too_long="truncate").completion(row(prompt="p", completion="c" * 80))
    assert (short.start, bytes(short.ids[2:])) == (2, b"c" * 48)


def test_rows_over_budget_are_left_out_and_counted_on_request(capsys):
    rows = [Row(f"a.jsonl:{i}", {"prompt": "x" * n}) for i, n in enumerate((5, 60, 7, 70))]
    one = encoder(too_long="skip")
    assert [len(p.ids) for p in encode_rows(one, rows, Encoder.prompt, "data")] == [6, 8]
    assert capsys.readouterr().out == "data: 2 of 4 rows: too long, and left out (first: a.jsonl:1)\n"
    with pytest.raises(UserError, match=r"no row of data is left of 2; the last one: a\.jsonl:3: the prompt"):
        encode_rows(one, rows[1::2], Encoder.prompt, "data")
    with pytest.raises(TooLong, match=r"a\.jsonl:1: the prompt has 61 tokens"):
        encode_rows(encoder(), rows, Encoder.prompt, "data")


def test_special_tokens_that_the_text_has_are_not_added_again():
    one = encoder()
    assert one.prompt(row(prompt="<bos>ab")).ids == [BOS, 97, 98]
    assert one.completion(row(prompt="<bos>ab", completion="c<eos>")).ids == [BOS, 97, 98, 99, EOS]
    assert one.text(row(text="<bos>ab<eos>")).ids == [BOS, 97, 98, EOS]
    assert len(one.report(3)) == 2


def test_half_a_surrogate_pair_is_one_line_with_its_place():
    with pytest.raises(UserError, match=r"a\.jsonl:7: character 1 of the text is half of a pair \(U\+D83D\)"):
        encoder().prompt(row(prompt="a\ud83d"))
    with pytest.raises(UserError, match=r"a\.jsonl:7: .*U\+DC00"):
        encoder().conversation(row(messages=[USER, {"role": "assistant", "content": "\udc00"}]))


def test_ids_beyond_the_embeddings_are_refused_and_never_pad():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(UserError, match=r"a\.jsonl:7: the tokenizer has '<tool>' as id 259, .* for 259 ids only"):
        encoder(tokenizer=tokenizer, vocab_size=259).prompt(row(prompt="a<tool>"))
    assert pad_id(tokenizer, 256) == 0
    assert encoder(vocab_size=257).pad_id == 256
    with pytest.raises(UserError, match="'<eos>' as id 258"):
        encoder(vocab_size=258).completion(row(prompt="a", completion="b"))


def test_answers_in_different_conversations_are_no_pair():
    with pytest.raises(UserError, match=r"a\.jsonl:7: chosen and rejected must differ in their last answer alone"):
        encoder().pair(row(chosen=turns("a", "b", "c", "d"), rejected=turns("a", "x", "c", "d")))
    trimmed = row(chosen=turns(" hi ", "yo"), rejected=turns("hi", "no"))
    chosen, rejected = encoder().pair(trimmed)
    assert chosen.ids[: chosen.start] == rejected.ids[: rejected.start]


def test_the_prompt_of_a_pair_is_sampled_as_it_is_trained_on():
    whole = row(prompt="hi", chosen=[USER, ANSWER], rejected=[USER, {**ANSWER, "content": "no"}])
    chosen, _ = encoder().pair(whole)
    prompt = encoder().pair_prompt(whole)
    assert prompt.ids == chosen.ids[: chosen.start]
    assert prompt.columns["prompt"] == [USER]
    assert encoder().pair_prompt(row(prompt="hi", chosen="a", rejected="b")).columns["prompt"] == "hi"
    with pytest.raises(UserError, match="the pair has no prompt"):
        encoder().pair_prompt(row(chosen="a", rejected="b"))


@pytest.mark.parametrize(("prompt", "match"), [("", "the prompt is empty"), ([], "the prompt is empty"),
                                               ([{"role": "user", "content": 3}], "with text, got dict")])  # fmt: skip
def test_a_prompt_without_text_is_refused(prompt, match):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match=rf"a\.jsonl:7: .*{match}"):
        encoder(tokenizer=tokenizer).prompt(row(prompt=prompt))


def test_rows_that_cannot_be_encoded_are_left_out_and_counted_on_request(capsys):
    good, bad = [USER, ANSWER], [USER, {"role": "tool", "content": "x"}]
    rows = [Row(f"a.jsonl:{i}", {"messages": messages}) for i, messages in enumerate((good, bad, good, bad))]
    one = encoder(bad_rows="skip")
    assert len(encode_rows(one, rows, Encoder.conversation, "data")) == 2
    said = (
        "data: 2 of 4 rows: left out (first: a.jsonl:1: the last message must be an answer, but its role is 'tool')\n"
    )
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"a\.jsonl:1: the last message must be an answer"):
        encode_rows(encoder(), rows, Encoder.conversation, "data")


def test_megabytes_are_cut_before_they_are_tokenised(monkeypatch):
    seen = []
    ids = Tokens.ids
    monkeypatch.setattr(Tokens, "ids", lambda self, where, text: seen.append(len(text)) or ids(self, where, text))
    small, large = (
        row(prompt="ab" * n + "c", completion="de" * n, messages=[{**USER, "content": "ab" * n}, ANSWER])
        for n in (50_000, 5_000_000)
    )  # both over the budget, and only one over MANY
    cutting = encoder(too_long="truncate")
    assert cutting.prompt(large).ids == cutting.prompt(small).ids
    assert cutting.completion(large) == cutting.completion(small)
    assert cutting.conversation(large) == cutting.conversation(small)
    few, many = (row(prompt="ab", completions=["de" * n, *["f"] * n]) for n in (50_000, 500_000))
    seen.clear()
    (start, ids, ends), (_, same, others) = (cutting.steps(steps, "\n") for steps in (few, many))
    assert (ids[:-1], set(ends), set(others)) == (same[: len(ids) - 1], {len(ids) - 1}, {len(same) - 1})
    assert start < cutting.max_tokens < len(ids)
    assert (max(seen), len(ends), len(others)) == (MANY, 50_001, 500_001)
    assert len(seen) < 20
    assert cutting.report(3)[0].startswith("1 of 3 rows: longer than the budget, and cut to it")
    with pytest.raises(TooLong, match=r"a\.jsonl:7: completion has a text of 10,000,001 characters, and the budget"):
        encoder().completion(large)


def test_a_text_that_the_budget_may_hold_is_not_cut():
    wide = encoder(max_tokens=MANY + 500, max_prompt_tokens=MANY + 500)
    assert len(wide.prompt(row(prompt="x" * (MANY + 10))).ids) == MANY + 11


def test_a_special_token_without_an_id_is_none():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = ""
    assert encoder(tokenizer=tokenizer).completion(row(prompt="ab", completion="c")).ids[-2:] == [99, EOS]


def test_a_completion_is_text_or_messages():
    with pytest.raises(UserError, match=r"a\.jsonl:7: a prompt or completion is text or a list of messages, got int 5"):
        encoder().answers(row(prompt="ab", completions=["a", 5]))
