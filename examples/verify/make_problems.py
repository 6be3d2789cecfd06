"""Write problems whose answers can be checked: `python examples/verify/make_problems.py` (always the same bytes).

Six families of questions that a model of 135M parameters can learn on a CPU. No question is both learnt and held out.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from random import Random

FOLDER = Path(__file__).parent
TRAIN, HELD_OUT = 100, 40  # of each family
WORDS = [
    "apple", "bread", "chair", "cloud", "glass", "green", "horse", "house", "lemon", "light", "music", "ocean", "paper",
    "plant", "queen", "river", "stone", "sugar", "table", "tiger", "train", "uncle", "voice", "water", "zebra",
]  # fmt: skip


def add(draw: Random) -> tuple[str, str]:
    a, b = draw.randint(1, 19), draw.randint(1, 19)
    return f"What is {a} + {b}?", str(a + b)


def subtract(draw: Random) -> tuple[str, str]:
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    return f"What is {max(a, b)} - {min(a, b)}?", str(abs(a - b))


def larger(draw: Random) -> tuple[str, str]:
    a, b = draw.sample(range(10, 100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def compare(draw: Random) -> tuple[str, str]:
    a, b = draw.sample(range(10, 100), 2)
    return f"Is {a} greater than {b}?", "yes" if a > b else "no"


def first(draw: Random) -> tuple[str, str]:
    words = draw.sample(WORDS, 3)
    return f"What is the first word of: {' '.join(words)}", words[0]


def count(draw: Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randint(2, 5))
    return f"How many words are in this list: {', '.join(words)}?", str(len(words))


FAMILIES: tuple[Callable[[Random], tuple[str, str]], ...] = (add, subtract, larger, compare, first, count)


def problems(family: Callable[[Random], tuple[str, str]], number: int, draw: Random) -> list[dict[str, str]]:
    """`number` different questions of a family with their answers."""
    answers: dict[str, str] = {}
    while len(answers) < number:
        question, answer = family(draw)
        answers[question] = answer
    return [
        {"prompt": f"Question: {question}\nAnswer:", "answer": answer, "family": family.__name__}
        for question, answer in answers.items()
    ]


def main() -> None:
    draw = random.Random(0)
    train, held_out = [], []
    for family in FAMILIES:
        rows = problems(family, TRAIN + HELD_OUT, draw)
        train += rows[:TRAIN]
        held_out += rows[TRAIN:]
    draw.shuffle(train)
    for name, rows in (("problems_train.jsonl", train), ("problems_heldout.jsonl", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{len(rows):4d} problems  {FOLDER / name}")


if __name__ == "__main__":
    main()
