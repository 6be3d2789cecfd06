"""torchrl's generalised advantage estimation with and without us, side by side: time, and how far the results differ.

python examples/dropin/torchrl_gae.py          (needs torchrl 0.14.1)
"""

import timeit
from functools import partial

import torch
from torchrl.objectives.value import functional

from rlhf_fast.integrations import patched

ENVIRONMENTS, STEPS, REPEATS = 16, 2048, 5
GAMMA, LAMBDA = 0.99, 0.95


def trajectories() -> dict[str, torch.Tensor]:
    """(environments, steps, 1) each; an episode ends at about every hundredth step."""
    torch.manual_seed(0)
    shape = (ENVIRONMENTS, STEPS, 1)
    values, reward, done = torch.randn(ENVIRONMENTS, STEPS + 1, 1), torch.randn(shape), torch.rand(shape) < 0.01
    return {"state_value": values[:, :-1], "next_state_value": values[:, 1:], "reward": reward, "done": done}


def measured(inputs: dict[str, torch.Tensor]) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    """(milliseconds of the fastest call, (advantages, value targets)) of what now stands under torchrl's name."""
    call = partial(functional.vec_generalized_advantage_estimate, GAMMA, LAMBDA, **inputs)
    return 1e3 * min(timeit.repeat(call, number=1, repeat=REPEATS)), call()


def main() -> None:
    inputs = trajectories()
    before, theirs = measured(inputs)
    with patched("torchrl") as names:
        print("replaced:", *names, sep="\n  ")
        after, ours = measured(inputs)
    print(f"\n{ENVIRONMENTS} x {STEPS} steps on the CPU: torchrl {before:.2f} ms, with us {after:.2f} ms")
    for name, their, our in zip(("advantages", "value targets"), theirs, ours, strict=True):
        print(f"{name} differ by at most {(their - our).abs().max():.1e}")


if __name__ == "__main__":
    main()
