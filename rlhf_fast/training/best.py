"""The policy of a run with the best held-out reward, within a budget of KL to the reference: best/ in its folder."""

import json
import os
from pathlib import Path

from rlhf_fast.data.reading import read_json
from rlhf_fast.errors import UserError, refusing
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.training import ranks
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.files import replace_file
from rlhf_fast.training.job import Job


def keep_best(job: Job, config: RolloutConfig, folder: Path, done: int, metrics: dict[str, float]) -> None:
    """Save the policy into `folder`/best where an evaluation after `done` steps is the best so far.

    metrics: those of the held-out prompts, `reward` and `kl` (nats per completion) among them; best.json has those of
    the best. A kill leaves the old adapter or the new one: its weights are one file, its config never changes. A run
    that is resumed behind its best evaluation makes the same policy again. UserError where nothing is paid.
    """
    if config.best_by is None or (config.kl_budget is not None and metrics["kl"] > config.kl_budget):
        return
    if config.best_by not in metrics:
        raise UserError(f"best_by {config.best_by}: nothing is paid here")
    best = folder / "best"
    record, staging = best / "best.json", best / ".new"
    name = config.best_by

    def is_better() -> bool:
        with refusing(f"{record} is damaged"):
            return not record.is_file() or metrics[name] > read_json(record)[name]

    if not ranks.from_first(is_better):
        return
    with ranks.place_to_save(staging) as place:
        save_adapter(job.backbone, "policy", place)
    if not ranks.is_first():
        return
    for path in staging.iterdir():
        os.replace(path, best / path.name)
    staging.rmdir()
    replace_file(record, json.dumps({"step": done, **metrics}) + "\n")
