"""What an evaluation found: figures beside those of real stories, criteria of success, and how they are written."""

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinystories_jax.data.folders import replace_file
from tinystories_jax.evaluation.bootstrap import Interval
from tinystories_jax.tables import columns, markdown_table, markdown_text

_NONE = "–"
_NUM_EXAMPLES = 3
_LINE_WIDTH = 100
_COLUMNS = ("score", "unit", "value", "95 % interval", "real stories", "95 % interval")


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval, and the same figure of held-out real stories; None is unknown."""

    name: str
    unit: str
    value: float | None
    interval: tuple[float, float] | None = None
    real: float | None = None
    real_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Criterion:
    """One of the recipe's criteria of success, and the figure that decided it; None is unknown."""

    name: str
    passed: bool | None
    figure: str

    @property
    def verdict(self) -> str:
        return "unknown" if self.passed is None else "PASS" if self.passed else "FAIL"


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model, or of any stories.

    title: what was scored, in one line. figures: everything measured, by name, as JSON can hold it but for nan.
    notes: how it was measured, and what could not be. stories: those that the model wrote, unedited, each with
    "prompt", "text" and "finished".
    """

    title: str
    figures: dict[str, Any]
    scores: tuple[Score, ...]
    criteria: tuple[Criterion, ...]
    notes: tuple[str, ...]
    stories: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what evaluation.json holds; nan becomes None."""
        lists = {name: list(map(asdict, getattr(self, name))) for name in ("scores", "criteria")}
        return _without_nan({"title": self.title, **self.figures, **lists, "notes": self.notes})


def format_text(evaluation: Evaluation) -> str:
    """Returns the evaluation for a terminal; the criteria come last."""
    table = columns([_COLUMNS, *map(_cells, evaluation.scores)])
    criteria = [_format_criterion(criterion) for criterion in evaluation.criteria]
    return "\n".join([evaluation.title, "", *table, "", *evaluation.notes, "", *criteria])


def format_markdown(evaluation: Evaluation) -> str:
    """Returns the evaluation as a Markdown page."""
    criteria = [(item.name, item.figure, item.verdict) for item in evaluation.criteria]
    parts = [
        f"# {markdown_text(evaluation.title)}",
        markdown_table(("criterion", "figure", "verdict"), criteria),
        markdown_table(_COLUMNS, [_cells(score) for score in evaluation.scores]),
        "\n".join(f"- {markdown_text(note)}" for note in evaluation.notes),
    ]
    if evaluation.stories:
        parts += ["## Stories", "The first ones, unedited."]
        # As blocks of code: a story is no Markdown.
        examples = [story["text"] for story in evaluation.stories[:_NUM_EXAMPLES]]
        parts += ["\n".join(f"    {line}" for line in text.splitlines()) for text in examples]
    return "\n\n".join(parts) + "\n"


def write_evaluation(evaluation: Evaluation, run: Path) -> None:
    """Writes evaluation.json, evaluation.md and evaluation_stories.jsonl into `run`, each at once or not at all."""
    # Whatever stands in a run under these names is replaced: a link there must not lead the writing elsewhere.
    replace_file(run / "evaluation.json", _to_json(evaluation))
    replace_file(run / "evaluation.md", _encode(format_markdown(evaluation)))
    lines = [json.dumps(story, ensure_ascii=False) for story in evaluation.stories]
    replace_file(run / "evaluation_stories.jsonl", _encode("".join(f"{line}\n" for line in lines)))


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Writes what evaluation.json holds to `path`: a file at once or not at all, a pipe or /dev/stdout as it is."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(_to_json(evaluation))
    else:
        replace_file(path, _to_json(evaluation))


def format_figure(value: float | None) -> str:
    """Returns a count as it is, another figure with four significant digits, and a dash where there is none."""
    if value is None or math.isnan(value):
        return _NONE
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def format_interval(interval: tuple[float, float] | None) -> str:
    """Returns "low to high", and nothing where there is no interval."""
    if interval is None or math.isnan(interval[0]):
        return ""
    return f"{format_figure(interval[0])} to {format_figure(interval[1])}"


def _cells(score: Score) -> tuple[str, ...]:
    of_real = format_figure(score.real), format_interval(score.real_interval)
    return score.name, score.unit, format_figure(score.value), format_interval(score.interval), *of_real


def _format_criterion(criterion: Criterion) -> str:
    text, indent = f"{criterion.verdict:<9}{criterion.name}: {criterion.figure}", " " * 9
    # The name of a file is not cut.
    return textwrap.fill(text, _LINE_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_without_nan(item) for item in value]
        return None if isinstance(value, Interval) and None in items else items
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_json(evaluation: Evaluation) -> bytes:
    return _encode(json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _encode(text: str) -> bytes:
    # A story may hold half of a character, which UTF-8 cannot.
    return text.encode("utf-8", errors="replace")
