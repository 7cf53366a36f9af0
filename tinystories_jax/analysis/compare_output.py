"""A comparison as a terminal's table, as compare.md and as the page compare.html."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from tinystories_jax.analysis.compare import Comparison
from tinystories_jax.analysis.compare_measures import training_flops_per_token
from tinystories_jax.analysis.page import figure, figures, header, paragraph, section, story, table, write_page
from tinystories_jax.analysis.plots import NUM_SERIES, Axis, Curve, draw
from tinystories_jax.analysis.run_files import RunFiles
from tinystories_jax.tables import columns, markdown_table, markdown_text

_NOTE = (
    "Several runs on a side: their mean, and their range in brackets. Bytes seen are the tokens at the validation "
    "split's bytes per token; FLOPs are 6 per matrix parameter and token, and causal attention. Wall time "
    "counts from when the data were ready, evaluations included."
)
_JUDGED = (
    "Second side minus first. With two seeds or more on both sides Welch's 95 % interval decides; with fewer, whether "
    "the scores' own 95 % intervals overlap."
)
_VERDICT_HEAD = ("measure", "sides", "difference", "95 % interval", "verdict")


def to_text(comparison: Comparison) -> str:
    """Returns the comparison for a terminal, without the stories."""
    letters = [side.letter for side in comparison.sides]
    lines = [f"{letter}  {names}{f': {differs}' * bool(differs)}" for letter, names, differs in comparison.legend]
    lines += ["", *columns([["", *letters], *([row.name, *row.cells] for row in comparison.rows)], flush_right=True)]
    if comparison.judgements:
        lines += ["", *columns([list(_VERDICT_HEAD), *(list(row) for row in _verdict_rows(comparison))])]
    return "\n".join([*lines, "", *comparison.doubts, comparison.conclusion])


def to_markdown(comparison: Comparison) -> str:
    """Returns the comparison as a page of Markdown."""
    letters = [side.letter for side in comparison.sides]
    parts = ["# Comparison", markdown_text(comparison.conclusion)]
    if comparison.doubts:
        parts.append("\n".join(f"- {markdown_text(doubt)}" for doubt in comparison.doubts))
    parts.append(markdown_table(("side", "runs", f"differs from {letters[0]} in"), comparison.legend))
    figures_table = markdown_table(
        ("", *letters), [(row.name, *row.cells) for row in comparison.rows], flush_right=True
    )
    parts += ["## Figures", figures_table, _NOTE]
    if comparison.judgements:
        parts += ["## Differences", markdown_table(_VERDICT_HEAD, _verdict_rows(comparison)), _JUDGED]
    for prompt, stories in comparison.stories:
        parts.append(f"## Stories: {markdown_text(prompt)}")
        for letter, text in zip(letters, stories, strict=True):
            quoted = "\n>\n> ".join(markdown_text(line) for line in text.split("\n"))
            parts.append(f"**{letter}**\n\n> {quoted}")
    return "\n\n".join(parts) + "\n"


def write_comparison_page(comparison: Comparison, path: Path) -> Path:
    """Writes compare.html."""
    letters = [side.letter for side in comparison.sides]
    legend = [
        (f'<b class="series-{_series(index)}">{escape(letter)}</b>\u2002{escape(names)}', escape(differs))
        for index, (letter, names, differs) in enumerate(comparison.legend)
    ]
    num_runs = sum(len(side.runs) for side in comparison.sides)
    top = header(
        "tinystories_jax · comparison",
        f"{num_runs} runs, {len(letters)} side{'s' * (len(letters) > 1)}",
        comparison.conclusion,
        *(paragraph(doubt, "warning") for doubt in comparison.doubts),
    )
    rows = [(escape(row.name), *map(escape, row.cells)) for row in comparison.rows]
    verdicts = [tuple(map(escape, row)) for row in _verdict_rows(comparison)]
    parts = [
        top,
        section("Sides", table(("side", f"differs from {letters[0]} in"), legend)),
        section("Bits per byte", _plots(comparison), note="On the validation stories, at each evaluation."),
        section("Figures", table(("", *letters), rows, numbers=range(1, len(letters) + 1)), paragraph(_NOTE)),
    ]
    if verdicts:
        parts.append(section("Differences", table(_VERDICT_HEAD, verdicts, numbers=(2, 3)), paragraph(_JUDGED)))
    parts.append(_show_stories(comparison, letters))
    return write_page(path, "Comparison of runs", parts)


def _verdict_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [(item.name, item.pair, item.difference, item.interval, item.said) for item in comparison.judgements]


def _series(index: int) -> int:
    return index % NUM_SERIES + 1


def _plots(comparison: Comparison) -> str:
    drawn = []
    for title, field, factor, axis in (
        ("Over tokens", "tokens", lambda run: 1.0, Axis("tokens seen")),
        ("Over compute", "tokens", training_flops_per_token, Axis("training FLOPs")),
        ("Over wall time", "seconds", lambda run: 1 / 60, Axis("minutes")),
    ):
        curves = _curves(comparison, field, factor)
        shown = {curve.series for curve in curves}
        sides = [(_series(index), side.letter) for index, side in enumerate(comparison.sides)]
        key = [(f"series-{series}", letter) for series, letter in sides if series in shown]
        if curves:
            plot = draw(title.lower().replace(" ", "-"), f"Bits per byte {title.lower()}", curves, x=axis, y=Axis(""))
        else:
            plot = paragraph(f"No run has {axis.label} beside bits per byte.")
        drawn.append(figure(title, plot, note="bits per byte" if curves else "", key=key))
    return figures(*drawn)


def _curves(comparison: Comparison, field: str, factor: Callable[[RunFiles], float]) -> list[Curve]:
    curves = []
    for index, side in enumerate(comparison.sides):
        for run in side.runs:
            x, y = run.series(field, "valid/bits_per_byte")
            if x:
                curves.append(Curve([value * factor(run) for value in x], y, _series(index), "points"))
    return curves


def _show_stories(comparison: Comparison, letters: Sequence[str]) -> str:
    if not comparison.stories:
        return section("Stories", paragraph("The runs have no sampled prompt in common."))
    parts = []
    for prompt, stories in comparison.stories:
        told = "".join(
            f'<div><h3 class="series-{_series(index)}">{escape(letter)}</h3>'
            f'<div class="story">{story(text, prompt)}</div></div>'
            for index, (letter, text) in enumerate(zip(letters, stories, strict=True))
        )
        parts.append(f'<div class="abreast">{told}</div>')
    note = "At the last evaluation of each side's first run, unedited, the articles underlined."
    return section("Stories", *parts, note=note)
