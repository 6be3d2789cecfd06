"""What a row says: a prompt and completions of it, as plain text or as a conversation."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_fast.data.messages import LEADING, Message, begins, split_pair
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.data.templates import ChatTemplate
from rlhf_fast.errors import UserError

ASSISTANT = ("assistant", "model")
Text = str | list[Message]


@dataclass(frozen=True)
class Exchange:
    """A prompt, and the completions of it that belong together (none: the prompt alone).

    prompt: text, and each completion too; or messages, and each completion a list of messages.
    prefilled: a completion goes on with the prompt's last message. earlier: the prompt's own answers may be learnt too.
    learnt: False where the ids are only to be scored, however the template opens an answer.
    """

    row: Row
    prompt: Text
    completions: list[Any]
    prefilled: bool = False
    earlier: bool = False
    learnt: bool = True

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        return checked_tools(self.row.where, self.row.values.get("tools"))

    def messages(self, completion: list[Message]) -> list[Message]:
        """The whole conversation."""
        assert isinstance(self.prompt, list)
        if self.prefilled:
            return [*self.prompt[:-1], joined(self.prompt[-1], completion[0]), *completion[1:]]
        return [*self.prompt, *completion]

    def texts(self) -> list[str]:
        """Every text of it, by itself."""
        found: list[str] = []

        def noted(text: str) -> str:
            found.append(text)
            return text

        self.with_texts(noted, noted)
        return found

    def with_texts(self, prompt: Callable[[str], str], completion: Callable[[str], str]) -> "Exchange":
        """With `prompt` of every text of the prompt, and `completion` of every text of the completions."""
        return replace(
            self,
            prompt=_with_text(self.prompt, prompt),
            completions=[_with_text(c, completion) for c in self.completions],
        )

    def shorter(self) -> "Exchange | None":
        """Without the first turn behind the system message; None where the prompt has but one turn."""
        if isinstance(self.prompt, str):
            return None
        start = next((i for i, m in enumerate(self.prompt) if m["role"] not in LEADING), 0)
        turns = [i for i, m in enumerate(self.prompt) if i > start and m["role"] == "user"]
        if not turns:
            return None
        prompt = [*self.prompt[:start], *self.prompt[turns[0] :]]
        return replace(self, prompt=prompt)


def _with_text(value: Any, change: Callable[[str], str]) -> Any:
    """`change` of a text, of the contents of messages, and of the text in their parts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_text(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _with_text(x, change) if key in ("content", "text") else x for key, x in value.items()}
    return value


@dataclass(frozen=True)
class Exchanges:
    """Reads rows with the columns prompt, completion, completions, chosen, rejected, messages, text.

    chat: 'auto': what is a list is a conversation. True: plain prompts are user messages. False: lists are refused.
    """

    template: ChatTemplate
    chat: Literal["auto"] | bool

    def prompt(self, row: Row) -> Exchange:
        return self._exchange(row, row.values["prompt"], [])

    def completion(self, row: Row) -> Exchange:
        prompt, completion = self._parts(row)
        return self._exchange(row, prompt, [completion], earlier=True)

    def pair(self, row: Row) -> Exchange:
        values = split_pair(row)
        return self._exchange(row, values.get("prompt") or "", [values["chosen"], values["rejected"]])

    def answers(self, row: Row) -> Exchange:
        return self._exchange(row, row.values.get("prompt") or "", row.values["completions"])

    def conversation(self, row: Row) -> Exchange:
        before, answer = self._answered(row, row.values["messages"])
        return Exchange(row, before, [answer], earlier=True)

    def text(self, row: Row) -> Exchange:
        if not isinstance(row.values["text"], str):
            raise UserError(f"{row.where}: column 'text' must be text; put conversations in 'messages'")
        return Exchange(row, "", [row.values["text"]])

    def _parts(self, row: Row) -> tuple[Text, Any]:
        """(prompt, completion). A whole conversation in `completion` brings its own prompt."""
        prompt, completion = row.values.get("prompt") or "", row.values["completion"]
        if isinstance(completion, str):
            return prompt, completion
        self._check(row, completion)
        if completion[0]["role"] in ASSISTANT:
            return prompt, completion
        before, answer = self._answered(row, completion)
        if prompt and not begins(prompt, before):
            raise UserError(f"{row.where}: completion is a conversation that the prompt is no part of: {shown(prompt)}")
        return before, answer

    def _exchange(self, row: Row, prompt: Text, completions: list[Any], *, earlier: bool = False) -> Exchange:
        """Text stays text, unless the prompt, a completion or `chat` makes it a conversation."""
        strange = next((x for x in (prompt, *completions) if not isinstance(x, str | list)), None)
        if strange is not None:
            raise UserError(f"{row.where}: a prompt or completion is text or a list of messages, got {shown(strange)}")
        listed = isinstance(prompt, list) or any(isinstance(c, list) for c in completions)
        wrapped = self.chat is True and isinstance(prompt, str) and bool(prompt)
        if not listed and not (wrapped and not self.template.has_rendered(str(prompt))):
            return Exchange(row, prompt, completions)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        elif prompt:
            self._check(row, prompt)
        answers = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        for completion in answers:
            self._answered(row, completion)
        if not prompt and not answers:
            raise UserError(f"{row.where}: the prompt is empty")
        prefilled = bool(prompt) and prompt[-1]["role"] in ASSISTANT and not prompt[-1].get("tool_calls")
        return Exchange(row, prompt, answers, prefilled, earlier)

    def _answered(self, row: Row, messages: Any) -> tuple[list[Message], list[Message]]:
        """The messages before the last, and the last, which must be an answer."""
        self._check(row, messages)
        *before, last = messages
        if last["role"] not in ASSISTANT:
            raise UserError(f"{row.where}: the last message must be an answer, but its role is {last['role']!r}")
        return before, [last]

    def _check(self, row: Row, messages: Any) -> None:
        if self.chat is False:
            raise UserError(f"{row.where}: found a list of messages, but chat is false")
        checked_messages(row.where, messages)


def checked_messages(where: str, messages: Any) -> list[Message]:
    """`messages` when it is a conversation: roles, and contents of text, of text parts, or none beside tool calls."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: a conversation must be a list of {{role, content}} messages, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _readable(message):
            raise UserError(
                f"{where}: a conversation must be a list of {{role, content}} messages with text, got {shown(message)}"
            )
    return messages


def _readable(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, list) and content:
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    other = any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    return isinstance(content, str) or (content is None and other)


def checked_tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """The `tools` of a row: a list of JSON schemas, or that as a JSON string; none for an empty one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: column 'tools' is not JSON: {error.msg} (column {error.colno})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: column 'tools' must be a list of JSON schemas, got {type(tools).__name__}")
    return tools


def joined(message: Message, more: Message) -> Message:
    """One assistant message from its beginning and the rest, which may bring further fields."""
    start, rest = message.get("content") or "", more.get("content") or ""
    if isinstance(start, list) or isinstance(rest, list):
        start, rest = (c if isinstance(c, list) else [{"type": "text", "text": c}] for c in (start, rest))
        content: Any = [*start[:-1], {**start[-1], "text": start[-1]["text"] + rest[0]["text"]}, *rest[1:]]
    else:
        content = start + rest
    return {**message, **more, "role": message["role"], "content": content}


def plain(content: Any) -> str:
    """A message's content as text, without the spaces around it."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return (content or "").strip()
