"""Where rewards come from: Python functions, a reward adapter on the backbone, or a reward model of its own."""

from rlhf_fast.rewards.functions import Payment
from rlhf_fast.rewards.sources import AdapterSource, Rewards, load_rewards, write_stats

__all__ = ["AdapterSource", "Payment", "Rewards", "load_rewards", "write_stats"]
