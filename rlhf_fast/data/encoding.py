"""Text and conversations to token ids: prompts, completions, chat templates, length budgets."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError

Text = str | list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete: its token ids, its text as the model reads it, and the row's other columns."""

    where: str
    ids: list[int]
    text: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A prompt with its completion: `ids[start:]` are the completion's tokens, EOS included."""

    ids: list[int]
    start: int


def quiet_libraries() -> None:
    """No progress bars and warnings of transformers' own: what matters to the user is reported by us."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder; UserError when there is none or it has no EOS token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer in {folder}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no EOS token, so completions could never end")
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with that is not EOS (masks come from lengths, so any other id will do)."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, 0, 1)
    return next(i for i in candidates if i is not None and i != tokenizer.eos_token_id)


@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one tokenizer.

    chat: 'auto' applies the chat template to lists of messages and leaves plain text alone; True also
        wraps plain prompts as one user message; False rejects lists of messages.
    max_prompt_tokens, max_tokens: budgets for the prompt and for prompt + completion. A longer prompt raises
        UserError, or with truncate_prompts loses its first tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_tokens: int
    chat: Literal["auto"] | bool = "auto"
    truncate_prompts: bool = False

    def prompt(self, row: Row) -> Prompt:
        """The row's `prompt` column, ready for generation; all columns are kept for reward functions."""
        text, special = self._prompt_text(row, row.values["prompt"])
        ids = self._fit(row, self._ids(text, special), self.max_prompt_tokens)
        if not ids:
            raise UserError(f"{row.where}: the prompt is empty")
        return Prompt(row.where, ids, text, row.values)

    def pair(self, row: Row, column: str) -> Example:
        """The row's prompt (when it has one) followed by the completion in `column` and EOS."""
        prompt, completion = row.values.get("prompt", ""), row.values[column]
        if isinstance(completion, list):
            before, completion = self._answered(row, completion)
            if before:
                # Many data sets have whole conversations and, once more, the prompt that they begin with.
                if prompt not in ("", before, before[0]["content"], before[-1]["content"]):
                    raise UserError(f"{row.where}: {column} is a conversation that the prompt is no part of")
                prompt = before
        return self._example(row, column, prompt, completion)

    def conversation(self, row: Row) -> Example:
        """The row's `messages`: the last one is the completion, those before it are its prompt."""
        prompt, completion = self._answered(row, row.values["messages"])
        return self._example(row, "messages", prompt, completion)

    def _answered(self, row: Row, messages: Any) -> tuple[list[dict[str, str]], str]:
        """The messages before the last, and the text of the last, which must be an answer."""
        self._check_messages(row, messages)
        *before, last = messages
        if last["role"] in ("system", "user"):
            raise UserError(f"{row.where}: the last message must be an answer, but its role is {last['role']!r}")
        return before, last["content"]

    def _example(self, row: Row, column: str, prompt: Text, completion: str) -> Example:
        text, special = self._prompt_text(row, prompt) if prompt else ("", True)
        prompt_ids = self._ids(text, special)
        completion_ids = [*self._ids(completion, False), self.tokenizer.eos_token_id]
        room = min(self.max_prompt_tokens, self.max_tokens - len(completion_ids))
        if room < 0:
            raise UserError(
                f"{row.where}: {column} has {len(completion_ids)} tokens, the budget (max_tokens) is {self.max_tokens}"
            )
        prompt_ids = self._fit(row, prompt_ids, room)
        return Example(prompt_ids + completion_ids, len(prompt_ids))

    def text(self, row: Row) -> Example:
        """The row's `text` column and EOS; every token counts."""
        if not isinstance(row.values["text"], str):
            raise UserError(f"{row.where}: column 'text' must be text; put conversations in 'messages'")
        ids = [*self._ids(row.values["text"], True), self.tokenizer.eos_token_id]
        if len(ids) > self.max_tokens:
            raise UserError(f"{row.where}: text has {len(ids)} tokens, the budget (max_tokens) is {self.max_tokens}")
        return Example(ids, 0)

    def _prompt_text(self, row: Row, prompt: Text) -> tuple[str, bool]:
        """The prompt as one string, and whether the tokenizer should add its own special tokens to it."""
        if isinstance(prompt, str):
            if self.chat is not True:
                return prompt, True
            prompt = [{"role": "user", "content": prompt}]
        self._check_messages(row, prompt)
        if self.tokenizer.chat_template is None:
            raise UserError(f"{row.where}: a conversation needs a chat template, and this tokenizer has none")
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return str(text), False

    def _check_messages(self, row: Row, messages: Any) -> None:
        if self.chat is False:
            raise UserError(f"{row.where}: found a list of messages, but chat is false")
        fine = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not fine or not messages:
            raise UserError(f"{row.where}: a conversation must be a list of {{role, content}} messages")

    def _ids(self, text: str, special: bool) -> list[int]:
        # The limits are ours to report: verbose=False keeps the tokenizer from warning about its own.
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _fit(self, row: Row, ids: list[int], budget: int) -> list[int]:
        if len(ids) <= budget:
            return ids
        if not self.truncate_prompts:
            raise UserError(
                f"{row.where}: the prompt has {len(ids)} tokens, the budget is {budget}; "
                "shorten it, raise max_prompt_tokens, or set truncate_prompts: true"
            )
        return ids[len(ids) - budget :]
