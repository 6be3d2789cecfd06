"""How long a run over many rows takes to its first step, and how much memory, with TRL on `datasets` beside it.

    python -m benchmarks.starts --out benchmarks/results/starts.json
    python -m benchmarks.starts --out out.json --rows 2000000 --case "chat, parquet" --peer .venv-peers/bin/python

Each start is a process of its own, from its launch to the end of the first step: first with empty caches, then once
more. The model is a Llama of two layers with a real tokenizer (`--tokenizer`), so that time goes into the data. Rows
are made up of random words, 20 to 80 characters of prompt and 20 to 100 of each answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine

BATCH = 4
CASES = {  # name -> (kind of rows, suffix, algorithm)
    "chat, JSONL": ("chat", "jsonl", "sft"), "chat, parquet": ("chat", "parquet", "sft"),
    "pairs, JSONL": ("pairs", "jsonl", "dpo"), "prompts, JSONL": ("prompts", "jsonl", "grpo"),
}  # fmt: skip
PEERS = {"sft": ("SFTTrainer", "SFTConfig"), "dpo": ("DPOTrainer", "DPOConfig")}
# What a user of TRL writes.
SCRIPT = """
import sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import {config}, {trainer}

class Told(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        open(sys.argv[4], "w").close()

data, model, folder = sys.argv[1:4]
rows = load_dataset("parquet" if data.endswith(".parquet") else "json", data_files=data, split="train")
arguments = {config}(output_dir=folder, max_steps=1, per_device_train_batch_size={batch}, report_to="none",
                     use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False)
trainer = {trainer}(AutoModelForCausalLM.from_pretrained(model), args=arguments, train_dataset=rows,
                    processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Told()])
trainer.train()
"""


class Words:
    """Text from a fixed seed."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        words = ["".join(self.random.choices(string.ascii_lowercase, k=self.random.randint(2, 9))) for _ in range(3000)]
        self.text = " ".join(self.random.choices(words, k=200_000))

    def some(self, least: int, most: int) -> str:
        size = self.random.randint(least, most)
        start = self.random.randrange(len(self.text) - most)
        return self.text[start : start + size]

    def row(self, kind: str, number: int) -> dict[str, Any]:
        prompt = f"{number} {self.some(20, 80)}"
        if kind == "prompts":
            return {"prompt": prompt}
        answers = self.some(20, 100), self.some(20, 100)
        if kind == "pairs":
            return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        said = zip(("user", "assistant"), (prompt, answers[0]), strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in said]}


