"""Articles (a, an, the) where English needs them: counted on reference stories, looked for in written ones.

Between two words of a story lies a gap, which holds an article or not. The words around it tell how likely it is to
hold one: always in "there was [a] girl", never in "her [] dog". A gap *needs* an article when that probability, counted
on reference stories, is at least 0.8. What is reported is the share of needed gaps that are filled.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.sentences import WORD

ARTICLES = frozenset(("a", "an", "the"))
NEEDED = 0.8  # a gap of at least this probability needs an article
UNLIKELY = 0.01  # an article in a gap below this probability has no business there

_MARK = "."  # stands for the end of a sentence, and for the beginning
_TOKEN = re.compile(rf"{WORD.pattern}|[.!?…]+")
# Gaps that the probability of the shorter contexts counts for, beside those counted in a longer one.
_PRIOR_GAPS = 3.0
# A context met once says little, and contexts met once are more than half of all.
_MIN_COUNT = 2

Counts = Mapping[str, Sequence[int]]  # context -> gaps, gaps with an article


class Gap(NamedTuple):
    """The place before the word at `sentence[start:end]`; at the edges, `previous` and `after` are the mark "."."""

    previous: str
    word: str
    after: str
    has_article: bool
    start: int
    end: int


@dataclass(frozen=True)
class ArticleReference:
    """How often an article stood in which context of the reference stories; a context of two words has a space."""

    num_stories: int
    num_gaps: int
    num_articles: int
    previous: Counts
    word: Counts
    previous_word: Counts
    word_after: Counts

    def probability(self, gap: Gap) -> float:
        """Returns P(article | previous word, next word, next but one).

        The pairs around the gap, (previous, next) and (next, next but one), are combined as if they were independent
        given the word they share; each backs off to its words alone. Counts of all three words would add nothing.
        """
        base = self.num_articles / self.num_gaps
        word = _mix(self.word.get(gap.word), base)
        previous = _mix(self.previous.get(gap.previous), base)
        before = _sigmoid(_logit(word) + _logit(previous) - _logit(base))
        before = _mix(self.previous_word.get(f"{gap.previous} {gap.word}"), before)
        after = _mix(self.word_after.get(f"{gap.word} {gap.after}"), word)
        return _sigmoid(_logit(before) + _logit(after) - _logit(word))


@dataclass(frozen=True)
class ArticleCounts:
    """Counts per story, float64 (num_stories,): sums and ratios of any subset of the stories can be taken."""

    words: np.ndarray  # articles included
    needed: np.ndarray  # gaps that need an article
    filled: np.ndarray  # of these, with one
    articles: np.ndarray  # gaps with one
    expected: np.ndarray  # articles that the reference would have put into the same gaps
    unlikely: np.ndarray  # articles in gaps where the reference has next to none


def count_articles(stories: Iterable[Sequence[str]]) -> ArticleReference:
    """Returns the reference counted on stories, each given as its sentences.

    Raises `UserError` where they hold no article, or nothing but articles.
    """
    contexts = ("previous", "word", "previous_word", "word_after")
    gaps: dict[str, Counter[str]] = {name: Counter() for name in contexts}
    filled: dict[str, Counter[str]] = {name: Counter() for name in contexts}
    num_stories = num_gaps = num_articles = 0
    for sentences in stories:
        num_stories += 1
        for gap in (gap for sentence in sentences for gap in find_gaps(sentence)):
            num_gaps += 1
            num_articles += gap.has_article
            pairs = (gap.previous, gap.word, f"{gap.previous} {gap.word}", f"{gap.word} {gap.after}")
            for name, context in zip(contexts, pairs, strict=True):
                gaps[name][context] += 1
                filled[name][context] += gap.has_article
    if not 0 < num_articles < num_gaps:
        raise UserError(
            f"{num_stories} stories hold {num_articles} articles in {num_gaps} places for one, which is no reference; "
            "give English stories"
        )
    kept = {
        name: {key: (count, filled[name][key]) for key, count in sorted(gaps[name].items()) if count >= _MIN_COUNT}
        for name in contexts
    }
    return ArticleReference(num_stories, num_gaps, num_articles, **kept)


def find_gaps(sentence: str) -> Iterator[Gap]:
    """Yields the gap before each word of a normalised sentence that is no article."""
    words: list[tuple[str, bool, int, int]] = []
    has_article = False
    for token in _TOKEN.finditer(sentence):
        word = token[0].lower() if WORD.match(token[0]) else _MARK
        if word not in ARTICLES:
            words.append((word, has_article, *token.span()))
        has_article = word in ARTICLES
    previous = _MARK
    for index, (word, has_article, start, end) in enumerate(words):
        if word != _MARK:
            after = words[index + 1][0] if index + 1 < len(words) else _MARK
            yield Gap(previous, word, after, has_article, start, end)
        previous = word


def find_absent(sentence: str, reference: ArticleReference) -> list[tuple[int, int]]:
    """Returns the [start, end) of each word of the sentence before which an article is needed and absent."""
    return [
        (gap.start, gap.end)
        for gap in find_gaps(sentence)
        if not gap.has_article and reference.probability(gap) >= NEEDED
    ]


def score_articles(stories: Sequence[Sequence[str]], reference: ArticleReference) -> ArticleCounts:
    """Returns the counts of each story; a story is the list of its sentences, as `split_sentences` gives them."""
    counts = np.zeros((len(stories), len(fields(ArticleCounts))))
    for row, sentences in enumerate(stories):
        counts[row, 0] = sum(len(WORD.findall(sentence)) for sentence in sentences)
        for gap in (gap for sentence in sentences for gap in find_gaps(sentence)):
            likely, article = reference.probability(gap), gap.has_article
            needed, unlikely = likely >= NEEDED, likely < UNLIKELY
            counts[row, 1:] += (needed, needed and article, article, likely, unlikely and article)
    return ArticleCounts(*counts.T)


def _mix(counts: Sequence[int] | None, prior: float) -> float:
    """Returns the share of gaps with an article, drawn towards `prior` the more, the fewer gaps there were."""
    if counts is None:
        return prior
    gaps, filled = counts
    return (filled + _PRIOR_GAPS * prior) / (gaps + _PRIOR_GAPS)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(logit: float) -> float:
    # Within what a float tells from 0 and 1, so that it can be turned back.
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))
