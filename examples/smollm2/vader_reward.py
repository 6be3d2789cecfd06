"""Reward of the sentiment runs: VADER's compound score of the completion, from -1 (negative) to 1 (positive).

Needs `pip install vaderSentiment` (MIT; the lexicon is inside the package, nothing is fetched). Source: Hutto and
Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def compound(prompts: list[str], completions: list[str]) -> list[float]:
    """One score in [-1, 1] per completion; the prompt is not read, so its own words earn nothing."""
    return [analyzer().polarity_scores(text)["compound"] for text in completions]
