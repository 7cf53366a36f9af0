"""Sides of a comparison: runs that differ in nothing but their seed are one side, and show how far seeds vary."""

import dataclasses
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_jax.analysis.run_files import RunFiles, StoredEvaluation, number, read_run
from tinystories_jax.config import Config, differences
from tinystories_jax.errors import UserError


@dataclass(frozen=True)
class Side:
    """`letter` names it; `runs` have one config but for the seed and what may differ between a run and its
    continuation, one tokenizer, the same training stories by name, and no seed twice."""

    letter: str
    runs: tuple[RunFiles, ...]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def names(self) -> str:
        return ", ".join(run.name for run in self.runs)


def read_sides(folders: Sequence[Path]) -> tuple[Side, ...]:
    """Returns the sides in the order in which their first runs are given; raises `UserError` for what is no run."""
    problems: list[str] = []
    runs: list[RunFiles] = []
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            problems.append(f"{folder} is given twice")
            continue
        try:
            run = read_run(folder)
        except UserError as error:
            problems += error.problems
            continue
        if run.tokenizer_sha256 is None:
            problems.append(f"{folder}/tokenizer/tokenizer.json does not exist: nothing tells what a loss is to mean")
        runs.append(run)
    if problems:
        raise UserError(problems)
    groups: list[list[RunFiles]] = []
    for run in _with_distinct_names(runs):
        home = next((group for group in groups if all(_differ_in_seed_alone(run, other) for other in group)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    letters = [*string.ascii_uppercase, *(f"S{index}" for index in range(len(string.ascii_uppercase), len(groups)))]
    return tuple(Side(letter, tuple(group)) for letter, group in zip(letters, groups, strict=False))


def _with_distinct_names(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Returns the runs, named by as much of the ends of their paths as tells each from all others."""
    paths = [run.folder.resolve().parts for run in runs]
    named = []
    for run, path in zip(runs, paths, strict=True):
        others = [other for other in paths if other != path]
        num_parts = next(n for n in range(1, len(path) + 1) if path[-n:] not in [other[-n:] for other in others])
        named.append(dataclasses.replace(run, name="/".join(path[-num_parts:])))
    return named


def _differ_in_seed_alone(first: RunFiles, second: RunFiles) -> bool:
    # The same seed twice is the same run again, or one by other code: in neither case do the two show what seeds do.
    fields = [field for field, _, _ in differences(first.config, second.config)]
    same_stories = _stories(first.config, "train") == _stories(second.config, "train")
    return fields == ["seed"] and same_tokenizer(first, second) and same_stories


def same_tokenizer(first: RunFiles, second: RunFiles) -> bool:
    return first.tokenizer_sha256 == second.tokenizer_sha256


def describe_difference(reference: Side, side: Side) -> str:
    """Returns in which settings `side` differs from `reference`."""
    found = [item for item in differences(reference.config, side.config) if item[0] != "seed"]
    # The schedule follows from the other fields, unless it is the data that differ.
    settings = [item for item in found if not item[0].startswith("schedule.")] or found
    parts = [f"{name} {_short(now)} instead of {_short(before)}" for name, before, now in settings]
    if not same_tokenizer(reference.runs[0], side.runs[0]):
        parts.append("another tokenizer")
    before, now = (" ".join(_stories(one.config, "train")) for one in (reference, side))
    if now != before:
        parts.append(f"training stories {_short(now)} instead of {_short(before)}")
    return ", ".join(parts) or "nothing that the configs tell: the same seed again, perhaps with other code"


def _short(value: object) -> str:
    text = str(value)
    return repr(value) if text == "" else text if len(text) <= 40 else text[:37] + "..."


def find_doubts(sides: Sequence[Side]) -> list[str]:
    """Returns what stands in the way of comparing the runs, a sentence each."""
    runs = [run for side in sides for run in side.runs]
    doubts = [f"{run.name}: {problem}." for run in runs for problem in run.problems]
    doubts += [
        f"{run.name} has {run.rows[-1]['update'] if run.rows else 0:,} of {run.schedule.total_updates:,} updates."
        for run in runs
        if not run.rows or run.rows[-1]["update"] < run.schedule.total_updates
    ]
    if len({run.config.eval.max_batches for run in runs}) > 1:
        doubts.append("eval.max_batches differs: validation figures come from different parts of the split.")
    elif runs[0].config.eval.max_batches and not all(same_tokenizer(run, runs[0]) for run in runs):
        doubts.append(
            "With other tokenizers eval.max_batches batches are other parts of the split, and figures differ."
        )
    samples = [run.config.sample for run in runs]
    for name in ("prompts", "temperature", "max_new_tokens"):
        if len({getattr(sample, name) for sample in samples}) > 1:
            doubts.append(f"sample.{name} differs: the scores of the runs' samples do not compare.")
    if len({_stories(run.config, "valid") for run in runs}) > 1:
        doubts.append("The runs name different validation stories; their scores compare only if these are the same.")
    doubts += [
        f"{run.name} was scored by evaluate.py at update {run.evaluation.update:,}, its best is {run.best['update']:,}."
        for run in runs
        if run.evaluation is not None
        and run.evaluation.update is not None
        and run.best is not None
        and run.evaluation.update != run.best["update"]
    ]
    writings = [(run.name, _writing(run.evaluation)) for run in runs if run.evaluation is not None]
    if len({writing for _, writing in writings}) > 1:
        told = "; ".join(f"{name} {writing}" for name, writing in writings)
        doubts.append(f"evaluate.py had the runs write differently, and such scores do not compare: {told}.")
    reference = bytes_per_token(runs[0])
    for run in runs[1:]:
        ratio = bytes_per_token(run)
        if reference is None or ratio is None or not same_tokenizer(run, runs[0]):
            continue
        if not math.isclose(ratio, reference, rel_tol=1e-6):
            doubts.append(f"{run.name} was validated on other stories than {runs[0].name}: scores do not compare.")
    return doubts


def _writing(evaluation: StoredEvaluation) -> str:
    """Returns how many stories evaluate.py had a run write, and how; their scores compare only where this agrees."""
    temperature = "an unknown temperature"
    if evaluation.temperature is not None:
        temperature = f"temperature {evaluation.temperature:g}"
    num_stories = "an unknown number of" if evaluation.num_stories is None else evaluation.num_stories
    return f"{num_stories} stories at {temperature}"


def _stories(config: Config, split: Literal["train", "valid"]) -> tuple[str, ...]:
    """Returns what the config names as the stories of a split."""
    data = config.data
    if data.source == "files":
        return data.source, data.train_files if split == "train" else data.valid_files
    return (data.source, data.hub_name, data.hub_revision) if data.source == "hub" else (data.source,)


def bytes_per_token(run: RunFiles) -> float | None:
    """Returns the UTF-8 bytes of a token of the validation split, which loss and bits per byte imply."""
    for row in run.evaluations:
        bits = number(row, "valid/bits_per_byte")
        if bits and math.isfinite(ratio := row["valid/loss"] / (math.log(2) * bits)):
            return ratio
    return None
