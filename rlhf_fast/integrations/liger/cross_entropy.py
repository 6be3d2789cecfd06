"""Liger's scaled cross-entropy from hidden states: the head's negative log-likelihoods at a temperature, per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs


class LigerFusedLinearScaledCrossEntropyFunction:
    """`apply` alone, as the peer's."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Any:
        """nll (M,) of `target` (M,) under softmax(_input @ weightᵀ / temperature), float32, 0 where it is ignore_index.

        _input: (M, H), weight: (V, H), of one type. return_entropy: also the entropy (M,), in the type of _input.
        selected_token_ids: (K,) int64, also their log-probabilities (M, K), float32. All are differentiable; more than
        one makes a tuple. m_tiles_per_cluster is a setting of the peer's kernel and changes nothing here.
        """
        if selected_token_ids is not None and selected_token_ids.dim() != 1:
            raise ValueError(f"selected_token_ids must be (K,), got {tuple(selected_token_ids.shape)}")
        mask, ids = target != ignore_index, target
        if selected_token_ids is not None:
            ids = torch.cat([target[:, None], selected_token_ids.expand(target.shape[0], -1)], 1)
        found = linear_logprobs(_input, weight, ids, mask=mask, temperature=temperature, return_entropy=return_entropy)
        logprobs, entropy = found if return_entropy else (found, None)
        nll, selected = (-logprobs, None) if selected_token_ids is None else (-logprobs[:, 0], logprobs[:, 1:])
        results = [nll, None if entropy is None else entropy.to(_input.dtype), selected]
        given = tuple(x for x in results if x is not None)
        return given if len(given) > 1 else nll


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """`apply` alone, as the peer's; runs on the CPU as well."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: torch.distributed.ProcessGroup | None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Any:
        """The same for a head of which `weight` (V / ranks, H) is this rank's rows; target has ids of the whole.

        tp_group: None for all ranks. The gradient of _input is summed over the ranks, that of weight stays local.
        Returns nll or (nll, entropy), (M,) float32. tiles_per_reduce changes nothing here.
        """
        group = torch.distributed.group.WORLD if tp_group is None else tp_group
        found = linear_logprobs(
            _input, weight, target, mask=target != ignore_index, temperature=temperature,
            return_entropy=return_entropy, process_group=group,
        )  # fmt: skip
        return (-found[0], found[1]) if return_entropy else -found
