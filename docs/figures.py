"""Draws the figures of docs/how_it_works.md into docs/figures/: `python docs/figures.py`.

A figure is made of numbers that a function of its own measures; tests/docs/test_figures.py holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen2Config

from rlhf_fast import linear_logprobs, token_logprobs
from rlhf_fast.models.backbone import Backbone

FOLDER = Path(__file__).parent / "figures"
OURS, OTHERS, BASE = "#1b7f5c", ("#b5503c", "#c99a2e"), "#9aa5b1"


# --- Softmax collapse ------------------------------------------------------------------------------------------------

MARGINS = [x / 2 for x in range(61)]  # nats
WRITTEN = {
    "z - logsumexp(z)": lambda z: z[0] - z.logsumexp(0),
    "log_softmax(z)": lambda z: F.log_softmax(z, 0)[0],
    "token_logprobs": lambda z: token_logprobs(z, torch.tensor(0)),
}


def collapse(written: Callable[[Tensor], Tensor], margin: float) -> tuple[float, float]:
    """|relative error| of a token's log-probability and of its gradient in float32, against the exact ones in float64.

    margin: the token's logit less the log-sum-exp of the others, which is 0, in nats.
    """
    others = torch.full((100,), 1 / 100, dtype=torch.float64).log()
    z = torch.cat([torch.tensor([margin], dtype=torch.float64), others]).float().requires_grad_()
    logprob = written(z)
    logprob.backward()
    wide = z.detach().double()
    rest = wide[1:].logsumexp(0)
    value, gradient = -F.softplus(rest - wide[0]), torch.sigmoid(rest - wide[0])
    assert z.grad is not None
    return _relative(logprob, value), _relative(z.grad[0], gradient)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() / exact - 1).abs())


def draw_collapse(path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for (name, written), color in zip(WRITTEN.items(), (*OTHERS, OURS), strict=True):
        errors = list(zip(*(collapse(written, margin) for margin in MARGINS), strict=True))
        for axis, error in zip(axes, errors, strict=True):
            axis.semilogy(MARGINS, [max(e, 1e-8) for e in error], color=color, label=name)
    for axis, title in zip(axes, ("log-probability", "its gradient by the logit"), strict=True):
        axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("margin of the token over the others, nats")
        axis.grid(alpha=0.3)
        axis.set_ylim(1e-8, 20)
    axes[0].set_ylabel("relative error in float32")
    axes[0].text(0.2, 2, "nothing left", fontsize=8)
    axes[0].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


# --- Products of an LM head ------------------------------------------------------------------------------------------

N, D, V = 64, 16, 512


class HeadCost(NamedTuple):
    products: float  # forward and backward, in N x D x V
    kept: float  # bytes kept for the backward pass, besides the inputs, over those of all logits in float32


def head_cost(logprobs: Callable[[Tensor, Tensor, Tensor], Tensor], *, trained: bool) -> HeadCost:
    """What log-probabilities of N tokens cost, from hidden states to the gradients of these and of a trained head."""
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=trained)
    ids = torch.randint(V, (N,))
    inputs = {x.untyped_storage().data_ptr() for x in (hidden, weight, ids)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (logprobs(hidden, weight, ids) * torch.randn(N)).sum()
        loss.backward()
    factors = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}
    pairs = [event.input_shapes[factors[event.name]] for event in profile.events() if event.name in factors]
    products = sum(a[0] * a[1] * b[1] for a, b in pairs)
    return HeadCost(products / (N * D * V), sum(kept.values()) / (4 * N * V))


def whole_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def recomputed_tiles(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    tiles = zip(hidden.split(16), ids.split(16), strict=True)
    return torch.cat([checkpoint(whole_logits, h, weight, i, use_reentrant=False) for h, i in tiles])


HEADS = {
    "all logits kept": whole_logits,
    "tiles made again in backward": recomputed_tiles,
    "linear_logprobs": linear_logprobs,
}


def draw_products(path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.8))
    for i, (name, color) in enumerate(zip(HEADS, (*OTHERS, OURS), strict=True)):
        costs = [head_cost(HEADS[name], trained=trained) for trained in (False, True)]
        for axis, numbers in zip(axes, zip(*costs, strict=True), strict=True):
            bars = axis.bar([0.27 * (i - 1), 1 + 0.27 * (i - 1)], numbers, 0.25, color=color, label=name)
            axis.bar_label(bars, fmt="%.2g", fontsize=8)
    for axis, title, top in zip(
        axes, ("N x D x V products, forward + backward", f"kept for backward / all logits (V = {V // D} D)"), (5, 1.35),
        strict=True,
    ):  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xticks([0, 1], ["frozen head", "trained head"])
        axis.set_ylim(0, top)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="upper left")
    _save(figure, path)


# --- Four roles ------------------------------------------------------------------------------------------------------


def role_bytes() -> dict[str, int]:
    """Bytes between updates of four roles of rank 8 on Qwen2.5-7B in bfloat16, with both AdamW states; sizes alone."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = Qwen2Config(vocab_size=152064, num_key_value_heads=4, tie_word_embeddings=False, **shape)
    with torch.device("meta"):
        backbone = Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    for role in ("policy", "critic", "reward"):
        backbone.add_adapter(role, rank=8, trainable=role != "reward")
    for role in ("critic", "reward"):
        backbone.add_head(role, trainable=role == "critic")
    sizes = backbone.bytes()
    roles = {role: sum(b for name, b in sizes.items() if name.endswith(role)) for role in backbone.adapters}
    moments = 2 * (roles["policy"] + roles["critic"])
    return {"base": sizes["base"], **roles, "AdamW": moments}


