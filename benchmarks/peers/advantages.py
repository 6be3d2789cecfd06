"""Other libraries' advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.settings import GAMMA, LAM, Function
from rlhf_fast.testing.stand_ins import stand_ins


def verl_gae_whitened() -> Function:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def verl(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        return [x * mask for x in compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)]

    return verl


def torchrl_gae() -> Function:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def torchrl(rewards: Tensor, values: Tensor) -> list[Tensor]:
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        columns = [x[..., None] for x in (values, following, rewards, done)]
        return [x[..., 0] for x in vec_generalized_advantage_estimate(GAMMA, LAM, *columns)]

    return torchrl


def verl_whiten() -> Function:
    from verl.utils.torch_functional import masked_whiten

    return lambda x, mask: masked_whiten(x, mask) * mask


def verl_group_advantages() -> Function:
    import numpy
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    def verl(rewards: Tensor, group_ids: Tensor) -> Tensor:
        column = rewards[:, None]
        index = numpy.asarray(group_ids.cpu())
        return compute_grpo_outcome_advantage(column, torch.ones_like(column), index, epsilon=1e-4)[0][:, 0]

    return verl


def torchtune_whiten() -> Function:
    from torchtune.rlhf import whiten

    return lambda x, mask: whiten(x, mask, shift_mean=False) * mask


def openrlhf_gae() -> Function:
    with stand_ins():
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    return lambda rewards, values: RemoteExperienceMaker.get_advantages_and_returns(
        None, values, rewards, None, GAMMA, LAM
    )


def openrlhf_discounted_returns() -> Function:
    with stand_ins():
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    return lambda rewards, mask: RemoteExperienceMaker.get_cumulative_returns(None, rewards, mask, GAMMA)
