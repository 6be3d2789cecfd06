"""Write the data of the tiny run: `python examples/tiny/make_data.py` (always the same bytes).

Short English sentences with an open sentiment: SFT shows good and bad endings equally often, preferences put
the kinder ending of a prompt first, and the held-out prompts are about things that no other file mentions.
"""

import json
import random
from pathlib import Path

from word_reward import NEGATIVE, POSITIVE, word_score

FOLDER = Path(__file__).parent
INTENSIFIERS = ("very", "quite", "really", "rather")
OPENINGS = (
    "The {} was",
    "Our {} was",
    "I found the {}",
    "They called the {}",
    "She said the {} was",
    "To me the {} felt",
)
THINGS = (
    "soup", "hotel", "film", "book", "song", "room", "lunch", "garden", "train", "weather",
    "lesson", "party", "house", "beach", "coffee", "market", "museum", "bread", "story", "town",
    "dinner", "office", "dress", "bike", "view", "dance", "game", "letter", "salad", "bus", "walk",
    "talk",
)  # fmt: skip
HELD_OUT_THINGS = ("cake", "boat", "play", "shop", "tea", "road", "meal", "poem")


def ending(rng: random.Random, valence: str) -> str:
    """One completion of at most 24 bytes: "positive", "negative" or "mixed" (one word of each kind)."""
    words = {"positive": POSITIVE, "negative": NEGATIVE}
    if valence == "mixed":
        pair = [rng.choice(POSITIVE), rng.choice(NEGATIVE)]
        rng.shuffle(pair)
        return f" {pair[0]} but {pair[1]}."
    first, second = rng.sample(words[valence], 2)
    form = rng.randrange(3)
    if form == 0:
        return f" {first}."
    if form == 1:
        return f" {rng.choice(INTENSIFIERS)} {first}."
    return f" {first} and {second}."


def prompts_about(things: tuple[str, ...]) -> list[str]:
    return [opening.format(thing) for opening in OPENINGS for thing in things]


def sft_rows(rng: random.Random, prompts: list[str]) -> list[dict[str, str]]:
    """Two positive, two negative and one mixed ending of every prompt, in random order."""
    rows = {
        (prompt, ending(rng, valence)): None
        for prompt in prompts
        for valence in ("positive", "positive", "negative", "negative", "mixed")
    }
    unique = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    rng.shuffle(unique)
    return unique


def preference_rows(rng: random.Random, prompts: list[str]) -> list[dict[str, str]]:
    """Positive over negative, positive over mixed and mixed over negative, once for every prompt."""
    rows = []
    for prompt in prompts:
        for better, worse in (("positive", "negative"), ("positive", "mixed"), ("mixed", "negative")):
            chosen, rejected = ending(rng, better), ending(rng, worse)
            high, low = word_score(prompts=[prompt] * 2, completions=[chosen, rejected])
            assert high > low, (chosen, rejected)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rng.shuffle(rows)
    return rows


def write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(rows):5d} rows  {FOLDER / name}")


def main() -> None:
    rng = random.Random(0)
    train, held_out = prompts_about(THINGS), prompts_about(HELD_OUT_THINGS)
    rng.shuffle(train)
    write("sft.jsonl", sft_rows(rng, train))
    write("preferences.jsonl", preference_rows(rng, train))
    write("prompts_train.jsonl", [{"prompt": prompt} for prompt in train])
    write("prompts_heldout.jsonl", [{"prompt": prompt} for prompt in held_out])


if __name__ == "__main__":
    main()