def draw_roles(path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.5, 1))
    _draw_traversal(left)
    sizes = role_bytes()
    bars = right.barh(list(sizes), [b / 2**30 for b in sizes.values()], color=[BASE, *[OURS] * 4])
    right.bar_label(bars, [f"{b / 2**30:.2f} GiB" for b in sizes.values()], fontsize=8, padding=3)
    right.set_xlim(0, 19)
    right.invert_yaxis()
    right.set_title("a 7B model, bfloat16, rank 8: bytes", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_traversal(axis: Any) -> None:
    axis.set_title("one traversal for all roles (top_layers: 2)", fontsize=10)
    for layer in range(3):
        axis.add_patch(Rectangle((0, layer), 1, 0.9, color=BASE))
        axis.text(0.5, layer + 0.45, f"layer {layer}", ha="center", va="center", fontsize=8)
    heads = ("LM head", "LM head", "value head", "score head")
    for i, role in enumerate(("policy", "reference", "critic", "reward")):
        for layer in (3, 4):
            axis.add_patch(Rectangle((i, layer), 0.96, 0.9, color=BASE))
            if role != "reference":
                axis.add_patch(Rectangle((i + 0.74, layer), 0.22, 0.9, color=OURS))
        axis.text(i + 0.36, 4.45, role, ha="center", va="center", fontsize=8)
        axis.text(i + 0.48, 5.15, heads[i], ha="center", fontsize=8)
    notes = {
        2.2: "layers without adapters: every row once",
        1.4: "gray: frozen weights, one product over",
        0.9: "the rows of all roles",
        0.2: "green: the LoRA of each role's own rows",
    }
    for height, note in notes.items():
        axis.text(1.15, height, note, fontsize=8)
    axis.set_xlim(0, 4)
    axis.set_ylim(0, 5.6)
    axis.axis("off")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=88)
    pyplot.close(figure)
    print(path)


FIGURES = {"collapse": draw_collapse, "products": draw_products, "roles": draw_roles}

if __name__ == "__main__":
    pyplot.switch_backend("Agg")
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        draw(FOLDER / f"{name}.png")
