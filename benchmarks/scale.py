"""What travels between processes, by formulas of sizes, and how long it takes at least: the tables of docs/scale.md.

Bytes of a gather are those of the whole tensor that it makes, of an all-reduce those of the tensor: what one counts who
watches the collectives, as tests/distributed/test_traffic.py does. Through a rank's link come (N - 1) / N of a gather
over N ranks, and of an all-reduce twice that (ring algorithms).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Model(NamedTuple):
    """A decoder of Llama's kind, and its adapters on all linear layers.

    bytes: of a weight. nf4: those of linear layers are packed, two in a byte.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    bytes: int = 2
    nf4: bool = False

    @property
    def linears(self) -> list[Shape]:
        """(out, in) of those of one layer."""
        d, inner, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        return [(inner, d), (kv, d), (kv, d), (d, inner), *[(self.intermediate, d)] * 2, (d, self.intermediate)]

    @property
    def parameters(self) -> int:
        layer = sum(map(math.prod, self.linears)) + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def adapter(self, rank: int, top_layers: int | None = None) -> int:
        """P_lora: the numbers of one adapter."""
        return (top_layers or self.layers) * sum(rank * (out + into) for out, into in self.linears)


def gathered(shapes: Sequence[Shape], ranks: int, itemsize: int) -> int:
    """Bytes of weights that are split by rows over `ranks`, the last piece filled up to the size of the others."""
    return sum(-(-rows // ranks) * ranks * math.prod(rest) for rows, *rest in shapes) * itemsize


def vocabulary_bytes(model: Model, ranks: int) -> int:
    """Of the embedding, and of the head."""
    return gathered([(model.vocabulary, model.hidden)], ranks, model.bytes)


def layer_bytes(model: Model, ranks: int, layers: int | None = None) -> int:
    """Of so many layers, by default of all."""
    linears = gathered(model.linears, ranks, model.bytes)
    if model.nf4:
        linears = gathered([(out * into // 2, 1) for out, into in model.linears], ranks, 1)
    norms = gathered([(model.hidden,)] * 2, ranks, model.bytes)
    return (model.layers if layers is None else layers) * (linears + norms)


def scale_bytes(model: Model) -> float:
    """What every rank holds whole: of nf4 a byte for 64 weights, and 4 for 256 of those."""
    weights = model.layers * sum(math.prod(shape) for shape in model.linears)
    return weights / 64 * (1 + 4 / 256) if model.nf4 else 0.0


def forward_bytes(model: Model, ranks: int) -> int:
    """A pass with log-probabilities, of any number of roles, or of the next tokens of all rows: about 2P."""
    return layer_bytes(model, ranks) + 2 * vocabulary_bytes(model, ranks)


def backward_bytes(model: Model, ranks: int, top_layers: int | None = None) -> int:
    """Its backward: the layers that it reaches; nothing is reduced, and a frozen head needs no weight."""
    return layer_bytes(model, ranks, top_layers)


def gradient_bytes(model: Model, rank: int, top_layers: int | None = None) -> int:
    """One all-reduce of a role's gradients, in float32, for each update."""
    return 4 * model.adapter(rank, top_layers)


def whole_rollout_bytes(model: Model, ranks: int) -> int:
    """A rollout of any length from a whole copy."""
    return forward_bytes(model, ranks)


def layered_rollout_bytes(model: Model, ranks: int, tokens: int) -> int:
    """A rollout whose longest completion has so many tokens, with every layer gathered for each."""
    return tokens * forward_bytes(model, ranks)


def split_head_bytes(model: Model, ranks: int, tokens: int) -> int:
    """A frozen head that stays in pieces: hidden states of every rank's `tokens` to all, and the sum of their gradients
    in float32, of which the pieces make parts."""
    return ranks * tokens * model.hidden * (model.bytes + 4)


# The cases of the page. Sizes of Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783, table 3).
MODELS = (
    Model("8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Model("70B", 80, 8192, 28672, 64, 8, 128, 128256),
    Model("405B", 126, 16384, 53248, 128, 8, 128, 128256),
    Model("405B nf4", 126, 16384, 53248, 128, 8, 128, 128256, nf4=True),
)
GPUS = (8, 64, 1024)
LORA_RANK = 32
# One H100 SXM, from its data sheet; and a network adapter of 400 Gb/s for each GPU.
MEMORY, MEMORY_SPEED, FLOPS, NVLINK, NETWORK, NODE = 80e9, 3.35e12, 989e12, 450e9, 50e9, 8
UTILISATION = 0.4  # of FLOPS, what a large model's pass is taken to reach
FOR_WEIGHTS = 0.5  # of MEMORY, what the pieces may take
COMPLETION = 1024  # tokens
PASSES = 2  # micro-batches of each GPU in a step
GB = 1e9


def pieces_of(model: Model, gpus: int) -> int | None:
    """Over how many GPUs the weights have to be split, a power of 2; None where they are too few."""
    counts = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    return next((n for n in counts if held_bytes(model, n) <= FOR_WEIGHTS * MEMORY), None)


def held_bytes(model: Model, ranks: int) -> float:
    """The frozen weights on each of them."""
    return forward_bytes(model, ranks) / ranks + scale_bytes(model)


def link(ranks: int) -> float:
    """Bytes a second of the slowest link of neighbouring ranks."""
    return NVLINK if ranks <= NODE else NETWORK


def gather_seconds(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks / link(ranks)


def hiding_tokens(model: Model, ranks: int) -> float:
    """Tokens of a GPU's micro-batch from which a forward takes longer than what it gathers."""
    return gather_seconds(forward_bytes(model, ranks), ranks) * UTILISATION * FLOPS / (2 * model.parameters)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(size: float) -> str:
    """GB."""
    return f"{size / GB:.3g}" if size < 100 * GB else f"{size / GB:,.0f}"


def per_pass() -> str:
    """What a GPU holds and what passes its link, by model and number of GPUs."""
    columns = [
        "model, GPUs", "`shards`", "weights held, GB", "forward, GB", "backward, GB", "forward at least, s",
        "tokens that hide it",
    ]  # fmt: skip
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            label, ranks = f"{model.name}, {gpus:,}", pieces_of(model, gpus)
            if ranks is None:
                rows.append([label, f"takes {pieces_of(model, 1 << 20)} GPUs", *[""] * 5])
                continue
            passes = [forward_bytes(model, ranks), backward_bytes(model, ranks)] if ranks > 1 else [0, 0]
            hides = f"{hiding_tokens(model, ranks):,.0f}" if ranks > 1 else "any"
            sizes = [held_bytes(model, ranks), *passes]
            rows.append([label, str(ranks), *map(shown, sizes), f"{gather_seconds(passes[0], ranks):.2g}", hides])
    return table(columns, rows)


def per_step() -> str:
    """What reaches a GPU in one PPO step, in GB, and how long it takes at least."""
    columns = ["model, GPUs", "rollout", "scoring", "forward and backward", "gradients of two roles", "at least, s"]
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            ranks, gradients = pieces_of(model, gpus), 2 * gradient_bytes(model, LORA_RANK)
            if ranks is None:
                continue
            sampled = whole_rollout_bytes(model, ranks)
            if not fits_whole(model, ranks):
                sampled = layered_rollout_bytes(model, ranks, COMPLETION)
            passes = [sampled, PASSES * forward_bytes(model, ranks)]
            passes.append(PASSES * (forward_bytes(model, ranks) + backward_bytes(model, ranks)))
            passes = [size if ranks > 1 else 0 for size in passes]
            seconds = gather_seconds(sum(passes), ranks) + 2 * gather_seconds(gradients, gpus)
            rows.append([f"{model.name}, {gpus:,}", *map(shown, [*passes, gradients]), f"{seconds:.3g}"])
    return table(columns, rows)


def fits_whole(model: Model, ranks: int) -> bool:
    """Whether a copy of all weights to sample from takes no more than half of what the pieces leave."""
    return forward_bytes(model, ranks) <= (MEMORY - held_bytes(model, ranks)) / 2


def rollouts() -> str:
    """Seconds of a rollout at least, by where the weights are that it reads."""
    columns = [
        "model, `shards`", "from a whole copy, s", "layer by layer, s", "GPU seconds over those of a server",
        "adapter to a server, MB",
    ]  # fmt: skip
    rows = []
    for model in MODELS:
        for ranks in (NODE, 64):
            if held_bytes(model, ranks) > MEMORY:
                continue
            read = COMPLETION * forward_bytes(model, 1) / MEMORY_SPEED
            copied = gather_seconds(whole_rollout_bytes(model, ranks), ranks) + read
            layered = gather_seconds(layered_rollout_bytes(model, ranks, COMPLETION), ranks)
            fits = fits_whole(model, ranks)
            rows.append([
                f"{model.name}, {ranks}", f"{copied:.3g}" if fits else "does not fit", f"{layered:,.0f}",
                f"{(copied if fits else layered) / read:.3g}", f"{gradient_bytes(model, LORA_RANK) / 1e6:,.0f}",
            ])  # fmt: skip
    return table(columns, rows)


def head() -> str:
    """Bytes of a forward for the head, gathered or left in pieces."""
    columns = ["model, `shards`", "tokens of each GPU", "gathered, GB", "in pieces, GB"]
    rows = []
    for model in (MODELS[0], MODELS[2]):
        for ranks in (8, 64):
            for tokens in (1024, 8192):
                sizes = vocabulary_bytes(model, ranks), split_head_bytes(model, ranks, tokens)
                rows.append([f"{model.name}, {ranks}", f"{tokens:,}", *map(shown, sizes)])
    return table(columns, rows)
