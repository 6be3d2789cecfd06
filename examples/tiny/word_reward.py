"""Reward of the tiny task: positive words minus negative words in a completion.

`make_data.py` writes its data with these lists, so this is the preference that the reward model has to find.
"""

import re

POSITIVE = (
    "good", "great", "lovely", "superb", "pleasant", "perfect", "splendid", "charming", "fine",
    "nice",
)  # fmt: skip
NEGATIVE = (
    "bad", "awful", "horrid", "dreadful", "terrible", "nasty", "poor", "dull", "sad", "ugly",
)  # fmt: skip


def word_score(prompts: list[str], completions: list[str]) -> list[float]:
    """One float per completion, in words: +1 for each positive one and -1 for each negative one."""
    return [
        float(sum((word in POSITIVE) - (word in NEGATIVE) for word in re.findall(r"[a-z]+", text.lower())))
        for text in completions
    ]


def word_steps(completions: list[str]) -> list[list[tuple[int, float]]]:
    """The same as a process reward: each word is a step, (its end in characters, what it is paid)."""
    return [
        [(word.end(), word_score([], [word[0]])[0]) for word in re.finditer(r"[a-z]+", text.lower())]
        for text in completions
    ]


def length(completions: list[str]) -> list[float]:
    """A cost: the length of each completion in lines of 20 characters."""
    return [len(text) / 20 for text in completions]
