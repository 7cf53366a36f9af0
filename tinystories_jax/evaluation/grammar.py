"""Scores of written text: articles, grammar out of 10, repetition, variety, length. No model, no network.

The end of the way from story to story: what a model wrote comes back here as plain text. Each figure is defined, with
what it cannot see, in docs/evaluation.md; held-out real stories are the scale (`real_scores`).
"""

import dataclasses
import functools
import gzip
import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.articles import NEEDED, UNLIKELY, ArticleReference, find_absent, score_articles
from tinystories_jax.evaluation.bootstrap import Interval, interval_of, resample
from tinystories_jax.evaluation.checker import CHECKER, find_faults, load_checker
from tinystories_jax.evaluation.link_grammar import count_unparsed
from tinystories_jax.evaluation.sentences import normalise, split_sentences, split_words

# Faults per 100 words, beyond those of real stories, that divide the grammar score by e (docs/evaluation.md).
GRAMMAR_SCALE = 2.0

_SHIPPED = importlib.resources.files("tinystories_jax.evaluation") / "reference.json.gz"
_DISTINCT_WORDS = 20_000


@dataclass(frozen=True)
class TextScores:
    """Figures of a set of stories, pooled; a share is 0 to 1, and nan where there is nothing to take a share of.

    What a limit on the length cut off counts for `words_per_story`, `repetition` and the distinct n-grams only. The
    figures of grammar are nan where grammar was not asked for.
    """

    num_stories: int
    num_words: int  # in sentences that were finished
    grammar: float  # 0 to 10
    grammar_interval: Interval
    clean_sentences: float  # 0 to 10: 10 x share of sentences without a fault
    clean_sentences_interval: Interval
    faults_per_100_words: float  # absent articles included
    faults_per_100_words_interval: Interval
    articles: float  # share of the gaps that need an article and have one
    articles_interval: Interval
    articles_per_100_words: float
    articles_per_100_words_interval: Interval
    articles_actual_to_expected: float
    articles_actual_to_expected_interval: Interval
    articles_unlikely: float  # share of articles where the reference has next to none
    articles_unlikely_interval: Interval
    repetition: float  # share of 4-grams that stood earlier in the same story
    repetition_interval: Interval
    words_per_story: float
    words_per_story_interval: Interval
    distinct_1: float  # share of different words among the first 20,000 of all stories
    distinct_2: float  # likewise of pairs
    finished: float | None  # share of stories that their author ended; None is unknown
    finished_interval: Interval | None
    unparsed_sentences: float | None  # share, by link-grammar; None if not asked for
    unparsed_skipped: int | None  # sentences too long for it


@dataclass(frozen=True)
class Reference:
    """What scores are measured by: counts on real stories, no text of them.

    `source` tells which: names of files, number of stories and SHA-256 of those that articles were counted on, and of
    the held-out ones, on half of which `real_faults_per_100_words` was measured.
    """

    source: dict[str, dict[str, Any]]
    articles: ArticleReference
    real_faults_per_100_words: float


def score_stories(
    texts: Sequence[str],
    *,
    finished: Sequence[bool] | None = None,
    reference: Reference | None = None,
    check_grammar: bool = True,
    parse_sentences: bool = False,
) -> TextScores:
    """Returns the scores of stories, by the shipped reference unless another is given; the same on every machine.

    `finished` tells of each story whether its author ended it, as a model does with the end token. `check_grammar`
    needs the package of `checker.py`, `parse_sentences` the library of `link_grammar.py`: `UserError` where it is
    missing.
    """
    reference = reference or shipped_reference()
    normal = [normalise(text) for text in texts]
    ends = [False] * len(texts) if finished is None else finished
    stories = [split_sentences(text, finished=end) for text, end in zip(normal, ends, strict=True)]
    words = [split_words(text) for text in normal]
    counts = _count_faults_and_articles(stories, reference, check_grammar=check_grammar) | _count_words(words)
    if finished is not None:
        counts["finished"] = np.array(finished, np.float64)
    parse = count_unparsed([sentence for story in stories for sentence in story]) if parse_sentences else None
    return TextScores(
        **{
            "num_stories": len(texts),
            "num_words": int(counts["words"].sum()),
            "finished": None,
            "finished_interval": None,
            **_pool(counts, reference.real_faults_per_100_words),
            **_distinct_ngrams(words),
            "unparsed_sentences": None if parse is None else float(_share(parse.unparsed, parse.tried)),
            "unparsed_skipped": None if parse is None else parse.skipped,
        }
    )


def count_faults(stories: Sequence[Sequence[str]], articles: ArticleReference) -> np.ndarray:
    """Returns float64 (3, num_stories): sentences, sentences without a fault, and faults, absent articles included.

    A story is the list of its sentences. Faults that overlap are one: an absent article that the checker reports as
    well is absent once.
    """
    load_checker()
    counts = np.zeros((len(stories), 3))
    for row, sentences in enumerate(stories):
        for sentence in sentences:
            faults = _count_apart([*find_faults(sentence), *find_absent(sentence, articles)])
            counts[row] += (1, faults == 0, faults)
    return counts.T


