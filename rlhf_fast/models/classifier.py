"""A reward model of its own: any local sequence classifier with one output."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.models.loading import check_finite


def load_classifier(folder: str, *, device: torch.device) -> PreTrainedModel:
    """The frozen classifier in `folder`, on `device`, in the dtype it was saved in.

    Raises UserError when it cannot be loaded, lacks its score head, has more than one output, or NaN in its weights.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"reward model {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        raise UserError(
            f"reward model {folder} has no score head with one output "
            f"(missing: {', '.join(map(str, [*info['missing_keys'], *info['mismatched_keys']]))})"
        )
    check_finite(model, f"reward model {folder}")
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def classify(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """The score of each token sequence, (B,) fp32 on the CPU. Sequences are padded on the right.

    The classifiers of transformers read the score at the last token that is not the padding, so that no sequence may
    end in the id that pads.
    """
    last = {row[-1] for row in ids}
    pad = next(i for i in range(len(last) + 1) if i not in last)
    model.config.pad_token_id = pad
    length = max(len(row) for row in ids)
    input_ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in ids], device=model.device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=model.device)
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float().cpu()
