"""A run's policy in the format of another program: an adapter of PEFT, merged weights, or GGUF."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rlhf_fast.commands.opening import Opened, copy_tokenizer, empty_folder, open_run
from rlhf_fast.errors import UserError
from rlhf_fast.models.merging import logprobs_of_trial, merge, stored_dtype
from rlhf_fast.models.peft_io import base_of, load_adapter, save_adapter

FORMATS = ("peft", "merged", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}  # the converter's names


def export(run: str, to: str, out: str, dtype: str | None = None, *, trust_remote_code: bool = False) -> str:
    """Write the policy of `run` into the folder `out`; a line that says what is there.

    dtype: of merged weights; None is that of the base model's own files. Raises UserError.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    converter = find_converter() if to == "gguf" else None
    opened = open_run(run, dtype="float32", trust_remote_code=trust_remote_code)
    if opened.adapter is None:
        raise UserError(f"{run} holds whole weights already, not an adapter: it is a model of transformers as it is")
    load_adapter(opened.backbone, "policy", opened.adapter, trainable=False)
    if opened.backbone.heads:
        raise UserError(f"{run} has a score head: it is a reward model or critic, which is used as the adapter it is")
    folder = empty_folder(out)
    try:
        if to == "peft":
            save_adapter(opened.backbone, "policy", folder)
            copy_tokenizer(opened.adapter, folder)
            return f"{folder}: an adapter for {base_of(folder)}"
        type_ = (stored_dtype(base_of(opened.adapter), trust_remote_code=trust_remote_code) if dtype is None
                 else getattr(torch, dtype))  # fmt: skip
        if converter is None:
            return f"{folder}: {write_merged(opened, folder, type_)}"
        with tempfile.TemporaryDirectory(dir=folder) as merged:
            said = write_merged(opened, Path(merged), type_)
            convert(converter, Path(merged), folder / "model.gguf", OUTTYPES[type_])
        return f"{folder / 'model.gguf'}: {said}"
    except UserError:
        shutil.rmtree(folder)
        raise


@torch.no_grad()
def write_merged(opened: Opened, folder: Path, dtype: torch.dtype) -> str:
    """Merge the policy into the base in float32, round to `dtype`, save; what rounding did on a few tokens."""
    backbone, model = opened.backbone, opened.backbone.model
    base = logprobs_of_trial(backbone, None)
    expected = merge(backbone, "policy")
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    rounded = logprobs_of_trial(backbone, None)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    opened.encoder.tokenizer.save_pretrained(folder)
    effect, error = (float((x - expected).abs().max()) for x in (base, rounded))
    return (f"weights in {str(dtype).removeprefix('torch.')}; log-probabilities of a few tokens are moved by at most "
            f"{effect:.2g} nats by the adapter, {error:.2g} by rounding")  # fmt: skip


def find_converter() -> Path:
    """llama.cpp's converter: in the folder LLAMA_CPP, or on the PATH."""
    root = os.environ.get("LLAMA_CPP")
    found = shutil.which(CONVERTER) if root is None else str(Path(root) / CONVERTER)
    if found is None or not Path(found).is_file():
        where = f"it is not in LLAMA_CPP ({root})" if root is not None else "it is not on the PATH"
        raise UserError(f"--to gguf needs {CONVERTER} of llama.cpp, and {where}: set LLAMA_CPP to a clone of llama.cpp")
    return Path(found)


def convert(converter: Path, model: Path, out: Path, outtype: str) -> None:
    """Raises UserError with the converter's last line where it fails."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(out), "--outtype", outtype]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not out.is_file():
        said = (result.stderr or result.stdout).strip().splitlines() or ["nothing was said"]
        raise UserError(f"{converter} failed ({result.returncode}): {said[-1]}")
