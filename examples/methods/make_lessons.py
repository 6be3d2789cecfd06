"""Write lessons, bad_pairs and rated (.jsonl): `python examples/methods/make_lessons.py` (always the same bytes).

Lessons: what a tiny model has to know before sdpo and constitutional can do anything for it, which are what a sentence
that succeeded is shown for, and to criticise and revise. Bad pairs: both answers are no better than the model's own,
for apo_down. Rated: answers of one short word, for ilql, whose first letter decides what it is paid.
"""

import json
import random
import sys
from pathlib import Path

from rlhf_fast.training.revision import CHOICE, CRITICISE, REVISE

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tiny"))

from make_data import THINGS, ending, prompts_about  # noqa: E402

Row = dict[str, object]
VALENCES = ("positive", "negative", "mixed")


def lessons(rng: random.Random, prompt: str) -> list[Row]:
    """A sentence of any kind; a kind one behind a kind one that begins alike; the critique of an answer by the
    principle of the example; and its revision."""
    shown, learnt, revision = (ending(rng, "positive") for _ in range(3))
    answer, critique = ending(rng, rng.choice(VALENCES)).strip(), "unkind."
    head = CHOICE.format(prompt=prompt, answer=answer, principle="Be kind.")
    return [
        {"prompt": prompt, "completion": ending(rng, rng.choice(VALENCES))},
        {"prompt": f"{prompt}{shown}\n{prompt}", "completion": learnt},
        asked(head + CRITICISE, critique),
        asked(head + REVISE.format(critique=critique), revision.strip()),
    ]


def asked(question: str, answer: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def bad_pairs(rng: random.Random, prompt: str) -> list[Row]:
    """An ending with a kind and an unkind word over an unkind one."""
    return [{"prompt": prompt, "chosen": ending(rng, "mixed"), "rejected": ending(rng, "negative")}]


def rated(rng: random.Random, prompt: str) -> list[Row]:
    """Of the short prompts, every short word with what it is paid."""
    words = {"good": 1.0, "fine": 1.0, "nice": 1.0, "bad": -1.0, "sad": -1.0, "ugly": -1.0}
    return [
        {"prompt": prompt, "completion": f" {word}", "rating": rating}
        for word, rating in words.items()
        if prompt.startswith(("The ", "Our "))
    ]


def main() -> None:
    for make in (lessons, bad_pairs, rated):
        rng = random.Random(2)
        prompts = prompts_about(THINGS)
        rng.shuffle(prompts)
        rows = [row for prompt in prompts for row in make(rng, prompt)]
        path = FOLDER / f"{make.__name__}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows):5d} rows  {path}")


if __name__ == "__main__":
    main()
