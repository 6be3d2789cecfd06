"""A reward model of its own: any local sequence classifier, read at one of its outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from rlhf_fast.errors import UserError, refusing
from rlhf_fast.models.architecture import context_length
from rlhf_fast.models.loading import check_files, check_finite


def load_classifier(
    folder: str, label: str | None = None, *, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, int]:
    """The frozen classifier in `folder`, on `device`, in the dtype it was saved in; and the output that `label` means.

    label: a name of the config's `id2label` or its number; None for a classifier with one output.
    Raises UserError when it cannot be loaded, lacks its head, has no such output, or NaN in its weights.
    """
    what = f"reward model {folder}"
    with refusing(f"{what} cannot be loaded"):
        check_files(Path(folder))
        entries, _ = PreTrainedConfig.get_config_dict(folder)
        labels = _labels(entries)
        output = choose_output(labels, label, what)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(labels), dtype="auto", output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        count = "one output" if len(labels) == 1 else f"{len(labels)} outputs"
        raise UserError(f"{what} has no score head with {count} (missing: {', '.join(map(str, absent))})")
    check_finite(model, what)
    return model.to(device).eval().requires_grad_(False), output


def _labels(entries: dict[str, Any]) -> list[str]:
    """The names of the outputs, by the entries of config.json; one that says nothing has one output."""
    names = entries.get("id2label")
    if not names:
        return [f"LABEL_{i}" for i in range(entries.get("num_labels", 1))]
    return [str(names[key]) for key in sorted(names, key=int)]


def choose_output(labels: Sequence[str], label: str | None, what: str) -> int:
    """The number of the output that `label`, a name or a number, means."""
    if label is None and len(labels) == 1:
        return 0
    if label in labels:
        return labels.index(label)
    if label is not None and label.isdecimal() and int(label) < len(labels):
        return int(label)
    wrong = f"has {len(labels)} outputs: choose one by ':LABEL'" if label is None else f"has no output {label!r}"
    raise UserError(f"{what} {wrong} ({', '.join(labels)})")


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the classifier can read. RoBERTa's kind has fewer positions than rows for them: they begin behind
    that of the padding."""
    rows = context_length(model)
    tables = [getattr(module, "position_embeddings", None) for module in model.modules()]
    unused = [t.padding_idx + 1 for t in tables if isinstance(t, nn.Embedding) and t.padding_idx is not None]
    return rows - max(unused, default=0)


@torch.no_grad()
def classify(model: PreTrainedModel, ids: Sequence[Sequence[int]], output: int = 0) -> Tensor:
    """That output, as the logit, for each token sequence, (B,) fp32 on the CPU. Sequences are padded on the right.

    The classifiers of causal models read the score at the last token that is not the padding, so that no sequence may
    end in the id that pads. Those of BERT's kind read it at the first token.
    """
    last = {row[-1] for row in ids}
    pad = next(i for i in range(len(last) + 1) if i not in last)
    model.config.pad_token_id = pad
    length = max(len(row) for row in ids)
    input_ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in ids], device=model.device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=model.device)
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, output].float().cpu()
