"""Preference pairs: a prompt with a chosen and a rejected completion."""

from dataclasses import dataclass

from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.reading import Row
from rlhf_fast.training.config import Config
from rlhf_fast.training.setup import load_rows

LAYOUTS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]


@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example


def load_pair_rows(config: Config) -> tuple[list[Row], list[Row]]:
    return load_rows(config, LAYOUTS)


def encode_pair(encoder: Encoder, row: Row) -> Pair:
    return Pair(encoder.pair(row, "chosen"), encoder.pair(row, "rejected"))
