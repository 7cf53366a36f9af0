"""Signals at random moments: the same command, given again until it is done, gives the run that would have been.

The real command gets SIGKILL, with its whole process group, while it starts, trains the tokenizer, builds the caches,
trains, saves, evaluates and writes the report; or SIGTERM or SIGINT, which it ends on by itself.
"""

import json
import os
import random
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.place import ROOT, write_stories
from tests.test_cli import script_environment
from tests.test_end_to_end import TIMES, parameter_bytes, read_jsonl
from tinystories_jax.config import from_dict
from tinystories_jax.data.prepare import find_data

SECONDS_PER_START = 900.0
SECONDS_TO_SAVE = 30.0
NUM_UPDATES = 24
MOST_TRIES = 5  # to catch a run in one phase
FLAGS = [
    *("--nodoctor", "--config=configs/quickstart.py", "--config.data.source=files"),
    *("--config.data.sequence_length=32", "--config.tokenizer.vocab_size=400"),
    *("--config.model.d_model=16", "--config.model.num_layers=1", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.d_ff=16", "--config.model.dropout=0.1"),
    *("--config.train.batch_size=4", "--config.train.grad_accum_steps=2", f"--config.train.max_updates={NUM_UPDATES}"),
    *("--config.eval.every=6", "--config.eval.max_batches=2", "--config.checkpoint.every=2"),
    *("--config.checkpoint.keep=2", "--config.logging.every=1"),
    *("--config.sample.prompts=('Once upon a time',)", "--config.sample.max_new_tokens=8"),
]


@dataclass
class Start:
    """What is seen of one process so far. `seconds` are those in which this one ran and could have seen more."""

    workdir: Path
    text: str = ""
    seconds: float = 0.0
    last_look: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        now = time.monotonic()
        self.seconds, self.last_look = self.seconds + min(now - self.last_look, 1.0), now

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.text, re.MULTILINE) is not None

    def saves(self) -> bool:
        return any("tmp" in path.name for path in (self.workdir / "checkpoints").glob("*"))


# When the phase of a process has begun, and the longest time in seconds from then to the kill.
PHASES: dict[str, tuple[Callable[[Start], bool], float]] = {
    "start-up": (lambda start: True, 3.0),
    "tokenizer": (lambda start: start.says("^tokenizer: training"), 1.0),
    "encoding": (lambda start: start.says("^(train|validation): encoding"), 0.5),
    "set-up": (lambda start: start.says("^stories shared"), 4.0),  # JAX is imported, the model made and compiled
    "training": (lambda start: start.says(r"^update \d+/(?s:.*)^update \d+/"), 0.3),
    "saving": (lambda start: start.says(r"^update \d+/") and start.saves(), 0.05),
    "evaluation": (lambda start: start.says(r"^update \d+: validation loss"), 0.3),
    "report": (lambda start: start.says(rf"^update {NUM_UPDATES} of {NUM_UPDATES} "), 0.5),
}
# In the order in which a run comes by; each kind of phase as often as said.
SHORT = [{"start-up": 1, "tokenizer": 1}, {"encoding": 1}, {"training": 2, "saving": 2, "evaluation": 2}, {"report": 1}]
WHOLE = [{"start-up": 2, "tokenizer": 2}, {"encoding": 2}, {"training": 2, "saving": 3, "evaluation": 1}, {"report": 1}]


def plan_kills(rounds: list[dict[str, int]], rng: random.Random) -> Iterator[str]:
    for phases in rounds:
        kills = [phase for phase, count in phases.items() for _ in range(count)]
        rng.shuffle(kills)
        yield from kills


