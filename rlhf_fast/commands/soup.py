"""The weighted average of adapters, exact: their pairs stacked to one adapter whose rank is the sum of theirs.

    sum of w_i s_i B_i A_i  =  [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

Averages of A and of B on their own, as they are often taken, are another matrix: they have the products B_i A_j too.
Source: averages of fine-tuned models, Wortsman et al. 2022 (arXiv 2203.05482); of policies for several rewards, Rame et
al. 2023 (arXiv 2306.04488).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_fast.commands.opening import copy_tokenizer, empty_folder, open_run
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.lora import LoRAShape
from rlhf_fast.models.peft_io import base_of, load_adapter, save_adapter


def parse_weights(words: Sequence[str], weights: str | None) -> tuple[list[str], list[float] | None]:
    """(runs, weights) of `A B --weights 0.5 0.5`, where a command line gives the option its first number alone, and of
    `A B --weights 0.5,0.5`. Raises UserError."""
    if weights is None:
        return list(words), None
    runs = [word for word in words if Path(word).exists() or not _is_number(word)]
    given = [*weights.replace(",", " ").split(), *(word for word in words if word not in runs)]
    bad = next((word for word in given if not _is_number(word)), None)
    if bad is not None:
        raise UserError(f"--weights must be finite numbers, got {bad!r}")
    return runs, [float(word) for word in given]


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def soup(runs: Sequence[str], weights: Sequence[float] | None, out: str, *, trust_remote_code: bool = False) -> str:
    """Write the average into the folder `out`; a line that says what is there. weights: default, all the same.

    Raises UserError for adapters that are not of one base, or not plain LoRA.
    """
    if len(runs) < 2:
        raise UserError(f"soup averages two or more adapters, got {len(runs)}")
    weights = weights or [1 / len(runs)] * len(runs)
    if len(weights) != len(runs):
        raise UserError(f"--weights has {len(weights)} numbers for {len(runs)} adapters")
    opened = open_run(runs[0], dtype="float32", trust_remote_code=trust_remote_code)
    if opened.adapter is None:
        raise UserError(f"{runs[0]} holds whole weights, not an adapter")
    bases = {run: base_of(run) for run in runs}
    other = next((run for run in runs if bases[run] != bases[runs[0]]), None)
    if other is not None:
        raise UserError(f"{runs[0]} and {other} are of different models: {bases[runs[0]]} and {bases[other]}")
    backbone = opened.backbone
    names = [f"part_{i}" for i in range(len(runs))]
    for name, run in zip(names, runs, strict=True):
        load_adapter(backbone, name, run, trainable=False)
        if name in backbone.heads:
            raise UserError(f"{run} has a score head, which is not averaged")
    stack(backbone, names, weights, "policy")
    folder = empty_folder(out)
    save_adapter(backbone, "policy", folder)
    copy_tokenizer(opened.adapter, folder)
    parts = " + ".join(f"{weight:g} {run}" for weight, run in zip(weights, runs, strict=True))
    return f"{folder}: {parts}, rank {max(pair.shape.rank for pair in backbone.adapters['policy'].values())}"


@torch.no_grad()
def stack(backbone: Backbone, names: Sequence[str], weights: Sequence[float], role: str) -> None:
    """Add the adapter `role` whose delta is the weighted sum of those of the adapters `names`."""
    modules: dict[str, list[tuple[float, str]]] = {}
    for name, weight in zip(names, weights, strict=True):
        for module, pair in backbone.adapters[name].items():
            if pair.magnitude is not None:
                raise UserError(f"an adapter has DoRA magnitudes ({module}), whose average is no sum of deltas")
            modules.setdefault(module, []).append((weight, name))
    pairs = {module: [(w, backbone.adapters[name][module]) for w, name in parts] for module, parts in modules.items()}
    shapes = {module: LoRAShape(sum(p.shape.rank for _, p in parts), 1.0) for module, parts in pairs.items()}
    backbone.create_adapter(role, shapes, trainable=False)
    for module, parts in pairs.items():
        target = backbone.adapters[role][module]
        target.a.copy_(torch.cat([pair.a for _, pair in parts]))
        target.b.copy_(torch.cat([weight * pair.shape.scale * pair.b for weight, pair in parts], dim=1))
