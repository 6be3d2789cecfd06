"""Completions of a run's policy beside those of what it started from, for any prompts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_fast.commands.opening import Opened, open_run
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Prompt
from rlhf_fast.data.layouts import rename_columns, require_columns, with_known_columns
from rlhf_fast.data.reading import Row
from rlhf_fast.data.sources import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Rewards, load_rewards
from rlhf_fast.rollout import roll_out
from rlhf_fast.training.best_of_n import best_of, kl_bound
from rlhf_fast.training.config import read_yaml
from rlhf_fast.training.folder import CONFIG_FILE
from rlhf_fast.training.job import Job, seed_everything


class Completion(NamedTuple):
    """reward: None where no reward was asked for."""

    text: str
    reward: float | None = None


class Wanted(NamedTuple):
    """n: completions of each prompt, each the best of `candidates` by the reward."""

    n: int = 1
    candidates: int = 1
    reward: str | None = None
    batch_size: int = 16


def sample(
    run: str, prompts: str | None, texts: Sequence[str], wanted: Wanted, *, before: bool = True, out: str | None = None,
    **changes: Any,
) -> None:  # fmt: skip
    """Print a table, or write a JSON line for each prompt to `out`: {"prompt", "before", "after"}, the last two lists
    of {"completion", "reward"}.

    prompts: a data file. texts: further prompts. changes: of the run's keys; temperature 0 takes the likeliest token.
    Raises UserError.
    """
    if prompts is None and not texts:
        raise UserError("nothing to complete: give --prompts FILE or --prompt TEXT")
    for name, count in (("--n", wanted.n), ("--best-of", wanted.candidates), ("--batch-size", wanted.batch_size)):
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    if wanted.candidates > 1 and wanted.reward is None:
        raise UserError(f"--best-of {wanted.candidates} needs --reward: what is best")
    opened = open_run(run, **greedy(changes), batch_size=wanted.batch_size)
    rows = read_prompts(opened, prompts, texts)
    found = {"after": completions(opened, rows, wanted, trained=True)}
    if before and opened.adapter is not None:
        found = {"before": completions(opened, rows, wanted, trained=False), **found}
    elif before and (start := start_of(opened)) is not None:
        found = {"before": completions(open_run(start, **greedy(changes)), rows, wanted, trained=True), **found}
    asked = [row.values["prompt"] for row in rows]
    if out is None:
        print_table(Console(markup=False, emoji=False), asked, found)
    else:
        write(Path(out), asked, found)
    summarise(Console(markup=False, emoji=False), found, wanted)


def greedy(changes: dict[str, Any]) -> dict[str, Any]:
    """Temperature 0 as the one likeliest token."""
    return changes if changes.get("temperature") != 0 else changes | {"temperature": 1.0, "top_k": 1, "top_p": 1.0}


def start_of(opened: Opened) -> str | None:
    """The model that a run of all weights started from; None where there is no config that says it."""
    path = opened.folder / CONFIG_FILE
    return read_yaml(path).get("model") if path.is_file() else None


def read_prompts(opened: Opened, prompts: str | None, texts: Sequence[str]) -> list[Row]:
    rows = [Row(f"--prompt {i}", {"prompt": text}) for i, text in enumerate(texts, 1)]
    if prompts is None:
        return rows
    read = read_rows(prompts)
    mapped = {ours: theirs for ours, theirs in (opened.config.columns or {}).items() if theirs in read[0].values}
    read = with_known_columns(rename_columns(read, mapped), "sample", prompts, family="ppo")
    return rows + require_columns(read, [("prompt",)], "sample")[1]


def completions(opened: Opened, rows: Sequence[Row], wanted: Wanted, *, trained: bool) -> list[list[Completion]]:
    """Of each row, `wanted.n`: of the trained policy, or of what it started from. The same random numbers for both."""
    opened.play(trained=trained)
    seed_everything(opened.config.seed)
    encoder = opened.encoder
    asked = encode_rows(encoder, rows, Encoder.prompt, "prompts")
    prompts = [prompt for prompt in asked for _ in range(wanted.n)]
    if wanted.reward is None:
        answers = [Completion(text) for text in plain(opened, prompts, wanted.batch_size)]
    else:
        job = Job(opened.backbone, encoder, asked.of([]), asked, {}, rewards=rewards_of(opened, wanted.reward, rows))
        best = best_of(job, opened.config, prompts, wanted.candidates, drawing=opened.drawing)
        answers = [Completion(*pair) for pair in zip(best.completions, best.rewards.tolist(), strict=True)]
    return [answers[i : i + wanted.n] for i in range(0, len(answers), wanted.n)]


def plain(opened: Opened, prompts: Sequence[Prompt], batch_size: int) -> list[str]:
    config, texts = opened.config, []
    for i in range(0, len(prompts), batch_size):
        rollout = roll_out(
            opened.backbone, opened.encoder.tokenizer, prompts[i : i + batch_size],
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p, drawing=opened.drawing,
        )  # fmt: skip
        texts += rollout.completions
    return texts


def rewards_of(opened: Opened, spec: str, rows: Sequence[Row]) -> Rewards:
    if "reward" in opened.backbone.adapters:
        opened.backbone.remove_adapter("reward")
    rewards = load_rewards({spec: 1.0}, opened.backbone, chat=opened.config.chat is True,
                           trust_remote_code=opened.config.trust_remote_code)  # fmt: skip
    rewards.check_rows(rows)
    return rewards


Found = dict[str, list[list[Completion]]]


def write(path: Path, prompts: Sequence[Any], found: Found) -> None:
    def entries(answers: Sequence[Completion]) -> list[dict[str, Any]]:
        return [{"completion": a.text, **({} if a.reward is None else {"reward": a.reward})} for a in answers]

    lines = [
        {"prompt": prompt} | {when: entries(answers[i]) for when, answers in found.items()}
        for i, prompt in enumerate(prompts)
    ]
    try:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def print_table(console: Console, prompts: Sequence[Any], found: Found) -> None:
    table = Table("prompt", *found, show_lines=True)
    for i, prompt in enumerate(prompts):
        shown = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        table.add_row(Text(shown), *(Text("\n\n".join(map(said, answers[i]))) for answers in found.values()))
    console.print(table)


def said(answer: Completion) -> str:
    return answer.text if answer.reward is None else f"{answer.text}  [{answer.reward:.3g}]"


def summarise(console: Console, found: Found, wanted: Wanted) -> None:
    if wanted.reward is not None:
        means = []
        for when, answers in found.items():
            rewards = [answer.reward for listed in answers for answer in listed if answer.reward is not None]
            means.append(f"{when} {math.fsum(rewards) / len(rewards):.4g}")
        console.print(Text(f"mean reward: {', '.join(means)}"), soft_wrap=True)
    if wanted.candidates > 1:
        bound = f"at most {kl_bound(wanted.candidates):.3g} nats of KL from one sample"
        console.print(Text(f"best of {wanted.candidates}: {bound}"), soft_wrap=True)
