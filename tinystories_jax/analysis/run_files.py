"""Reads what a run has written so far, at any moment of it and without JAX."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from tinystories_jax.config import Config, Schedule, from_dict
from tinystories_jax.data.folders import parse_json, read_small_file
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.results import Criterion, Score
from tinystories_jax.training.jsonl import read_jsonl
from tinystories_jax.training.run_folder import MAX_JSON_BYTES

Interval = tuple[float, float]

_MOST = 1e30  # no figure of a run is larger; what is was not written by it


@dataclass(frozen=True)
class StoredEvaluation:
    """evaluation.json. `grammar` is out of 10, `articles` the share of needed articles that are there."""

    update: int | None
    num_stories: int | None
    temperature: float | None
    scores: tuple[Score, ...]
    criteria: tuple[Criterion, ...]
    grammar: Score
    articles: Score


@dataclass(frozen=True)
class RunFiles:
    """What stands in `folder`. `problems` says, a line each, what of it is damaged; what is not there yet is none.

    name: that of the folder, after as many of those above it as runs side by side need to be told apart.
    rows: metrics.jsonl. samples: samples.jsonl. starts: environment.json. last_written: when the metrics grew last,
    seconds since 1970, None before.
    """

    folder: Path
    name: str
    config: Config
    tokenizer_sha256: str | None
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: StoredEvaluation | None
    starts: list[dict[str, Any]]
    last_written: float | None
    problems: tuple[str, ...]

    @property
    def schedule(self) -> Schedule:
        assert self.config.schedule is not None
        return self.config.schedule

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with a validation loss."""
        return [row for row in self.rows if number(row, "valid/loss") is not None]

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The row with the best validation loss."""
        return min(self.evaluations, key=lambda row: row["valid/loss"], default=None)

    def series(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Returns the values of two fields in the rows that have both."""
        rows = (row for row in self.rows if x in row and y in row)
        pairs = [(a, b) for row in rows if (a := number(row, x)) is not None and (b := number(row, y)) is not None]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def last(self, key: str) -> float | None:
        """Returns the newest value of a field."""
        return next((value for row in reversed(self.rows) if (value := number(row, key)) is not None), None)

    def samples_of(self, update: int) -> list[dict[str, Any]]:
        """Returns the rows of the stories written at `update`, in the order of the prompts."""
        return [row for row in self.samples if row["update"] == update]

    def first_samples_of(self, update: int) -> list[dict[str, Any]]:
        """Returns the first of each prompt's rows at `update`, in the order of the prompts."""
        first: dict[str, dict[str, Any]] = {}
        for row in self.samples_of(update):
            first.setdefault(row["prompt"], row)
        return list(first.values())


def number(row: dict[str, Any], key: str) -> float | None:
    """Returns a finite number, None where there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST:
        return None
    return value


def read_run(folder: Path) -> RunFiles:
    """Returns what stands in the run; raises `UserError` where `folder` is none or its config cannot be read."""
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "environment.json"):
        if (folder / name).exists() and not (folder / name).is_file():  # reading a pipe would wait for ever
            raise UserError(f"{folder / name} is not a regular file; move it away")
    config = _read_config(folder)
    assert config.schedule is not None
    problems: list[str] = []
    rows = _read_rows(folder / "metrics.jsonl", config.schedule.total_updates, problems)
    if (in_order := sorted({row["update"]: row for row in rows}.values(), key=lambda row: row["update"])) != rows:
        problems.append("metrics.jsonl: updates out of order or twice over; the last row of each is taken")
    rows = in_order
    samples = _read_rows(folder / "samples.jsonl", config.schedule.total_updates, problems)
    written = [row for row in samples if isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)]
    if len(written) < len(samples):
        problems.append(f"samples.jsonl: {len(samples) - len(written)} rows without a prompt and a text left out")
    metrics, tokenizer = folder / "metrics.jsonl", folder / "tokenizer" / "tokenizer.json"
    return RunFiles(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        tokenizer_sha256=_hash_tokenizer(tokenizer, problems),
        rows=rows,
        samples=written,
        evaluation=_read_evaluation(folder / "evaluation.json", problems),
        starts=_read_starts(folder / "environment.json", problems),
        last_written=metrics.stat().st_mtime if rows else None,
        problems=tuple(problems),
    )


def _read_config(folder: Path) -> Config:
    path = folder / "config.json"
    try:
        return from_dict(_read_json(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist: {folder} is no run; give a workdir that train.py made") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        advice = "the command that trained the run writes it again from its checkpoints"
        raise UserError(f"{path}: cannot be read as a run's config ({reason}); {advice}") from error


def _hash_tokenizer(path: Path, problems: list[str]) -> str | None:
    try:
        return sha256(read_small_file(path, MAX_JSON_BYTES)).hexdigest()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
        return None


def _read_json(path: Path) -> Any:
    """Raises ValueError for what is none, or too large to be a run's."""
    return parse_json(read_small_file(path, MAX_JSON_BYTES), path.name)


def _read_rows(path: Path, total_updates: int, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        rows, num_damaged = read_jsonl(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
        return []
    if num_damaged:
        problems.append(f"{path.name}: {num_damaged} damaged line{'s' * (num_damaged > 1)} left out")
    known = [row for row in rows if 1 <= row["update"] <= total_updates]
    if len(known) < len(rows):
        problems.append(f"{path.name}: {len(rows) - len(known)} rows of no update from 1 to {total_updates:,} left out")
    return known


def _read_evaluation(path: Path, problems: list[str]) -> StoredEvaluation | None:
    if not path.exists():
        return None
    try:
        values = _read_json(path)
        return StoredEvaluation(
            update=_count(values, "checkpoint_update"),
            num_stories=_count(values, "num_stories"),
            temperature=number(values, "temperature"),
            scores=tuple(_score(score) for score in values.get("scores") or ()),
            criteria=tuple(
                Criterion(str(criterion["name"]), _passed(criterion["passed"]), str(criterion["figure"]))
                for criterion in values.get("criteria") or ()
            ),
            grammar=Score("grammar", "of 10", number(values, "grammar"), _interval(values.get("grammar_interval"))),
            articles=Score("articles", "share", number(values, "articles"), _interval(values.get("articles_interval"))),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read as scores ({type(error).__name__}: {error})")
        return None


def _count(values: dict[str, Any], key: str) -> int | None:
    value = number(values, key)
    return None if value is None else int(value)


def _score(values: dict[str, Any]) -> Score:
    return Score(
        name=str(values["name"]),
        unit=str(values.get("unit") or ""),
        value=number(values, "value"),
        interval=_interval(values.get("interval")),
        real=number(values, "real"),
        real_interval=_interval(values.get("real_interval")),
    )


def _passed(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"passed is {value!r:.20}, not true, false or null")
    return value


def _interval(values: Any) -> Interval | None:
    if values is None:
        return None
    low, high = values
    limits = {"low": low, "high": high}
    if None in (number(limits, "low"), number(limits, "high")) or low > high:
        raise ValueError(f"{values!r:.50} is no interval")
    return float(low), float(high)


def _read_starts(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        starts = _read_json(path)["starts"]
        if not all(isinstance(start, dict) for start in starts):
            raise ValueError("a start is no object")
        return list(starts)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read ({type(error).__name__}: {error})")
        return []
