"""verl's advantage estimators: one score or reward per token in, (advantages, returns) per token out, (B, T) each.

A prompt's only answer keeps its score, as in verl. Answers of equal scores get exactly 0, where verl's may get the
rounding error of their mean over epsilon.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import discounted_returns, gae, group_advantages, whiten
from rlhf_fast.integrations.verl.masked import check_two_counted, masked_whiten

Pair = tuple[Tensor, Tensor]


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> Pair:
    """Whitened GAE advantages and the returns before whitening. Steps behind the mask have those of the step after.

    What stands behind the mask changes no advantage, bit for bit, and no return that counts.
    """
    advantages, _ = gae(token_level_rewards, values, mask=response_mask, gamma=float(gamma), lam=float(lam))
    carried = _carried_back(advantages, response_mask)
    dtype = _dtype(token_level_rewards, values, response_mask)
    return masked_whiten(carried, response_mask).to(dtype), (carried + values).to(dtype)


def _carried_back(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T): x of the next step that counts, the step itself included; 0 after the last one."""
    end = x.shape[1]
    steps = torch.where(mask.bool(), torch.arange(end, device=x.device), end)
    following = steps.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(x, (0, 1)).gather(1, following)


# --- Scores of answers to one prompt ----------------------------------------------------------------------------------


def _named_like(function: Callable[..., Any], compute: Callable[..., Pair]) -> Callable[..., Pair]:
    """`compute`, whose signature is verl's, with the name and the docstring of `function`."""
    compute.__name__, compute.__qualname__, compute.__doc__ = (
        function.__name__, function.__qualname__, function.__doc__,
    )  # fmt: skip
    return compute


def _outcome_advantage(advantages: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[..., Pair]:
    """Gives a function of (rewards, mask, index) verl's signature, and its advantages (B,) to the answers' tokens."""

    def compute(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None,
        **kwargs: Any,
    ) -> Pair:  # fmt: skip
        return _spread(advantages(token_level_rewards, response_mask, index), response_mask)

    return _named_like(advantages, compute)


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True, config: Any = None,
) -> Pair:  # fmt: skip
    """(score - mean) / (std + epsilon) of the group, or the numerator alone. index: (B,), equal entries are a group."""
    variant = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
    return _spread(_in_groups(variant, token_level_rewards, index, epsilon=epsilon), response_mask)


def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True, config: Any = None,
) -> Pair:  # fmt: skip
    """The same, at least in float32."""
    rewards = token_level_rewards.to(_dtype(token_level_rewards, torch.float32))
    return compute_grpo_outcome_advantage(rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo)


def compute_grpo_passk_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True, config: Any = None, **kwargs: Any,
) -> Pair:  # fmt: skip
    """The best answer's lead over the second, (/ (std + epsilon)); 0 for all others. Normalised as `config` says."""
    if config is None:
        raise ValueError(
            "config must be given: its norm_adv_by_std_in_grpo decides, the argument of that name does not"
        )
    groups, sizes = _groups(index, token_level_rewards.device)
    if (sizes < 2).any():
        raise ValueError(f"pass@k needs two answers to every prompt, got groups of {sorted(set(sizes.tolist()))}")
    variant = "grpo" if config.get("norm_adv_by_std_in_grpo", True) else "dr_grpo"
    advantages = group_advantages(token_level_rewards.sum(-1), group_ids=groups, variant=variant, eps=epsilon)
    by_score = advantages.argsort(descending=True, stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]  # a run for every group, its best answer first
    best = torch.nn.functional.pad(groups[order].diff() != 0, (1, 0), value=True)
    lead = advantages[order] - advantages[order].roll(-1)
    leads = torch.zeros_like(lead).scatter(0, order, torch.where(best, lead, 0))
    return _spread(leads.to(token_level_rewards.dtype), response_mask)


@_outcome_advantage
def compute_rloo_outcome_advantage(rewards: Tensor, mask: Tensor, index: Any) -> Tensor:
    """score - mean of the group's others."""
    return _in_groups("rloo", rewards, index)


@_outcome_advantage
def compute_rloo_vectorized_outcome_advantage(rewards: Tensor, mask: Tensor, index: Any) -> Tensor:
    """The same, but 0 for a prompt's only answer."""
    groups, _ = _groups(index, rewards.device)
    return group_advantages(rewards.sum(-1), group_ids=groups, variant="rloo")


