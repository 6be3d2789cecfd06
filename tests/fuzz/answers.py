"""An endpoint that answers what none should: http://127.0.0.1:PORT/N/v1 answers every question with ANSWERS[N]."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MANY = 200  # MiB, or seconds: more than anyone waits for


def answer(text: Any, **entries: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, **entries}]}).encode()


def logprobs(value: Any) -> dict[str, Any]:
    return {"logprobs": {"content": value}}


_LIKELY = {
    "token": "5",
    "logprob": -0.1,
    "top_logprobs": [{"token": "5", "logprob": -0.1}, {"token": "4", "logprob": -3}],
}
# (status, headers, body)
ANSWERS: list[tuple[int, dict[str, str], bytes]] = [
    (200, {}, answer("5", **logprobs([_LIKELY]))), (200, {}, answer("2")), (200, {}, answer("")), (200, {},
    answer(None)),
    (200, {}, answer(5)), (200, {}, answer([{"type": "text", "text": "5"}])), (200, {}, answer({"x": 1})), (200, {},
    b""),
    (200, {}, answer("9" * 5000)), (200, {}, answer("\ud800 5")), (200, {}, answer("x" * (20 << 20))), (200, {},
    b"[" * 100_000),
    (200, {}, answer("\0\x1b[31m[/red] 5")), (200, {}, answer("NaN")), (200, {}, answer("1e400")), (200, {},
    answer("-3 or 11")),
    (200, {}, b"null"), (200, {}, b"{}"), (200, {}, b'{"choices": []}'), (200, {}, b'{"choices": {"0": 1}}'), (200, {},
    b"<html>"),
    (200, {}, b'{"choices": [{"message": {"content": 1' + b"0" * 5000 + b"}}]}"), (200, {}, b"\xff\xfe\0"), (200, {},
    b"data: {}\n\n"),
    (200, {}, answer("5", **logprobs("x"))), (200, {}, answer("5", **logprobs([])))
    , (200, {}, answer("5", **logprobs([{}]))), (200, {}, answer("5", **logprobs([None]))),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "top_logprobs": [{"token": "5", "logprob": 1e308}]}]))),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "top_logprobs": [{"token": "5", "logprob": float("nan")}]}]))),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "top_logprobs": [{"token": "5", "logprob": "x"}]}]))),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "top_logprobs": {"5": 1}}]))), (200, {}, answer("5",
    **logprobs([{"token": 5}]))),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "logprob": -1e400, "top_logprobs": []}]))), (200, {}, answer("5",
    logprobs=[])),
    (200, {}, answer("5", **logprobs([{**_LIKELY, "token": "\ud800"}]))), (200, {}, answer("5",
    **logprobs([_LIKELY] * 100_000))),
    (204, {}, b""), (301, {"Location": "/0/v1/chat/completions"}, b""), (302, {"Location": "http://127.0.0.1:9/"}, b""),
    (307, {"Location": "file:///etc/passwd"}, b""), (308, {"Location": ""}, b""), (400, {}, b"logprobs"), (401, {},
    b"\x1b[31mno\r\n" * 999),
    (404, {}, b""), (418, {}, b"\xff" * 99), (422, {}, b"no logprobs here"), (429, {"Retry-After": "1"}, b""), (429,
    {"Retry-After": "nan"}, b""),
    (429, {"Retry-After": "-5"}, b""), (429, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, b""), (500, {},
    b"x" * 100_000), (599, {}, b""),
    (429, {"Retry-After": "9999999"}, b""), (503, {"Retry-After": "\u00b2".encode("latin1").decode("latin1")}, b""),
    (429, {"Retry-After": "1.1.1"}, b""),
    (200, {"Content-Encoding": "gzip"}, b"no gzip"), (200, {"Content-Type": "text/html; charset=\xff"}, answer("5")),
    (200, {"Content-Type": "application/json; charset=utf-7"}, answer("5")), (200,
    {"Content-Encoding": "br, gzip, deflate"}, b"x"),
    (200, {"does": "trickle"}, answer("5")), (200, {"does": "grow"}, b""), (200, {"does": "break off"}, answer("5")),
    (200, {"does": "say nothing"}, b""),
    (200, {"does": "garbage"}, b""), (200, {"does": "bomb", "Content-Encoding": "gzip"}, b""),
]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, headers, body = ANSWERS[int(self.path.split("/")[1])]
        does = headers.get("does")
        if does == "garbage":
            self.wfile.write(b"\xff\0HTTP/9 x\r\n\r\n")
        elif does == "say nothing":
            time.sleep(MANY)
        else:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header(
                "Content-Length", str(MANY << 20 if does in ("grow", "break off", "trickle") else len(body))
            )
            self.end_headers()
            if does == "trickle":
                for _ in range(10 * MANY):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
            elif does == "grow":
                for _ in range(MANY):
                    self.wfile.write(b" " * (1 << 20))
            else:
                self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """Its URL, without the number of the answer; it is a process of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            server.serve_forever()
        os._exit(0)
    server.socket.close()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
