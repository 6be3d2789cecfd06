"""python -m benchmarks.catalogue: writes the tables of kernels/README.md from the op table and committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import described, described_scratch
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
README = ROOT / "kernels" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARK, END = "<!-- python -m benchmarks.catalogue writes {} -->\n", "<!-- end -->\n"
BACKENDS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}
OURS = {"cpu.json": ("cpu",), "gpu.json": ("triton", "cuda")}
NOT_YET = "not yet measured"


class Row(NamedTuple):
    """What an op computes and at least costs: N tokens or elements, V vocabulary, D hidden size, R rank, K bins or
    answers, s bytes per input element; P = one N x D x V product."""

    formula: str
    flops: str
    bytes: str


ROWS: dict[str, Row] = {
    "distributional_value_loss": Row("-Σ p log softmax(z), p a Gaussian's histogram", "~30 NK", "NKs, 4 NK written"),
    "discounted_returns": Row("R = r + γR'", "~3 N", "Ns + N, 4 N written"),
    "gae": Row("A = δ + γλA', δ = r + γV' - V", "~10 N", "2 Ns + N, 8 N written"),
    "group_advantages": Row("r - a baseline of its group, over a spread", "~6 N", "Ns, 4 N written"),
    "kl_estimate": Row("k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x; x = log p/q", "~40 N", "2 Ns, 8 N written"),
    "linear_kl": Row("D(softmax z, softmax z') of both heads", "4P frozen, 6P trained head", "head once per tile"),
    "linear_logprobs": Row("log softmax(h Wᵀ)[y]", "2P frozen head, trained 3P or 4P", "head once per tile"),
    "linear_policy_loss": Row("policy_loss(linear_logprobs(h, W))", "2P frozen, 3P trained head", "head once per tile"),
    "linear_preference_loss": Row("preference_loss of its sums", "2P frozen, 3P trained head", "head once per tile"),
    "linear_value_loss": Row("value_loss(h · w)", "4 ND", "NDs, NDs written"),
    "lora_linear": Row("x Wᵀ + s (x Aᵀ) Bᵀ by segment", "2 N in out + 2 NR (in + out)", "weight once for all adapters"),
    "policy_loss": Row("Σ w L(exp(logp - old), A)", "~40 N", "3 Ns + N, 4 N written; backward 8 N"),
    "preference_loss": Row("L(β (x - y)), x and y log-ratios", "~30 N", "4 Ns, 8 N written"),
    "ranking_loss": Row("Plackett-Luce with ties", "~20 K² per prompt", "Ns + 8 N, 12 N written"),
    "reward_loss": Row("softplus(r⁻ - r⁺ + margin)", "~15 N", "3 Ns, 8 N written"),
    "sample_tokens": Row("draw from the truncated softmax(z)", "~10 NV, 32 NV per threshold", "NVs"),
    "shaped_rewards": Row("-β KL per token, score at the last", "~3 N", "Ns + N, 4 N written"),
    "step_reward_loss": Row("BCE or squared error at steps", "~15 N", "2 Ns + N, 4 N written"),
    "token_kl": Row("D(softmax z, softmax z')", "~30 NV", "2 NVs; backward 3 NVs"),
    "token_logprobs": Row("z[y] - logsumexp(z), -Σ p log p", "~10 NV, backward ~6 NV", "NVs; backward 2 NVs"),
    "unpaired_preference_loss": Row("L(±(β x - shift))", "~20 N", "2 Ns + N, 4 N written"),
    "value_loss": Row("½ max((v - R)², (clip(v) - R)²)", "~10 N", "3 Ns + N, 4 N written"),
    "vtrace": Row("A = ρδ + γλcA'", "~25 N", "4 Ns + N, 8 N written"),
    "whiten": Row("(x - mean) / (std + ε)", "~6 N", "2 Ns, 4 N written"),
}


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def share(results: dict[str, Any], case: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """Of the machine's limit: the slower of bytes at copy bandwidth and FLOPs at matrix rate, over our best time."""
    matrix = next(rate for name, rate in results["limits"].items() if name.endswith("flops_per_second"))
    floor = max(case["bytes"] / results["limits"]["copy_bytes_per_second"], case["flops"] / matrix)
    ours = [row["min_ms"] for name, row in case["contenders"].items() if name in names]
    return 1e3 * floor / min(ours) if floor and ours else None


def shares(name: str, op: str) -> str:
    results = read(name)
    if results is None:
        return NOT_YET
    found = []
    for case in results["cases"]:
        first, *rest = case["case"].replace(",", "").split()
        part = share(results, case, OURS[name])
        if first == op and part is not None:
            label = " ".join(rest) + (" bf16" if "bfloat16" in case["shape"] else "")
            found.append(f"{part:.0%} {label}".strip())
    return "<br>".join(found) or NOT_YET


def ops_table() -> str:
    lines = [
        "| op | computes | FLOPs | bytes read | backends | share of the limit, CPU | GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, impls in sorted(table().items()):
        row, backends = ROWS[op], ", ".join(BACKENDS[name] for name in impls)
        on_cpu, on_gpu = shares("cpu.json", op), shares("gpu.json", op)
        lines.append(f"| `{op}` | {row.formula} | {row.flops} | {row.bytes} | {backends} | {on_cpu} | {on_gpu} |")
    return "\n".join(lines) + "\n"


def timings(name: str) -> str:
    """Every case: the best of the interleaved repeats of everyone, and what was asked of it."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    peers = "".join(f", {peer} {version}" for peer, version in results["peers"].items())
    lines = [
        f"{where}; torch {machine['torch']}{peers}; commit {machine['commit'][:7]}; `{machine['command']}`.", "",
        "| case | ours | eager | others | bars |", "|---|---:|---:|---|---|",
    ]  # fmt: skip
    for case in results["cases"]:
        best = {who: row["min_ms"] for who, row in case["contenders"].items()}
        ours = min(best.pop(who) for who in OURS[name] if who in best)
        eager = best.pop("eager")
        others = ", ".join(f"{who} {ms:.4g}" for who, ms in best.items() if who not in OURS[name])
        lines_of_bars = [*map(described, case["bars"]), *described_scratch(case, OURS[name])]
        bars = "<br>".join(line.removeprefix("bar ") for line in lines_of_bars)
        lines.append(f"| {case['case']}, {case['shape']} | {ours:.4g} | {eager:.4g} | {others} | {bars} |")
    return "\n".join(lines) + "\n"


SECTIONS = {
    "the ops": ops_table,
    "the CPU timings": lambda: timings("cpu.json"),
    "the GPU timings": lambda: timings("gpu.json"),
}


def with_tables(text: str) -> str:
    for name, made in SECTIONS.items():
        head, rest = text.split(MARK.format(name))
        text = head + MARK.format(name) + "\n" + made() + "\n" + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
