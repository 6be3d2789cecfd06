"""Requests to a server that may be busy, restart, or never answer: one client for all that ask one."""

import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2

from rlhf_fast.errors import UserError, first_line

AGAIN = (408, 409, 425, 429)  # and 5xx: what a later try may answer
LONGEST_WAIT = 30.0  # seconds between two tries
LONGEST_ASKED = 600.0  # seconds between two tries that a server may ask for
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # no proxy knows them


class Client:
    """Requests below `url`, from several threads at once, at most `concurrency` at a time.

    A request that fails in the connection, takes longer than `timeout` seconds as a whole, or is answered with a status
    that may pass (429, 5xx) is tried `retries` times more, after 2^n / 2 seconds at random between half and all of it,
    or what Retry-After says, up to LONGEST_ASKED. largest: bytes of an answer, as it is unpacked. what: names the
    server in messages. kept: what is not lost by the failure. key_variable: the environment variable with the API key,
    which may be unset.
    """

    def __init__(
        self, url: str, what: str, *, timeout: float, retries: int, concurrency: int, key_variable: str, kept: str,
        largest: int = 1 << 28,
    ) -> None:  # fmt: skip
        self.timeout, self.largest = timeout, largest
        self.url, self.name, self.retries, self.kept = url.rstrip("/"), f"{what} {url.rstrip('/')}", retries, kept
        self._stopped = threading.Event()
        key = os.environ.get(key_variable)
        try:
            httpx2.URL(self.url)
            self._client = httpx2.Client(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                mounts={f"all://{host}": None for host in LOOPBACK},
            )
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise UserError(f"{self.name} cannot be asked: {first_line(error)}") from None

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        count: Callable[[], None] = lambda: None,
        final: Callable[[httpx2.Response], bool] = lambda response: False,
    ) -> httpx2.Response:
        """The answer to a request, after as many tries as it may take: one that is final, whatever its status is.

        count: called before each try. final: which of the statuses that may pass do not. Raises UserError where there
        is no such answer.
        """
        failure, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt and self._stopped.wait(wait):
                break
            count()
            try:
                response = self._received(method, path, body)
            except httpx2.RequestError as error:  # no connection, a connection that broke off, a time-out
                failure, wait = f"{type(error).__name__}: {first_line(error)}", pause(attempt)
                continue
            passing = response.status_code in AGAIN or response.status_code >= 500
            if not passing or final(response):
                return response
            failure, wait = status(response), pause(attempt, response.headers.get("retry-after"))
            if wait > LONGEST_ASKED:
                raise UserError(f"{self.name} wants to be asked again in {wait:g} s, which is too long to wait; "
                                f"{self.kept}, and --resume auto goes on with them")  # fmt: skip
        raise UserError(f"{self.name} gave no answer in {self.retries + 1} tries, the last: {failure}; {self.kept}, "
                        "and --resume auto goes on with them")  # fmt: skip

    def _received(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        """The response to a request, which ends in time and has a size: a server may send for ever."""
        content, start = bytearray(), time.monotonic()
        with self._client.stream(method, self.url + path, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > self.largest:
                    raise UserError(f"{self.name} answers with more than {self.largest >> 20} MiB")
                if time.monotonic() - start > self.timeout:
                    raise httpx2.ReadTimeout(f"it is still answering after {self.timeout:g} s")
        kept = [header for header in response.headers.raw if header[0].lower() in (b"retry-after", b"content-type")]
        return httpx2.Response(response.status_code, headers=kept, content=bytes(content))

    def refusal(self, response: httpx2.Response) -> UserError:
        return UserError(f"{self.name}: {status(response)}")

    def stop(self) -> None:
        """Nothing is tried again from here on."""
        self._stopped.set()


def pause(attempt: int, retry_after: str | None = None) -> float:
    """Seconds before the next try."""
    asked = float(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", retry_after) else 0.0
    return max(asked, min(LONGEST_WAIT, 0.5 * 2**attempt) * random.SystemRandom().uniform(0.5, 1.0))


def status(response: httpx2.Response) -> str:
    """What a refusal says: the message of OpenAI's form of errors, or its text."""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = response.text
    text = " ".join(str(said).split())
    return f"status {response.status_code}" + (f" ({text[:200]})" if text else "")
