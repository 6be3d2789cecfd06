"""Where rewards come from: Python functions, a reward adapter on the backbone, a reward model of its own, and programs
that know whether an answer is right."""

from rlhf_fast.rewards.adapter import AdapterSource, write_stats
from rlhf_fast.rewards.functions import Payment
from rlhf_fast.rewards.sources import Judged, Rewards, Source, load_rewards
from rlhf_fast.rewards.verify import Verifier

__all__ = ["AdapterSource", "Judged", "Payment", "Rewards", "Source", "Verifier", "load_rewards", "write_stats"]
