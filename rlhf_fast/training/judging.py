"""The key `judge` made a Judge: who speaks, what is asked, and what it may cost."""

from pathlib import Path
from typing import Any

from rlhf_fast.data.encoding import Encoder, load_tokenizer
from rlhf_fast.errors import UserError
from rlhf_fast.models.architecture import context_length
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import embedding_rows, load_model
from rlhf_fast.models.peft_io import base_of, load_adapter
from rlhf_fast.rewards.cache import Cache
from rlhf_fast.rewards.endpoint import Endpoint
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.speakers import VERDICT_TOKENS, EndpointSpeaker, LocalSpeaker, Speaker
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.entries import JudgeConfig

OWN_ROLES = ("policy", "reference")


def build_judge(config: SamplingConfig, backbone: Backbone, tokenizer: Any) -> Judge | None:
    """The judge of config.judge. A model or an adapter that an earlier stage has yet to train is the base model."""
    if config.judge is None:
        return None
    chosen = config.judge
    low, _, high = chosen.scale.partition("-")
    return Judge(
        _speaker(chosen, config, backbone, tokenizer), form=chosen.form, scale=(int(low), int(high)),
        labels=(chosen.labels[0], chosen.labels[1]), template=_text(chosen.prompt), ending=chosen.ending,
        principles=lines_of(chosen.principles, "judge.principles"), criteria=chosen.criteria or [],
        thought_tokens=chosen.thought_tokens, clamp=chosen.clamp, debate=chosen.debate,
        argument_tokens=chosen.argument_tokens, against=chosen.against, seed=config.seed, name=f"judge {chosen.by}",
    )  # fmt: skip


def _speaker(chosen: JudgeConfig, config: SamplingConfig, backbone: Backbone, tokenizer: Any) -> Speaker:
    if chosen.is_endpoint:
        cache = Cache(Path(chosen.cache).expanduser())
        return EndpointSpeaker(Endpoint(
            str(chosen.by), str(chosen.model), timeout=chosen.timeout, retries=chosen.retries,
            concurrency=chosen.concurrency, max_calls=chosen.max_calls, cache=cache, key_variable=chosen.key_variable,
        ))  # fmt: skip
    role = None
    if isinstance(chosen.by, str) and chosen.by != "backbone":
        backbone, tokenizer, role = _other_model(chosen.by, backbone, trust=config.trust_remote_code)
    elif chosen.adapter in OWN_ROLES:
        role = str(chosen.adapter) if chosen.adapter in backbone.adapters else None
    elif isinstance(chosen.adapter, str):
        load_adapter(backbone, "judge", chosen.adapter, trainable=False)
        role = "judge"
    context = context_length(backbone.model)
    room = context - max(chosen.thought_tokens, chosen.argument_tokens * (chosen.debate > 0), VERDICT_TOKENS)
    encoder = Encoder(tokenizer, room, context, config.chat, vocab_size=embedding_rows(backbone.model))
    return LocalSpeaker(backbone, encoder, role, config.micro_batch_size or 16)


def _other_model(folder: str, backbone: Backbone, *, trust: bool) -> tuple[Backbone, Any, str | None]:
    """A model of its own, in the dtype and on the device of `backbone`; with the adapter where `folder` is one."""
    adapter = folder if (Path(folder) / "adapter_config.json").is_file() else None
    weight = backbone.lm_head_weight
    base = base_of(adapter) if adapter else folder
    other = Backbone(load_model(base, dtype=weight.dtype, device=weight.device, trust_remote_code=trust))
    if adapter:
        load_adapter(other, "judge", adapter, trainable=False)
    own = folder if (Path(folder) / "tokenizer_config.json").is_file() else base
    return other, load_tokenizer(own, trust_remote_code=trust), "judge" if adapter else None


def _text(value: str | None) -> str | None:
    """The template, or the content of the file that it names."""
    if value is None or "\n" in value or not value.endswith((".txt", ".md")):
        return value
    if not Path(value).is_file():
        raise UserError(f"judge.prompt {value} is no file")
    return Path(value).read_text(encoding="utf-8")


def lines_of(value: str | list[str] | None, key: str) -> list[str]:
    """A list of sentences as it is, or the lines of the file that a text names."""
    if not isinstance(value, str):
        return value or []
    if not Path(value).is_file():
        raise UserError(f"{key} {value!r} is neither a list nor a file")
    found = [line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise UserError(f"{key} {value} has no lines")
    return found