@_outcome_advantage
def compute_opo_outcome_advantage(rewards: Tensor, mask: Tensor, index: Any) -> Tensor:
    """score - mean of the group weighted by length."""
    return _in_groups("opo", rewards, index, lengths=mask.sum(-1))


def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, f_norm: float = 1.0,
    alpha: float = 1.0, config: Any = None, **kwargs: Any,
) -> Pair:  # fmt: skip
    """(score - mean of the group) / f_norm, times the answers per score that is not 0, as verl has it for any alpha."""
    scores = token_level_rewards.sum(-1)
    alpha_of_batch = scores.shape[0] / scores.count_nonzero().clamp(min=1)
    return _spread(alpha_of_batch * _in_groups("dr_grpo", token_level_rewards, index) / f_norm, response_mask)


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None,
    **kwargs: Any,
) -> Pair:  # fmt: skip
    """score - mean of the group, whitened over the batch's tokens."""
    check_two_counted(response_mask)
    tokens, _ = _spread(_in_groups("dr_grpo", token_level_rewards, index), response_mask)
    whitened = whiten(tokens, response_mask).to(tokens.dtype)
    return whitened, whitened


# --- Rewards to go ----------------------------------------------------------------------------------------------------


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> Pair:
    """Discounted returns by config.gamma, whitened over the batch's tokens, and the returns; 0 behind the mask."""
    if config is None:
        raise ValueError("config must be given, for its gamma")
    check_two_counted(response_mask)
    returns = discounted_returns(token_level_rewards, mask=response_mask, gamma=config.gamma)
    dtype = token_level_rewards.dtype
    return whiten(returns, response_mask).to(dtype), returns.to(dtype)


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> Pair:
    """Rewards to go minus the greedy answer's reward, (B,), where the mask counts; and the rewards to go."""
    dtype = _dtype(token_level_rewards, response_mask)
    returns = discounted_returns(token_level_rewards * response_mask).to(dtype)
    return returns - reward_baselines.unsqueeze(-1) * response_mask, returns


# --- Optimal token baselines ------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Those of the answers, (B, T) each, and the prompts that the answers are of, (B,)."""

    returns: Tensor  # rewards to go
    energy: Tensor  # the sum of a step's and all earlier steps' squared score norms
    mask: Tensor
    groups: Tensor
    sizes: Tensor  # of the groups

    def baselines(self, lengths: Tensor | None, epsilon: float) -> Tensor:
        """(B, T): the group's mean of the returns by the energy, step by step, none for a prompt's only answer.

        lengths: (B,), to have none either where only the longest answer has steps.
        """
        (rows, steps), groups = self.returns.shape, self.groups
        sums, totals = (
            torch.zeros_like(self.energy).index_add_(0, groups, x.to(self.energy.dtype))
            for x in (self.returns * self.energy, self.energy)
        )
        means = (sums / (totals + epsilon))[groups]
        none = (self.sizes < 2)[:, None].expand(rows, steps)
        if lengths is not None and rows > 0:
            longest = torch.zeros_like(lengths).scatter_reduce(0, groups, lengths, "amax")[groups]
            at_longest = lengths == longest
            number = torch.zeros_like(groups).index_add_(0, groups, at_longest.to(groups.dtype))[groups]
            second = torch.zeros_like(lengths).scatter_reduce(0, groups, torch.where(at_longest, 0, lengths), "amax")
            alone = at_longest & (number == 1)
            place = torch.arange(steps, device=groups.device)
            none = none | (alone[:, None] & (place >= second[groups][:, None]))
        return torch.where(none, 0, means).to(self.returns.dtype)


def _token_baseline(advantages: Callable[[Steps, bool, float], Tensor]) -> Callable[..., Pair]:
    """Gives a function of (steps, handle_zero_tail, epsilon) verl's signature; (its advantages, the rewards to go)."""

    @torch.no_grad()
    def compute(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, old_log_probs: Tensor, sum_pi_squared: Tensor,
        rollout_is_weights: Tensor | None = None, handle_zero_tail: bool = True, epsilon: float = 1e-8, **kwargs: Any,
    ) -> Pair:  # fmt: skip
        returns = discounted_returns(token_level_rewards * response_mask)
        returns = returns.to(_dtype(token_level_rewards, response_mask))
        norms = 1 - 2 * old_log_probs.exp() + sum_pi_squared
        if rollout_is_weights is not None:
            norms = norms * rollout_is_weights.square()
        energy = torch.where(response_mask.bool(), norms * response_mask, 0).cumsum(-1)
        steps = Steps(returns, energy, response_mask, *_groups(index, returns.device))
        return advantages(steps, handle_zero_tail, epsilon) * response_mask, returns

    return _named_like(advantages, compute)


