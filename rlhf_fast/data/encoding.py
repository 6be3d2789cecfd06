"""Rows to token ids. This is the one place that decides which ids are trained on, scored and sampled from.

A conversation is rendered by the chat template and tokenised once, as a whole; plain text likewise, prompt and
completion together. The completion begins where the rendering of its prompt ends, and ends as the template ends a turn
(plain text: in EOS). The token that stops generation is the last one that is learnt; what the template renders behind
it (the line break of `<|im_end|>\\n`) is read but not learnt, because the model has stopped by then.
"""

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from logging import ERROR, getLogger
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf_fast.data.cache import NONE, Cache
from rlhf_fast.data.conversations import Exchange, Exchanges, Text, plain
from rlhf_fast.data.messages import LEADING, Message
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.data.templates import ChatTemplate, TurnEnd
from rlhf_fast.data.tokens import Tokens, common_prefix, load_tokenizer, pad_id
from rlhf_fast.data.turns import Turns, until_stop
from rlhf_fast.errors import UserError

__all__ = ["Encoder", "Example", "Prompt", "TooLong", "load_tokenizer", "pad_id", "quiet_libraries"]

MANY = 1 << 17  # characters of a text that may be over any budget
SPANNING = "a token spans the end of the prompt: it counts as the completion's, and the prompt is cut before it"


class TooLong(UserError):
    """A row that its budget does not hold."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete: its token ids, its text as the model reads it, and the row's other columns.

    turn_end: what closes an answer to it; None: EOS.
    """

    where: str
    ids: list[int]
    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    turn_end: TurnEnd | None = None


@dataclass(frozen=True)
class Example:
    """A prompt with its completion, `ids[start:]`. mask: 1 for each token that is learnt; None: all from `start`."""

    ids: list[int]
    start: int
    mask: list[int] | None = None

    @property
    def learnt(self) -> list[int]:
        """One number for each token: 1 where it counts."""
        return [int(i >= self.start) for i in range(len(self.ids))] if self.mask is None else self.mask

    def without(self, first: int, count: int) -> "Example":
        """Less `count` of the prompt's tokens, from `first` on."""
        kept = [*range(first), *range(first + count, len(self.ids))]
        return Example([self.ids[i] for i in kept], self.start - count, [self.learnt[i] for i in kept])