def shipped_reference() -> Reference:
    """Returns the reference that comes with the package, counted on TinyStories."""
    return _read_shipped()[0]


def real_scores() -> TextScores:
    """Returns the scores of held-out real stories: the scale for all others."""
    return _read_shipped()[1]


def read_reference(path: Path) -> tuple[Reference, TextScores]:
    """Returns what `write_reference` wrote."""
    values = json.loads(gzip.decompress(path.read_bytes()))
    real: dict[str, Any] = values["real"]
    real |= {name: Interval(*value) for name, value in real.items() if isinstance(value, list)}
    articles = ArticleReference(**values["articles"])
    return Reference(values["source"], articles, values["real_faults_per_100_words"]), TextScores(**real)


def write_reference(reference: Reference, real: TextScores, path: Path) -> None:
    """Writes the reference and the scores of held-out real stories: the same ones give the same bytes."""
    values = {
        "thresholds": {"needed": NEEDED, "unlikely": UNLIKELY, "grammar_scale": GRAMMAR_SCALE},
        "checker": CHECKER,
        "source": reference.source,
        "real_faults_per_100_words": reference.real_faults_per_100_words,
        "real": dataclasses.asdict(real),
        "articles": vars(reference.articles),
    }
    try:
        text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise UserError("the held-out stories leave a score undefined; give more, or English ones") from error
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


@functools.cache
def _read_shipped() -> tuple[Reference, TextScores]:
    with importlib.resources.as_file(_SHIPPED) as path:
        return read_reference(path)


def _count_faults_and_articles(
    stories: list[list[str]], reference: Reference, *, check_grammar: bool
) -> dict[str, np.ndarray]:
    faults = count_faults(stories, reference.articles) if check_grammar else np.full((3, len(stories)), math.nan)
    counts = dataclasses.asdict(score_articles(stories, reference.articles))
    return counts | dict(zip(("sentences", "clean", "faults"), faults, strict=True))


def _count_words(stories: list[list[str]]) -> dict[str, np.ndarray]:
    """Returns the counts of each story for which it need not have been finished."""
    four_grams = [_ngrams([words], 4) for words in stories]
    return {
        "stories": np.ones(len(stories)),
        "all_words": np.array([len(words) for words in stories], np.float64),
        "four_grams": np.array([len(grams) for grams in four_grams], np.float64),
        "repeated": np.array([len(grams) - len(set(grams)) for grams in four_grams], np.float64),
    }


def _pool(counts: dict[str, np.ndarray], real_faults: float) -> dict[str, Any]:
    """Returns the figures that are ratios of sums over the stories, each with its interval."""
    figures = _figures({name: count.sum() for name, count in counts.items()}, real_faults)
    draws = _figures(resample(counts), real_faults)
    scores: dict[str, Any] = {name: float(figure) for name, figure in figures.items()}
    return scores | {f"{name}_interval": interval_of(draw) for name, draw in draws.items()}


def _figures(sums: dict[str, np.ndarray], real_faults: float) -> dict[str, np.ndarray]:
    """Returns the figures, from sums over the stories, or from arrays of such sums."""
    faults = 100 * _share(sums["faults"], sums["words"])
    figures = {
        "grammar": 10 * np.exp(-np.maximum(0, faults - real_faults) / GRAMMAR_SCALE),
        "clean_sentences": 10 * _share(sums["clean"], sums["sentences"]),
        "faults_per_100_words": faults,
        "articles": _share(sums["filled"], sums["needed"]),
        "articles_per_100_words": 100 * _share(sums["articles"], sums["words"]),
        "articles_actual_to_expected": _share(sums["articles"], sums["expected"]),
        "articles_unlikely": _share(sums["unlikely"], sums["articles"]),
        "repetition": _share(sums["repeated"], sums["four_grams"]),
        "words_per_story": _share(sums["all_words"], sums["stories"]),
    }
    return figures | ({"finished": _share(sums["finished"], sums["stories"])} if "finished" in sums else {})


def _distinct_ngrams(stories: list[list[str]]) -> dict[str, float]:
    """Returns the shares of different words and pairs, for as much text of every author."""
    num_words = 0
    first = []
    for words in stories:
        first.append(words[: _DISTINCT_WORDS - num_words])
        num_words += len(first[-1])
    ones, pairs = _ngrams(first, 1), _ngrams(first, 2)
    return {
        "distinct_1": float(_share(len(set(ones)), len(ones))),
        "distinct_2": float(_share(len(set(pairs)), len(pairs))),
    }


def _ngrams(stories: list[list[str]], n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams of all stories; none reaches from one story into the next."""
    return [gram for words in stories for gram in zip(*(words[start:] for start in range(n)), strict=False)]


def _count_apart(spans: list[tuple[int, int]]) -> int:
    """Returns how many [start, end) there are when those that overlap are one."""
    count = reached = 0
    for start, end in sorted(spans):
        count += start >= reached
        reached = max(reached, end)
    return count


def _share(part: Any, whole: Any) -> Any:
    """Returns part / whole, elementwise for arrays; nan where there is no whole."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(whole, 0), math.nan, np.divide(part, whole))
