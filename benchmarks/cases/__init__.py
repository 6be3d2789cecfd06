"""What is timed: our ops beside the plain PyTorch that they replace, other libraries' functions, and bare floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.cases import advantages, head, losses, products, scaling, tokens
from benchmarks.cases.sizes import CPU, GPU, Sizes
from benchmarks.harness import Case

__all__ = ["GROUPS", "Sizes", "selected", "sizes_of"]

Cases = Callable[[Sizes, str], list[Case]]


def together(*families: Cases) -> Cases:
    return lambda sizes, device: [case for family in families for case in family(sizes, device)]


GROUPS: dict[str, Cases] = {
    # What `make bench` and `make gpu` time.
    "bars": together(tokens.bars, head.bars, losses.bars, advantages.bars),
    # Every op that has no case with a bar, and every pass that those leave out.
    "ops": together(advantages.ops, losses.ops, tokens.ops, head.ops),
    "ragged": together(tokens.ragged, head.ragged),
    "products": products.cases,
    "scaling": scaling.cases,
}
QUICK = Sizes(N=64, V=2048, D=64, B=8, T=256, packed=512, dtype=torch.float32)
SCALING = {
    "cpu": Sizes(N=1024, V=32_768, D=64, B=8, T=131_072, packed=0, dtype=torch.float32),
    "cuda": Sizes(N=1024, V=32_768, D=4096, B=64, T=131_072, packed=0, dtype=torch.bfloat16),
}
QUICK_SCALING = Sizes(N=32, V=256, D=16, B=2, T=64, packed=0, dtype=torch.float32)


def sizes_of(group: str, device: str, quick: bool) -> Sizes:
    full = SCALING[device] if group == "scaling" else CPU if device == "cpu" else GPU
    return replace(QUICK_SCALING if group == "scaling" else QUICK, dtype=full.dtype) if quick else full


def selected(
    groups: list[str], device: str, quick: bool = False, name: str = "", compiled: bool = False, peer: str = "",
    shape: str = "",
) -> list[Case]:  # fmt: skip
    """The cases whose names hold `name` and whose shapes hold `shape`, once where groups share them; with `peer`, those
    in which it takes part.

    torch.compile takes part where it is asked for, or where a bar names it.
    """
    cases: dict[tuple[str, str], Case] = {}
    for group in groups:
        for case in GROUPS[group](sizes_of(group, device, quick), device):
            keep = compiled or (not quick and any(bar.against == "torch.compile" for bar in case.bars))
            others = {who: run for who, run in case.peers.items() if keep or who != "torch.compile"}
            if name in case.name and shape in case.shape and (not peer or peer in others):
                cases.setdefault((case.name, case.shape), replace(case, peers=others, bars=() if quick else case.bars))
    return list(cases.values())
