"""What was measured of a model or of stories, as rows of a table, as criteria of success, and as figures by name."""

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
# A model taught to write articles everywhere fills every gap that needs one. "the" before 15 common names makes the
# ratio of actual to expected articles 1.2 times that of real stories.
ARTICLES_RATIO_AT_MOST = 1.1  # times that of real stories

_TEXT_ROWS = (
    ("grammar", "of 10", "grammar"),
    ("sentences without a fault", "of 10", "clean_sentences"),
    ("faults per 100 words", "faults", "faults_per_100_words"),
    ("articles where one is needed", "share", "articles"),
    ("articles per 100 words", "articles", "articles_per_100_words"),
    ("articles, actual to expected", "ratio", "articles_actual_to_expected"),
    ("articles where none belongs", "share of them", "articles_unlikely"),
    ("4-grams met before in the story", "share", "repetition"),
    ("distinct words of 20,000", "share", "distinct_1"),
    ("distinct pairs of words, likewise", "share", "distinct_2"),
    ("words per story", "words", "words_per_story"),
    ("stories ended by their author", "share", "finished"),
)


@dataclass(frozen=True)
class Measured:
    """The parts of an evaluation; None is not measured.

    loss_on: the text that the loss was measured on, or why it was not. real_copies: those of validation stories.
    """

    text: TextScores
    loss: ValidationScores | None
    loss_on: str
    copies: CopyScores | None = None
    real_copies: CopyScores | None = None
    judge: JudgeScores | None = None


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
    """Returns the recipe's criteria of success, each with the figure that decides it.

    The figure itself decides, not its interval: too few stories must not help.
    """
    text, loss, real = measured.text, measured.loss, real_scores()
    articles_at_least = real.articles_interval.low
    ratio, ratio_at_most = text.articles_actual_to_expected, ARTICLES_RATIO_AT_MOST * real.articles_actual_to_expected
    there, not_everywhere = _compare(text.articles, articles_at_least), _compare(ratio_at_most, ratio)
    return (
        Criterion(
            f"validation loss < {LOSS_BELOW}",
            None if loss is None else loss.loss < LOSS_BELOW,
            measured.loss_on if loss is None else f"{format_figure(loss.loss)} nats per token, on {measured.loss_on}",
        ),
        Criterion(
            f"articles where needed as in real stories, at least {format_figure(articles_at_least)}, "
            f"and not everywhere, actual to expected at most {format_figure(ratio_at_most)}",
            None if there is None or not_everywhere is None else there and not_everywhere,
            f"{_with_interval(text.articles, text.articles_interval)}; actual to expected {format_figure(ratio)}",
        ),
        Criterion(
            f"grammar at least {GRAMMAR_AT_LEAST:g} of 10",
            _compare(text.grammar, GRAMMAR_AT_LEAST),
            _with_interval(text.grammar, text.grammar_interval),
        ),
    )


def _compare(value: float, at_least: float) -> bool | None:
    return None if value != value or at_least != at_least else value >= at_least


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    if value != value:
        return "not measured"
    between = format_interval(interval)
    return f"{format_figure(value)} ({between or 'one story has no interval'})"


def _loss_rows(loss: ValidationScores | None) -> Iterator[Score]:
    if loss is None:
        return
    yield Score("loss", "nats per token", loss.loss)
    yield Score("perplexity", "per token", loss.perplexity)
    yield Score("bits per byte", "bits", loss.bits_per_byte)
    for name, scores in _article_targets(loss).items():
        where = "at articles" if name == "all" else f'at "{name}"'
        yield Score(f"loss {where}", "nats per token", scores.loss)
        yield Score(f"probability {where}", "mean of the right", scores.probability)
        yield Score(f"recall {where}", "share at 1", scores.recall)


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
