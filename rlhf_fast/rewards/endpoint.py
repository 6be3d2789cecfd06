"""A language model behind an OpenAI-compatible endpoint: questions in parallel, tried again, cached, and counted.

Its protocol: POST {url}/chat/completions. https://platform.openai.com/docs/api-reference/chat
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx2
from pydantic import BaseModel, Field, ValidationError

from rlhf_fast.data.notes import say
from rlhf_fast.errors import UserError
from rlhf_fast.http import Client
from rlhf_fast.rewards.cache import Answer, Cache

TOP_LOGPROBS = 20  # the most that the protocol allows
LARGEST = 1 << 24  # bytes of an answer


class _Likely(BaseModel):
    token: str
    logprob: Annotated[float, Field(le=1)]  # a little above 0 by rounding


class _Token(_Likely):
    top_logprobs: list[_Likely] | None = None


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None


class _Reply(BaseModel):
    """What is read of the answer to a request."""

    choices: Annotated[list[_Choice], Field(min_length=1)]


class Endpoint:
    """Asks `model` at `url` (".../v1"), at most `concurrency` questions at a time.

    Requests are tried again as http.Client says. max_calls: how many may be sent, tries again included; None: any
    number. cache: answers that are there cost no request.
    Raises UserError when a question stays without an answer; the answers before it are in the cache.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: int = 6,
        concurrency: int = 8,
        max_calls: int | None = None,
        cache: Cache | None = None,
        key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        self.url, self.model = url.rstrip("/"), model
        self.concurrency, self.max_calls, self.cache = concurrency, max_calls, cache
        self.calls = 0
        self._lock = threading.Lock()
        self._logprobs = True
        self._client = Client(
            url, "judge", timeout=timeout, retries=retries, concurrency=concurrency, key_variable=key_variable,
            kept="the answers so far are kept", largest=LARGEST,
        )  # fmt: skip

    def ask(self, conversations: Sequence[list[dict[str, str]]], max_tokens: int) -> list[Answer]:
        """{"text": ..., "tokens": [[token, {token: probability}], ...] or None} for each list of messages.

        The temperature is 0. tokens: each of the answer's, and the likeliest ones in its place, where the endpoint
        tells them; without white space around them.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(lambda messages: self._answer(messages, max_tokens), conversations))
        finally:
            # The first failure ends the run: what has not been sent yet is not sent, what is under way is cached.
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        request = {"url": self.url, "model": self.model, "messages": messages, "max_tokens": max_tokens}
        answer = None if self.cache is None else self.cache.get(request)
        if answer is None:
            answer = self._read(self._post(messages, max_tokens))
            if self.cache is not None:
                self.cache.put(request, answer)
        return answer

    def _count(self) -> None:
        with self._lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise UserError(f"judge {self.url}: {self.calls} requests were sent, which is the budget "
                                "(judge.max_calls); the answers so far are kept")  # fmt: skip
            self.calls += 1

    def _post(self, messages: list[dict[str, str]], max_tokens: int) -> httpx2.Response:
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        }  # fmt: skip
        if self._logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        response = self._client.request("POST", "/chat/completions", body, count=self._count)
        if response.status_code in (400, 422) and "logprobs" in body and "logprobs" in response.text:
            say(f"judge {self.url} gives no log-probabilities: verdicts are read from its text")
            self._logprobs = False
            return self._post(messages, max_tokens)
        return response

    def _read(self, response: httpx2.Response) -> Answer:
        if response.status_code >= 400:
            raise self._client.refusal(response)
        try:
            choice = _Reply.model_validate_json(response.content).choices[0]
        except ValidationError as errors:
            first = errors.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise UserError(
                f"judge {self.url} answers in another form than chat completions: {where}: {first['msg']}"
            ) from None
        content = choice.logprobs.content if choice.logprobs is not None else None
        tokens = None if content is None else [[token.token.strip(), _likeliest(token)] for token in content]
        return {"text": choice.message.content or "", "tokens": tokens}


def _likeliest(token: _Token) -> dict[str, float]:
    """{token: probability} in one place; spellings that differ in white space are one, and add up."""
    found: dict[str, float] = {}
    for entry in token.top_logprobs or [token]:
        text = entry.token.strip()
        found[text] = found.get(text, 0.0) + math.exp(entry.logprob)
    return found
