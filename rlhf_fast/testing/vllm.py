"""A vLLM server on the CPU as a process, for what tests it and what measures it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx2

STARTS = 600.0  # seconds; 35 on two quiet cores


class Server:
    """vLLM of the interpreter `python` on `model` in float32, with adapters up to rank 8, threads: of its products."""

    def __init__(self, python: Path, model: Path, log: Path, *, threads: int = 1, rows: int = 32) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.python, self.model, self.log, self.threads, self.rows = python, model, log, threads, rows
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Waits until it answers. It has a process group of its own, because the engine is a child of what is started.

        Raises RuntimeError with the end of its log where it does not.
        """
        environment = {
            **os.environ, "PATH": f"{self.python.parent}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads), "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        options = (
            f"--model {self.model} --served-model-name base --port {self.port} --host 127.0.0.1 --dtype float32 "
            f"--max-model-len 1024 --max-num-seqs {self.rows} --enforce-eager --enable-lora --max-lora-rank 8"
        )
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *options.split()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + STARTS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                httpx2.get(f"{self.url}/models", timeout=2).raise_for_status()
                return self
            except httpx2.HTTPError:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"vLLM does not answer: {self.log.read_text()[-2000:]}")

    def signal(self, number: int) -> None:
        """To all of its processes."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
