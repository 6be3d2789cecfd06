"""Trains twice with TRL, as it is and after `rlhf_fast.patch("trl")`, and prints time, memory and losses side by side.

Each run has a process of its own, so that the peak of one is not the other's.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils import logging

import rlhf_fast
from rlhf_fast.models.tiny import tiny

STEPS = 10
VOCABULARY = 8192  # of which the tiny tokenizer knows 259: so that the LM head weighs as much as in a large model
# What both examples pass to TRL's config.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": STEPS, "logging_steps": 1, "bf16": False,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1,
}  # fmt: skip


@dataclass
class Result:
    losses: list[float]
    seconds: float
    peak_mib: float  # above what was in use before training
    replaced: list[str]


def side_by_side(train: Callable[[str, PreTrainedModel, PreTrainedTokenizerBase], Any]) -> None:
    """`train(folder, model, tokenizer)` makes a trainer of TRL; this trains it without us and with us."""
    results = [_in_a_process(train, patched) for patched in (False, True)]
    print("replaced:", *results[1].replaced, sep="\n  ")
    print(f"\n{'':14}{'TRL':>12}{'TRL on us':>12}")
    print(f"{'seconds':14}" + "".join(f"{r.seconds:12.1f}" for r in results))
    print(f"{'peak MiB':14}" + "".join(f"{r.peak_mib:12.0f}" for r in results))
    for step, pair in enumerate(zip(*(r.losses for r in results), strict=True), 1):
        print(f"{f'loss, step {step}':14}" + "".join(f"{round(loss, 6) + 0.0:12.6f}" for loss in pair))


def _in_a_process(train: Callable[..., Any], patched: bool) -> Result:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, train, patched).result()


def _measured(train: Callable[..., Any], patched: bool) -> Result:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error(), datasets.disable_progress_bars()
    replaced = rlhf_fast.patch("trl") if patched else []
    set_seed(1)
    model, tokenizer = tiny(1, hidden_size=64, layers=2)
    model.resize_token_embeddings(VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, model, tokenizer)
        trainer.remove_callback(PrinterCallback)
        before, start = _peak_bytes(), time.perf_counter()
        trainer.train()
        seconds, peak = time.perf_counter() - start, _peak_bytes()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Result(losses, seconds, (peak - before) / 2**20, replaced)


def _peak_bytes() -> int:
    """The most memory that the GPU, or without one this process, has had in use."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
