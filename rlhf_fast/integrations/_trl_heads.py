"""What TRL's two autograd functions compute, on our ops, for heads that are whole: see ChunkedLogProbFunction and
ChunkedDivergenceFunction in trl.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rlhf_fast import linear_kl, linear_logprobs, token_kl, token_logprobs
from rlhf_fast.ops.head.head import Head
from rlhf_fast.ops.head.tiles import chunks, default_chunk_tokens

_TILE_ROWS = 512  # of tiles of logits that autograd makes
_Projection = tuple[Tensor, Tensor, Tensor | None]  # hidden, weight, bias


class Transform(NamedTuple):
    """What is done to logits before the temperature."""

    logit_scale: float
    softcap: float | None

    def of(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def compute_type(hidden: Tensor) -> torch.dtype:
    """The type of the products: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def scored(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, targets: Tensor, dtype: torch.dtype, temperature: float,
    transform: Transform, outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The five outputs of ChunkedLogProbFunction."""
    scale = transform.logit_scale
    if scale <= 0:  # TRL takes any; 0 and -1 are exact factors in every type
        sign = -1.0 if scale < 0 else 0.0
        hidden, bias = hidden * sign, None if bias is None else bias * sign
        transform = transform._replace(logit_scale=abs(scale) or 1.0)
    options: dict[str, Any] = {"temperature": temperature, **transform._asdict()}
    want_stats = "log_sum_sq_probs" in outputs or "is_top1" in outputs
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the logits
        hidden, weight, bias = _cast(dtype, hidden, weight, bias)
        wanted: dict[str, Any] = {"return_entropy": "entropy" in outputs, "return_stats": want_stats}
        scored = linear_logprobs(hidden, weight, targets, bias=bias, **wanted, **options)
        logprobs, *rest = scored if isinstance(scored, tuple) else (scored,)
        entropy = rest.pop(0).float() if "entropy" in outputs else None
        squares = mean = is_top1 = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                squares = rest[0].sum_p_squared.log().float()
            if "mean_logits" in outputs:
                mean = _mean_logits(hidden, weight, bias, transform, temperature)
            if "is_top1" in outputs:
                is_top1 = _is_top1(hidden, weight, bias, targets, logprobs, rest[0].p_max, transform)
    return logprobs.float(), entropy, squares, mean, is_top1


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, temperature: float
) -> Tensor:
    """(N,) float32: the mean of z over the vocabulary, without gradient."""
    if transform.softcap is None:  # the mean of linear functions is one
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) * (transform.logit_scale / temperature)
    result = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for rows, logits in logit_tiles(hidden, weight, bias):
        result[rows] = transform.of(logits).mean(-1) / temperature
    return result


def _is_top1(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logprobs: Tensor, p_max: Tensor,
    transform: Transform,
) -> Tensor:  # fmt: skip
    """(N,) bool: whether the target's logit is the greatest, and the first of those that equal it.

    A target with more than half of the probability has no equal. Of the others, only rows where it is the greatest to
    rounding can be true; their logits are made again.
    """
    is_top1 = logprobs > -0.693  # just above log(1 / 2)
    open_rows = (~is_top1 & (logprobs > p_max.log() - 1e-4)).nonzero()[:, 0]
    for rows, logits in logit_tiles(hidden[open_rows], weight, bias):
        best = transform.of(logits).argmax(-1)
        is_top1[open_rows[rows]] = best == targets[open_rows[rows]]
    return is_top1


def diverged(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, *, types: tuple[torch.dtype, torch.dtype],
    transforms: tuple[Transform, Transform], **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two outputs of ChunkedDivergenceFunction; options: variant, js_weight and temperature, as of linear_kl."""
    scale, softcap = transforms[0]
    with torch.autocast(student_hidden.device.type, enabled=False):
        student = _cast(types[0], student_hidden, student_weight, student_bias)
        teacher = _cast(
            types[1], *(None if x is None else x.detach() for x in (teacher_hidden, teacher_weight, teacher_bias))
        )
        if transforms[0] == transforms[1] and scale > 0:
            common = torch.promote_types(*types)
            (h, w, b), (ref_h, ref_w, ref_b) = _cast(common, *student), _cast(common, *teacher)
            out = linear_kl(
                h, ref_h, w, None, ref_weight=ref_w, bias=b, ref_bias=ref_b, logit_scale=scale, softcap=softcap,
                return_entropy=True, **options,
            )  # fmt: skip
            assert out.entropy is not None
            return out.kl.float(), out.entropy.detach().float()
        return _diverged_by_tiles(student, teacher, transforms, options)


def _diverged_by_tiles(
    student: _Projection, teacher: _Projection, transforms: tuple[Transform, Transform], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same for logits that are transformed differently: a tile of both at a time, made again in backward."""
    wide = torch.promote_types(torch.promote_types(student[0].dtype, teacher[0].dtype), torch.float32)
    (hidden, *head), (ref_hidden, *ref_head) = _cast(wide, *student), _cast(wide, *teacher)

    def tile(rows: Tensor, ref_rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = transforms[0].of(linear(rows, weight, bias))
        ref_logits = transforms[1].of(linear(ref_rows, *ref_head))
        ids = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        _, entropy = token_logprobs(logits.detach(), ids, temperature=options["temperature"], return_entropy=True)
        return token_kl(logits, ref_logits, **options).float(), entropy.float()

    return by_tiles(tile, (hidden, ref_hidden), *head)


def by_tiles(
    compute: Callable[..., tuple[Tensor, Tensor]], rows: tuple[Tensor, Tensor], *others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """compute(*rows, *others) for a tile of the rows at a time, which backward makes again."""
    starts = range(0, max(1, rows[0].shape[0]), _TILE_ROWS)
    tiles = [[x[i : i + _TILE_ROWS] for x in rows] for i in starts]
    first, second = zip(*(checkpoint(compute, *tile, *others, use_reentrant=False) for tile in tiles), strict=True)
    return torch.cat(first), torch.cat(second)


def logit_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits (n, V) in float32 or float64), a tile of the byte budget at a time."""
    for rows in chunks(hidden.shape[0], default_chunk_tokens(weight)):
        shape = (rows.stop - rows.start, weight.shape[0])
        logits = hidden.new_empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        Head(weight, bias).logits(hidden[rows], logits)
        yield rows, logits


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    return tuple(None if x is None else x.to(dtype) for x in tensors)
