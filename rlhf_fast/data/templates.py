"""Conversations as a chat template renders them: what opens an answer, what ends it, which text is rendered already."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_fast.data.messages import Message
from rlhf_fast.data.rendering import Renderer
from rlhf_fast.data.tokens import Tokens
from rlhf_fast.errors import UserError

# Stands for a message's content where the text around it is asked for: plain letters, which no template changes.
_MARK = "xMARKx"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TurnEnd:
    """What closes an answer.

    text: as the template renders it; until_stop: its part that a model writes. ids: its tokens. stop: the one of them
    at which a model stops; what follows it is read by the model in the next turn, and never written by it. eos_added:
    the template has no such token, so EOS is behind what it renders.
    """

    text: str
    until_stop: str
    ids: tuple[int, ...]
    stop: int
    eos_added: bool = False

    def missing(self, completion: Sequence[int]) -> list[int]:
        """The ids that a sampled completion lacks of its closed turn."""
        closed = bool(completion) and completion[-1] == self.stop
        return list(self.ids[self.ids.index(self.stop) + 1 :] if closed else self.ids)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer. What it says of itself is learnt by rendering, never assumed."""

    tokens: Tokens
    name: str = "the tokenizer"

    @property
    def exists(self) -> bool:
        return self.tokens.tokenizer.chat_template is not None

    def render(
        self, where: str, messages: Sequence[Message], tools: Any = None, *, opening: bool = False, more: bool = False
    ) -> str:
        """The conversation as text.

        opening: with what opens an answer. more: up to the last character of the last message, which goes on.
        Whatever the template raises is a UserError that names the row.
        """
        if not self.exists:
            raise UserError(f"{where}: a conversation needs a chat template, and {self.name} has none")
        try:
            return str(
                self._renderer(
                    [self._taken(message) for message in messages], tools=tools, tokenize=False,
                    add_generation_prompt=opening, continue_final_message=more,
                )
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a template is code of its own and may raise anything
            message = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: the chat template refuses this conversation: {message[:300]}") from None

    def written(self, where: str, messages: Sequence[Message], tools: Any) -> list[int] | None:
        """1 for each token that the template marks as the assistant's by `{% generation %}`; None where it marks
        none."""
        tokenizer = self.tokens.tokenizer
        if not tokenizer.is_fast or not _GENERATION.search(tokenizer.get_chat_template(None, tools)):
            return None
        encoded: Any = self._renderer(
            [self._taken(message) for message in messages], tools=tools, return_dict=True,
            return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False},
        )  # fmt: skip
        mask = list(encoded["assistant_masks"])
        return mask if any(mask) else None

    def behind(self, where: str, messages: Sequence[Message], index: int, tools: Any) -> str | None:
        """The text behind the content of message `index`, or None where the template does not render that content."""
        marked = [{**m, "content": _MARK} if i == index else m for i, m in enumerate(messages)]
        text = self.render(where, marked, tools)
        return text[text.rindex(_MARK) + len(_MARK) :] if _MARK in text else None

    def before(self, where: str, messages: Sequence[Message], index: int, tools: Any) -> str | None:
        """The text before the content of message `index`, or None where the template does not render that content."""
        marked = [{**m, "content": _MARK} if i == index else m for i, m in enumerate(messages)]
        text = self.render(where, marked, tools, opening=True)
        return text[: text.index(_MARK)] if _MARK in text else None

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokens.tokenizer)

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What follows the content of a last answer. A template that ends it in no special token gets EOS behind it."""
        text = self._probe("the chat template", [_user("hi"), _assistant(_MARK)])
        end = text[text.rindex(_MARK) + len(_MARK) :]
        ids = self.tokens.ids("the chat template", text)
        start, _ = self.tokens.boundary("the chat template", text, ids, len(text) - len(end))
        closing = ids[start:]
        stop = next((i for i in closing if i in self._specials), None)
        if stop is None:
            eos = self.tokens.tokenizer.eos_token_id
            if eos is None:
                raise UserError(
                    f"the chat template ends an answer in {end!r}, and {self.name} has no EOS: it never ends"
                )
            return TurnEnd(end, end, (*closing, eos), eos, eos_added=True)
        token = self._token(stop)
        until_stop = end[: end.index(token) + len(token)] if token in end else end
        return TurnEnd(end, until_stop, tuple(closing), stop)

    @cached_property
    def user_opening(self) -> tuple[str, str]:
        """The text before and behind a first user message that is to be answered, without BOS and EOS."""
        text = self._probe("the chat template", [_user(_MARK)], opening=True)
        # A template may render a message twice.
        return self._without_ends(text.partition(_MARK)[0]), self._without_ends(text.rpartition(_MARK)[2])

    @cached_property
    def starts_with_bos(self) -> bool:
        bos = self.tokens.tokenizer.bos_token
        return bool(bos) and self._probe("the chat template", [_user(_MARK)], opening=True).startswith(bos)

    def has_rendered(self, text: str) -> bool:
        """Whether `text` is a conversation that this template has rendered already."""
        if not self.exists:
            return False
        try:
            header, opening = self.user_opening
        except UserError:  # what this template cannot render, it has not rendered
            return False
        marker = self._from_special(header)
        if marker:
            return marker.strip() in text
        start, end = header.strip(), opening.strip()
        return bool(start and end) and self._without_ends(text).lstrip().startswith(start) and end in text

    def rendered_head(self, text: str) -> int:
        """How many characters of a rendered text are the template's beginning, up to the first user message."""
        header = self._from_special(self.user_opening[0]) or self.user_opening[0]
        return text.index(header) + len(header) if header in text else 0

    def _from_special(self, text: str) -> str:
        """The text from its last special token on; empty where it has none."""
        places = [text.rindex(token) for token in map(self._token, self._specials) if token in text]
        return text[max(places) :] if places else ""

    @cached_property
    def _takes(self) -> tuple[bool, bool]:
        """Whether contents may be text, and whether they may be a list of text parts."""
        taken = []
        contents: list[Any] = [_MARK, [{"type": "text", "text": _MARK}]]
        for content in contents:
            try:
                text = str(self._renderer([{"role": "user", "content": content}], tokenize=False))
            except Exception:  # noqa: BLE001 - a refusal is the answer
                text = ""
            taken.append(_MARK in text and f"'{_MARK}'" not in text and f'"{_MARK}"' not in text)
        return taken[0], taken[1]

    def _taken(self, message: Message) -> Message:
        """The message with its content in a form that the template takes."""
        content, (text, parts) = message.get("content"), self._takes
        if isinstance(content, list) and not parts and text:
            return {**message, "content": "".join(part["text"] for part in content)}
        if isinstance(content, str) and parts and not text:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _probe(self, where: str, messages: list[Message], *, opening: bool = False) -> str:
        text = self.render(where, messages, opening=opening)
        if _MARK not in text:
            raise UserError(f"the chat template of {self.name} leaves out the content of a message: {text[:100]!r}")
        return text

    @cached_property
    def _specials(self) -> frozenset[int]:
        """Ids of added tokens other than white space, which some vocabularies have among them."""
        tokenizer = self.tokens.tokenizer
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        return frozenset(i for i in added | set(tokenizer.all_special_ids) if i is not None)  # None: of the token ""

    def _token(self, index: int) -> str:
        return str(self.tokens.tokenizer.convert_ids_to_tokens(index))

    def _without_ends(self, text: str) -> str:
        tokenizer = self.tokens.tokenizer
        for token in (tokenizer.bos_token, tokenizer.eos_token):
            text = text.replace(token, "") if token else text
        return text


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
