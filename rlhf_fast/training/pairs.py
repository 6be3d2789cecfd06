"""Preference pairs: a prompt with a chosen and a rejected completion."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.data.encoding import Encoder, Example, encode_rows
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


def encode_pairs(encoder: Encoder, train: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Pair], list[Pair]]:
    """The pairs of both sets; what was left out or changed is said."""

    def encode(row: Row) -> Pair:
        return Pair(*encoder.pair(row))

    return encode_rows(encoder, train, encode, "data"), encode_rows(encoder, held_out, encode, "held-out data")
