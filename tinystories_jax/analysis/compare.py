"""Runs side by side: what each was given, what came of it, and which differences are larger than the noise."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tinystories_jax.analysis.compare_measures import MEASURES, Measure
from tinystories_jax.analysis.noise import Verdict, compare_to_noise
from tinystories_jax.analysis.run_files import Interval, RunFiles
from tinystories_jax.analysis.sides import Side, describe_difference, find_doubts, read_sides, same_tokenizer

NOT_COMPARABLE = "not comparable: the tokenizers differ"
OTHER_TEMPERATURES = "not comparable: written at other temperatures"
NO_DIFFERENCE = "no difference found"
_NONE = "–"
_FEWEST_SEEDS = 2  # a side, that say anything of the noise


@dataclass(frozen=True)
class Row:
    """One measure over all sides. `cells`, one per side, are what is known of it."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """One measure of quality between two sides. `verdict` is None where the two do not compare."""

    name: str
    pair: str
    difference: str
    interval: str
    said: str
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """`legend` has a line per side: its letter, its runs, how it differs from the first. `stories`: for each prompt
    that all sides have, the story of each one's first run at its last evaluation."""

    sides: tuple[Side, ...]
    legend: tuple[tuple[str, str, str], ...]
    rows: tuple[Row, ...]
    judgements: tuple[Judgement, ...]
    doubts: tuple[str, ...]
    stories: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def conclusion(self) -> str:
        """Returns the result in a few sentences."""
        return self._result + " Mind the doubts listed with it." * bool(self.doubts)

    @property
    def _result(self) -> str:
        judged = [item for item in self.judgements if item.verdict is not None]
        found = [item for item in judged if item.verdict is not None and item.verdict.found]
        tested = [item for item in judged if item.verdict is not None and item.verdict.found is not None]
        if len(self.sides) == 1:
            return "One side: these runs differ in their seed alone. Their ranges are the noise of a run."
        if found:
            pairs: dict[str, list[str]] = {}
            for item in found:
                pairs.setdefault(item.name, []).append(item.pair)
            named = "; ".join(f"{name} ({', '.join(which)})" for name, which in pairs.items())
            over_seeds = [item for item in tested if item.verdict is not None and item.verdict.interval is not None]
            chance = f" Of {len(over_seeds)} comparisons at 95 %, one in twenty would be counted by chance alone."
            of_seeds = " What one seed a side tells holds for these runs; another seed may differ as much."
            return (
                f"Larger than the noise: {named}."
                + chance * bool(over_seeds)
                + of_seeds * (len(over_seeds) < len(tested))
            )
        if tested:
            few = min(len(side.runs) for side in self.sides) == _FEWEST_SEEDS
            more = f" With {_FEWEST_SEEDS} seeds a side only large differences are; a third seed shows smaller ones."
            return f"{NO_DIFFERENCE.capitalize()}: none of {len(tested)} is larger than the noise." + more * few
        return (
            "No noise estimate, so nothing is said of any difference: give runs with another seed for each side, or "
            "score the runs with scripts/evaluate.py, whose figures have intervals."
        )


def compare(folders: Sequence[Path]) -> Comparison:
    """Returns the comparison of runs; raises one `UserError` for all that are none."""
    sides = read_sides(folders)
    one_tokenizer = all(same_tokenizer(sides[0].runs[0], side.runs[0]) for side in sides)
    legend = [
        (side.letter, side.names, "" if side is sides[0] else describe_difference(sides[0], side)) for side in sides
    ]
    rows = []
    for measure in MEASURES:
        cells = tuple(_cell(measure, side) for side in sides)
        if set(cells) != {_NONE}:
            mark = " (not comparable)" * (measure.per_token and not one_tokenizer)
            rows.append(Row(measure.name + mark, cells))
    judgements = [
        judgement
        for measure in MEASURES
        if measure.judged
        for first, second in itertools.combinations(sides, 2)
        if (judgement := _judge(measure, first, second)) is not None
    ]
    return Comparison(sides, tuple(legend), tuple(rows), tuple(judgements), tuple(find_doubts(sides)), _stories(sides))


def _values(measure: Measure, side: Side) -> list[float]:
    return [value for run in side.runs if (value := measure.value(run)) is not None]


def _intervals(measure: Measure, side: Side) -> list[Interval]:
    return [interval for run in side.runs if (interval := measure.interval(run)) is not None]


def _cell(measure: Measure, side: Side) -> str:
    """Returns the figure, with the interval of a single run, or the mean of several with their range, and how many runs
    have one where not all do."""
    values, intervals = _values(measure, side), _intervals(measure, side)
    if not values:
        return _NONE
    some = f", {len(values)} of {len(side.runs)} runs" * (len(values) < len(side.runs))
    written = [measure.write(value) for value in sorted(values)]
    if len(set(written)) > 1:
        return f"{measure.write(mean(values))} ({written[0]} to {written[-1]}{some})"
    if len(values) == len(intervals) == 1:
        low, high = intervals[0]
        return f"{written[0]} (95 %: {measure.write(low)} to {measure.write(high)}{some})"
    return written[0] + some


def _judge(measure: Measure, first: Side, second: Side) -> Judgement | None:
    a, b = _values(measure, first), _values(measure, second)
    if not a or not b:
        return None
    pair = f"{first.letter}\u00a0→\u00a0{second.letter}"
    if measure.per_token and not same_tokenizer(first.runs[0], second.runs[0]):
        return Judgement(measure.name, pair, _NONE, _NONE, NOT_COMPARABLE, None)
    if measure.by_evaluation and len(_temperatures(first) | _temperatures(second)) > 1:
        return Judgement(measure.name, pair, _NONE, _NONE, OTHER_TEMPERATURES, None)
    verdict = compare_to_noise(a, b, _intervals(measure, first), _intervals(measure, second))
    interval = _NONE
    if verdict.interval is not None:
        interval = " to ".join(measure.write_difference(limit) for limit in verdict.interval)
    said = {True: "larger than the noise", False: NO_DIFFERENCE, None: verdict.why}[verdict.found]
    return Judgement(measure.name, pair, measure.write_difference(verdict.difference), interval, said, verdict)


def _temperatures(side: Side) -> set[float | None]:
    """Returns those at which the side's stories were scored, None for one that nobody knows."""
    return {run.evaluation.temperature for run in side.runs if run.evaluation is not None}


def _stories(sides: Sequence[Side]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    told = [_last_stories(side.runs[0]) for side in sides]
    common = [prompt for prompt in told[0] if all(prompt in stories for stories in told)]
    return tuple((prompt, tuple(stories[prompt] for stories in told)) for prompt in common)


def _last_stories(run: RunFiles) -> dict[str, str]:
    update = run.samples[-1]["update"] if run.samples else -1
    return {row["prompt"]: row["text"] for row in run.first_samples_of(update)}
