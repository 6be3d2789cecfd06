"""Best of n: of a prompt's completions the one that is paid most, or some, how far that leads, and what other n give.

kl_bound(n) = log n - (n - 1) / n bounds the KL of the best of n to one sample; it is reached where no two completions
can tie. `curve` is, for each n, the mean over all subsets of n of the N samples of a prompt:

    sum over i = n..N of C(i - 1, n - 1) / C(N, n) gold_(i),    gold_(i) of the i-th sample, from below, by proxy

with the mean gold of those that tie, which is to choose among them at random.
Sources: the bound, Stiennon et al. 2020 (arXiv 2009.01325, appendix G.3) and, that it is one, Beirami et al. 2024
(arXiv 2401.01879); the estimate, Nakano et al. 2021 (arXiv 2112.09332, appendix I) and Coste et al. 2023 (2310.02743).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.rollout import Drawing
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import Experience, collect
from rlhf_fast.training.job import Job

# rewards (P, n) -> which are kept, (P, n)
KEEPS: dict[str, Callable[..., Tensor]] = {
    "best": lambda rewards, **_: F.one_hot(rewards.argmax(1), rewards.shape[1]).bool(),
    "percentile": lambda rewards, *, percentile, **_: (
        (rewards >= rewards.quantile(percentile, dim=1, keepdim=True)) & (rewards > rewards.amin(1, keepdim=True))
    ),
    "correct": lambda rewards, *, correct_at, **_: rewards >= correct_at,
}


class BestOf(NamedTuple):
    """The best of n completions of each of P prompts.

    completions: P texts, the first of the best where several tie. rewards: (P,), what they are paid. candidates: P
    lists of n texts. scores: (P, n), what all are paid, and parts: by each source alone. fp32 on the CPU.
    kl_bound: nats.
    """

    completions: list[str]
    rewards: Tensor
    candidates: list[list[str]]
    scores: Tensor
    parts: dict[str, Tensor]
    kl_bound: float


def best_of(
    job: Job, config: SamplingConfig, prompts: Sequence[Prompt], n: int, *, drawing: Drawing | None = None
) -> BestOf:
    """Sample n completions of each prompt, batch_size at a time, and choose by the job's rewards.

    drawing: what draws the tokens in the policy's place.

    Uses torch's global random state. Raises ValueError for n < 1 or no prompts.
    """
    if n < 1 or not prompts:
        raise ValueError(f"best_of needs n >= 1 and a prompt, got n = {n} and {len(prompts)} prompts")
    size = max(1, config.batch_size // n)
    passes = [
        collect(job, config, [prompt for prompt in prompts[start : start + size] for _ in range(n)], drawing=drawing)
        for start in range(0, len(prompts), size)
    ]
    texts = [text for experience in passes for text in experience.rollout.completions]
    candidates = [texts[start : start + n] for start in range(0, len(texts), n)]
    scores = torch.cat([experience.rewards.cpu() for experience in passes]).view(-1, n)
    parts = {name: torch.cat([e.parts[name].cpu() for e in passes]).view(-1, n) for name in passes[0].parts}
    best = scores.argmax(1)
    chosen = [texts[i] for texts, i in zip(candidates, best.tolist(), strict=True)]
    return BestOf(chosen, scores.amax(1), candidates, scores, parts, kl_bound(n))


def kl_bound(n: int) -> float:
    """KL(best of n || one sample) in nats, at most."""
    return math.log(n) - (n - 1) / n


def curve(proxy: Tensor, gold: Tensor, sizes: Sequence[int]) -> Tensor:
    """(len(sizes),) float64: for each n, the expected gold of the best of n by proxy, averaged over prompts.

    proxy, gold: (P, N), N samples of each of P prompts. Raises ValueError for an n outside [1, N].
    """
    count = proxy.shape[1]
    wrong = [n for n in sizes if not 1 <= n <= count]
    if wrong:
        raise ValueError(f"sizes must be in [1, N] = [1, {count}], got {wrong[0]}")
    weights = torch.tensor(
        [[math.comb(i - 1, n - 1) / math.comb(count, n) for i in range(1, count + 1)] for n in sizes],
        dtype=torch.float64,
    )
    tied = (proxy[:, :, None] == proxy[:, None, :]).double()
    gold = (tied @ gold.double()[:, :, None]).squeeze(2) / tied.sum(2)
    ordered = gold.gather(1, proxy.argsort(1))
    return (ordered @ weights.T).mean(0)


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4 ... up to `largest`, and that itself."""
    return sorted({*(1 << k for k in range(largest.bit_length())), largest})


def different(experience: Experience, chosen: Tensor) -> Tensor:
    """(M,): the rows of the chosen, (P, n), the first of those of a prompt that are the same."""
    rows: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(experience.rollout.completion_ids()):
        if chosen.view(-1)[row]:
            rows.setdefault((row // chosen.shape[1], *ids), row)
    return torch.tensor([*rows.values()], dtype=torch.int64)
