"""What fits a GPU: models of 1B to 70B, counted on the meta device. Nothing is computed, and no GPU is needed.

    python -m benchmarks.fits

Passes of two and of three layers of the model's own shapes are counted by rlhf_fast/models/counting.py, as a run counts
its own (`memory:`), and their bytes are a straight line in the number of layers. Rows are as long as the context, half
of it prompt; a step has ROWS of them. Of a GPU, RESERVED and a twentieth are left to CUDA and to what its allocator
loses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.machine import git
from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.training.config import merged, parse
from rlhf_fast.training.memory_plan import Counter, Fit, Parts, Plan, Settings, Shape

# The shapes of Llama-3.2-1B, Llama-3.1-8B, Qwen2.5-32B and Llama-3.1-70B, from their config.json.
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "tie_word_embeddings")  # fmt: skip
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "1B": (LlamaConfig, dict(zip(NAMES, (2048, 8192, 16, 32, 8, 128256, True), strict=True))),
    "8B": (LlamaConfig, dict(zip(NAMES, (4096, 14336, 32, 32, 8, 128256, False), strict=True))),
    "32B": (Qwen2Config, dict(zip(NAMES, (5120, 27648, 64, 40, 8, 152064, False), strict=True))),
    "70B": (LlamaConfig, dict(zip(NAMES, (8192, 28672, 80, 64, 8, 128256, False), strict=True))),
}
METHODS = {"SFT": "sft", "DPO": "dpo", "GRPO": "grpo", "PPO": "ppo"}
CONTEXTS = (2048, 8192, 32768)
GPUS = (24, 48, 80)  # GiB
RESERVED, LOST = 1 << 30, 0.05
ROWS, RANK = 16, 16
DEPTHS = (2, 3)  # layers that are counted


def backbone_of(model: str, layers: int, *, nf4: bool, method: str) -> Backbone:
    """With the roles of the method, on the meta device."""
    kind, sizes = MODELS[model]
    config = kind(**{**sizes, "num_hidden_layers": layers, "max_position_embeddings": 131072})
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if nf4:
            pack(built.model.layers)
    backbone = Backbone(built)
    backbone.add_adapter("policy", rank=RANK)
    if method == "ppo":
        backbone.add_adapter("critic", rank=RANK)
        backbone.add_adapter("reward", rank=RANK, trainable=False)
        backbone.add_head("critic")
        backbone.add_head("reward", trainable=False)
    return backbone


def pack(layers: nn.Module) -> None:
    """Their linear layers as bitsandbytes stores them in NF4, with scales that are quantised as well."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            shape, count = linear.weight.shape, linear.weight.numel()
            blocks = count // 64
            outer = QuantState(
                torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
            state = QuantState(
                torch.empty(blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=64,
                quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty(()), state2=outer,
            )  # fmt: skip
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            if linear.bias is not None:
                packed.bias = linear.bias
            packed.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
            packed.weight.quant_state = state
            setattr(parent, name, packed)


class Deep:
    """A counter of a model of many layers, from those of two with few."""

    def __init__(self, model: str, method: str, context: int, *, nf4: bool) -> None:
        algorithm = METHODS[method]
        module = load_algorithm(algorithm)
        keys = {"algorithm": algorithm, "model": model, "data": "-", "batch_size": ROWS, "lora_rank": RANK}
        if algorithm in ("grpo", "ppo"):
            keys |= {"reward": "a:b", "max_new_tokens": context // 2}
        if algorithm == "grpo":
            keys |= {"num_generations": 8}
        values, _ = merged(module.AlgorithmConfig, algorithm, ALGORITHMS[algorithm].defaults, keys)
        self.config, self.device = parse(module.AlgorithmConfig, values), "cuda"
        each = 2 if algorithm == "dpo" else 1
        self.shape = Shape(context, context // 2, context // 2, each, ROWS, ROWS)
        self.layers, self.counters = MODELS[model][1]["num_hidden_layers"], []
        for depth in DEPTHS:
            backbone = backbone_of(model, depth, nf4=nf4, method=algorithm)
            trained = ["policy", "critic"] if algorithm == "ppo" else ["policy"]
            counter = Counter(backbone, trained, 2, self.config, self.shape)
            counter.padded = False
            self.counters.append(counter)

    @property
    def sizes(self) -> dict[str, int]:
        return {}

    def parts(self, settings: Settings) -> Parts:
        few, more = (counter.parts(settings) for counter in self.counters)
        steps = (self.layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        whole = Parts(*(round(a + (b - a) * steps) for a, b in zip(few, more, strict=True)))
        if not few.rollout:
            return whole
        cached = few.rollout + (self.layers - DEPTHS[0]) * self._cache_bytes(settings.rollout_rows or ROWS)
        return whole._replace(rollout=max(whole.rollout, cached))

    def _cache_bytes(self, rows: int) -> int:
        """Of keys and values of a layer: of all rows, and of their prompts, which a rollout begins with. In few layers
        they are less than what a pass makes, so that a straight line would miss them."""
        shape, model = self.shape, self.counters[0].backbone.model.config
        rows, head = min(rows, ROWS), model.hidden_size // model.num_attention_heads
        width = shape.width if rows == ROWS else shape.width * 3 // 2
        prompts = -(-rows // self.config.num_generations)
        return (rows * width + prompts * shape.prompt) * 2 * model.num_key_value_heads * head * 2


def row_of(plan: Plan) -> dict[str, Any]:
    settings, tokens = plan.settings, plan.settings.micro_batch_size * plan.shape.each * plan.shape.width
    return {**settings._asdict(), "tokens": tokens, "bytes": plan.parts.total, **plan.parts._asdict()}


def measured(models: list[str], contexts: list[int]) -> dict[str, Any]:
    found = {}
    for model in models:
        for weights in ("bf16", "nf4"):
            for method in METHODS:
                for context in contexts:
                    deep = Deep(model, method, context, nf4=weights == "nf4")
                    least = deep.parts(Settings(1, True, 128, 1))
                    of_gpus: dict[str, Any] = {}
                    for gpu in GPUS:
                        budget = int((gpu << 30) * (1 - LOST)) - RESERVED
                        fits = least.total <= budget
                        of_gpus[str(gpu)] = row_of(Fit(deep, budget).plan()) if fits else None  # type: ignore[arg-type]
                    key = f"{model} {weights} {method} {context}"
                    found[key] = {"least": {**least._asdict(), "bytes": least.total}, "gpus": of_gpus}
                    print(key, {gpu: row and row["tokens"] for gpu, row in of_gpus.items()}, flush=True)
    return found


def shown(row: dict[str, Any] | None, least: dict[str, Any]) -> str:
    if row is None:
        return "-"
    recomputed = ", recomputed" if row["gradient_checkpointing"] else ""
    chunk = "" if row["head_chunk_tokens"] is None else f", logits of {row['head_chunk_tokens']}"
    sampled = "" if row["rollout_rows"] is None else f", {row['rollout_rows']} sampled"
    return f"{row['tokens'] // 1024}k{recomputed}{chunk}{sampled}"


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| model, weights | method | context | least, GiB | {' | '.join(f'{gpu} GB' for gpu in GPUS)} |",
        "|---|---|---:|---:|" + "---|" * len(GPUS),
    ]
    for key, found in results["fits"].items():
        model, weights, method, context = key.split()
        cells = [shown(found["gpus"][str(gpu)], found["least"]) for gpu in GPUS]
        least = found["least"]["bytes"] / 2**30
        lines.append(f"| {model} {weights} | {method} | {int(context) // 1024}k | {least:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nCommit: {results['commit']}. Command: `python -m benchmarks.fits`.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--context", type=int, action="append", help="default: 2048, 8192 and 32768")
    parser.add_argument("--results", default="benchmarks/results/fits.json")
    options = parser.parse_args()
    report = {"rows": ROWS, "rank": RANK, "commit": git("rev-parse", "--short", "HEAD"), "fits": {}}
    for model in options.model or list(MODELS):
        report["fits"] |= measured([model], options.context or list(CONTEXTS))
        Path(options.results).write_text(json.dumps(report, indent=1) + "\n")
    print(f"-> {options.results}; python -m benchmarks.catalogue writes the page")


if __name__ == "__main__":
    main()
