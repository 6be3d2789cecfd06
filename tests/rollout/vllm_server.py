"""A stand-in for a vLLM server on the tiny model of tests.training.tiny_runs: a thread that can be killed.

It samples from adapter files as vLLM does: it reads them when it is told to, knows them by name, forgets them when it
is started again, gives the answers of a prompt the seeds seed, seed + 1 ..., and takes what a request leaves open from
settings of its own, here such that nothing but token 7 comes out.
"""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import load_adapter

EXPLICIT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Server:
    """mode: of the log-probabilities. requests: (path, body) of all that came. faults: answers, (status, text), to the
    next requests for completions. Every `slow` seconds a token."""

    def __init__(self, model: Path, *, mode: str = "raw", context: int = 128) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.backbone = Backbone(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
        self.mode, self.context, self.max_rank, self.takes_adapters = mode, context, 8, True
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.travelled: dict[str, list[str]] = {}
        self.faults: list[tuple[int, str]] = []
        self.lock = threading.Lock()
        self.http: ThreadingHTTPServer | None = None
        self.connections: set[socket.socket] = set()

    def start(self) -> "Server":
        with self.lock:
            for name in list(self.backbone.adapters):
                self.backbone.remove_adapter(name)
        ThreadingHTTPServer.allow_reuse_address = True
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), type("Here", (_Handler,), {"of": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def kill(self) -> None:
        """Connections break off, what is loaded is forgotten."""
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None
            for connection in list(self.connections):
                with contextlib.suppress(OSError):  # it is closed
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()

    def sent(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not self.takes_adapters:
            return 404, {"detail": "Not Found"}
        if name in self.backbone.adapters:
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        self.travelled[name] = sorted(path.name for path in folder.iterdir())
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 500, error(f"Call to add_lora method failed: 'LoRA rank {rank} is greater than max_lora_rank 8.'")
        with torch.random.fork_rng(devices=[]):  # whoever asks waits, and has the same random state behind
            load_adapter(self.backbone, name, folder, trainable=False)
        return 200, "Success"

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["lora_name"] not in self.backbone.adapters:
            return 404, error("The lora adapter cannot be found.")
        self.backbone.remove_adapter(body["lora_name"])
        return 200, "Success"

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.faults:
            status, text = self.faults.pop(0)
            return status, text if status == 200 else error(text)
        if body["model"] != "base" and body["model"] not in self.backbone.adapters:
            return 404, error(f"The model `{body['model']}` does not exist.")
        choices = [self.choice(body, index) for index in range(body.get("n", 1))]
        return 200, {"choices": choices[::-1]}  # in whatever order

    def choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
        ids, logprobs, top, finish = list(body["prompt"]), [], [], "length"
        for _ in range(body["max_tokens"]):
            with self.backbone.using(None if body["model"] == "base" else body["model"]):
                raw = self.backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
            processed = raw / body["temperature"]
            if body["top_k"] > 0:
                processed = processed.masked_fill(processed < processed.topk(body["top_k"]).values[-1], -torch.inf)
            token = int(torch.multinomial(processed.softmax(0), 1, generator=generator))
            if any(name not in body for name in EXPLICIT):
                token = 7
            told = (raw if self.mode == "raw" else processed).log_softmax(0)
            ids.append(token)
            logprobs.append(float(told[token]))
            best = int(told.argmax())
            top.append({f"token_id:{token}": logprobs[-1], f"token_id:{best}": float(told[best])})
            if token in body["stop_token_ids"]:
                finish = "stop"
                break
        ids = ids[len(body["prompt"]) :]
        told_ids = {"token_ids": ids} if body.get("return_token_ids") else {}
        names = [f"token_id:{token}" for token in ids]
        told_logprobs = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top}
        return {"index": index, "finish_reason": finish, "logprobs": told_logprobs, **told_ids}


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": 0}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Server

    def setup(self) -> None:
        super().setup()
        self.of.connections.add(self.connection)

    def do_GET(self) -> None:
        self._reply(200, {"data": [
            {"id": "base", "parent": None, "max_model_len": self.of.context},
            {"id": "another-v7", "parent": "base", "max_model_len": None},
        ]})  # fmt: skip

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        path = self.path.rpartition("/")[2]
        server = self.of
        act = {"completions": server.complete, "load_lora_adapter": server.load, "unload_lora_adapter": server.unload}
        with server.lock:
            if self.server is not server.http:  # killed meanwhile
                self.close_connection = True
                return
            server.requests.append((path, body))
            answer = act[path](body)
        self._reply(*answer)

    def _reply(self, status: int, value: Any) -> None:
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
        with contextlib.suppress(OSError):  # whoever asked is gone
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def until(holds) -> None:
    while not holds():
        time.sleep(0.002)