@_token_baseline
def compute_optimal_token_baseline_advantage(steps: Steps, handle_zero_tail: bool, epsilon: float) -> Tensor:
    """Rewards to go minus a baseline per step and prompt, their mean weighted by the energy W of the steps so far.

    W_t = sum over s <= t of w_s, w = 1 - 2 p + sum of the squared probabilities, times rollout_is_weights squared; all
    (B, T), p = exp(old_log_probs). handle_zero_tail: no baseline where only the longest answer has steps. A prompt's
    only answer has none. Returns (advantages, rewards to go).
    """
    weighed = steps._replace(energy=steps.energy * steps.mask)
    return steps.returns - weighed.baselines(steps.mask.sum(-1) if handle_zero_tail else None, epsilon)


@_token_baseline
def compute_multi_turn_optimal_token_baseline_advantage(steps: Steps, handle_zero_tail: bool, epsilon: float) -> Tensor:
    """The same with the steps of an answer counted by its own tokens: what the mask leaves out takes no step."""
    counts, groups = steps.mask.bool(), steps.groups
    order = counts.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)  # an answer's own tokens first
    own = counts.gather(1, order)
    returns, energy = (torch.where(own, x.gather(1, order), 0) for x in (steps.returns, steps.energy))
    lengths = counts.sum(-1)
    sizes = torch.zeros_like(lengths).index_add_(0, groups, (lengths > 0).to(lengths.dtype))[groups]
    baselines = Steps(returns, energy, own, groups, sizes).baselines(lengths if handle_zero_tail else None, epsilon)
    return torch.zeros_like(returns).scatter(1, order, torch.where(own, returns - baselines, 0))


# --- What they share --------------------------------------------------------------------------------------------------


def _groups(index: Any, device: torch.device) -> Pair:
    """(number of the group, its size), (B,) each, from labels of any kind: an array, a tensor or a list."""
    labels = index.tolist() if hasattr(index, "tolist") else list(index)
    sizes = Counter(labels)
    numbers = {label: number for number, label in enumerate(sizes)}
    entries = torch.tensor([[numbers[label], sizes[label]] for label in labels], dtype=torch.int64, device=device)
    return entries.view(-1, 2).unbind(1)  # type: ignore[return-value]


def _in_groups(
    variant: str, rewards: Tensor, index: Any, *, lengths: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """(B,): advantages of the scores; for grpo, a prompt's only answer has mean 0 and standard deviation 1."""
    scores = rewards.sum(-1)
    groups, sizes = _groups(index, rewards.device)
    advantages = group_advantages(scores, group_ids=groups, variant=variant, eps=epsilon, lengths=lengths)
    only = scores.to(advantages.dtype) / (1 + epsilon if variant == "grpo" else 1)
    return torch.where(sizes == 1, only, advantages).to(rewards.dtype)


def _spread(advantages: Tensor, mask: Tensor) -> Pair:
    """One advantage per answer as (advantages, returns) of its tokens."""
    tokens = advantages.unsqueeze(-1) * mask
    return tokens, tokens


def _dtype(*given: Tensor | torch.dtype) -> torch.dtype:
    """The type of what PyTorch computes from all of them."""
    return reduce(torch.promote_types, (x.dtype if isinstance(x, Tensor) else x for x in given))


# The names of verl's registry.
ESTIMATORS: dict[str, Callable[..., Pair]] = {
    "gae": compute_gae_advantage_return,
    "grpo": compute_grpo_outcome_advantage,
    "grpo_vectorized": compute_grpo_vectorized_outcome_advantage,
    "grpo_passk": compute_grpo_passk_outcome_advantage,
    "rloo": compute_rloo_outcome_advantage,
    "rloo_vectorized": compute_rloo_vectorized_outcome_advantage,
    "opo": compute_opo_outcome_advantage,
    "gpg": compute_gpg_outcome_advantage,
    "reinforce_plus_plus": compute_reinforce_plus_plus_outcome_advantage,
    "reinforce_plus_plus_baseline": compute_reinforce_plus_plus_baseline_outcome_advantage,
    "remax": compute_remax_outcome_advantage,
    "optimal_token_baseline": compute_optimal_token_baseline_advantage,
    "tir_optimal_token_baseline": compute_multi_turn_optimal_token_baseline_advantage,
}
FUNCTIONS = tuple(ESTIMATORS.values())
