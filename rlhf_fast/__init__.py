"""rlhf_fast: fused kernels and a lean training loop for preference learning."""

from rlhf_fast.backends import BackendError, use_backend
from rlhf_fast.integrations import patch, patched, unpatch
from rlhf_fast.ops.advantages.gae import discounted_returns, gae, length_adaptive_lambda
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.advantages.kl_controller import AdaptiveKLController, FixedKLController
from rlhf_fast.ops.advantages.shaped_rewards import shaped_rewards
from rlhf_fast.ops.advantages.vtrace import vtrace
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.head.linear_kl import LinearKl, linear_kl
from rlhf_fast.ops.head.linear_logprobs import linear_logprobs
from rlhf_fast.ops.head.linear_policy_loss import linear_policy_loss
from rlhf_fast.ops.head.linear_preference_loss import linear_preference_loss
from rlhf_fast.ops.lora.lora_linear import Adapter, lora_linear
from rlhf_fast.ops.policy.policy_loss import PolicyObjective, policy_loss
from rlhf_fast.ops.preference.objective import PreferenceObjective
from rlhf_fast.ops.preference.preference_loss import preference_loss
from rlhf_fast.ops.preference.preference_weights import length_desensitized_weights, wpo_weights
from rlhf_fast.ops.preference.unpaired_preference_loss import (
    UnpairedPreferenceObjective,
    mismatched_kl,
    running_reward_shift,
    unpaired_preference_loss,
)
from rlhf_fast.ops.rewards.ranking_loss import ranking_loss
from rlhf_fast.ops.rewards.reward_loss import ensemble_scores, reward_loss
from rlhf_fast.ops.rewards.step_reward_loss import step_reward_loss
from rlhf_fast.ops.tokens.kl_estimate import kl_estimate
from rlhf_fast.ops.tokens.sample_tokens import Samples, sample_tokens
from rlhf_fast.ops.tokens.token_kl import token_kl
from rlhf_fast.ops.tokens.token_logprobs import RowStats, token_logprobs
from rlhf_fast.ops.values.distributional_value_loss import distributional_value_loss
from rlhf_fast.ops.values.linear_value_loss import linear_value_loss
from rlhf_fast.ops.values.value_loss import LossAndValues, value_loss

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdaptiveKLController",
    "BackendError",
    "FixedKLController",
    "LinearKl",
    "Loss",
    "LossAndValues",
    "PolicyObjective",
    "PreferenceObjective",
    "RowStats",
    "Samples",
    "UnpairedPreferenceObjective",
    "discounted_returns",
    "distributional_value_loss",
    "ensemble_scores",
    "gae",
    "group_advantages",
    "kl_estimate",
    "length_adaptive_lambda",
    "length_desensitized_weights",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_value_loss",
    "lora_linear",
    "mismatched_kl",
    "patch",
    "patched",
    "policy_loss",
    "preference_loss",
    "ranking_loss",
    "reward_loss",
    "running_reward_shift",
    "sample_tokens",
    "shaped_rewards",
    "step_reward_loss",
    "token_kl",
    "token_logprobs",
    "unpaired_preference_loss",
    "unpatch",
    "use_backend",
    "value_loss",
    "vtrace",
    "whiten",
    "wpo_weights",
]
