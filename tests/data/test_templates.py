"""The oracle is the template's own rendering, tokenised by transformers."""

import json
import re

import pytest

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from tests.data.chat import RETURNING, SPOKEN, TEMPLATES, THINKING, TOKENIZERS, tokenizer_of

USER = {"role": "user", "content": "What is the capital of Italy? "}
ANSWER = {"role": "assistant", "content": " It is Rome."}
AGAIN = {"role": "user", "content": "Is it warm?"}
LAST = {"role": "assistant", "content": "yes, quite warm"}
STOPS = {"gemma": "<end_of_turn>", "llama 3": "<|eot_id|>", "llama 2": "</s>", "mistral": "</s>", "zephyr": "</s>",
         "phi": "<|end|>"}  # fmt: skip


def encoder(tokenizer, **changes) -> Encoder:
    return Encoder(**{"tokenizer": tokenizer, "max_prompt_tokens": 500, "max_tokens": 500, **changes})


def row(**values) -> Row:
    return Row("a.jsonl:7", values)


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def in_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def learnt_text(tokenizer, example) -> str:
    return tokenizer.decode([i for i, m in zip(example.ids, example.learnt, strict=True) if m])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_conversation_has_the_ids_of_its_rendering_and_learns_the_answer_up_to_the_stop_token(name, kind):
    tokenizer = tokenizer_of(kind, TEMPLATES[name])
    messages = [USER, ANSWER, AGAIN, LAST]
    if name == "text parts":
        messages = in_parts(messages)
    example = encoder(tokenizer).conversation(row(messages=messages))
    assert example.ids == rendered(tokenizer, messages)
    learnt = [i for i, m in zip(example.ids, example.learnt, strict=True) if m]
    stop = tokenizer.convert_tokens_to_ids(STOPS.get(name, "<|im_end|>"))
    assert learnt[-1] == stop
    if name == "generation" and kind != "slow":  # without offsets the marks say nothing
        answers = [m for m in messages if m["role"] == "assistant"]
        assert learnt.count(stop) == len(answers)
        return
    prompt = rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    assert example.ids[: len(prompt)] == prompt
    assert example.learnt[: len(prompt)] == [0] * len(prompt)
    assert all(example.learnt[len(prompt) : len(prompt) + len(learnt)])
    assert encoder(tokenizer).prompt(row(prompt=messages[:-1])).ids == prompt
    assert encoder(tokenizer).completion(row(prompt=messages[:-1], completion=[messages[-1]])) == example
    pair = row(prompt=messages[:-1], chosen=messages, rejected=messages)
    assert encoder(tokenizer).pair(pair) == (example, example)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "generation"])
@pytest.mark.parametrize("kind", ["byte level", "legacy llama"])
def test_every_answer_is_learnt_on_request(name, kind):
    """What is learnt, decoded, are the answers as the template renders them, each with its end."""
    tokenizer = tokenizer_of(kind, TEMPLATES[name])
    messages = [USER, ANSWER, AGAIN, LAST]
    example = encoder(tokenizer, train_on="all_assistant").conversation(row(messages=messages))
    assert example.ids == rendered(tokenizer, in_parts(messages) if name == "text parts" else messages)
    stop = STOPS.get(name, "<|im_end|>")
    think = "<think>\n\n</think>\n\n" if name == "qwen 3" else ""
    learnt = re.sub(r"\s", "", learnt_text(tokenizer, example))
    assert learnt == re.sub(r"\s", "", f"It is Rome.{stop}{think}yes, quite warm{stop}")


def test_the_marks_of_a_template_come_first():
    tokenizer = tokenizer_of("byte level", TEMPLATES["generation"])
    messages = [USER, ANSWER, AGAIN, LAST]
    oracle = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    example = encoder(tokenizer).conversation(row(messages=messages))
    assert (example.ids, example.learnt) == (oracle["input_ids"], oracle["assistant_masks"])
    # The answers of a prompt are no part of the completion.
    chosen, _ = encoder(tokenizer).pair(row(chosen=messages, rejected=messages))
    assert learnt_text(tokenizer, chosen) == "yes, quite warm<|im_end|>"


def test_an_earlier_answer_that_no_model_would_write_so_is_refused():
    tokenizer = tokenizer_of("byte level", RETURNING)
    messages = [USER, ANSWER, AGAIN, LAST]
    example = encoder(tokenizer).conversation(row(messages=messages))
    assert example.ids == rendered(tokenizer, messages)
    assert learnt_text(tokenizer, example) == "<|message|>yes, quite warm<|return|>"
    with pytest.raises(UserError, match=r"a\.jsonl:7: cannot tell which tokens .* are message 1"):
        encoder(tokenizer, train_on="all_assistant").conversation(row(messages=messages))