def quiet_libraries() -> None:
    """No progress bars and warnings of the libraries' own: what matters to the user is reported by us."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)


@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one tokenizer.

    chat: 'auto' applies the chat template to lists of messages and leaves plain text alone; True also
        wraps plain prompts as one user message; False rejects lists of messages.
    max_prompt_tokens, max_tokens: budgets for the prompt and for prompt + completion.
    too_long: a row over budget raises TooLong ('error'; 'skip', where `encode_rows` leaves it out), or is cut
        ('truncate'): of its prompt first whole early turns, then the first tokens behind the template's beginning (BOS,
        system message). Where that would leave the prompt less than half of max_tokens, completions lose their end.
    train_on: in a conversation, the last answer or every one. A template's own `{% generation %}` marks come first.
    vocab_size: rows of the model's embeddings; an id beyond them raises UserError. None: not checked.
    bad_rows: 'skip': `encode_rows` leaves out what the template refuses and what has no answer.
    known: where `encode_rows` keeps what it found.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_tokens: int
    chat: Literal["auto"] | bool = "auto"
    too_long: Literal["error", "skip", "truncate"] = "error"
    train_on: Literal["last", "all_assistant"] = "last"
    vocab_size: int | None = None
    bad_rows: Literal["error", "skip"] = "error"
    known: Cache = field(default=NONE, compare=False)
    notes: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.tokenizer, self.vocab_size)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokens)

    @cached_property
    def exchanges(self) -> Exchanges:
        return Exchanges(self.template, self.chat)

    @cached_property
    def text_end(self) -> TurnEnd:
        """What closes a plain text: what the tokenizer puts behind one, else EOS."""
        behind = self.tokens.around[1] or [self.tokenizer.eos_token_id]
        if behind[0] is None:
            raise UserError("the tokenizer has no EOS token, so completions could never end")
        self.tokens.check("the end of a text", behind)
        return TurnEnd("", "", tuple(behind), behind[0])

    @property
    def longest_end(self) -> int:
        """Tokens that close the longest turn."""
        turn = self.template.turn_end.ids if self.template.exists and self.chat is not False else ()
        return max(len(self.text_end.ids), len(turn))

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer, self.vocab_size)

    def prompt(self, row: Row) -> Prompt:
        """The row's `prompt` column, ready for generation; all columns are kept for reward functions."""
        return self._prompt(self.exchanges.prompt(row), row.values)

    def pair_prompt(self, row: Row) -> Prompt:
        """The prompt that `pair` gives the row's completions, ready for generation."""
        pair = self.exchanges.pair(row)
        if not pair.prompt:
            raise UserError(f"{row.where}: the pair has no prompt, so there is nothing to sample completions for")
        prompt = row.values["prompt"] if isinstance(pair.prompt, str) and "prompt" in row.values else pair.prompt
        return self._prompt(replace(pair, completions=[]), {**row.values, "prompt": prompt})

    def pair(self, row: Row) -> tuple[Example, Example]:
        """The row's `chosen` and `rejected` behind the same prompt (when there is one), token for token."""
        chosen, rejected = self._examples(self.exchanges.pair(row), "the longer of chosen and rejected")
        return chosen, rejected

    def completion(self, row: Row) -> Example:
        """The row's prompt followed by its `completion`."""
        return self._examples(self.exchanges.completion(row), "completion")[0]

    def answers(self, row: Row) -> list[Example]:
        """The row's `completions` behind the same prompt, token for token."""
        return self._examples(self.exchanges.answers(row), "the longest of completions")

    def conversation(self, row: Row) -> Example:
        """The row's `messages`: the last one is the completion, those before it are its prompt."""
        return self._examples(self.exchanges.conversation(row), "messages")[0]

    def text(self, row: Row) -> Example:
        """The row's `text` column and EOS; every token counts."""
        (example,) = self._examples(self.exchanges.text(row), "text")
        return Example(example.ids, 0)

    def steps(self, row: Row, separator: str) -> tuple[int, list[int], list[int]]:
        """Where the steps of `completions` begin behind the row's `prompt`; the ids; and the last token of each step.

        Each step is tokenised by itself and closed by the separator, the last one too, on whose last token its score is
        read. In running text a line break merges with its neighbours. Source: the recipe of TRL 0.29's PRM trainer.
        What is behind max_tokens is never tokenised: such steps end at the same token, which is behind max_tokens too.
        """
        ids, ends = list(self.prompt(row).ids), []
        start, closing = len(ids), self._ids(row.where, separator)
        if not closing:
            raise UserError(f"step_separator {separator!r} is no token of this tokenizer")
        for step in row.values["completions"]:
            if not isinstance(step, str):
                raise UserError(
                    f"{row.where}: completions must be a list of texts, one for each step, got {shown(step)}"
                )
            if len(ids) <= self.max_tokens:
                ids += self._ids(row.where, step[: max(MANY, self.max_tokens * self._longest_token)]) + closing
            ends.append(len(ids) - 1)
        return start, ids, ends

    def scored(self, prompt: Text, completion: str, tools: Any = None) -> list[int]:
        """The ids of a prompt, as the data has it, with a sampled completion and the end of the turn."""
        row = Row("a completion", {"prompt": prompt, "completion": completion, "tools": tools})
        exchange = replace(self.exchanges.completion(row), learnt=False)
        return self._examples(exchange, "completion")[0].ids

    def note(self, what: str, where: str) -> None:
        """Remember what was done to a row without asking, for `report`."""
        rows = self.notes.setdefault(what, [])
        if where not in rows[-1:]:
            rows.append(where)

    def report(self, total: int) -> list[str]:
        """One line for each kind of note about `total` rows; the notes are then forgotten."""
        lines = [f"{len(rows)} of {total} rows: {what} (first: {rows[0]})" for what, rows in self.notes.items()]
        self.notes.clear()
        return lines

    @cached_property
    def key(self) -> str:
        """A hash of the tokenizer, its template and the settings: of all that the ids of a row depend on."""
        state = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tokenizer", "known", "notes")}
        backend = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else self.tokenizer.get_vocab()
        parts = (state, backend, self.tokenizer.chat_template, self.tokenizer.special_tokens_map)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _ids(self, where: str, text: str) -> list[int]:
        return self.tokens.ids(where, text)

    # Budgets

    def _prompt(self, exchange: Exchange, columns: dict[str, Any]) -> Prompt:
        exchange, (example,) = self._fitted(exchange, "prompt")
        if not example.ids:
            raise UserError(f"{exchange.row.where}: the prompt is empty")
        text = self._opened(exchange)
        if self.too_long == "truncate" and len(example.ids) < len(self.tokens.ids(exchange.row.where, text)):
            text = str(self.tokenizer.decode(example.ids))
        rendered = isinstance(exchange.prompt, list) or self.template.has_rendered(text)
        return Prompt(
            exchange.row.where, example.ids, text, columns, self.template.turn_end if rendered else self.text_end
        )

    def _examples(self, exchange: Exchange, name: str) -> list[Example]:
        return self._fitted(exchange, name)[1]

    def _fitted(self, exchange: Exchange, name: str) -> tuple[Exchange, list[Example]]:
        """The encoded exchange within the budgets, and what is left of its prompt."""
        exchange = self._cut(exchange, name)
        where, examples = exchange.row.where, self._encoded(exchange)
        answer = max(len(e.ids) - e.start for e in examples)
        prompt, budget = examples[0].start, min(self.max_prompt_tokens, self.max_tokens - answer)
        if prompt <= budget:
            return exchange, examples
        if self.too_long != "truncate":
            tokens = answer if exchange.prompt else answer + prompt
            if tokens > self.max_tokens:
                raise TooLong(f"{where}: {name} has {tokens} tokens, the budget (max_tokens) is {self.max_tokens}")
            raise TooLong(
                f"{where}: the prompt has {prompt} tokens, the budget is {budget}; "
                "shorten it, raise max_prompt_tokens, or set too_long: skip or truncate"
            )
        budget = max(budget, min(self.max_prompt_tokens, self.max_tokens // 2))
        while examples[0].start > budget and (shorter := exchange.shorter()) is not None:
            exchange, examples = shorter, self._encoded(shorter)
        over = examples[0].start - budget
        if over > 0:
            head, tail = self._fixed(exchange, examples[0])
            if budget < head + tail:
                raise TooLong(f"{where}: the prompt cannot be cut to {budget} tokens: its template alone takes them")
            examples = [example.without(head, over) for example in examples]
        self.note("longer than the budget, and cut to it", where)
        learnt = [e.learnt[: self.max_tokens] for e in examples]
        return exchange, [Example(e.ids[: self.max_tokens], e.start, m) for e, m in zip(examples, learnt, strict=True)]

    def _cut(self, exchange: Exchange, name: str) -> Exchange:
        """Less the characters for which the budget has no tokens whatever they are: megabytes are never tokenised.

        Of a prompt both ends stay, of a completion its beginning, each with more than the tokens that will be left.
        """
        longest = max(map(len, exchange.texts()), default=0)
        if longest <= MANY or longest <= (most := max(MANY, self.max_tokens * self._longest_token)):
            return exchange
        if self.too_long != "truncate":
            raise TooLong(
                f"{exchange.row.where}: {name} has a text of {longest:,} characters, and the budget (max_tokens "
                f"{self.max_tokens}) holds at most {most:,}"
            )
        self.note("longer than the budget, and cut to it", exchange.row.where)
        return exchange.with_texts(
            prompt=lambda text: text if len(text) <= 2 * most else text[:most] + text[-most:],
            completion=lambda text: text[:most],
        )

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _fixed(self, exchange: Exchange, example: Example) -> tuple[int, int]:
        """How many tokens at the beginning and at the end of the prompt stay: the template's own, and a prefill."""
        where, prompt = exchange.row.where, self._opened(exchange)
        if isinstance(exchange.prompt, str):
            rendered = self.template.has_rendered(prompt)
            place, before = self.template.rendered_head(prompt) if rendered else 0, self._before_text(rendered)
            end = self.template.user_opening[1] if rendered else ""
        else:
            first = next((i for i, m in enumerate(exchange.prompt) if m["role"] not in LEADING), 0)
            opening = self.template.before(where, exchange.prompt, first, exchange.tools) or ""
            place, before = common_prefix(opening, prompt), []
            end = self.template.user_opening[1] + (
                plain(exchange.prompt[-1].get("content")) if exchange.prefilled else ""
            )
        beginning, _ = _with(before, self.tokens.ids(where, prompt[:place]))
        return common_prefix(beginning, example.ids), len(self.tokens.ids(where, end)) + 1

    # Encoding

    def _encoded(self, exchange: Exchange) -> list[Example]:
        """Every completion of the exchange behind the same prompt ids, whatever their length."""
        one = self._encoded_text if isinstance(exchange.prompt, str) else self._encoded_conversation
        examples = [one(exchange, completion) for completion in exchange.completions or [None]]
        # A token that spans the boundary in one completion need not in another.
        shared = min(*(e.start for e in examples), *(common_prefix(examples[0].ids, e.ids) for e in examples))
        return [
            replace(e, start=shared, mask=[*[0] * shared, *[1] * (e.start - shared), *e.learnt[e.start :]])
            if shared < e.start else e for e in examples
        ]  # fmt: skip

    def _opened(self, exchange: Exchange) -> str:
        """The text of the prompt up to where a completion begins."""
        if isinstance(exchange.prompt, str):
            return exchange.prompt
        if not exchange.prompt:
            return (
                self.template.before(exchange.row.where, exchange.messages(exchange.completions[0]), 0, exchange.tools)
                or ""
            )
        opening = not exchange.prefilled
        return self.template.render(
            exchange.row.where, exchange.prompt, exchange.tools, opening=opening, more=not opening
        )

    def _encoded_text(self, exchange: Exchange, completion: str | None) -> Example:
        where, prompt = exchange.row.where, str(exchange.prompt)
        text = prompt + (completion or "")
        rendered = self.template.has_rendered(prompt or text)
        end = self.template.turn_end if rendered else self.text_end
        if rendered:
            self.note("already rendered by the chat template, and taken as it is", where)
            if completion is not None and not self._closed(text, end):
                text += end.text
        ids = self.tokens.ids(where, text)
        start, cut = (
            self.tokens.boundary(where, text, ids, len(prompt)) if completion is not None else (len(ids), False)
        )
        if cut:
            self.note(SPANNING, where)
        before = self._before_text(rendered)
        ids, added = _with(before, ids)
        start += added
        if before and not added:
            self.note("begins with special tokens of the tokenizer, which are not added again", where)
        if completion is not None:
            closing = [end.stop] if rendered and end.eos_added else [] if rendered else list(end.ids)
            if closing and ids[max(start, len(ids) - len(closing)) :] == closing:
                self.note("ends in the token that ends a text, which is not added again", where)
            else:
                ids = [*ids, *closing]
        return Example(ids, start, until_stop([int(i >= start) for i in range(len(ids))], ids, start, end))

    def _before_text(self, rendered: bool) -> list[int]:
        """The special tokens in front of a text; of one that is rendered already, what the template has there."""
        before = self.tokens.around[0]
        if rendered:
            before = [self.tokenizer.bos_token_id] if self.template.starts_with_bos else []
        self.tokens.check("the beginning of a text", before)
        return before

    def _closed(self, text: str, end: TurnEnd) -> bool:
        stop = str(self.tokenizer.convert_ids_to_tokens(end.stop))
        return text.rstrip().endswith((stop, stop if end.eos_added else end.text.rstrip()))

    def _encoded_conversation(self, exchange: Exchange, completion: list[Message] | None) -> Example:
        where, opened = exchange.row.where, self._opened(exchange)
        if completion is None:
            ids = self.tokens.ids(where, opened)
            return Example(ids, len(ids))
        end = self.template.turn_end
        messages = self._closed_once(exchange, completion, end)
        whole = self.template.render(where, messages, exchange.tools)
        ids = self.tokens.ids(where, whole)
        written = self.template.written(where, messages, exchange.tools) if exchange.learnt else None
        if whole.startswith(opened):
            start, cut = self.tokens.boundary(where, whole, ids, len(opened))
            if cut:
                self.note(SPANNING, where)
        elif not exchange.learnt:
            start = common_prefix(ids, self.tokens.ids(where, opened))
        elif written is None:
            here = common_prefix(opened, whole)
            raise UserError(
                f"{where}: the chat template opens an answer with {opened[here:][-60:]!r}, but renders this one as "
                f"{whole[here:][:60]!r}: the model would never read these tokens in use"
            )
        else:
            # The last run of tokens that the template marks as written.
            start = max((i for i, m in enumerate(written) if m and not (i and written[i - 1])), default=0)
        if not exchange.learnt:
            mask = [1] * len(ids)
        elif written is not None:
            mask = written if exchange.earlier else [m if i >= start else 0 for i, m in enumerate(written)]
        else:
            turns = Turns(self.template, where, messages, exchange.tools, whole, ids)
            everything = exchange.earlier and self.train_on == "all_assistant"
            mask = turns.mask(len(messages) - len(completion), start, everything)
        if end.eos_added:
            self.note("the chat template ends answers in no special token: EOS is added behind it", where)
            ids, mask = [*ids, end.stop], [*mask, 1]
        if not any(mask):
            raise UserError(f"{where}: the chat template marks no token of the answer as the assistant's")
        return Example(ids, start, mask)

    def _closed_once(self, exchange: Exchange, completion: list[Message], end: TurnEnd) -> list[Message]:
        """The whole conversation; an answer that brings the end of its turn along does not get it twice."""
        messages = exchange.messages(completion)
        content = messages[-1].get("content")
        if not isinstance(content, str) or not self._closed(content, end):
            return messages
        self.note("the answer has the token that ends its turn, which is not added again", exchange.row.where)
        content = content.rstrip()
        if not end.eos_added:
            content = content.removesuffix(end.text.rstrip())
        content = content.removesuffix(str(self.tokenizer.convert_ids_to_tokens(end.stop)))
        return [*messages[:-1], {**messages[-1], "content": content}]


def _with(before: list[int], ids: list[int]) -> tuple[list[int], int]:
    """`ids` behind `before`, which they may begin with already; and how many were added."""
    return (ids, 0) if ids[: len(before)] == before else ([*before, *ids], len(before))
