"""Which tokens of a rendered conversation are answers, as a model would have written them."""

from dataclasses import dataclass
from typing import Any

from rlhf_fast.data.conversations import ASSISTANT
from rlhf_fast.data.messages import Message
from rlhf_fast.data.templates import ChatTemplate, TurnEnd
from rlhf_fast.errors import UserError


@dataclass(frozen=True)
class Turns:
    """The answers in a rendered conversation: `whole` is its text, `ids` its tokens."""

    template: ChatTemplate
    where: str
    messages: list[Message]
    tools: Any
    whole: str
    ids: list[int]

    def mask(self, first: int, start: int, earlier: bool) -> list[int]:
        """1 on each token of the answers from message `first` on, which begins at token `start`; with `earlier` on
        those before it too. The token that stops a turn is its last one."""
        mask = [0] * len(self.ids)
        for index, message in enumerate(self.messages):
            if message["role"] not in ASSISTANT or (index < first and not earlier):
                continue
            begin = start if index == first else self._start(index)
            stop = self._end(index, begin)
            if any(mask[begin:]) or stop < begin:
                raise self._unclear(index)
            mask[begin:stop] = [1] * (stop - begin)
        return mask

    def _start(self, index: int) -> int:
        """The first token of an answer: where the rendering of what precedes it ends."""
        if index == 0:
            opened = self.template.before(self.where, self.messages, 0, self.tools)
        else:
            opened = self.template.render(self.where, self.messages[:index], self.tools, opening=True)
        if opened is None or not self.whole.startswith(opened):
            raise self._unclear(index)
        return self.template.tokens.boundary(self.where, self.whole, self.ids, len(opened))[0]

    def _end(self, index: int, begin: int) -> int:
        """The token behind an answer's last one."""
        end = self.template.turn_end
        if index == len(self.messages) - 1:
            mask = until_stop([1] * len(self.ids), self.ids, begin, end)
            return sum(mask)
        if self.messages[index].get("tool_calls"):
            return self._end_before_next(index, begin)
        behind = self.template.behind(self.where, self.messages, index, self.tools)
        if behind is None or not self.whole.endswith(behind) or not behind.startswith(end.until_stop):
            raise self._unclear(index)
        place = len(self.whole) - len(behind) + len(end.until_stop)
        return self.template.tokens.boundary(self.where, self.whole, self.ids, place)[0]

    def _end_before_next(self, index: int, begin: int) -> int:
        """The same for an answer with tool calls, whose own text is unknown: the last stop token before the content
        of the next message."""
        following = self.template.before(self.where, self.messages, index + 1, self.tools)
        if following is None or not self.whole.startswith(following):
            raise self._unclear(index)
        limit, _ = self.template.tokens.boundary(self.where, self.whole, self.ids, len(following))
        stops = [i for i in range(begin, limit) if self.ids[i] == self.template.turn_end.stop]
        if not stops:
            raise self._unclear(index)
        return stops[-1] + 1

    def _unclear(self, index: int) -> UserError:
        return UserError(
            f"{self.where}: cannot tell which tokens of the chat template's rendering are message {index}, an earlier "
            "answer, as the model would have written them: use train_on: last, or a template with {% generation %}"
        )


def until_stop(mask: list[int], ids: list[int], start: int, end: TurnEnd) -> list[int]:
    """`mask` without what is behind the last stop token of ids[start:]."""
    last = next((i for i in range(len(ids) - 1, start - 1, -1) if ids[i] == end.stop), len(ids) - 1)
    return [m if i <= last else 0 for i, m in enumerate(mask)]
