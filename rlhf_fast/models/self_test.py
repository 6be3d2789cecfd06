"""What a model does on a few tokens, before anything is trained on it: a fault of an architecture is one line at the
start instead of wrong log-probabilities for a whole run.

Nothing is run on the meta device, where there are no values to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.architecture import logit_transforms, text_config
from rlhf_fast.models.packing import FLASH, layout_of
from rlhf_fast.models.quantized import is_quantized

if TYPE_CHECKING:
    from rlhf_fast.models.backbone import Backbone

TOKENS, PADDING = 10, 3
TRIAL_ROWS = 2 * TOKENS


def trial(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (2, TOKENS): a sequence, and its beginning padded on the right."""
    ids = _ordinary_ids(model, TOKENS + PADDING)
    begin = TOKENS - PADDING
    rows, mask = [ids[:TOKENS], ids[:begin] + ids[TOKENS:]], [[1] * TOKENS, [1] * begin + [0] * PADDING]
    return torch.tensor(rows, device=model.device), torch.tensor(mask, device=model.device)


def _ordinary_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Ids spread over the vocabulary that no entry of the config gives a meaning (padding, images, audio)."""
    entries = [*vars(model.config).items(), *vars(model.config.get_text_config(decoder=True)).items()]
    values = (value for name, value in entries if name.endswith(("token_id", "token_index")))
    special = {id for value in values for id in (value if isinstance(value, list) else [value])}
    # Some heads know fewer ids than the embeddings.
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = min(len(embeddings.get_parameter("weight")), int(head.out_features))  # type: ignore[arg-type]
    step = max(1, size // (3 * count))
    ordinary = [id for id in range(step, size, step) if id not in special]
    return [ordinary[i % len(ordinary)] for i in range(count)]


def check_logits(backbone: Backbone) -> None:
    """Compare the log-probabilities that training will use with those of the model's own logits, in nats, and those of
    a padded sequence with those of the same without padding. What padding on the left changes shows where it is used:
    `rollout.check_sampler`.

    Raises UserError for a model that does to its logits what `logit_transform` does not know, one that looks ahead,
    and one that takes more than text.
    """
    model = backbone.model
    input_ids, mask = trial(model)
    given = {name: value for name, value in backbone.inputs(input_ids, mask).items() if name != "position_ids"}
    try:
        own = model(**given).logits
        if own.shape[:2] != input_ids.shape:
            raise unsupported(model, f"its logits for {tuple(input_ids.shape)} tokens are {tuple(own.shape)}")
        backbone.vocabulary = own.shape[-1]
        expected = own[0, :-1].float().log_softmax(-1).gather(-1, input_ids[0, 1:, None]).squeeze(-1)
        if not expected.isfinite().all():
            raise UserError(f"{type(model).__name__} gives log-probabilities that are not finite: are its weights?")
        bound = rounding(own)
        ours, difference = _nearest(backbone, input_ids, mask, expected)
        if not difference <= bound and "position_ids" in backbone.accepted:
            backbone.accepted.remove("position_ids")  # it counts positions in a way of its own, as RoBERTa does
            ours, difference = _nearest(backbone, input_ids, mask, expected)
    except UserError:
        raise
    except Exception as error:  # whatever the code of an architecture may raise
        if backbone.shards is not None and "DTensor" in str(error):  # the type of a weight of which this has a part
            why = "it reads the weight of an embedding itself, of which each process holds but a part: shards must be 1"
            raise unsupported(model, why) from error
        raise unsupported(model, f"it fails on text alone: {first_line(error)}") from error
    if not difference <= bound:
        raise unsupported(model, f"its log-probabilities differ from those of its head by {difference:.3g} nats")
    real = TOKENS - PADDING - 1
    if not (difference := _apart(ours[0, :real], ours[1, :real])) <= bound:
        raise unsupported(model, f"what follows a token changes its log-probability by {difference:.3g} nats")


def check_gradients(backbone: Backbone, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> why, of the linears that no gradient reaches: what they give only chooses among tokens, as indexers of
    sparse attention do. A gradient that happens to be zero is one.

    Raises UserError for a model that has none for any of them.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            outputs[name].append(output)
            # A leaf could not be changed in place, as some models do.
            return None if output.requires_grad else output.requires_grad_(True).clone()

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in linears.items()]
    try:
        with torch.enable_grad():
            total = backbone.hidden(*trial(backbone.model), [None])[None].float().sum()
    finally:
        for handle in handles:
            handle.remove()
    if not total.requires_grad:
        raise unsupported(backbone.model, "no gradient reaches its layers")
    given = [(name, output) for name, found in outputs.items() for output in found]
    gradients = torch.autograd.grad(total, [output for _, output in given], allow_unused=True)
    reached = {name for (name, _), gradient in zip(given, gradients, strict=True) if gradient is not None}
    return {name: "no gradient reaches it on a short text" for name in linears if name not in reached}


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _nearest(backbone: Backbone, input_ids: Tensor, mask: Tensor, expected: Tensor) -> tuple[Tensor, float]:
    """Our log-probabilities of the tokens after the first, (2, TOKENS - 1), under the transform of the logits that
    comes nearest to what is `expected` of the first row, which the backbone keeps; and how near that is."""
    hidden = backbone.hidden(input_ids, mask, [None])[None]
    tried = []
    for transform in logit_transforms(backbone.model):
        backbone.logit_transform = transform
        logprobs = backbone.logprobs(hidden, input_ids, mask)
        tried.append((_apart(logprobs[0, 1:], expected), transform, logprobs[:, 1:]))
    difference, backbone.logit_transform, ours = min(tried, key=lambda trial: trial[0])
    return ours, difference


def rounding(logits: Tensor) -> float:
    """Nats that rounding may make between log-probabilities of these logits, rounded by the model, and ours.

    In half precision two units in the last place of the largest logit. Measured in bf16 and fp16: at most 0.6 of a unit
    over every tiny model of docs/architectures.md, and 0.25 (0.057 nats) for SmolLM2-135M in bf16.
    """
    if logits.dtype not in (torch.bfloat16, torch.float16):
        return 1e-3
    return 2 * torch.finfo(logits.dtype).eps * logits.abs().max().item()


@torch.no_grad()
def runs_lower_layers_once(backbone: Backbone, first: int) -> bool:
    """Whether the layers below `first` may run once for several roles: whether starting at that layer gives what the
    whole model gives. It does not where layers hand on more than their output, or the model works between them.
    """
    input_ids, mask = trial(backbone.model)
    whole = backbone.run(input_ids, mask)
    try:
        lower = backbone.reach(first, input_ids, mask)
        if lower.dim() != 3 or lower.shape[:2] != input_ids.shape:
            return False
        upper = backbone.run(input_ids, mask, first=first, lower=lower)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    bound = (1e-4 if whole.dtype == torch.float32 else 0.05) * whole.abs().max()
    return upper.shape == whole.shape and bool((upper - whole).abs().max() <= bound)


@torch.no_grad()
def why_not_packed(backbone: Backbone) -> tuple[str, int | None]:
    """Why rows that begin alike, and one that does not, do not give packed what they give with padding, "" where they
    do; and how long rows may be, None where that does not matter.

    They do where attention alone carries a token to later ones, goes through transformers' interface, and the model
    counts positions as it is told: no recurrence, no convolution. Of windows of attention that no row of this trial
    reaches the end of, the attention must be told, not its mask alone.
    """
    if "position_ids" not in backbone.accepted:
        return "it counts positions in a way of its own", None
    implementation = text_config(backbone.model)._attn_implementation
    if implementation not in ("sdpa", "eager", FLASH):
        return f"its attention is {implementation}", None
    ids, begin = _ordinary_ids(backbone.model, TOKENS + PADDING), TOKENS // 2
    rows = [ids[:TOKENS], ids[:begin] + ids[TOKENS:], ids[PADDING : PADDING + begin + 1]]
    input_ids = torch.tensor([row + ids[:1] * (TOKENS - len(row)) for row in rows], device=backbone.model.device)
    real = torch.tensor([[place < len(row) for place in range(TOKENS)] for row in rows], device=input_ids.device).long()
    layout = layout_of(input_ids, real)
    assert layout is not None
    try:
        padded = backbone.run(input_ids, real)
        states = layout.unpack(backbone.run(layout.pack(input_ids), layout.pack(real), layout))
    except Exception as error:  # noqa: BLE001 - whatever the code of an architecture may raise
        return f"its layers do not take packed rows: {first_line(error)}", None
    bound = (1e-4 if padded.dtype == torch.float32 else 0.05) * padded.abs().max()
    difference = (states - padded)[real.bool()].abs().max()
    if not difference <= bound:
        return f"its hidden states would differ by {difference:.3g}", None
    return "", min(layout.masked - layout.told, default=None)


@contextmanager
def observing(linears: Mapping[str, nn.Module], rows: int) -> Iterator[dict[str, str]]:
    """Yields name -> why it cannot be adapted, complete at the end of a forward with `rows` tokens inside."""
    reasons = dict.fromkeys(linears, "it is not called on text, though its weight may be used")

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            reason = _why_not(module, args, kwargs, output, rows)
            reasons.pop(name, None) if reason is None else reasons.update({name: reason})

        return hook

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in linears.items()]
    try:
        yield reasons
    finally:
        for handle in handles:
            handle.remove()


def _why_not(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, rows: int) -> str | None:
    if len(args) != 1 or kwargs:
        return "it is called with more than its input"
    if args[0].numel() != rows * args[0].shape[-1]:
        return "it sees the tokens in an order of its own, as experts do"
    if type(module) in (nn.Linear, Conv1D) or is_quantized(module):
        return None
    weight: Any = module.weight
    if weight.dtype != args[0].dtype or not isinstance(output, Tensor):
        return f"{type(module).__name__} is no plain linear layer"
    plain = F.linear(args[0], weight, module.bias)  # type: ignore[arg-type]
    same = plain.shape == output.shape and bool((plain - output).abs().max() <= 0.01 * plain.abs().max())
    return None if same else f"{type(module).__name__} is no plain linear layer"


def unsupported(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(f"unsupported architecture {type(model).__name__}: {reason}")
