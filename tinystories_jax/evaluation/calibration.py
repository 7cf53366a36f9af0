"""How far the scores of written text can be trusted: real stories, and the same stories spoiled to a known degree.

Also makes the reference that ships with the package. Nothing here is needed to score a story.
"""

import dataclasses
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tinystories_jax.data.files import find_files
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.articles import ARTICLES, count_articles
from tinystories_jax.evaluation.grammar import Reference, TextScores, score_stories
from tinystories_jax.evaluation.sentences import WORD, normalise, split_sentences

RATES = (0.05, 0.1, 0.25, 0.5, 1.0)

_VERBS = (
    ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("isn't", "aren't"), ("wasn't", "weren't"),
    ("hasn't", "haven't"), ("doesn't", "don't"), ("goes", "go"), ("likes", "like"), ("loves", "love"),
    ("needs", "need"), ("says", "say"), ("sees", "see"), ("wants", "want"),
)  # fmt: skip
_OTHER_NUMBER = {form: other for pair in _VERBS for form, other in (pair, pair[::-1])}
_SMALL_WORDS = frozenset((
    "and", "as", "at", "but", "for", "had", "he", "her", "his", "i", "in", "is", "it", "my", "of", "on", "she", "so",
    "that", "they", "to", "was", "were", "with", "you",
))  # fmt: skip

Edit = tuple[int, int, str]  # text[start:end] becomes this


@dataclass(frozen=True)
class Spoiled:
    """The scores of stories spoiled in one way at one rate; the rate is a share of all opportunities."""

    way: str
    rate: float
    scores: TextScores


def read_stories(files: str) -> tuple[list[str], dict[str, Any]]:
    """Returns the stories of comma-separated paths or globs, and what tells them from others."""
    stories = list(iter_stories(StorySource("files", "files", files=files), StoryReport(), SeenStories()))
    names = ", ".join(path.name for path in find_files(files))
    digest = hashlib.sha256("\0".join(stories).encode()).hexdigest()
    return stories, {"files": names, "num_stories": len(stories), "sha256": digest}


def halve(stories: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns two halves of held-out real stories, taken in turn: one to measure by, one to score.

    Raises `UserError` with fewer than two stories in each.
    """
    if len(stories) < 4:
        raise UserError(f"{len(stories)} held-out stories are too few to halve; give at least 4, better hundreds")
    return list(stories[::2]), list(stories[1::2])


def make_reference(train: Sequence[str], measured: Sequence[str], source: dict[str, dict[str, Any]]) -> Reference:
    """Returns the reference: articles counted on `train`, the faults of real stories measured on `measured`.

    Raises `UserError` where there is nothing to measure.
    """
    articles = count_articles(split_sentences(normalise(story), finished=True) for story in train)
    reference = Reference(source, articles, real_faults_per_100_words=0.0)
    scores = score_stories(measured, finished=[True] * len(measured), reference=reference)
    if math.isnan(scores.articles + scores.faults_per_100_words):
        raise UserError("the held-out stories leave a score undefined; give more, or English ones")
    return dataclasses.replace(reference, real_faults_per_100_words=scores.faults_per_100_words)


def score_spoiled(stories: Sequence[str], reference: Reference) -> list[Spoiled]:
    """Returns the scores of the stories spoiled in every way at each of the `RATES`, in that order."""
    table = []
    for way in SPOILERS:
        for rate in RATES:
            texts = [spoil(story, way, rate, seed=seed) for seed, story in enumerate(stories)]
            scores = score_stories(texts, finished=[True] * len(texts), reference=reference)
            table.append(Spoiled(way, rate, scores))
    return table


def spoil(text: str, way: str, rate: float, *, seed: int) -> str:
    """Returns the text spoiled in one of the `SPOILERS` at `rate` of its opportunities.

    With one seed, whatever is spoiled at a lower rate is spoiled at a higher one as well.
    """
    rng = random.Random(seed)
    text = normalise(text)
    edits = [edit for edit in SPOILERS[way](text, list(WORD.finditer(text))) if rng.random() < rate]
    pieces, position, begins = [], 0, False
    for start, end, replacement in [*edits, (len(text), len(text), "")]:
        kept = text[position:start]
        if kept and begins:
            kept, begins = kept[0].upper() + kept[1:], False
        pieces += (kept, replacement)
        # A word is left out at the beginning of a sentence: the next that stays begins it.
        begins = begins or (not replacement and start < end and _begins(text, start))
        position = end
    return "".join(pieces)


def format_table(real: TextScores, table: Sequence[Spoiled]) -> str:
    """Returns the calibration as a Markdown table, a row per spoiled text."""
    lines = [
        "| text | rate | grammar | 95 % | clean sentences | articles | 95 % | faults per 100 words |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, rate, scores in [("real stories", 0.0, real), *((row.way, row.rate, row.scores) for row in table)]:
        grammar, articles = scores.grammar_interval, scores.articles_interval
        lines.append(
            f"| {way} | {rate:.0%} | {scores.grammar:.2f} | {grammar.low:.2f} to {grammar.high:.2f} "
            f"| {scores.clean_sentences:.2f} | {scores.articles:.3f} | {articles.low:.3f} to {articles.high:.3f} "
            f"| {scores.faults_per_100_words:.2f} |"
        )
    return "\n".join(lines)


def _drop_articles(text: str, words: list[re.Match[str]]) -> Iterator[Edit]:
    return _drop(text, words, ARTICLES)


def _delete_small_words(text: str, words: list[re.Match[str]]) -> Iterator[Edit]:
    return _drop(text, words, _SMALL_WORDS)


def _drop(text: str, words: list[re.Match[str]], unwanted: frozenset[str]) -> Iterator[Edit]:
    for word, after in itertools.pairwise(words):
        if word[0].lower() in unwanted and text[word.end() : after.start()] == " ":
            yield word.start(), after.start(), ""


def _break_agreement(text: str, words: list[re.Match[str]]) -> Iterator[Edit]:
    for word in words:
        if other := _OTHER_NUMBER.get(word[0].lower()):
            yield *word.span(), other.capitalize() if word[0][0].isupper() else other


def _swap_words(text: str, words: list[re.Match[str]]) -> Iterator[Edit]:
    for first, second in zip(words[::2], words[1::2], strict=False):
        if text[first.end() : second.start()] == " ":
            swapped = f"{second[0]} {first[0]}"
            begins = _begins(text, first.start())
            yield first.start(), second.end(), swapped[0].upper() + swapped[1:] if begins else swapped


def _double_words(text: str, words: list[re.Match[str]]) -> Iterator[Edit]:
    for word in words:
        yield word.end(), word.end(), f" {word[0]}"


def _begins(text: str, start: int) -> bool:
    """Returns whether the word there begins a sentence, which keeps its capital letter when it is spoiled."""
    before = text[max(0, start - 5) : start].rstrip(" \n\"'")
    return text[start].isupper() and (before == "" or before[-1] in ".!?")


SPOILERS: dict[str, Callable[[str, list[re.Match[str]]], Iterator[Edit]]] = {
    "articles dropped": _drop_articles,
    "agreement broken": _break_agreement,
    "words swapped": _swap_words,
    "words doubled": _double_words,
    "small words deleted": _delete_small_words,
}