def test_an_answer_that_is_opened_otherwise_than_it_is_rendered_is_refused():
    tokenizer = tokenizer_of("byte level", THINKING)
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template opens an answer with '<think>\\n', but"):
        encoder(tokenizer).conversation(row(messages=[USER, ANSWER]))
    # To be scored, it is what the template renders.
    assert encoder(tokenizer).scored([USER], ANSWER["content"]) == rendered(tokenizer, [USER, ANSWER])


def test_a_template_without_a_token_that_ends_a_turn_gets_eos():
    tokenizer = tokenizer_of("byte level", SPOKEN)
    one = encoder(tokenizer)
    example = one.conversation(row(messages=[USER, LAST]))
    assert example.ids == [*rendered(tokenizer, [USER, LAST]), tokenizer.eos_token_id]
    assert learnt_text(tokenizer, example) == " yes, quite warm\n</s>"
    assert one.prompt(row(prompt=[USER])).turn_end.stop == tokenizer.eos_token_id
    assert "ends answers in no special token" in one.report(1)[0]


@pytest.mark.parametrize("name", ["qwen 3", "tools"])
def test_tool_calls_and_reasoning_are_learnt_as_the_template_renders_them(name):
    tokenizer = tokenizer_of("byte level", TEMPLATES[name])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    calling = {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [call]}
    example = encoder(tokenizer).conversation(row(messages=[USER, calling]))
    assert example.ids == rendered(tokenizer, [USER, calling])
    learnt = learnt_text(tokenizer, example)
    assert '"arguments": {"city": "Rome"}' in learnt
    assert learnt.endswith("</tool_call><|im_end|>")
    assert ("I must look." in learnt) == (name == "qwen 3")
    messages = [USER, calling, {"role": "tool", "content": "sunny"}, LAST]
    example = encoder(tokenizer, train_on="all_assistant").conversation(row(messages=messages))
    assert example.ids == rendered(tokenizer, messages)
    learnt = learnt_text(tokenizer, example)
    assert learnt.count("<|im_end|>") == 2
    assert "</tool_call>" in learnt
    assert "sunny" not in learnt
    # The whole continuation of an explicit prompt is its completion.
    chosen, rejected = encoder(tokenizer).pair(row(prompt=[USER], chosen=messages[1:], rejected=[LAST]))
    assert learnt_text(tokenizer, chosen) == learnt
    assert chosen.ids[: chosen.start] == rejected.ids[: rejected.start]


def test_tools_reach_the_template_as_a_list_and_as_json():
    tokenizer = tokenizer_of("byte level", TEMPLATES["tools"])
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    oracle = rendered(tokenizer, [USER, LAST], tools=tools)
    for column in (tools, json.dumps(tools)):
        assert encoder(tokenizer).conversation(row(messages=[USER, LAST], tools=column)).ids == oracle
        prompt = encoder(tokenizer).prompt(row(prompt=[USER], tools=column)).ids
        assert prompt == rendered(tokenizer, [USER], tools=tools, add_generation_prompt=True)
    for broken in ("{", "[1]", {"name": "weather"}):
        with pytest.raises(UserError, match=r"a\.jsonl:7: column 'tools'"):
            encoder(tokenizer).prompt(row(prompt=[USER], tools=broken))


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama 2", "text parts"])
def test_a_prompt_that_ends_in_an_answer_is_gone_on_with(name):
    tokenizer = tokenizer_of("byte level", TEMPLATES[name])
    started = {"role": "assistant", "content": "Sure, "}
    oracle = rendered(tokenizer, [USER, started], continue_final_message=True) if name != "text parts" else None
    prompt = encoder(tokenizer).prompt(row(prompt=[USER, started]))
    if oracle is not None:
        assert prompt.ids == oracle
    whole = {"role": "assistant", "content": "Sure, it is Rome."}
    for completion in ("it is Rome.", [{"role": "assistant", "content": "it is Rome."}]):
        example = encoder(tokenizer).completion(row(prompt=[USER, started], completion=completion))
        assert example == encoder(tokenizer).completion(row(prompt=[USER, started], completion="it is Rome."))
        assert example.ids == encoder(tokenizer).conversation(row(messages=[USER, whole])).ids
        assert learnt_text(tokenizer, example).strip().startswith("it is Rome.")


