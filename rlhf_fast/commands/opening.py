"""A finished run, opened to be used: its model, its tokenizer and the keys that it was sampled with."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.algorithms import ilql
from rlhf_fast.data.encoding import Encoder, quiet_libraries
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import CONFIG_NAME, load_adapter
from rlhf_fast.rollout import Drawing
from rlhf_fast.training.config import SamplingConfig, parse, read_yaml
from rlhf_fast.training.folder import CONFIG_FILE
from rlhf_fast.training.job import seed_everything
from rlhf_fast.training.setup import build_encoder, build_model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass
class Opened:
    """A model without roles, and where the adapters are. adapter: None where the run trained every weight.

    decode_beta: the weight of the run's Q-adapters where it samples (ILQL); None where it has none. drawing: what draws
    the tokens in the policy's place.
    """

    folder: Path
    config: SamplingConfig
    backbone: Backbone
    encoder: Encoder
    adapter: Path | None
    decode_beta: float | None = None
    drawing: Drawing | None = None

    def play(self, *, trained: bool) -> None:
        """The role 'policy' is the run's policy, or what it started from: its reference, or the base model.

        The role 'reference' is what it started from, both times.
        """
        backbone, start = self.backbone, self.folder / "reference"
        for role in {"policy", "reference", *ilql.QS} & set(backbone.adapters):
            backbone.remove_adapter(role)
        self.drawing = None
        if trained and self.decode_beta is not None:
            for role in ilql.QS:
                load_adapter(backbone, role, self.folder / role, trainable=False)
            self.drawing = ilql.Steered(backbone, self.config, self.decode_beta)
        moved = (start / CONFIG_NAME).is_file()
        if moved:
            load_adapter(backbone, "reference", start, trainable=False)
        source = self.adapter if trained else start if moved else None
        if source is not None:
            load_adapter(backbone, "policy", source, trainable=False)
        else:
            backbone.add_adapter("policy", rank=1, trainable=False)  # its delta is zero


def open_run(folder: str | Path, **changes: Any) -> Opened:
    """The run, adapter or model in `folder`, with the keys of its config.yaml, where there is one, less those that
    `changes` sets. A change of None is none. Raises UserError for what is none of the three."""
    quiet_libraries()
    folder = Path(folder)
    values = read_yaml(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if "stages" in values:
        names = ", ".join(str(stage.get("name", stage.get("algorithm"))) for stage in values["stages"])
        raise UserError(f"{folder} holds the stages {names}: name one, such as {folder}/{names.split(', ')[-1]}")
    if not (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        reason = "there is no such folder" if not folder.is_dir() else "it is not finished" if values else (
            f"it has neither {CONFIG_NAME} nor config.json")  # fmt: skip
        raise UserError(f"{folder} is no finished run, adapter or model: {reason}")
    # Rewards and data of the run are not needed, and may be gone.
    kept = {"chat", "dtype", "quantization", "attn_implementation", "device", "max_tokens", "max_prompt_tokens", "seed",
            "max_new_tokens", "temperature", "top_k", "top_p", "columns"}  # fmt: skip
    known = {key: value for key, value in values.items() if key in kept}
    known |= {key: value for key, value in changes.items() if value is not None}
    config = parse(SamplingConfig, {**known, "algorithm": "sample", "model": str(folder), "data": ""})
    seed_everything(config.seed)
    backbone, tokenizer, adapter = build_model(config)
    encoder = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
    beta = values.get("decode_beta", ilql.DECODE_BETA) if values.get("algorithm") == "ilql" else None
    return Opened(folder, config, backbone, encoder, None if adapter is None else Path(adapter), beta)


def empty_folder(out: str | Path) -> Path:
    """The folder `out`, made where it is not there. Raises UserError where something is in it."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The files of the tokenizer in `source`, where it has one."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
