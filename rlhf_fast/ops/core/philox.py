"""Philox4x32-10 in plain PyTorch: the words of csrc/math/philox.h and of Triton's `tl.philox`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(seed: Tensor, *counters: Tensor) -> list[Tensor]:
    """The four words, int64 in [0, 2^32), of a 0-d int64 seed and up to four counters that broadcast; the rest is 0."""
    given = list(torch.broadcast_tensors(*(c.to(torch.int64) & _WORD for c in counters)))
    c0, c1, c2, c3 = given + [torch.zeros_like(given[0])] * (4 - len(given))
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap around: the low 64 bits are all there is of a product of two words.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]
