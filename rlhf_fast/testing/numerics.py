"""The numerics contract, in one place (README, "Numerics"): every op's tests measure against it.

On the same inputs, |kernel - fp64| <= 1.5 * max |eager in the same dtype - fp64| + tolerance(dtype), for values and
for every gradient. `eager` is the plain PyTorch that a user would have written, not our reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Per unit of the largest value in the fp64 result (at least 1). Never loosened for one test.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_contract(name: str, kernel: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """`kernel` keeps the contract beside `eager` (same inputs, same dtype) and `oracle` (fp64).

    The tolerance is that of the kernel result's own dtype. Infinities must be the oracle's; NaN never passes.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    assert kernel.shape == oracle.shape, f"{name}: shape {tuple(kernel.shape)} != {tuple(oracle.shape)}"
    assert not kernel.isnan().any(), f"{name}: NaN in the result"
    finite = torch.isfinite(oracle)
    assert torch.equal(kernel[~finite].double(), oracle[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    exact = oracle[finite]
    error = (kernel[finite].double() - exact).abs().max().item()
    eager_errors = (eager.expand_as(oracle)[finite].double() - exact).abs()
    eager_errors = eager_errors[torch.isfinite(eager_errors)]
    bound = 1.5 * (eager_errors.max().item() if eager_errors.numel() else 0.0)
    bound += TOLERANCE[kernel.dtype] * max(1.0, exact.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3e} exceeds the contract's {bound:.3e}"
