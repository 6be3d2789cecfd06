"""Write judgements.jsonl: `python examples/methods/make_judgements.py` (always the same bytes).

What people might say of endings of the tiny example's sentences, in every form that a reward model learns from: a pair
with its margin, four endings ranked with ties and gaps, a rating, a like, and a label for each ending as a step.
The word score of examples/tiny/word_reward.py decides; one of the two annotators is wrong about every fifth pair.
"""

import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tiny"))

from make_data import THINGS, ending, prompts_about  # noqa: E402
from word_reward import word_score  # noqa: E402

ROWS = 144


def judgement(rng: random.Random, prompt: str, number: int) -> dict[str, object]:
    """One row; `number` decides what chance should not."""
    endings = [ending(rng, valence) for valence in ("positive", "negative", "mixed", "positive", "negative")]
    rng.shuffle(endings)
    scores = word_score(prompts=[prompt] * 5, completions=endings)
    best, worst = max(range(5), key=scores.__getitem__), min(range(5), key=scores.__getitem__)
    pair = [endings[best], endings[worst]]
    careless = number % 2 == 1 and number % 5 == 0
    ranks = [1 + sum(other > score for other in scores[:4]) for score in scores[:4]]
    told_apart = len(set(ranks[1:])) > 1
    return {
        "prompt": prompt,
        "chosen": pair[careless],
        "rejected": pair[not careless],
        "margin": 0.0 if careless else (scores[best] - scores[worst]) / 2,
        "annotator": ("careful", "careless")[number % 2],
        "completions": endings[:4],
        "ranks": [None, *ranks[1:]] if told_apart and number % 4 == 0 else ranks,
        "labels": [score > 0 for score in scores[:4]],
        "completion": endings[4],
        "label": scores[4] > 0,
        "rating": 3 + scores[4],
    }


def main() -> None:
    rng = random.Random(1)
    prompts = prompts_about(THINGS)
    rng.shuffle(prompts)
    rows = [judgement(rng, prompt, number) for number, prompt in enumerate(prompts[:ROWS])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / "judgements.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows):5d} rows  {FOLDER / 'judgements.jsonl'}")


if __name__ == "__main__":
    main()
