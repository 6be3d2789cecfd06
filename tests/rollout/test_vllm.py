"""A run through the real vLLM, whose CPU build `make vllm` installs; `make test-vllm` runs this."""

import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_fast.data.encoding import Prompt, load_tokenizer
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import load_adapter
from rlhf_fast.rollout import roll_out
from rlhf_fast.rollout.engines.vllm import VLLM
from rlhf_fast.testing.vllm import Server
from tests.training.interruptions import run
from tests.training.tiny_runs import write_jsonl

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("RLHF_FAST_VLLM", ROOT / ".venv-vllm" / "bin" / "python"))
MODEL = Path(os.environ.get("RLHF_FAST_SMOLLM2", ROOT / ".cache" / "smollm2-135m-instruct"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON.exists() and MODEL.is_dir()), reason="needs vLLM and SmolLM2: make test-vllm"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(PYTHON, MODEL, tmp_path_factory.mktemp("vllm") / "vllm.log")
    yield server.start()
    server.kill()


def test_grpo_trains_through_it_pushes_its_adapter_at_every_step_and_survives_its_restart(server, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Letter {i}. Dear friend, today I"} for i in range(12)])
    (tmp_path / "reward.py").write_text(
        "def score(completions):\n    return [float(c.count('e')) for c in completions]\n"
    )
    values = {
        "algorithm": "grpo", "model": str(MODEL), "data": str(tmp_path / "prompts.jsonl"), "eval_size": 2,
        "reward": f"{tmp_path / 'reward.py'}:score", "steps": 4, "batch_size": 8, "num_generations": 4,
        "max_new_tokens": 12, "learning_rate": 1e-3, "device": "cpu", "dtype": "float32", "report_to": "none",
        "engine": {"kind": "vllm", "url": server.url, "retries": 40}, "output_dir": str(tmp_path / "run"),
        "chat": False,
    }  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"

    def kill_and_restart():
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        server.kill()
        server.start()

    disturber = threading.Thread(target=kill_and_restart)
    disturber.start()
    run(values)
    disturber.join()
    rows = read_jsonl(metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["sampler_gap"] < 1e-4
    assert all(abs(row["sampler_kl"]) < 1e-5 and abs(row["correction_mean"] - 1) < 1e-3 for row in rows)
    log = server.log.read_text()
    states = [f"v{k}" for k in range(1, 6)]  # the start, and after each step
    assert sorted(set(re.findall(r"Loaded new LoRA adapter: name 'rlhf_fast-\w+-(v\d+)'", log))) == states
    assert log.count("Removed LoRA adapter: name 'rlhf_fast-") >= 3, "what the second server had, but for the last"

    trained = Backbone(load_model(str(MODEL), dtype=torch.float32))
    load_adapter(trained, "policy", tmp_path / "run", trainable=False)
    tokenizer = load_tokenizer(str(MODEL))
    prompts = [Prompt("", tokenizer(text)["input_ids"], text, {}) for text in ("Once upon a time", "Rain is") * 4]
    rollout = roll_out(
        trained, tokenizer, prompts, max_new_tokens=24, keep_logprobs=True, engine=VLLM(server.url, model="base")
    )
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    batch = rollout.batch
    counted = batch.mask[:, 1:].bool()

    @torch.no_grad()
    def logprobs(model):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0][counted]

    plain = logprobs(base)
    theirs = logprobs(PeftModel.from_pretrained(base, str(tmp_path / "run")).eval())
    gap = (rollout.sampler.logprobs[:, 1:][counted] - theirs).abs().max().item()
    print(f"log-probabilities of {int(counted.sum())} tokens differ from PEFT's by at most {gap:.2g} nats")
    assert (theirs - plain).abs().max() > 0.01, "the adapter does something"
    assert gap < 1e-4
