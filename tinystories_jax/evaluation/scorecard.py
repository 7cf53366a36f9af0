"""What was measured of a model or of stories, as rows of a table, as criteria of success, and as figures by name."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tinystories_jax.evaluation.copies import NEAR_COPY, SEED_LENGTH, CopyScores
from tinystories_jax.evaluation.grammar import TextScores, real_scores
from tinystories_jax.evaluation.judge import MARKS, JudgeScores
from tinystories_jax.evaluation.results import Criterion, Score, format_figure, format_interval
from tinystories_jax.evaluation.validation import ValidationScores

LOSS_BELOW = 2.0
GRAMMAR_AT_LEAST = 8.0
# Scores can be won by what is no story. Too little text, or none but the prompts: nothing is decided.
STORIES_AT_LEAST = 50
WORDS_PER_STORY_AT_LEAST = 50  # a third of real stories
# Articles everywhere fill every gap that needs one; junk has neither. Times the ratio of real stories, either way:
# "the" before 15 common names makes 1.2.
ARTICLES_RATIO = 1.1
# One faultless sentence over and over. Real stories repeat .01 of their 4-grams.
REPETITION_AT_MOST = 0.05
# One faultless story over and over. Times the distinct words of real stories.
DISTINCT_AT_LEAST = 0.5
# Of the recipe's vocabulary, which the bound of the loss is for; and how far from it a loss per token still compares.
_BYTES_PER_TOKEN, _BYTES_PER_TOKEN_RATIO = 4.1, 1.1

_TEXT_ROWS = (
    ("grammar", "of 10", "grammar"),
    ("sentences without a fault", "of 10", "clean_sentences"),
    ("faults per 100 words", "faults", "faults_per_100_words"),
    ("articles where one is needed", "share", "articles"),
    ("articles per 100 words", "articles", "articles_per_100_words"),
    ("articles, actual to expected", "ratio", "articles_actual_to_expected"),
    ("articles where none belongs", "share of all", "articles_unlikely"),
    ("repeated 4-grams, within a story", "share", "repetition"),
    ("distinct words of the first 20,000", "share", "distinct_1"),
    ("distinct pairs of words, likewise", "share", "distinct_2"),
    ("words per story", "words", "words_per_story"),
    ("stories with an end token", "share", "finished"),
)


@dataclass(frozen=True)
class Measured:
    """The parts of an evaluation; None is not measured.

    loss_on: the text that the loss was measured on, or why it was not. real_copies: those of validation stories.
    temperature: of the writing, None where nobody knows.
    """

    text: TextScores
    loss: ValidationScores | None
    loss_on: str
    copies: CopyScores | None = None
    real_copies: CopyScores | None = None
    judge: JudgeScores | None = None
    temperature: float | None = None


def list_scores(measured: Measured) -> tuple[Score, ...]:
    """Returns the rows of the table."""
    return (
        *_loss_rows(measured.loss),
        *_text_rows(measured.text),
        *_copy_rows(measured.copies, measured.real_copies),
        *_judge_rows(measured.judge),
    )


def list_figures(measured: Measured) -> dict[str, Any]:
    """Returns every figure by name."""
    loss, copies, real, judge = measured.loss, measured.copies, measured.real_copies, measured.judge
    return {
        "loss": loss and loss.loss,
        "perplexity": loss and loss.perplexity,
        "bits_per_byte": loss and loss.bits_per_byte,
        "loss_on": loss and measured.loss_on,
        "num_loss_tokens": loss and loss.num_tokens,
        "article_targets": loss and {name: asdict(scores) for name, scores in _article_targets(loss).items()},
        **asdict(measured.text),
        "copies": copies and asdict(copies),
        "real_copies": real and asdict(real),
        "judge": judge and asdict(judge),
    }


def list_criteria(measured: Measured) -> tuple[Criterion, ...]:
    """Returns the recipe's criteria of success, each with the figures that decide it.

    The figures themselves decide, not their intervals, which would let fewer stories pass with worse figures.
    """
    return _loss_criterion(measured), _articles_criterion(measured), _grammar_criterion(measured)


def _loss_criterion(measured: Measured) -> Criterion:
    loss, name = measured.loss, f"validation loss < {LOSS_BELOW}"
    if loss is None:
        return Criterion(name, None, measured.loss_on)
    figure = f"{format_figure(loss.loss)} nats per token, on {measured.loss_on}"
    bytes_per_token = loss.loss / (math.log(2) * loss.bits_per_byte)
    if max(bytes_per_token / _BYTES_PER_TOKEN, _BYTES_PER_TOKEN / bytes_per_token) > _BYTES_PER_TOKEN_RATIO:
        figure += (
            f"; at {bytes_per_token:.2f} bytes a token, where the recipe's vocabulary has {_BYTES_PER_TOKEN}: only "
            "bits per byte compare"
        )
        return Criterion(name, None, figure)
    return Criterion(name, loss.loss < LOSS_BELOW, figure)


def _articles_criterion(measured: Measured) -> Criterion:
    text, real = measured.text, real_scores()
    ratio, of_real, low = text.articles_actual_to_expected, real.articles_actual_to_expected, real.articles_interval.low
    between = of_real / ARTICLES_RATIO, of_real * ARTICLES_RATIO
    return Criterion(
        f"articles where needed as in real stories, at least {format_figure(low)}, and not everywhere, actual to "
        f"expected {format_interval(between)}",
        _decide(measured, (text.articles, ratio), text.articles >= low and between[0] <= ratio <= between[1]),
        f"{_with_interval(text.articles, text.articles_interval)}; actual to expected {format_figure(ratio)}"
        + _doubt(measured),
    )


def _grammar_criterion(measured: Measured) -> Criterion:
    text = measured.text
    distinct = DISTINCT_AT_LEAST * real_scores().distinct_1
    varied = text.repetition <= REPETITION_AT_MOST and text.distinct_1 >= distinct
    return Criterion(
        f"grammar at least {GRAMMAR_AT_LEAST:g} of 10, with at most {REPETITION_AT_MOST:g} of the 4-grams repeated "
        f"and at least {format_figure(distinct)} of the words distinct",
        _decide(
            measured, (text.grammar, text.repetition, text.distinct_1), text.grammar >= GRAMMAR_AT_LEAST and varied
        ),
        f"{_with_interval(text.grammar, text.grammar_interval)}; {format_figure(text.repetition)} repeated, "
        f"{format_figure(text.distinct_1)} distinct" + _doubt(measured),
    )


def _decide(measured: Measured, figures: tuple[float, ...], passed: bool) -> bool | None:
    return None if _too_little(measured.text) or any(map(math.isnan, figures)) else passed


def _too_little(text: TextScores) -> str:
    if text.num_stories < STORIES_AT_LEAST:
        return f"too few stories: {text.num_stories}, a verdict takes {STORIES_AT_LEAST}"
    if not text.words_per_story >= WORDS_PER_STORY_AT_LEAST:
        return f"too short stories: {text.words_per_story:.0f} words, a verdict takes {WORDS_PER_STORY_AT_LEAST}"
    return ""


def _doubt(measured: Measured) -> str:
    """Returns what keeps the figure from being that of a model's own stories, to stand behind it."""
    little, temperature = _too_little(measured.text), measured.temperature
    tame = "" if temperature in (None, 1) else f"at temperature {temperature:g}, where 1 has the scale of real stories"
    return "".join(f"; {doubt}" for doubt in (little, tame) if doubt)


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    if math.isnan(value):
        return "not measured"
    between = format_interval(interval)
    return f"{format_figure(value)} ({between or 'too few stories for an interval'})"


