"""The part of a report that shows grammar appear: scores and a story at each evaluation, and the last stories."""

from typing import Any

from tinystories_jax.analysis.page import figure, figures, paragraph, section, story
from tinystories_jax.analysis.plots import Axis, Curve, draw
from tinystories_jax.analysis.run_files import RunFiles, number

_MOST_MOMENTS = 12
_NONE = "–"


def show_emergence(run: RunFiles) -> str:
    note = (
        "At each evaluation: the figures, and the story for the first prompt, its articles underlined. Articles "
        f"written and grammar are those of a few stories at temperature {run.config.sample.temperature:g}; "
        "scripts/evaluate.py takes more of them, at temperature 1, and is harder to please."
    )
    if not run.evaluations:
        return section("Emergence", paragraph("No evaluation yet."))
    moments = _choose_moments(run)
    left_out = len(run.evaluations) - len(moments)
    more = paragraph(f"{left_out} evaluations between these are left out; metrics.jsonl has them all.")
    return section("Emergence", _emergence_figures(run), _timeline(run, moments), more if left_out else "", note=note)


def _emergence_figures(run: RunFiles) -> str:
    shares = [
        (("valid/article_recall", 1, "recall"), ("samples/articles", 3, "written")),
        "Articles",
        "recall: right first guesses at articles; written: needed ones in its stories",
        Axis("", low=0.0, high=1.0, percent=True),
    ]
    grammar = [(("samples/grammar", 4, "its stories"),), "Grammar", "out of 10", Axis("", low=0.0, high=10.0)]
    drawn = []
    for sources, title, note, axis in (shares, grammar):
        found = [(run.series("update", key), series, name) for key, series, name in sources]
        curves = [Curve(*points, series, "points") for points, series, _ in found if points[0]]
        key = [(f"series-{series}", name) for points, series, name in found if points[0]]
        if curves:
            plot = draw(title.lower(), f"{title} over updates", curves, x=Axis("update"), y=axis)
            drawn.append(figure(title, plot, note=note, key=key if len(sources) > 1 else ()))
    return figures(*drawn)


def _choose_moments(run: RunFiles) -> list[dict[str, Any]]:
    """Returns all evaluations, or where they are many the first, the last, the best and others evenly between."""
    rows = run.evaluations
    if len(rows) <= _MOST_MOMENTS:
        return rows
    kept = {round(index * (len(rows) - 1) / (_MOST_MOMENTS - 1)) for index in range(_MOST_MOMENTS)}
    return [row for index, row in enumerate(rows) if index in kept or row is run.best]


_TIMELINE = (
    ("epoch", "epoch", "{:.2f}"),
    ("valid/loss", "validation loss", "{:.3f}"),
    ("valid/bits_per_byte", "bits per byte", "{:.3f}"),
    ("valid/article_recall", "recall at articles", "{:.1%}"),
    ("samples/articles", "articles written", "{:.1%}"),
    ("samples/grammar", "grammar of 10", "{:.1f}"),
)


def _timeline(run: RunFiles, moments: list[dict[str, Any]]) -> str:
    columns = [column for column in _TIMELINE if run.last(column[0]) is not None]
    head = "".join(f'<th class="number">{name}</th>' for _, name, _ in columns)
    body = []
    for row in moments:
        values = [number(row, key) for key, _, _ in columns]
        cells = "".join(
            f'<td class="number">{_NONE if value is None else form.format(value)}</td>'
            for value, (_, _, form) in zip(values, columns, strict=True)
        )
        mark = ' <span class="best">best</span>' if row is run.best else ""
        body.append(f'<tr class="figures-row"><th scope="row">{row["update"]:,}{mark}</th>{cells}</tr>')
        first = next(iter(run.samples_of(row["update"])), None)
        text = story(first["text"], first["prompt"]) if first else "no story of this update in samples.jsonl"
        body.append(f'<tr class="story-row"><td colspan="{len(columns) + 1}"><div class="story">{text}</div></td></tr>')
    head = f"<thead><tr><th>update</th>{head}</tr></thead>"
    return f'<div class="scroll"><table class="timeline">{head}<tbody>{"".join(body)}</tbody></table></div>'


def show_last_samples(run: RunFiles) -> str:
    if not run.samples:
        return section("Samples", paragraph("No story yet: the first come with the first evaluation."))
    update = run.samples[-1]["update"]
    told = []
    for row in run.first_samples_of(update):
        cut = " unfinished" if row.get("finished") is False else ""
        told.append(f'<blockquote class="story{cut}">{story(row["text"], row["prompt"])}</blockquote>')
    temperature = run.config.sample.temperature
    note = (
        f"At update {update:,}, unedited, temperature {temperature:g}: the first story of each prompt, of "
        f"{len(run.samples_of(update)):,} in samples.jsonl."
    )
    return section("Samples", *told, note=note)
