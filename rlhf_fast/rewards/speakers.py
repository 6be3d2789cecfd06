"""Who answers a judge's questions: a model in this process, or one behind an endpoint.

A local model is not asked for text but for the log-probabilities of the possible verdicts: softmax over those of the
labels (Lee et al. 2023, 2309.00267, section 2.2), exact, and with a gradient of confidence that text does not have.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Encoder, Example, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops.head.linear_logprobs import linear_logprobs
from rlhf_fast.rewards.endpoint import Endpoint
from rlhf_fast.rollout import roll_out

WHERE = "a question to the judge"
VERDICT_TOKENS = 8  # more than any label has


class Question(NamedTuple):
    """text: what is asked. ending: what stands right before the verdict, such as 'Rating:'."""

    text: str
    ending: str


class Speaker(Protocol):
    """Answers questions. `calls`: the requests that were sent and may cost money."""

    calls: int

    def verdicts(self, questions: Sequence[Question], labels: Sequence[str], thought_tokens: int) -> Tensor:
        """(N, L) fp64: the probability of each label, rows sum to 1; NaN where no verdict could be read.

        thought_tokens: how many tokens the speaker may think aloud before its verdict.
        """

    def write(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Answers of at most max_tokens tokens, without white space around them."""


@dataclass
class LocalSpeaker:
    """A role of a backbone; None is the base model. encoder: renders questions, by the chat template where there is
    one. temperature: at which it writes; None: greedily."""

    backbone: Backbone
    encoder: Encoder
    role: str | None = None
    rows_per_pass: int = 16
    temperature: float | None = None
    calls: int = 0

    def __post_init__(self) -> None:
        if self.backbone.shards is not None:
            raise UserError("a model whose weights are split over processes (shards) cannot judge: each asks it on its "
                            "own; take a model of its own or an endpoint")  # fmt: skip

    @property
    def chat(self) -> bool:
        """Whether a question is a user's message; else it is plain text, and goes on with the answer."""
        return self.encoder.template.exists and self.encoder.chat is not False

    def verdicts(self, questions: Sequence[Question], labels: Sequence[str], thought_tokens: int) -> Tensor:
        thoughts = self.write([q.text for q in questions], thought_tokens) if thought_tokens else [""] * len(questions)
        prompts = [self._prompt(q, thought) for q, thought in zip(questions, thoughts, strict=True)]
        return exact_probabilities(self._label_ids(prompts[0], labels), lambda prefix, following: torch.cat(
            [self._next(prompts[i : i + self.rows_per_pass], prefix, following)
             for i in range(0, len(prompts), self.rows_per_pass)]
        ))  # fmt: skip

    def write(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        prompts = [self._prompt(Question(text, ""), "") for text in texts]
        rollout = roll_out(
            self.backbone, self.encoder.tokenizer, prompts, max_new_tokens=max_tokens, role=self.role,
            temperature=self.temperature or 1.0, top_k=int(self.temperature is None), rows_per_pass=self.rows_per_pass,
        )  # fmt: skip
        return [text.strip() for text in rollout.completions]

    def _prompt(self, question: Question, thought: str) -> Prompt:
        """Of a chat model the question is a user's message and thoughts begin its answer, elsewhere all is one text."""
        opening = f"{thought}\n{question.ending}".lstrip() if thought or not self.chat else ""
        if not self.chat:
            return self.encoder.prompt(Row(WHERE, {"prompt": f"{question.text}\n{opening}".rstrip()}))
        messages = [{"role": "user", "content": question.text}]
        messages += [{"role": "assistant", "content": opening}] if opening else []
        return self.encoder.prompt(Row(WHERE, {"prompt": messages}))

    def _label_ids(self, prompt: Prompt, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each label behind a prompt; all questions of a judge end alike."""
        tokens = self.encoder.tokens
        before = tokens.ids(WHERE, prompt.text)
        space = "" if not prompt.text or prompt.text[-1].isspace() else " "
        found = []
        for label in labels:
            whole = tokens.ids(WHERE, prompt.text + space + label)
            if whole[: len(before)] != before or len(whole) == len(before):
                raise UserError(f"judge: the label {label!r} is no token of its own behind {prompt.text[-30:]!r}")
            found.append(tuple(whole[len(before) :]))
        return found

    @torch.no_grad()
    def _next(self, prompts: Sequence[Prompt], prefix: tuple[int, ...], following: Sequence[int]) -> Tensor:
        """(B, K): log p(following[k] | prompt, prefix), nats."""
        device = self.backbone.lm_head_weight.device
        examples = [Example([*p.ids, *prefix], len(p.ids)) for p in prompts]
        batch = pad_batch(examples, self.encoder.pad_id).to(device)
        hidden = self.backbone.hidden(batch.input_ids, batch.attention_mask, [self.role])[self.role]
        last = hidden[torch.arange(len(prompts), device=device), batch.attention_mask.sum(1) - 1]
        targets = torch.tensor([list(following)] * len(prompts), device=device)
        return linear_logprobs(
            last, self.backbone.lm_head_weight, targets, bias=self.backbone.lm_head_bias,
            **self.backbone.logit_transform,
        ).double().cpu()  # fmt: skip


def exact_probabilities(
    labels: Sequence[tuple[int, ...]], following: Callable[[tuple[int, ...], Sequence[int]], Tensor]
) -> Tensor:
    """(N, L): the probability of each label, of sequences of tokens that may begin with one another ("1", "10").

    following(prefix, tokens) -> (N, K): log-probabilities of the tokens behind the prefix. A label that another one
    goes on from counts with what is left of it, P(1) - P(10); the rows are then scaled to sum 1.
    """
    if len(set(labels)) < len(labels):
        raise UserError("judge: two labels are the same tokens")
    table: dict[tuple[int, ...], dict[int, Tensor]] = {}
    for prefix in sorted({label[:i] for label in labels for i in range(len(label))}):
        tokens = sorted({label[len(prefix)] for label in labels if label[: len(prefix)] == prefix != label})
        table[prefix] = dict(zip(tokens, following(prefix, tokens).unbind(1), strict=True))
    logs = {label: torch.stack([table[label[:i]][label[i]] for i in range(len(label))]).sum(0) for label in labels}
    top = torch.stack(list(logs.values())).amax(0)
    mass = {label: (log - top).exp() for label, log in logs.items()}
    own = dict(mass)
    for label in labels:
        shorter = [other for other in labels if other != label and label[: len(other)] == other]
        if shorter:
            own[max(shorter, key=len)] = own[max(shorter, key=len)] - mass[label]
    found = torch.stack([own[label].clamp(min=0) for label in labels], dim=1)
    return found / found.sum(1, keepdim=True)


@dataclass
class EndpointSpeaker:
    """A model behind an endpoint; its verdict is read from its text, and its confidence from the log-probabilities of
    the verdict's token where the endpoint tells them."""

    endpoint: Endpoint

    @property
    def calls(self) -> int:
        return self.endpoint.calls

    @calls.setter
    def calls(self, calls: int) -> None:
        self.endpoint.calls = calls

    def verdicts(self, questions: Sequence[Question], labels: Sequence[str], thought_tokens: int) -> Tensor:
        answers = self.endpoint.ask([_asked(q.text) for q in questions], thought_tokens + VERDICT_TOKENS)
        return torch.stack([read_verdict(a["text"], a["tokens"], labels, last=thought_tokens > 0) for a in answers])

    def write(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        return [answer["text"].strip() for answer in self.endpoint.ask([_asked(text) for text in texts], max_tokens)]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def read_verdict(
    text: str, tokens: list[tuple[str, dict[str, float]]] | None, labels: Sequence[str], *, last: bool
) -> Tensor:
    """(L,) probabilities of the labels, NaN where `text` has none of them: its first one counts, or its `last`.

    tokens: each of the text's with the likeliest ones in its place. Without them, or where the verdict is no token of
    its own, or could go on to a longer label, it counts as certain.
    """
    longest_first = sorted(labels, key=len, reverse=True)
    found = re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", text)
    if not found:
        return torch.full((len(labels),), torch.nan, dtype=torch.float64)
    verdict = found[-1 if last else 0]
    places = [likeliest for token, likeliest in tokens or [] if token == verdict]
    if places:
        likeliest = places[-1 if last else 0]
        mass = torch.tensor([likeliest.get(label, 0.0) for label in labels], dtype=torch.float64)
        unclear = any(
            a != b and b.startswith(a) and b not in likeliest for a in likeliest for b in labels if a in labels
        )
        if mass.sum() > 0 and not unclear:
            return mass / mass.sum()
    return torch.tensor([float(label == verdict) for label in labels], dtype=torch.float64)