def _loss_rows(loss: ValidationScores | None) -> Iterator[Score]:
    if loss is None:
        return
    yield Score("loss", "nats per token", loss.loss)
    yield Score("perplexity", "per token", loss.perplexity)
    yield Score("bits per byte", "bits", loss.bits_per_byte)
    for name, scores in _article_targets(loss).items():
        where = "at articles" if name == "all" else f'at "{name}"'
        yield Score(f"loss {where}", "nats per token", scores.loss)
        yield Score(f"probability {where}", "mean, of the right token", scores.probability)
        yield Score(f"recall {where}", "share, top 1", scores.recall)


def _article_targets(loss: ValidationScores) -> dict[str, Any]:
    return {"all": loss.all_articles, **loss.articles}


def _text_rows(text: TextScores) -> Iterator[Score]:
    real = real_scores()
    for name, unit, field in _TEXT_ROWS:
        value, of_real = ((getattr(s, field), getattr(s, f"{field}_interval", None)) for s in (text, real))
        yield Score(name, unit, *value, *of_real)
    if text.unparsed_sentences is not None:
        yield Score("sentences without a parse", "share", text.unparsed_sentences)


def _copy_rows(copies: CopyScores | None, real: CopyScores | None) -> Iterator[Score]:
    if copies is None:
        return
    unit = f"tokens (0: under {SEED_LENGTH})"
    yield Score(
        f"stories with over {NEAR_COPY} tokens copied",
        "share",
        copies.near_copies,
        copies.near_copies_interval,
        real and real.near_copies,
        real and real.near_copies_interval,
    )
    yield Score("longest copied run, median story", unit, copies.median, None, real and real.median)
    yield Score("longest copied run of all", unit, copies.longest, None, real and real.longest)


def _judge_rows(judge: JudgeScores | None) -> Iterator[Score]:
    if judge is not None:
        for mark in MARKS:
            yield Score(f"{mark}, judged by {judge.model}", "of 10", judge.marks[mark], judge.intervals[mark])
