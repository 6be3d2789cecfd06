"""The same job at growing sizes: contexts from 1k to 128k tokens, vocabularies from 32k to 262k."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import advantages, head, losses, tokens
from benchmarks.cases.build import backward, forward
from benchmarks.cases.sizes import Sizes
from benchmarks.harness import Case, free_bytes

EAGER_COPIES = 4  # of the logits in float32 that eager log-probabilities and their backward hold
PEER_LOGITS = 1 << 28  # beyond it a CPU spends minutes on other libraries, whose time grows with the logits as before


def of_head(sizes: Sizes, device: str) -> Case:
    """linear_logprobs with a frozen head, forward and backward."""
    peers = "linear_logprobs" if device != "cpu" or sizes.N * sizes.V <= PEER_LOGITS else ""
    fits = free_bytes(device) > EAGER_COPIES * 4 * sizes.N * sizes.V
    return backward(replace(head.logprobs(sizes, device), label="frozen head", peers=peers, fits=fits), device)


def cases(sizes: Sizes, device: str) -> list[Case]:
    """Contexts double from sizes.N to sizes.T with a quarter of the vocabulary, vocabularies three times from sizes.V.

    D and the dtype stay.
    """
    contexts = [sizes.N << k for k in range((sizes.T // sizes.N).bit_length())]
    by_context = [replace(sizes, N=n, V=sizes.V // 4) for n in contexts]
    by_vocabulary = [replace(sizes, V=sizes.V << k) for k in range(4)]
    growing = [of_head(size, device) for size in [*by_context, *by_vocabulary]]
    growing += [forward(tokens.logprobs(size, device), device) for size in by_vocabulary]
    for job_of, passes in ((advantages.gae, forward), (losses.policy, backward)):
        for time in contexts:
            case = passes(job_of(replace(sizes, T=time), device), device)
            growing.append(replace(case, sizes={**case.sizes, "T": time}))
    return [replace(case, group="scaling") for case in growing]