def test_contents_in_parts_are_text_where_the_template_takes_only_text():
    tokenizer = tokenizer_of("byte level")
    parts = [{**USER, "content": [{"type": "text", "text": USER["content"]}]}, ANSWER]
    assert encoder(tokenizer).conversation(row(messages=parts)).ids == rendered(tokenizer, [USER, ANSWER])
    image = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}, ANSWER]
    with pytest.raises(UserError, match=r"must be a list of \{role, content\} messages"):
        encoder(tokenizer).conversation(row(messages=image))


@pytest.mark.parametrize("role", ["tool", "user", "system", "function"])
def test_only_an_assistant_answers(role):
    tokenizer = tokenizer_of("byte level")
    with pytest.raises(UserError, match=f"must be an answer, but its role is '{role}'"):
        encoder(tokenizer).conversation(row(messages=[USER, {"role": role, "content": "sunny"}]))


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content.missing.name }}", "{{ 1 + messages[0].content }}", "{% if %}"]
)
def test_what_a_template_raises_is_one_line_with_the_row(template):
    with pytest.raises(UserError, match=r"^a\.jsonl:7: the chat template refuses this conversation: .+") as error:
        encoder(tokenizer_of("byte level", template)).prompt(row(prompt=[USER]))
    assert "\n" not in str(error.value)


def test_a_system_message_that_the_template_refuses_is_named():
    tokenizer = tokenizer_of("byte level", TEMPLATES["gemma"])
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template refuses .*: System role not supported"):
        encoder(tokenizer).conversation(row(messages=[{"role": "system", "content": "x"}, USER, ANSWER]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_is_rendered_already_is_not_rendered_again(name):
    """With the tokenizer's own BOS, the template's, or the text's, there is as much of it as in the rendering."""
    tokenizer = tokenizer_of("legacy llama", TEMPLATES[name])
    asked, answered = [USER], [USER, LAST]
    if name == "text parts":
        asked, answered = in_parts(asked), in_parts(answered)
    prompt = rendered(tokenizer, asked, add_generation_prompt=True)
    text = rendered(tokenizer, asked, add_generation_prompt=True, tokenize=False)
    for chat in ("auto", True):
        one = encoder(tokenizer, chat=chat)
        assert one.prompt(row(prompt=text)).ids == prompt
        assert one.prompt(row(prompt=text.removeprefix("<s>"))).ids == prompt
        assert "already rendered" in " ".join(one.report(1))
    whole = rendered(tokenizer, answered, tokenize=False)
    assert encoder(tokenizer).text(row(text=whole)).ids == rendered(tokenizer, answered)
    example = encoder(tokenizer).completion(row(prompt=text, completion=whole[len(text) :]))
    assert example == encoder(tokenizer).completion(row(prompt=[USER], completion=[LAST]))


def test_an_answer_that_brings_its_end_along_gets_it_once():
    tokenizer = tokenizer_of("byte level")
    one = encoder(tokenizer)
    ended = {**LAST, "content": LAST["content"] + "<|im_end|>\n"}
    assert one.conversation(row(messages=[USER, ended])).ids == rendered(tokenizer, [USER, LAST])
    assert "not added again" in one.report(1)[0]


def test_a_call_that_ends_otherwise_than_an_answer_is_not_learnt_into_the_result():
    ending = TEMPLATES["tools"].replace("{{ '<|im_end|>\\n' }}{% endfor %}", (
        "{{ '<|end|>' if m['tool_calls'] else '<|im_end|>\\n' }}{% endfor %}"))  # fmt: skip
    assert ending != TEMPLATES["tools"]
    calling = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [USER, calling, {"role": "tool", "content": "sunny"}, LAST]
    tokenizer = tokenizer_of("byte level", ending)
    assert learnt_text(tokenizer, encoder(tokenizer).conversation(row(messages=messages))).count("<|im_end|>") == 1
    with pytest.raises(UserError, match=r"cannot tell which tokens .* are message 1"):
        encoder(tokenizer, train_on="all_assistant").conversation(row(messages=messages))


def test_a_template_that_renders_a_message_twice_has_a_beginning_and_an_end():
    tokenizer = tokenizer_of("byte level", "{% for m in messages %}<s>{{ m.content }} {{ m.content }}</s>{% endfor %}")
    prompt = encoder(tokenizer).prompt(row(prompt="plain"))
    assert prompt.text == "plain"
    assert encoder(tokenizer).template.user_opening[1] == ""
