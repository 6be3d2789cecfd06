"""A language model behind an OpenAI-compatible endpoint: questions in parallel, tried again, cached, and counted.

Its protocol: POST {url}/chat/completions. https://platform.openai.com/docs/api-reference/chat
"""

import math
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from rlhf_fast.data.notes import say
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.rewards.cache import Answer, Cache

TOP_LOGPROBS = 20  # the most that the protocol allows
AGAIN = (408, 409, 425, 429)  # and 5xx: what a later try may answer
LONGEST_WAIT = 30.0  # seconds between two tries


class Endpoint:
    """Asks `model` at `url` (".../v1"), at most `concurrency` questions at a time.

    A request that fails in the connection, takes longer than `timeout` seconds, or is answered with a status that may
    pass (429, 5xx) is tried `retries` times more, after 2^n / 2 seconds at random between half and all of it, or what
    Retry-After says. max_calls: how many requests may be sent, tries again included; None: any number. cache: answers
    that are there cost no request. key_variable: the environment variable with the API key, which may be unset.
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
        self.retries, self.concurrency, self.max_calls, self.cache = retries, concurrency, max_calls, cache
        self.calls = 0
        self._lock = threading.Lock()
        self._logprobs = True
        key = os.environ.get(key_variable)
        self._client = httpx2.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=concurrency),
        )

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
            answer = self._sent(messages, max_tokens)
            if self.cache is not None:
                self.cache.put(request, answer)
        return answer

    def _sent(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """The answer to a request, after as many tries as it may take."""
        failure, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
            self._count()
            try:
                response = self._post(messages, max_tokens)
            except httpx2.TransportError as error:  # no connection, a connection that broke off, a time-out
                failure, wait = f"{type(error).__name__}: {first_line(error)}", _pause(attempt)
                continue
            if response.status_code in AGAIN or response.status_code >= 500:
                failure, wait = _status(response), _pause(attempt, response.headers.get("retry-after"))
                continue
            if response.status_code >= 400:
                raise UserError(f"judge {self.url}: {_status(response)}")
            return _read(self.url, response)
        raise UserError(f"judge {self.url} gave no answer in {self.retries + 1} tries, the last: {failure}; the "
                        "answers so far are kept, and --resume auto goes on with them")  # fmt: skip

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
        response = self._client.post(f"{self.url}/chat/completions", json=body)
        if response.status_code in (400, 422) and "logprobs" in body and "logprobs" in response.text:
            say(f"judge {self.url} gives no log-probabilities: verdicts are read from its text")
            self._logprobs = False
            return self._post(messages, max_tokens)
        return response


def _pause(attempt: int, retry_after: str | None = None) -> float:
    """Seconds before the next try."""
    asked = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else 0.0
    return max(asked, min(LONGEST_WAIT, 0.5 * 2**attempt) * random.SystemRandom().uniform(0.5, 1.0))


def _status(response: httpx2.Response) -> str:
    text = " ".join(response.text.split())
    return f"status {response.status_code}" + (f" ({text[:200]})" if text else "")


def _read(url: str, response: httpx2.Response) -> Answer:
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] or ""
        content = (choice.get("logprobs") or {}).get("content")
        tokens = None if content is None else [[token["token"].strip(), _likeliest(token)] for token in content]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"judge {url} answers in another form than chat completions: {error!r}") from None
    return {"text": text, "tokens": tokens}


def _likeliest(token: dict[str, Any]) -> dict[str, float]:
    """{token: probability} in one place; spellings that differ in white space are one, and add up."""
    found: dict[str, float] = {}
    for entry in token.get("top_logprobs") or [token]:
        text = entry["token"].strip()
        found[text] = found.get(text, 0.0) + math.exp(entry["logprob"])
    return found
