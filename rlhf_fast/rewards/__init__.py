"""Where rewards come from: Python functions, a reward adapter on the backbone, or a reward model of its own."""

from rlhf_fast.rewards.sources import Rewards, load_rewards

__all__ = ["Rewards", "load_rewards"]
