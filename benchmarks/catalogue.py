"""python -m benchmarks.catalogue: writes the table of kernels/README.md from the op table and the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
README = ROOT / "kernels" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- catalogue: python -m benchmarks.catalogue -->\n", "<!-- end of the catalogue -->\n"
BACKENDS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


class Row(NamedTuple):
    """What an op computes and at least costs: N tokens or elements, V vocabulary, D hidden size, R rank, K bins or
    answers, s bytes per input element; P = one N x D x V product."""

    formula: str
    flops: str
    bytes: str


ROWS: dict[str, Row] = {
    "token_logprobs": Row("z[y] - logsumexp(z), -sum p log p", "~10 NV, backward ~6 NV", "NVs; backward 2 NVs"),
    "linear_logprobs": Row(
        "log softmax(h Wᵀ)[y]", "2P frozen head, trained head 3P in the budget, else 4P", "head once per tile"
    ),
    "kl_estimate": Row("k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x; x = log p/q", "~6 N", "3 Ns"),
    "gae": Row("A = δ + γλ A', δ = r + γV' - V", "~10 N", "2 Ns + N read, 8 N written"),
    "discounted_returns": Row("R = r + γR'", "~3 N", "Ns + N read, 4 N written"),
    "shaped_rewards": Row("-β KL per token, score at the last", "~3 N", "Ns + N read, 4 N written"),
    "whiten": Row("(x - mean) / (std + ε)", "~6 N", "2 Ns read, Ns written"),
    "group_advantages": Row("r - baseline of its group, over its spread", "~6 N", "2 Ns"),
    "policy_loss": Row("Σ w L(exp(logp - old), A)", "~40 N", "3 Ns + N read, 4 N written; backward 8 N"),
    "value_loss": Row("½ max((v - R)², (clip(v) - R)²)", "~10 N", "3 Ns + N read, 4 N written"),
    "preference_loss": Row("L(β (x - y)), x and y log-ratios", "~30 N", "4 Ns read, 8 N written"),
    "reward_loss": Row("softplus(r⁻ - r⁺ + margin)", "~15 N", "3 Ns read, 8 N written"),
    "lora_linear": Row("x Wᵀ + s (x Aᵀ) Bᵀ by segment", "2 N in out + 2 NR (in + out)", "weight once for all adapters"),
}


def shares(results: dict[str, Any] | None, op: str, names: tuple[str, ...]) -> str:
    """Share of the machine's limit (the slower of bytes at copy bandwidth and FLOPs at matrix rate) per case."""
    if results is None:
        return "not yet measured"
    copy = results["limits"]["copy_bytes_per_second"]
    matrix = next(rate for name, rate in results["limits"].items() if name.endswith("flops_per_second"))
    found = []
    for case in results["cases"]:
        words = case["case"].replace(",", "").split()
        floor = max(case["bytes"] / copy, case["flops"] / matrix)
        if words[0] != op or not floor:
            continue
        best = min(row["min_ms"] for name, row in case["contenders"].items() if name in names) / 1e3
        label = " ".join(words[1:]) + (" bf16" if "bfloat16" in case["shape"] else "")
        found.append(f"{floor / best:.0%}{' (' + label + ')' if label else ''}")
    return "<br>".join(found) or "-"


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def catalogue() -> str:
    cpu, gpu = read("cpu.json"), read("gpu.json")
    lines = [
        "| op | computes | FLOPs | bytes | backends | share of the limit, CPU | GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, impls in sorted(table().items()):
        row = ROWS[op]
        backends = ", ".join(BACKENDS[name] for name in impls)
        on_cpu, on_gpu = shares(cpu, op, ("cpu",)), shares(gpu, op, ("triton", "cuda"))
        lines.append(f"| `{op}` | {row.formula} | {row.flops} | {row.bytes} | {backends} | {on_cpu} | {on_gpu} |")
    return "\n".join(lines) + "\n"


def with_catalogue(text: str) -> str:
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + catalogue() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_catalogue(README.read_text()))
