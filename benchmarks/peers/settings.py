"""Hyper-parameters of every contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]  # of tensors by name

CLIP, GAMMA, LAM, BETA, VALUE_COEF = 0.2, 0.99, 0.95, 0.1, 0.1
