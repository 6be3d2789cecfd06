"""The engine that a config asks for."""

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.engines.protocol import Engine
from rlhf_fast.rollout.engines.vllm import VLLM
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.entries import EngineConfig
from rlhf_fast.training.job import Job


def engine_of(job: Job, config: SamplingConfig) -> str | Engine:
    """What samples, one for the whole run."""
    if job.engine is None:
        job.engine = open_engine(config.engine)
    return job.engine


def open_engine(config: EngineConfig) -> str | Engine:
    """As `roll_out` takes it."""
    if config.kind == "local" or (config.kind == "transformers" and not config.continuous):
        return config.kind
    if config.kind == "transformers":
        try:
            from rlhf_fast.rollout.engines.continuous import ContinuousBatching
        except ImportError as error:
            raise UserError(f"engine.continuous needs another version of transformers: {error}") from None
        return ContinuousBatching()
    assert config.url is not None
    return VLLM(
        config.url, model=config.model, folder=config.folder, key_variable=config.key_variable, timeout=config.timeout,
        retries=config.retries, concurrency=config.concurrency,
    )  # fmt: skip
