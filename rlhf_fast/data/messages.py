"""Lists of messages: their spellings brought to {role, content}, and a pair of conversations taken apart."""

import re
from typing import Any

from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError

Message = dict[str, Any]
ANSWERING = ("assistant", "model", "tool")
LEADING = ("system", "developer")
# ShareGPT's names (https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered) and those of its heirs.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def spelled_out(value: Any, where: str) -> Any:
    """`value` with {from, value} messages as {role, content}; parquet's {role: [...], content: [...]} as a list of
    messages, and one message as a list of one. Everything else is left alone."""
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        lists = [column for column in value.values() if isinstance(column, list)]
        if len(lists) < len(value):
            return [value]
        if len({len(column) for column in lists}) == 1:
            return [dict(zip(value, fields, strict=True)) for fields in zip(*lists, strict=True)]
    if isinstance(value, dict) and {"from", "value"} <= value.keys():
        value = [value]
    if isinstance(value, list) and value and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value):
        return [{"role": _role(m["from"], where), "content": m["value"]} for m in value]
    return value


def _role(name: Any, where: str) -> str:
    if not isinstance(name, str) or name.lower() not in _ROLES:
        raise UserError(f"{where}: a message is from {name!r}; known: {', '.join(_ROLES)}")
    return _ROLES[name.lower()]


def check_text_or_messages(row: Row, column: str, *, text: bool = True, messages: bool = True) -> None:
    """UserError unless the row's column holds what a column of that name may hold."""
    value = row.values.get(column)
    if value is None:
        state = "is null" if column in row.values else "is missing"
        raise UserError(f"{row.where}: column {column!r} {state}")
    if isinstance(value, str) and text:
        if messages and _AS_TEXT.match(value):
            raise UserError(f"{row.where}: column {column!r} holds a conversation written as text: {shown(value)}; "
                            "it must be a list of messages, which JSONL and parquet can hold")  # fmt: skip
        return
    if isinstance(value, list) and messages:
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"{row.where}: column {column!r} must be a list of {{role, content}} messages; "
                                f"number {number} is {shown(message)}")  # fmt: skip
        if value:
            return
    wanted = " or ".join(["text"] * text + ["a list of messages"] * messages)
    raise UserError(f"{row.where}: column {column!r} must be {wanted}, got {shown(value)}")


def trimmed(messages: list[Message]) -> list[Message]:
    """The messages without the white space around their text, which templates take off."""
    return [{**m, "content": m["content"].strip()} if isinstance(m.get("content"), str) else m for m in messages]


def split_pair(row: Row) -> dict[str, Any]:
    """The row's values with whole conversations in `chosen` and `rejected` taken apart into `prompt`, the messages that
    they share, and the answers that follow.

    Raises UserError where chosen and rejected differ before the last answer, or where a `prompt` beside them is no
    part of them; white space around a message makes no difference.
    """
    for column in ("chosen", "rejected", *(["prompt"] if "prompt" in row.values else [])):
        check_text_or_messages(row, column)
    chosen, rejected = row.values["chosen"], row.values["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return row.values
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{row.where}: one of chosen and rejected is text, the other a list of messages")
    answers = [answer[0]["role"] in ANSWERING for answer in (chosen, rejected)]
    if all(answers):
        if not row.values.get("prompt"):
            raise UserError(f"{row.where}: chosen and rejected begin with an answer, and there is no prompt before it")
        return row.values
    start = _fork(row, chosen, rejected)
    prompt = row.values.get("prompt", "")
    if prompt and not begins(prompt, chosen[:start]):
        raise UserError(f"{row.where}: chosen is a conversation that the prompt is no part of: {shown(prompt)}")
    return {**row.values, "prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _fork(row: Row, chosen: list[Message], rejected: list[Message]) -> int:
    """Where the answers begin: after the messages that both conversations share, the last one of each apart."""
    pairs = zip(trimmed(chosen[:-1]), trimmed(rejected[:-1]), strict=False)
    start = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(chosen), len(rejected)) - 1)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] not in ANSWERING:
            raise UserError(f"{row.where}: the last message of {name} must be an answer, "
                            f"but its role is {messages[-1]['role']!r}")  # fmt: skip
        if messages[start]["role"] == "tool" or any(m["role"] not in ANSWERING for m in messages[start:]):
            raise UserError(f"{row.where}: chosen and rejected must differ in their last answer alone, but they differ "
                            f"in message {start + 1} already; bad_rows: skip leaves such rows out")  # fmt: skip
    return start


def begins(prompt: Any, messages: list[Message]) -> bool:
    """Whether `prompt` is what the conversation begins with: its messages, its first ones, or a user's text in it."""
    messages = trimmed(messages)
    if isinstance(prompt, str):
        return prompt.strip() in [m.get("content") for m in messages if m["role"] == "user"]
    given = trimmed(prompt)
    spoken = [m for m in messages if m["role"] not in LEADING]
    return given in (messages[: len(given)], spoken[: len(given)])
