"""Stages that repeat: what the stages of every round are called, what they take of which other, and what came of each.

An entry of `stages` is a stage, or `{repeat: N, stages: [...]}`; a key `repeat` beside `stages` repeats them all. The
stage NAME of round R is the folder round-R/NAME.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.table import Table

from rlhf_fast.data.reading import read_json
from rlhf_fast.errors import UserError, refusing, short
from rlhf_fast.training.config import Config
from rlhf_fast.training.entries import FromStage
from rlhf_fast.training.files import replace_file
from rlhf_fast.training.folder import CONFIG_FILE, SUMMARY_FILE

FILE = "rounds.jsonl"
SHOWN = ("reward", "kl", "accuracy", "loss", "rows", "revisions")  # in the table; the file has all
KEYS = ("model", "reward", "cost", "data", "teacher")  # that may name a stage; so may judge.by and judge.adapter
C = TypeVar("C", bound=Config)


class Planned(NamedTuple):
    """A stage of a pipeline.

    name: its folder. own: what the file calls it. values: its keys. round: from 1, or 0 outside of rounds. rounds: how
    many there are. block: the stages of a round, in order.
    """

    name: str
    own: str
    values: dict[str, Any]
    round: int = 0
    rounds: int = 0
    block: tuple[str, ...] = ()


def planned(values: dict[str, Any]) -> list[Planned]:
    """Every stage of every round of the keys `stages` and `repeat`, in the order in which they run."""
    listed = values["stages"]
    if "repeat" in values:
        listed = [{"repeat": values["repeat"], "stages": listed}]
    found: list[Planned] = []
    for entry in _checked(listed):
        if "repeat" not in entry:
            name = _name(entry)
            found.append(Planned(name, name, entry))
            continue
        if set(entry) != {"repeat", "stages"}:
            raise UserError(f"an entry with repeat has stages beside it and nothing else, got {', '.join(entry)}")
        count, inner = entry["repeat"], _checked(entry["stages"])
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"repeat must be a whole number from 1, got {count!r}")
        if any("repeat" in stage for stage in inner):
            raise UserError("stages that repeat cannot hold others that repeat")
        block = tuple(map(_name, inner))
        for number in range(1, count + 1):
            found += [
                Planned(f"round-{number}/{name}", name, stage, number, count, block)
                for name, stage in zip(block, inner, strict=True)
            ]
    names = list(dict.fromkeys((plan.own, plan.block) for plan in found))
    own = [name for name, _ in names]
    if len({plan.name for plan in found}) < len(found) or len(set(own)) < len(own):
        raise UserError(f"stages need different names, got {', '.join(own)}; give them a `name`")
    return found


def _checked(listed: Any) -> list[dict[str, Any]]:
    fine = isinstance(listed, list) and listed
    if not fine or not all(isinstance(s, dict) and ("algorithm" in s or "repeat" in s) for s in listed):
        raise UserError("stages must be a list of mappings, each with an algorithm, or with repeat and stages")
    return listed


def _name(entry: dict[str, Any]) -> str:
    name = entry.get("name", entry["algorithm"])
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(
            f"stage name {short(name)}: it is a folder in output_dir, so it must be one word without a path"
        )
    if name in (CONFIG_FILE, FILE) or re.fullmatch(r"round-\d+", name):
        raise UserError(f"stage name {name!r}: output_dir has a file or folder of that name")
    return name


def in_its_round(config: C, plan: Planned, plans: Sequence[Planned]) -> C:
    """The config of a stage with references to the folders of the round that is meant, and with the round's seed.

    Every round draws other samples (seed + round - 1) of other examples, but of the same held-out ones.
    """
    config = with_references(config, lambda key, reference: _meant(key, reference, plan, plans))
    if plan.round < 2:
        return config
    later = plan.round - 1
    held_out_by_seed = config.eval_data is None and "data" not in config.gives
    order = config.order_seed if held_out_by_seed else config.order_seed + later
    return config.model_copy(update={"seed": config.seed + later, "data_seed": order})


def _meant(key: str, reference: FromStage, plan: Planned, plans: Sequence[Planned]) -> list[str | FromStage]:
    """The folders that a reference of the stage `plan` means: one, or of `rounds: all` those of all rounds so far."""
    before = plans[: plans.index(plan)]
    found = [other.name for other in before if other.own == reference.stage]
    if not found and reference.first is not None:
        first = [other.name for other in before if other.own == reference.first]
        return [FromStage.model_validate({"from": first[-1]})] if first else [reference.first]
    if not found:
        of_rounds = reference.stage in plan.block
        hint = "; in the first round there is none: say `first`, a stage before it or a folder" if of_rounds else ""
        raise UserError(f"stage {plan.own}: from: {reference.stage} is no earlier stage{hint}")
    if reference.rounds == "all" and key != "data":
        raise UserError(f"stage {plan.own}: {key} from {reference.stage}: rounds: all is for data")
    return [FromStage.model_validate({"from": name}) for name in (found if reference.rounds == "all" else found[-1:])]


def with_references(config: C, change: Callable[[str, FromStage], list[Any]]) -> C:
    """The config with what `change(key, reference)` puts in the place of every `{from: STAGE}`."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [new for item in value for new in (change(key, item) if isinstance(item, FromStage) else [item])]
        if not isinstance(value, FromStage):
            return value
        found = change(key, value)
        return found if len(found) > 1 else found[0]

    changes = {key: changed(key, getattr(config, key)) for key in KEYS if hasattr(config, key)}
    judge = getattr(config, "judge", None)
    if judge is not None:
        entries = {key: changed(f"judge.{key}", getattr(judge, key)) for key in ("by", "adapter")}
        changes["judge"] = judge.model_copy(update=entries)
    return config.model_copy(update=changes)


def references(config: Config) -> list[tuple[str, FromStage]]:
    """(key, reference) of every `{from: STAGE}`."""
    found: list[tuple[str, FromStage]] = []

    def noted(key: str, reference: FromStage) -> list[Any]:
        found.append((key, reference))
        return [reference]

    with_references(config, noted)
    return found


def record_rounds(folder: Path, plans: Sequence[Planned]) -> list[dict[str, Any]]:
    """Write FILE, a line for each round that is finished: the last held-out metrics of each of its stages."""
    rows = []
    for number in sorted({plan.round for plan in plans} - {0}):
        stages = [plan for plan in plans if plan.round == number]
        summaries = [folder / plan.name / SUMMARY_FILE for plan in stages]
        if all(path.is_file() for path in summaries):
            with refusing(f"a {SUMMARY_FILE} in {folder} is damaged"):
                metrics = [read_json(path)["metrics"] for path in summaries]
            rows.append({"round": number, **{p.own: found for p, found in zip(stages, metrics, strict=True)}})
    replace_file(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def rounds_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each round: the held-out metrics of its last stage, those of SHOWN that all rounds have."""
    last = list(rows[0])[-1]
    names = [name for name in rows[0][last] if name.startswith(SHOWN) and not name.endswith("_se")]
    names = [name for name in names if all(name in row[last] for row in rows)]
    table = Table("round", *names, title=f"{last}: held-out data after each round")
    for row in rows:
        table.add_row(str(row["round"]), *(f"{row[last][name]:.3f}" for name in names))
    return table
