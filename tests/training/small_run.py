"""The smallest runs of the real loop, in this process: seconds each, once their programs are compiled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import read_tiny_values
from tinystories_jax.config import Config, resolve, with_data
from tinystories_jax.data.cache import num_blocks
from tinystories_jax.data.prepare import PreparedData, prepare_data
from tinystories_jax.training import loop
from tinystories_jax.training.checkpoint import Checkpoints
from tinystories_jax.training.environment import recorded_start
from tinystories_jax.training.loop import TrainResult, _Logs, _meta, _start_or_resume, train
from tinystories_jax.training.memory import compile_step
from tinystories_jax.training.restore import require_checkpoints, restore_state
from tinystories_jax.training.steps import TrainState, TrainStep

LATEST, BEFORE = 6, 4  # the updates of the two checkpoints of `finished_run`
TIMES = ("seconds", "train/tokens_per_second", "train/mfu", "train/data_wait_fraction")


@contextmanager
def shared_programs(folder: Path) -> Iterator[None]:
    """Lets every start of a run reuse what an earlier one has compiled, as processes share it on disk; the step in
    float32 as well, which they compile anew on an x86 processor (tests/faults/test_kill.py)."""
    steps = {}

    def compile_once(config: Config, rows: int) -> TrainStep:
        if (config, rows) not in steps:
            steps[config, rows] = compile_step(config, rows)
        return steps[config, rows]

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", compile_once)
        yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def make_small_config(folder: Path, **fields: Any) -> Config:
    """Returns a config on stories in `folder`; `section__key` is a field. 12.5 updates are an epoch."""
    stories = folder / "stories.txt"
    stories.write_text("\n<|endoftext|>\n".join(f"Once there was a cat. The cat saw {n} birds." for n in range(60)))
    values = read_tiny_values()
    values.data.update(source="files", train_files=str(stories), valid_files=str(stories))
    values.data.cache_dir = str(folder / "cache")
    values.tokenizer.vocab_size = 270
    values.model.update(d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=8)
    values.train.update(max_updates=6)
    values.eval.update(every=2, max_batches=1)
    values.checkpoint.update(every=2, keep=2)
    values.sample.update(prompts=("A",), max_new_tokens=2)
    values.logging.update(every=1, tensorboard=False)
    for field, value in fields.items():
        section, key = field.split("__")
        values[section][key] = value
    return resolve(values)


def train_on(config: Config, workdir: Path) -> TrainResult:
    return train(config, prepare_data(config), workdir)


def with_schedule(config: Config, data: PreparedData) -> Config:
    """Returns what the loop makes of `config`."""
    blocks = num_blocks(len(data.train.tokens), config.data.sequence_length)
    return with_data(config, vocab_size=data.tokenizer.vocab_size, num_blocks=blocks)


def checkpoints_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of the metrics without the measured times, which no two runs share."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def arrays_of(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def state_of(config: Config, workdir: Path, update: int | None = None) -> list[np.ndarray]:
    """Returns the arrays of a checkpoint, the latest one if no update is named, optimizer state included."""
    data = prepare_data(config)
    config = with_schedule(config, data)
    if update is None:
        update = require_checkpoints(workdir)[-1]
    return arrays_of(restore_state(workdir, update, _meta(config, data))[0])


def are_equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Says whether they are the same bit for bit."""
    return all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in zip(some, others, strict=True))


@dataclass(frozen=True)
class Run:
    """A finished run, with the states of its checkpoints as they come back undamaged."""

    workdir: Path
    config: Config
    data: PreparedData
    states: dict[int, list[np.ndarray]]

    def start(self, workdir: Path) -> tuple[int, TrainState]:
        """Goes on with the copy in `workdir` as training does, up to its next update, which it does not make."""
        with Checkpoints(workdir, self.config) as checkpoints:
            now = _meta(self.config, self.data)
            state, meta = _start_or_resume(checkpoints, now, workdir)
            with _Logs(workdir, meta, tensorboard=False), recorded_start(workdir, resumed=True):
                return meta.update, state


@contextmanager
def finished_run(folder: Path) -> Iterator[Run]:
    """Makes a run of `LATEST` updates in `folder`/run; on the way out what is compiled is shared no longer."""
    small = make_small_config(folder)
    with shared_programs(folder / "compiled"):
        train_on(small, folder / "run")
        states = {update: state_of(small, folder / "run", update) for update in (BEFORE, LATEST)}
        data = prepare_data(small)
        config = with_schedule(small, data)
        yield Run(folder / "run", config, data, states)
