"""verl on our kernels: its functions under its own names, and the same registered with it as rlhf_fast_<name>.

    rlhf_fast.patch("verl")                   replaces verl's functions by ours
    rlhf_fast.integrations.verl.register()    leaves them and adds ours to the registries of policy losses and of
                                              advantage estimators: actor.policy_loss.loss_mode=rlhf_fast_gspo

verl's functions that call the ones replaced run on ours under the patch: `bypass_mode`, `gdpo`, the trainers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_fast.integrations.verl import advantages, logprobs, losses, masked, policy

PEER = "verl"
TESTED = "0.9.1"

_CORE = "verl.trainer.ppo.core_algos"
_HOMES = {
    _CORE: (advantages.FUNCTIONS, losses.FUNCTIONS, policy.FUNCTIONS),
    "verl.utils.torch_functional": (logprobs.FROM_LOGITS, masked.FUNCTIONS),
    "verl.utils.experimental.torch_functional": (logprobs.FUSED_LINEAR,),
    "verl.utils.kernel.linear_cross_entropy": (logprobs.LINEAR_CROSS_ENTROPY,),
}
# Objects of their own: unpatch() puts verl's wherever it finds what patch() has put.
POLICY_LOSSES = {f"rlhf_fast_{name}": partial(function) for name, function in policy.LOSSES.items()}
ADVANTAGE_ESTIMATORS = {f"rlhf_fast_{name}": partial(function) for name, function in advantages.ESTIMATORS.items()}


def replacements() -> dict[str, Any]:
    """Dotted name in verl -> ours, entries of its registries included where `register()` has not made them."""
    from verl.trainer.ppo import core_algos

    ours: dict[str, Any] = {
        f"{home}.{function.__name__}": function
        for home, groups in _HOMES.items()
        for group in groups
        for function in group
    }
    for registry, entries in (
        ("POLICY_LOSS_REGISTRY", POLICY_LOSSES),
        ("ADV_ESTIMATOR_REGISTRY", ADVANTAGE_ESTIMATORS),
    ):
        known = getattr(core_algos, registry)
        ours |= {f"{_CORE}.{registry}.{name}": entry for name, entry in entries.items() if name not in known}
    return ours


def register() -> list[str]:
    """Adds ours to verl's two registries, for this process; returns the names. Harmless when called again."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    for name, loss in POLICY_LOSSES.items():
        register_policy_loss(name)(loss)
    for name, estimator in ADVANTAGE_ESTIMATORS.items():
        register_adv_est(name)(estimator)
    return [*POLICY_LOSSES, *ADVANTAGE_ESTIMATORS]
