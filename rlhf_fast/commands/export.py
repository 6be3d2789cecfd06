"""A run's policy in the format of another program: an adapter of PEFT, merged weights, or GGUF."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from rlhf_fast.commands.opening import Opened, copy_tokenizer, empty_folder, open_run
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import hub_id
from rlhf_fast.models.lora import LoRA
from rlhf_fast.models.peft_io import base_of, load_adapter, save_adapter
from rlhf_fast.models.self_test import trial

FORMATS = ("peft", "merged", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
CONVERTER = "convert_hf_to_gguf.py"


def export(run: str, to: str, out: str, dtype: str | None = None) -> str:
    """Write the policy of `run` into the folder `out`; a line that says what is there.

    dtype: of merged weights; None is that of the base model's own files. Raises UserError.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    converter = find_converter() if to == "gguf" else None
    opened = open_run(run, dtype="float32")
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
        type_ = stored_dtype(opened.adapter) if dtype is None else getattr(torch, dtype)
        if converter is None:
            return f"{folder}: {write_merged(opened, folder, type_)}"
        with tempfile.TemporaryDirectory(dir=folder) as merged:
            said = write_merged(opened, Path(merged), type_)
            convert(converter, Path(merged), folder / "model.gguf")
        return f"{folder / 'model.gguf'}: {said}"
    except UserError:
        shutil.rmtree(folder)
        raise


def stored_dtype(adapter: Path) -> torch.dtype:
    """The type of the base model's own files."""
    place, revision = hub_id(base_of(adapter))
    dtype = getattr(AutoConfig.from_pretrained(place, trust_remote_code=False, **revision), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


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


@torch.no_grad()
def merge(backbone: Backbone, role: str) -> Tensor:
    """Put the role's adapter into the weights of a float32 model, and take the adapter away.

    Returns log-probabilities of the adapter on a few tokens. Raises UserError where the merged weights give others, and
    for weights that cannot be merged: quantised ones, and those that another module uses too.
    """
    if backbone.quantized:
        raise UserError(f"{next(iter(backbone.quantized))} is quantised: merge into the model that it was made from")
    users: dict[int, set[str]] = {}
    for name, parameter in backbone.model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter.data_ptr(), set()).add(name)
    expected = logprobs_of_trial(backbone, role)
    for name, pair in backbone.adapters[role].items():
        module = backbone.model.get_submodule(name)
        weight = module.get_parameter("weight")
        shared = users[weight.data_ptr()] - {f"{name}.weight"}
        if shared:
            raise UserError(f"{name}.weight is {min(shared)} too, which has no adapter: it cannot be merged")
        ours = weight.t() if isinstance(module, Conv1D) else weight
        ours.copy_(merged_weight(ours, pair))
    backbone.remove_adapter(role)
    difference = float((logprobs_of_trial(backbone, None) - expected).abs().max())
    if not difference <= 2e-3:  # nats; float32 against float32, as when an adapter is saved
        raise UserError(f"the merged weights differ from the adapter by {difference:.3g} nats")
    return expected


def logprobs_of_trial(backbone: Backbone, role: str | None) -> Tensor:
    input_ids, mask = trial(backbone.model)
    return backbone.logprobs(backbone.hidden(input_ids, mask, [role])[role], input_ids, mask)


def merged_weight(weight: Tensor, pair: LoRA) -> Tensor:
    """(out, in), float32: W + scale B A; with magnitudes (DoRA, arXiv 2402.09353, eq. 5) each row then of that norm."""
    whole = weight.float() + pair.shape.scale * (pair.b.float() @ pair.a.float())
    if pair.magnitude is None:
        return whole
    return whole * (pair.magnitude.float() / torch.linalg.vector_norm(whole, dim=1))[:, None]


def find_converter() -> Path:
    """llama.cpp's converter: in the folder LLAMA_CPP, or on the PATH."""
    root = os.environ.get("LLAMA_CPP")
    found = shutil.which(CONVERTER) if root is None else str(Path(root) / CONVERTER)
    if found is None or not Path(found).is_file():
        where = f"it is not in LLAMA_CPP ({root})" if root is not None else "it is not on the PATH"
        raise UserError(f"--to gguf needs {CONVERTER} of llama.cpp, and {where}: set LLAMA_CPP to a clone of llama.cpp")
    return Path(found)


def convert(converter: Path, model: Path, out: Path) -> None:
    """Raises UserError with the converter's last line where it fails."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not out.is_file():
        said = (result.stderr or result.stdout).strip().splitlines() or ["nothing was said"]
        raise UserError(f"{converter} failed ({result.returncode}): {said[-1]}")