def write_rows(path: Path, kind: str, rows: int) -> None:
    words = Words()
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(words.row(kind, i)) + "\n" for i in range(rows))
        return
    import pyarrow
    from pyarrow import parquet

    writer = None
    for start in range(0, rows, 50_000):
        part = [words.row(kind, i) for i in range(start, min(rows, start + 50_000))]
        table = pyarrow.Table.from_pylist(part)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_model(folder: Path, tokenizer: str) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def start(command: list[str], first_step: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds to the first step, elapsed and at work (of all processes); the most memory that one process had."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log)
        took = None
        while True:
            child, status, usage = os.wait4(process.pid, os.WNOHANG)
            if took is None and first_step.exists() and (first_step.name == "told" or first_step.stat().st_size):
                took = time.perf_counter() - began
            if child:
                break
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or took is None:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {log.read()[-2000:]}")
    return {"seconds": round(took, 2), "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_mib": usage.ru_maxrss >> 10}  # fmt: skip


def ours(place: Path, data: Path, algorithm: str) -> tuple[list[str], Path, dict[str, str]]:
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    keys: dict[str, Any] = {
        "algorithm": algorithm, "model": place / "model", "data": data, "steps": 1, "batch_size": BATCH,
        "output_dir": run, "report_to": "none", "eval_size": BATCH, "device": "cpu",
    }  # fmt: skip
    if algorithm == "grpo":
        keys |= {"reward": "examples/tiny/word_reward.py:word_score", "num_generations": BATCH, "max_new_tokens": 4}
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return (
        [sys.executable, "-m", "rlhf_fast", "train", *flags],
        run / "metrics.jsonl",
        {"XDG_CACHE_HOME": str(place / "ours"), "HF_HOME": str(place / "hub")},
    )


def theirs(python: str, place: Path, data: Path, algorithm: str) -> tuple[list[str], Path, dict[str, str]]:
    trainer, config = PEERS[algorithm]
    script, told = place / "peer.py", place / "told"
    script.write_text(SCRIPT.format(trainer=trainer, config=config, batch=BATCH))
    told.unlink(missing_ok=True)
    folder = place / "peer"
    return ([python, str(script), str(data), str(place / "model"), str(folder), str(told)], told,
            {"HF_HOME": str(place / "theirs")})  # fmt: skip


def measure(place: Path, data: Path, algorithm: str, peer: str | None) -> dict[str, Any]:
    """Of each contender the first start and the second; one after the other, in turn."""
    found: dict[str, Any] = {"rlhf_fast": [], **({"trl": []} if peer else {})}
    for _ in range(2):
        found["rlhf_fast"].append(start(*ours(place, data, algorithm)))
        if peer:
            found["trl"].append(start(*theirs(peer, place, data, algorithm)))
    return found


def table(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| rows | | first start, s | second start, s | processor, s | peak, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results["starts"]:
        for name, (first, second) in row["found"].items():
            work = f"{first['processor_seconds']:.0f}, {second['processor_seconds']:.0f}"
            peak = max(first["peak_mib"], second["peak_mib"])
            seconds = f"{first['seconds']:.1f} | {second['seconds']:.1f}"
            lines.append(f"| {row['rows']:,} {row['case']} | {name} | {seconds} | {work} | {peak:,} |")
    where, loads = results["machine"], [row["load"] for row in results["starts"]]
    lines += ["", f"{where['cpu']}, {results['processors']} processors, load {min(loads)} to {max(loads)} from "
              f"elsewhere, torch {where['torch']}, {results['peer']}. Command: `{where['command']}`."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON, whose other cases stay")
    parser.add_argument("--rows", type=int, action="append", help="default: 200000 and 2000000")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--tokenizer", default=".cache/smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--peer", help="a Python that has TRL: beside sft and dpo")
    parser.add_argument("--peer-rows", type=int, default=200_000, help="most rows that the peer starts on")
    arguments = parser.parse_args()
    peer, before = "no peer", {}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        peer = before["peer"]
    if arguments.peer:
        asks = "import trl, datasets; print(f'TRL {trl.__version__}, datasets {datasets.__version__}')"
        asked = subprocess.run([arguments.peer, "-c", asks], capture_output=True, text=True, check=True)
        peer = asked.stdout.strip().splitlines()[-1]
    results: dict[str, Any] = {
        "machine": machine("cpu"), "processors": len(os.sched_getaffinity(0)), "peer": peer,
        "starts": before.get("starts", []),
    }  # fmt: skip
    for rows in arguments.rows or [200_000, 2_000_000]:
        for case in arguments.case or CASES:
            kind, suffix, algorithm = CASES[case]
            load = round(os.getloadavg()[0], 1)
            with tempfile.TemporaryDirectory() as name:
                place = Path(name)
                data = place / f"{kind}.{suffix}"
                write_rows(data, kind, rows)
                write_model(place / "model", arguments.tokenizer)
                beside = arguments.peer if algorithm in PEERS and rows <= arguments.peer_rows else None
                found = measure(place, data, algorithm, beside)
            others = [row for row in results["starts"] if (row["rows"], row["case"]) != (rows, case)]
            row = {"rows": rows, "case": case, "commit": results["machine"]["commit"], "load": load, "found": found}
            results["starts"] = [*others, row]
            print(rows, case, json.dumps(found), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
