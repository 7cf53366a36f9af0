"""What a comparison puts side by side: one figure per run each, and how to write it."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from tinystories_jax.analysis.plots import compact
from tinystories_jax.analysis.run_files import Interval, RunFiles, number
from tinystories_jax.analysis.sides import bytes_per_token
from tinystories_jax.evaluation.results import Score
from tinystories_jax.model.transformer import num_params
from tinystories_jax.training.flops import flops_per_token


@dataclass(frozen=True)
class Measure:
    """`value` of a run is None where the run does not tell. `judged`: a measure of quality, whose differences are held
    against the noise. `per_token`: means nothing between two tokenizers. `by_evaluation`: of stories that
    evaluate.py had the run write."""

    name: str
    value: Callable[[RunFiles], float | None]
    write: Callable[[float], str]
    judged: bool = False
    per_token: bool = False
    by_evaluation: bool = False
    interval: Callable[[RunFiles], Interval | None] = lambda run: None

    def write_difference(self, value: float) -> str:
        if self.write is _share:
            return f"{100 * value:+.1f} points"
        return f"{value:+.4f}" if self.write is _loss else f"{value:+.2f}"


def training_flops_per_token(run: RunFiles) -> float:
    """Returns the FLOPs of training on one token, from the shapes alone: no device is started."""
    return flops_per_token(run.config.model, run.config.data.sequence_length)


def _num_embedding_params(run: RunFiles) -> float:
    model = run.config.model
    return model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)


def _bytes_seen(run: RunFiles) -> float | None:
    tokens, each = run.last("tokens"), bytes_per_token(run)
    return None if tokens is None or each is None else tokens * each


def _flops(run: RunFiles) -> float | None:
    tokens = run.last("tokens")
    return None if tokens is None else tokens * training_flops_per_token(run)


def _speed(run: RunFiles) -> float | None:
    speeds = run.series("update", "train/tokens_per_second")[1]
    return median(speeds) if speeds else None


def _at_best(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: number(run.best, key) if run.best is not None else None


def _last(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.last(key)


def _scored(choose: Callable[[RunFiles], Score | None], form: Callable[[float], str], name: str) -> Measure:
    def value(run: RunFiles) -> float | None:
        score = choose(run)
        return None if score is None else score.value

    def interval(run: RunFiles) -> Interval | None:
        score = choose(run)
        return None if score is None else score.interval

    return Measure(name, value, form, judged=True, by_evaluation=True, interval=interval)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _points(value: float) -> str:
    return f"{value:.2f}"


def _minutes(value: float) -> str:
    return f"{value / 60:,.1f} min"


MEASURES = (
    Measure("vocabulary, tokens", lambda run: run.config.model.vocab_size, _count),
    Measure("parameters in embeddings", _num_embedding_params, _count),
    Measure("other parameters", lambda run: num_params(run.config.model) - _num_embedding_params(run), _count),
    Measure("updates", lambda run: run.rows[-1]["update"] if run.rows else None, _count),
    Measure("tokens seen", _last("tokens"), compact),
    Measure("story bytes seen, about", _bytes_seen, compact),
    Measure("training FLOPs", _flops, compact),
    Measure("wall time", _last("seconds"), _minutes),
    Measure("tokens per second, median", _speed, _count),
    Measure("validation loss, final, nats per token", _last("valid/loss"), _loss, per_token=True),
    Measure("validation loss, best, nats per token", _at_best("valid/loss"), _loss, judged=True, per_token=True),
    Measure("bits per byte, final", _last("valid/bits_per_byte"), _loss),
    Measure("bits per byte, at the best loss", _at_best("valid/bits_per_byte"), _loss, judged=True),
    Measure("recall at articles, at the best loss", _at_best("valid/article_recall"), _share, judged=True),
    Measure("articles in the run's last samples", _last("samples/articles"), _share, judged=True),
    Measure("grammar of the run's last samples, of 10", _last("samples/grammar"), _points, judged=True),
    _scored(lambda run: run.evaluation and run.evaluation.articles, _share, "articles, evaluate.py"),
    _scored(lambda run: run.evaluation and run.evaluation.grammar, _points, "grammar of 10, evaluate.py"),
)