@dataclass(frozen=True)
class Place:
    """A folder with stories, for runs that share nothing but compiled programs."""

    folder: Path

    def command(self, life: str) -> list[str]:
        return [
            *(sys.executable, "scripts/train.py", *FLAGS, f"--workdir={self.folder / life / 'run'}"),
            f"--config.data.train_files={self.folder / 'train.txt'}",
            f"--config.data.valid_files={self.folder / 'valid.txt'}",
            f"--config.data.cache_dir={self.folder / life / 'cache'}",
        ]

    def start(
        self, life: str, phase: str | None, rng: random.Random, numbers: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    ) -> int:
        """Runs the command until it ends, with signals from a random moment of the phase on; returns its exit code."""
        environment = script_environment(
            JAX_COMPILATION_CACHE_DIR=str(self.folder / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            PYTHONUNBUFFERED="1",  # each line is seen when it is written
        )
        process = subprocess.Popen(
            self.command(life),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        seen = Start(self.folder / life / "run")
        begins, longest = PHASES[phase] if phase else (lambda start: False, 0.0)
        with process:
            try:
                if self._watch(process, seen, begins, SECONDS_PER_START):
                    delay = seen.seconds + rng.uniform(0, longest)
                    self._watch(process, seen, lambda start: start.seconds >= delay, SECONDS_PER_START)
                    for number in numbers:
                        if process.poll() is None:
                            os.killpg(process.pid, number)
                    self._watch(process, seen, lambda start: False, SECONDS_TO_SAVE)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        assert code in (0, -signal.SIGKILL if numbers == (signal.SIGKILL,) else 128 + numbers[0]), seen.text
        assert "Traceback" not in seen.text, seen.text
        return code

    def _watch(
        self, process: subprocess.Popen[bytes], seen: Start, until: Callable[[Start], bool], most_seconds: float
    ) -> bool:
        """Looks on until `until` is so, and returns True; or until the process ends."""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        began = seen.seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not until(seen):
                if selector.select(timeout=0.002):
                    if not (content := process.stdout.read()):
                        return False
                    seen.text += content.decode(errors="replace")
                seen.look()
                assert seen.seconds - began < most_seconds, seen.text
        return True


def names_below(folder: Path) -> set[str]:
    """Returns the names of all files and folders, hidden and temporary ones too, that two runs must have in common.

    Of a checkpoint that is its folder, since orbax draws the names inside; TensorBoard gets a file from every start;
    and what sources hash to is remembered only once they are some seconds old.
    """
    names = {path.relative_to(folder).parts for path in folder.rglob("*")}
    shortened = {parts[:3] if "checkpoints" in parts else parts for parts in names}
    return {"/".join(parts) for parts in shortened if not {"tensorboard", "source_hashes.json"} & set(parts)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_jsonl(path)]


def check_the_same(place: Place, life: str) -> None:
    """Fails where a run that was killed or stopped differs from the undisturbed one, or has left anything behind."""
    ours, undisturbed = place.folder / life, place.folder / "undisturbed"
    assert parameter_bytes(ours / "run") == parameter_bytes(undisturbed / "run")
    rows = rows_of(ours / "run" / "metrics.jsonl")
    assert [row["update"] for row in rows] == list(range(1, NUM_UPDATES + 1))
    assert rows == rows_of(undisturbed / "run" / "metrics.jsonl")
    assert rows_of(ours / "run" / "samples.jsonl") == rows_of(undisturbed / "run" / "samples.jsonl")
    data = find_data(from_dict(json.loads((ours / "run" / "config.json").read_text())))
    assert data is not None
    assert f"Finished: {NUM_UPDATES} updates" in (ours / "run" / "report.html").read_text()
    assert names_below(ours) == names_below(undisturbed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("kill"))
    write_stories(place.folder / "train.txt", range(6_000))
    write_stories(place.folder / "valid.txt", range(6_000, 6_400))
    assert place.start("undisturbed", None, random.Random(0)) == 0
    return place


@pytest.mark.slow
def test_a_run_killed_again_and_again_comes_to_the_very_same_end(place, full, tally: Counter[str]):
    rng, life = random.Random(3), 0
    for phase in (phase for _ in range(9 if full else 1) for phase in plan_kills(WHOLE if full else SHORT, rng)):
        for _ in range(MOST_TRIES):
            tally["starts"] += 1
            if place.start(f"life{life}", phase, rng):
                tally[f"killed in {phase}"] += 1
                break
            # It was done first, or the phase lay behind it already: the next life comes by there again.
            tally[f"done before {phase}"] += 1
            check_the_same(place, f"life{life}")
            life += 1
        else:
            pytest.fail(f"no run was caught in {phase}: {tally}")
    assert place.start(f"life{life}", None, rng) == 0
    check_the_same(place, f"life{life}")
    tally["runs that ended the same"] = life + 1
    assert sum(count for outcome, count in tally.items() if outcome.startswith("killed")) >= (100 if full else 10)


ONCE = {"SIGTERM": (signal.SIGTERM,), "SIGINT": (signal.SIGINT,), "SIGINT twice": (signal.SIGINT, signal.SIGINT)}
# Where each is sent, in order; what lies behind a run already is not done again.
SHORT_SIGNALS = [("SIGTERM", "encoding"), ("SIGINT", "training"), ("SIGTERM", "saving"), ("SIGINT twice", "evaluation"),
                 ("SIGINT", "report")]  # fmt: skip
PHASES_TO_STOP = ("tokenizer", "encoding", "set-up", "training", "saving", "evaluation", "report")
WHOLE_SIGNALS = [(name, phase) for phase in PHASES_TO_STOP for name in ONCE]


@pytest.mark.slow
def test_a_run_asked_to_stop_is_saved_in_time_and_comes_to_the_very_same_end(place, full, tally: Counter[str]):
    rng, life = random.Random(4), 0
    for name, phase in WHOLE_SIGNALS if full else SHORT_SIGNALS:
        for _ in range(MOST_TRIES):
            if place.start(f"stopped{life}", phase, rng, ONCE[name]):
                tally[f"{name} in {phase}"] += 1
                break
            check_the_same(place, f"stopped{life}")
            life += 1
        else:
            pytest.fail(f"no run was caught in {phase}: {tally}")
    assert place.start(f"stopped{life}", None, rng) == 0
    check_the_same(place, f"stopped{life}")
    tally["runs that ended the same"] = life + 1
