"""report.html: one page that says how a run went, or how it goes, from nothing but its files."""

import dataclasses
import shlex
import time
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from tinystories_jax.analysis.curves import show_curves
from tinystories_jax.analysis.emergence import show_emergence, show_last_samples
from tinystories_jax.analysis.page import (
    code,
    details,
    fields,
    header,
    paragraph,
    section,
    table,
    tiles,
    write_page,
)
from tinystories_jax.analysis.run_files import Interval, RunFiles, number, read_run
from tinystories_jax.evaluation.results import format_figure, format_interval

# A run that writes nothing for longer than an evaluation can take is not under way.
_QUIET_SECONDS = 15 * 60
_NONE = "–"


def write_report(folder: Path) -> Path:
    """Writes RUN/report.html, at any moment of the run, and returns its path; the same files of a run that is
    over give the same bytes.

    Raises `UserError` where `folder` is no run. What else is missing or damaged is said on the page.
    """
    run = read_run(folder)
    parts = [
        _headline(run),
        show_curves(run),
        show_emergence(run),
        show_last_samples(run),
        _scores(run),
        _config(run),
        _environment(run),
    ]
    return write_page(folder / "report.html", f"{run.name} · report", parts)


def _headline(run: RunFiles) -> str:
    total, update = run.schedule.total_updates, _last_update(run)
    bar = f'<progress max="{total}" value="{update}"></progress>' if 0 < update < total else ""
    made_up = "Trained on the bundled sample, which this project made up: it is not TinyStories."
    return "".join(
        [
            header("tinystories_jax · report of a run", run.name, _state(run), bar),
            paragraph(made_up, "warning") if run.config.data.source == "sample" else "",
            *(paragraph(problem, "warning") for problem in run.problems),
            tiles(_key_figures(run)),
        ]
    )


def _last_update(run: RunFiles) -> int:
    return run.rows[-1]["update"] if run.rows else 0


def _state(run: RunFiles) -> str:
    """Returns whether the run is finished, under way or stopped, and where."""
    update, total = _last_update(run), run.schedule.total_updates
    at = f"at update {update:,} of {total:,}"
    if update >= total:
        return f"Finished: {total:,} updates."
    ended = run.starts[-1].get("ended") if run.starts else None
    if ended:
        patience, evaluations = run.config.eval.early_stopping_patience, run.evaluations
        if patience and run.best in evaluations and len(evaluations) - 1 - evaluations.index(run.best) >= patience:
            return f"Stopped early {at}: no better validation loss for {patience} evaluations."
        return f"Stopped {at}, on {_date(str(ended))}; the command that started it goes on from its last checkpoint."
    if run.last_written is None:
        return f"No update of {total:,} is logged yet."
    if time.time() - run.last_written > _QUIET_SECONDS:
        since = datetime.fromtimestamp(run.last_written, UTC).isoformat()
        return f"Stopped or held up {at}: nothing logged since {_date(since)}."
    return f"Under way, {at}."


def _key_figures(run: RunFiles) -> dict[str, str]:
    best, speeds = run.best, run.series("update", "train/tokens_per_second")[1]
    tokens, epoch, seconds = run.last("tokens"), run.last("epoch"), run.last("seconds")
    shown: dict[str, str] = {}
    if best is not None:
        shown[f"best validation loss, at update {best['update']:,}"] = f"{best['valid/loss']:.3f}"
        for key, name, form in (
            ("valid/bits_per_byte", "bits per byte, same update", "{:.3f}"),
            ("valid/article_recall", "recall at articles, same update", "{:.1%}"),
        ):
            if (value := number(best, key)) is not None:
                shown[name] = form.format(value)
    else:
        shown["validation loss: not evaluated yet"] = _NONE
    if tokens is not None:
        shown["tokens seen" if epoch is None else f"tokens seen, {epoch:.2f} epochs"] = _million(tokens)
    if speeds:
        used = run.series("update", "train/mfu")[1]
        at = f", {median(used):.1%} of the peak FLOP/s" if used else ""
        shown[f"tokens per second, median{at}"] = f"{median(speeds):,.0f}"
    if seconds is not None:
        shown["wall time"] = _duration(seconds)
    return shown


def _scores(run: RunFiles) -> str:
    found = run.evaluation
    if found is None:
        command = f"python scripts/evaluate.py --checkpoint {shlex.quote(str(run.folder))}"
        return section("Scores", paragraph("Not measured yet, or not readable. This command measures:"), code(command))
    counted = "" if found.num_stories is None else f"{found.num_stories:,} stories "
    at = "" if found.update is None else f"of the checkpoint of update {found.update:,}"
    how = "" if found.temperature is None else f", temperature {found.temperature:g}"
    note = f"{counted}{at}{how}".strip().capitalize()
    colours = {True: "good", False: "bad", None: ""}
    criteria = [
        (escape(item.name), escape(item.figure), f'<span class="{colours[item.passed]}">{item.verdict}</span>')
        for item in found.criteria
    ]
    scores = [
        (escape(score.name), *_cells(score.value, score.interval), *_cells(score.real, score.real_interval))
        for score in found.scores
    ]
    units = [f'<span class="unit">{escape(score.unit)}</span>' for score in found.scores]
    rows = [(name, unit, *rest) for (name, *rest), unit in zip(scores, units, strict=True)]
    columns = ("score", "unit", "value", "95 % interval", "real stories", "95 % interval")
    return section(
        "Scores",
        table(("criterion", "figure", ""), criteria) if criteria else "",
        table(columns, rows, numbers=(2, 3, 4, 5)) if rows else paragraph("evaluation.json holds no scores."),
        note=note,
    )


def _cells(value: float | None, interval: Interval | None) -> tuple[str, str]:
    return format_figure(value), format_interval(interval)


def _config(run: RunFiles) -> str:
    values = dataclasses.asdict(run.config)
    sha256 = run.tokenizer_sha256 or "unknown: tokenizer/tokenizer.json is missing"
    parts = [fields({"seed": values.pop("seed"), "SHA-256 of the tokenizer": sha256})]
    for name, members in values.items():
        parts.append(details(name, fields({key: _setting(value) for key, value in members.items()})))
    return section("Configuration", *parts, note="Derived values included, as config.json has them.")


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " · ".join(map(str, value)) or "none"
    return "(empty)" if value == "" else str(value)


def _environment(run: RunFiles) -> str:
    if not run.starts:
        return section("Environment", paragraph("environment.json is missing or damaged: nothing is known of it."))
    *earlier, last = run.starts
    parts = [fields(_flat(last))]
    for number_of_start, start in enumerate(earlier, start=1):
        parts.append(details(f"start {number_of_start}: {start.get('started', 'unknown')}", fields(_flat(start))))
    note = "" if not earlier else f"The last of {len(run.starts)} starts; earlier ones below."
    return section("Environment", *parts, note=note)


def _flat(start: dict[str, Any]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for key, value in start.items():
        for name, item in value.items() if isinstance(value, dict) else ((key.replace("_", " "), value),):
            shown[str(name)] = str(item)
    return shown


def _million(count: float) -> str:
    return f"{count / 1e6:,.2f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"


def _date(iso: str) -> str:
    return iso[:16].replace("T", " ") + " UTC"
