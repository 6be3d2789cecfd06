"""Other libraries' losses and KL estimates from log-probabilities, values and rewards."""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.settings import BETA, CLIP, VALUE_COEF, Function
from rlhf_fast.testing.stand_ins import stand_ins


def verl_policy_loss() -> Function:
    from verl.trainer.ppo.core_algos import compute_policy_loss

    no_dual_clip = 1e9
    return lambda logprobs, old_logprobs, advantages, mask: compute_policy_loss(
        old_logprobs, logprobs, advantages, mask, CLIP, clip_ratio_c=no_dual_clip
    )[0]


def openrlhf_policy_loss() -> Function:
    with stand_ins():
        from openrlhf.models.loss import PolicyLoss

    loss = PolicyLoss(CLIP, CLIP)
    return lambda logprobs, old_logprobs, advantages, mask: loss(logprobs, old_logprobs, advantages, mask)[0]


def verl_value_loss() -> Function:
    from verl.trainer.ppo.core_algos import compute_value_loss

    return lambda values, old_values, returns, mask: compute_value_loss(values, returns, old_values, mask, CLIP)[0]


def openrlhf_value_loss() -> Function:
    with stand_ins():
        from openrlhf.models.loss import ValueLoss

    loss = ValueLoss(CLIP)
    return lambda values, old_values, returns, mask: loss(values, old_values, returns, mask)


def verl_kl_estimate() -> Function:
    from verl.trainer.ppo.core_algos import kl_penalty_forward

    return lambda logprobs, ref_logprobs: kl_penalty_forward(logprobs, ref_logprobs, "low_var_kl")


def openrlhf_kl_estimate() -> Function:
    with stand_ins():
        from openrlhf.models.utils import compute_approx_kl

    return lambda logprobs, ref_logprobs: compute_approx_kl(logprobs, ref_logprobs, kl_estimator="k3")


def openrlhf_preference_loss() -> Function:
    with stand_ins():
        from openrlhf.models.loss import DPOLoss

    loss = DPOLoss(BETA)
    return lambda chosen, rejected, ref_chosen, ref_rejected: loss(chosen, rejected, ref_chosen, ref_rejected)[0]


def openrlhf_reward_loss() -> Function:
    with stand_ins():
        from openrlhf.models.loss import PairWiseLoss

    loss = PairWiseLoss()
    return lambda chosen_rewards, rejected_rewards: loss(chosen_rewards, rejected_rewards)


def torchtune_ppo_losses() -> Function:
    """The policy's loss and the critic's in one call."""
    from torchtune.rlhf.loss import PPOLoss

    loss = PPOLoss(epsilon=CLIP, value_clip_range=CLIP, value_coeff=VALUE_COEF)

    def torchtune(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
        values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        return loss(old_logprobs, logprobs, advantages, old_values, values, returns, mask, mask)[0]

    return torchtune


def torchtune_preference_loss() -> Function:
    from torchtune.rlhf.loss import DPOLoss

    loss = DPOLoss(BETA)
    return lambda chosen, rejected, ref_chosen, ref_rejected: loss(chosen, rejected, ref_chosen, ref_rejected)[0].mean()
