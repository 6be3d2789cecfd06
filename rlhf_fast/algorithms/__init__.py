"""The algorithms, each one file that reads from top to bottom.

Every module has the same five names, which the command line calls in this order:
    AlgorithmConfig          the keys of the YAML file and of the flags
    prepare(config) -> Job   model, roles, data, rewards: all that can fail on bad input, nothing written
    evaluate(job, config)    held-out metrics and samples, before and after
    train(job, config, run)  the loop
    save(job, config, folder) what the run leaves: adapters, or the model
"""

import importlib
from types import ModuleType

from rlhf_fast.errors import UserError

ALGORITHMS = {"sft": "sft", "reward_model": "reward_model", "ppo": "ppo", "grpo": "grpo", "dpo": "preference"}


def load_algorithm(name: str) -> ModuleType:
    """The module of an algorithm; UserError for a name that is none."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise UserError(f"unknown algorithm {name!r}; there are: {', '.join(ALGORITHMS)}")
    return importlib.import_module(f"rlhf_fast.algorithms.{ALGORITHMS[name]}")
