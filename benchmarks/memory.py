"""Memory of one PPO update: four roles on one backbone beside four separate models.

    python -m benchmarks.memory .cache/smollm2-135m-instruct

Each contender runs in a process of its own: build the models, make one warm-up update, then one that is measured.
Resident is the process's memory between updates, peak its high-water mark during one, both above the process that has
only imported the libraries. Bytes of weights and optimizer states are also counted from the tensors themselves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import git

CONTENDERS = {
    "ours": "rlhf_fast: adapters and heads on one frozen backbone",
    "ours-checkpointed": "rlhf_fast, with activation checkpointing",
    "sft": "LoRA SFT of rlhf_fast on the same tokens: one role, one pass",
    "separate": "four models: policy + LoRA (PEFT), reference, full critic, reward",
    "separate-checkpointed": "four models, with activation checkpointing",
}
RANK, BATCH, TOKENS, LEARNING_RATE = 8, 8, 128, 1e-4
MIB = 2**20


def memory_kib(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def resident_kib() -> int:
    """What is held and not what was used: freed memory is handed back. A new high-water mark begins."""
    ctypes.CDLL(None).malloc_trim(0)
    resident = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return resident


def batch_of(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and completion mask (second half), all (BATCH, TOKENS)."""
    ids = torch.randint(0, vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    completion = torch.zeros_like(ids)
    completion[:, TOKENS // 2 :] = 1
    return ids, torch.ones_like(ids), completion


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def estimates(old: Tensor, ref: Tensor, old_values: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, from KL-shaped rewards by GAE."""
    import rlhf_fast as ops

    kl = ops.kl_estimate(old, ref, variant="k1")
    rewards = ops.shaped_rewards(scores, kl, mask=mask, kl_coef=0.05)
    advantages, returns = ops.gae(rewards, old_values, mask=mask)
    return ops.whiten(advantages, mask), returns


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    import rlhf_fast as ops

    return ops.policy_loss(logprobs, old, advantages, mask=mask)[0]


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    import rlhf_fast as ops

    return 0.5 * ops.value_loss(values, old_values, returns, mask=mask, clip_eps=0.2)[0]


def ours(folder: str, checkpointed: bool) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    from rlhf_fast.models.backbone import Backbone
    from rlhf_fast.models.loading import load_model

    backbone = Backbone(load_model(folder, dtype=torch.float32, device="cpu"))
    backbone.enable_checkpointing(checkpointed)
    for role in ("policy", "critic"):
        backbone.add_adapter(role, rank=RANK)
    backbone.add_adapter("reward", rank=RANK, trainable=False)
    backbone.add_head("critic")
    backbone.add_head("reward", trainable=False)
    optimizers = [torch.optim.AdamW(backbone.parameters_of(role), lr=LEARNING_RATE) for role in ("policy", "critic")]
    ids, attention, mask = batch_of(backbone.model.config.vocab_size)

    def update() -> None:
        old = backbone.score(ids, attention, mask)
        advantages, returns = estimates(old.logprobs, old.ref_logprobs, old.values, old.scores, mask)
        logprobs = backbone.logprobs(backbone.hidden(ids, attention, ["policy"])["policy"], ids, mask)
        policy_loss(logprobs, old.logprobs, advantages, mask).backward()
        values = backbone.values("critic", backbone.hidden(ids, attention, ["critic"])["critic"])
        value_loss(values, old.values, returns, mask).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def tensors() -> list[Tensor]:
        adapters = [p for role in ("policy", "critic", "reward") for p in backbone.parameters_of(role)]
        return [*backbone.model.parameters(), *adapters, *states(optimizers)]

    return update, tensors


def sft(folder: str) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    from rlhf_fast.models.backbone import Backbone
    from rlhf_fast.models.loading import load_model

    backbone = Backbone(load_model(folder, dtype=torch.float32, device="cpu"))
    backbone.add_adapter("policy", rank=RANK)
    optimizer = torch.optim.AdamW(backbone.parameters_of("policy"), lr=LEARNING_RATE)
    ids, attention, mask = batch_of(backbone.model.config.vocab_size)

    def update() -> None:
        hidden = backbone.hidden(ids, attention, ["policy"])["policy"]
        (-backbone.logprobs(hidden, ids, mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update, lambda: [*backbone.model.parameters(), *backbone.parameters_of("policy"), *states([optimizer])]


def separate(folder: str, checkpointed: bool) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """As the usual trainers hold them: only the policy has a LoRA, the critic is trained whole."""
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(load(folder), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    reference, critic = load(folder).requires_grad_(False), load(folder).model
    reward = load(folder).model.requires_grad_(False)
    width = reference.config.hidden_size
    value_head, score_head = nn.Linear(width, 1), nn.Linear(width, 1).requires_grad_(False)
    if checkpointed:
        for model in (policy, critic):
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    critic_parameters = [*critic.parameters(), *value_head.parameters()]
    adapters = [p for p in policy.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(ps, lr=LEARNING_RATE) for ps in (adapters, critic_parameters)]
    ids, attention, mask = batch_of(reference.config.vocab_size)
    completion = TOKENS - TOKENS // 2  # positions whose logits are needed, as trainers ask for with logits_to_keep

    def logprobs_of(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=completion + 1, use_cache=False).logits
        picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, -completion:, None])[..., 0]
        return nn.functional.pad(picked, (TOKENS - completion, 0))

    def values_of(model: nn.Module, head: nn.Module) -> Tensor:
        return head(model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state)[..., 0]

    def update() -> None:
        with torch.no_grad():
            old, ref = logprobs_of(policy), logprobs_of(reference)
            old_values = nn.functional.pad(values_of(critic, value_head)[:, :-1], (1, 0))
            scores = values_of(reward, score_head)[:, -1]
        advantages, returns = estimates(old, ref, old_values, scores, mask)
        policy_loss(logprobs_of(policy), old, advantages, mask).backward()
        values = nn.functional.pad(values_of(critic, value_head)[:, :-1], (1, 0))
        value_loss(values, old_values, returns, mask).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def tensors() -> list[Tensor]:
        modules = (policy, reference, critic, reward, value_head, score_head)
        return [*(p for module in modules for p in module.parameters()), *states(optimizers)]

    return update, tensors


def states(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    return [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]


def unique_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(contender: str, folder: str) -> dict[str, float]:
    """Runs in a process of its own; all figures in bytes."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import rlhf_fast.models.backbone  # noqa: F401

    torch.manual_seed(0)
    imported = memory_kib("VmRSS")
    if contender == "sft":
        update, tensors = sft(folder)
    else:
        build = ours if contender.startswith("ours") else separate
        update, tensors = build(folder, contender.endswith("checkpointed"))
    update()
    resident = resident_kib()
    update()
    held, peak = unique_bytes(tensors()), memory_kib("VmHWM")
    return {"weights_and_states": held, "resident": (resident - imported) * 1024, "peak": (peak - imported) * 1024}


def section(report: dict) -> str:
    """The report as a part of docs/benchmarks.md."""
    base = report["rows"]["separate"]
    lines = [
        f"SmolLM2-135M in float32, batch of {report['batch']} x {report['tokens']} tokens (half of them completion), "
        f"LoRA rank {report['rank']} on all linear layers, AdamW. One update = score the batch with all four roles, "
        "losses, backward, optimizer steps. Same losses, same batch, each contender in its own process.",
        "",
        "| contender | weights + optimizer states | resident between updates | peak of an update | peak, share |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        cells = [f"{row[key] / MIB:,.0f} MiB" for key in ("weights_and_states", "resident", "peak")]
        lines.append(f"| {CONTENDERS[name]} | {' | '.join(cells)} | {row['peak'] / base['peak']:.0%} |")
    lines += [
        "",
        f"Bytes of the frozen model alone: {report['base'] / MIB:,.0f} MiB; all four roles of ours with both AdamW "
        f"states: {report['rows']['ours']['weights_and_states'] / report['base']:.3f} times that. (At 7B in bfloat16 "
        "with rank 8 the ratio is below 1.05; `tests/models/test_memory.py` counts it.)",
        "",
        "Resident and peak are those of the process (VmRSS after malloc_trim, VmHWM), above the same process before a "
        "model is loaded.",
        "",
        f"Machine: {report['machine']}. Versions: {report['versions']}. Commit: {report['commit']}. "
        "Command: `python -m benchmarks.memory .cache/smollm2-135m-instruct`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the converted SmolLM2-135M-Instruct")
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one and print JSON")
    parser.add_argument("--results", default="benchmarks/results/memory.json")
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, options.model)))
        return

    import peft
    import transformers

    rows = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.memory", options.model, "--contender", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {key: f"{value / MIB:,.0f} MiB" for key, value in rows[name].items()}, flush=True)
    report = {
        "batch": BATCH, "tokens": TOKENS, "rank": RANK,
        "base": unique_bytes(list(load(options.model).parameters())), "rows": rows,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "commit": git("rev-parse", "--short", "HEAD"),
    }  # fmt: skip
    Path(options.results).write_text(json.dumps(report, indent=1) + "\n")
    print(f"-> {options.results}; python -m benchmarks.catalogue writes the page")


if __name__ == "__main__":
    main()
