"""Liger's scaled cross-entropy from hidden states: the head's negative log-likelihoods at a temperature, per token."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs


class LigerFusedLinearScaledCrossEntropyFunction:
    """`apply` alone, as the peer's."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100,
        m_tiles_per_cluster: int = 1, return_entropy: bool = False, selected_token_ids: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """nll (M,) of `target` (M,) under softmax(_input @ weightᵀ / temperature), float32, 0 where it is ignore_index.

        _input: (M, H), weight: (V, H), of one type. return_entropy: also the entropy (M,), in the type of _input.
        selected_token_ids: (K,) int64, also their log-probabilities (M, K), float32. All are differentiable; more than
        one makes a tuple. m_tiles_per_cluster is a setting of the peer's kernel and changes nothing here.
        Raises TypeError for what is not of these types, ValueError for shapes, values, ids outside the vocabulary and
        tensors on several devices; to look at the ids waits for a GPU, as the peer does.
        """
        _check_rows(_input, weight, target)
        _check_options(temperature, "m_tiles_per_cluster", m_tiles_per_cluster, return_entropy)
        _check_ids("target", target[target != ignore_index], weight)
        if selected_token_ids is not None:
            _check_selected(selected_token_ids, weight)
        mask, ids = target != ignore_index, target
        if selected_token_ids is not None:
            ids = torch.cat([target[:, None], selected_token_ids.expand(target.shape[0], -1)], 1)
        scored = linear_logprobs(_input, weight, ids, mask=mask, temperature=temperature, return_entropy=return_entropy)
        logprobs, entropy = (scored, None) if isinstance(scored, Tensor) else scored
        nll, selected = (-logprobs, None) if selected_token_ids is None else (-logprobs[:, 0], logprobs[:, 1:])
        results = [nll, None if entropy is None else entropy.to(_input.dtype), selected]
        given = tuple(x for x in results if x is not None)
        return given if len(given) > 1 else nll


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """`apply` alone, as the peer's; runs on the CPU as well."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, tp_group: torch.distributed.ProcessGroup | None,
        temperature: float = 1.0, ignore_index: int = -100, tiles_per_reduce: int = 1, return_entropy: bool = False,
    ) -> Any:  # fmt: skip
        """The same for a head of which `weight` (V / ranks, H) is this rank's rows; target has ids of the whole.

        tp_group: None for all ranks. The gradient of _input is summed over the ranks, that of weight stays local.
        Returns nll or (nll, entropy), (M,) float32. tiles_per_reduce changes nothing here.
        """
        _check_rows(_input, weight, target)
        _check_options(temperature, "tiles_per_reduce", tiles_per_reduce, return_entropy)
        group = torch.distributed.group.WORLD if tp_group is None else tp_group
        scored = linear_logprobs(
            _input, weight, target, mask=target != ignore_index, temperature=temperature,
            return_entropy=return_entropy, process_group=group,
        )  # fmt: skip
        return -scored if isinstance(scored, Tensor) else (-scored.logprobs, scored.entropy)


def _check_rows(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    shapes = tuple(hidden.shape), tuple(weight.shape), tuple(target.shape)
    if (hidden.dim(), weight.dim(), target.dim()) != (2, 2, 1) or hidden.shape != (target.shape[0], weight.shape[1]):
        raise ValueError(f"_input must be (M, H), weight (V, H) and target (M,), got {', '.join(map(str, shapes))}")
    if len({hidden.device, weight.device, target.device}) > 1:
        devices = f"{hidden.device}, {weight.device} and {target.device}"
        raise ValueError(f"_input, weight and target must be on the same device, got {devices}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"_input and weight must have the same floating type, got {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {target.dtype}")


def _check_options(temperature: Any, tiles_name: str, tiles: Any, return_entropy: Any) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"temperature must be a real number, got {temperature!r}")
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if isinstance(tiles, bool) or not isinstance(tiles, int):
        raise TypeError(f"{tiles_name} must be an int, got {tiles!r}")
    if tiles < 1:
        raise ValueError(f"{tiles_name} must be >= 1, got {tiles}")
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool, got {return_entropy!r}")


def _check_selected(ids: Any, weight: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"selected_token_ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.dim() != 1:
        raise ValueError(f"selected_token_ids must be (K,), got {tuple(ids.shape)}")
    if ids.device != weight.device:
        raise ValueError(
            f"selected_token_ids and weight must be on the same device, got {ids.device} and {weight.device}"
        )
    _check_ids("selected_token_ids", ids, weight)


def _check_ids(name: str, ids: Tensor, weight: Tensor) -> None:
    outside = ids[(ids < 0) | (ids >= weight.shape[0])]
    if outside.numel() > 0:
        raise ValueError(f"{name} must be in [0, {weight.shape[0]}), got {outside[0].item()}")
