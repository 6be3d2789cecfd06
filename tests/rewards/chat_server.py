"""A small OpenAI-compatible chat server, run as a process of its own: python chat_server.py PORT LOG MODE [FAILURES]

MODE: digits (rates an answer by its length, with log-probabilities), text (without), refuses (400 for logprobs), slow
(answers after a second), prose (never a verdict). FAILURES: statuses of the first requests, 429,500. Every request that
is answered with 200 is a line of LOG, the last words of its question.
"""

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, LOG, MODE, *REST = sys.argv[1:]
FAILURES = [int(status) for status in (REST[0].split(",") if REST else [])]
LOCK = threading.Lock()


def verdict(question: str) -> str:
    """Of a comparison the longer answer, of an answer its length; 1 and 2, or 1 to 10."""
    if "Answer 2:" in question:
        first, second = question.split("Answer 1:\n")[1].split("\n\nAnswer 2:\n")
        return "1" if len(first) >= len(second.split("\n\n")[0]) else "2"
    return str(min(10, len(question.split("Answer:\n")[1].split("\n\nRate")[0])))


class Chat(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        assert body["temperature"] == 0
        with LOCK:
            failure = FAILURES.pop(0) if FAILURES else None
        if failure is not None:
            return self._reply(failure, {"error": "not now"})
        if MODE == "refuses" and "logprobs" in body:
            return self._reply(400, {"error": "logprobs are not supported"})
        if MODE == "slow":
            time.sleep(1.0)
        text = "I cannot say." if MODE == "prose" else verdict(question)
        choice = {"message": {"role": "assistant", "content": text}}
        if MODE == "digits":
            other = "2" if text == "1" else "1"
            likeliest = {text: 0.75, f" {other}": 0.125, other: 0.125, "10": 0.0001} | {text: 0.75}
            top = [{"token": token, "logprob": math.log(p)} for token, p in likeliest.items()]
            choice["logprobs"] = {"content": [{"token": text, "logprob": math.log(0.75), "top_logprobs": top}]}
        with LOCK, Path(LOG).open("a") as log:
            log.write(json.dumps([self.headers["authorization"], question[-40:]]) + "\n")
        return self._reply(200, {"choices": [choice]})

    def _reply(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        if status == 429:
            self.send_header("retry-after", "0.2")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", int(PORT)), Chat).serve_forever()
