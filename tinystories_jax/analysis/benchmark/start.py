"""From a command to its first update, as a user waits for it: whole processes of scripts/train.py, by phase."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinystories_jax
from tinystories_jax.analysis.benchmark.inputs import with_rows
from tinystories_jax.analysis.timing import spread_of
from tinystories_jax.config import Config, to_dict
from tinystories_jax.data.prepare import find_data, prepare_data
from tinystories_jax.errors import UserError

_TRAIN = Path(tinystories_jax.__file__).parents[1] / "scripts" / "train.py"
# What ends each phase: the first line on stderr that begins so. JAX is imported in the second.
_PHASES = {"data": "stories shared", "imports_and_checks": "run ", "first_update": "update 1/"}
_DOCTOR = ("nodoctor", "doctor")
_CONFIG = """import json

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(json.loads({values!r}))
"""


def measure_start(config: Config, rows: int, rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Returns the seconds from command to first update: first and second start, without and with the doctor.

    A first start finds no compiled program, a second one those of the first. The token caches are there: those of the
    config where they are prepared, else a small one of its files or of the bundled sample. An update is one micro-batch
    of `rows` rows.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        config, origin = _with_prepared_data(config, folder)
        path = folder / "config.py"
        path.write_text(_CONFIG.format(values=_to_json(_shortened(config, rows))), encoding="utf-8")
        taken: dict[str, dict[str, list[dict[str, float]]]] = {}
        for turn in range(1, rounds + 1):
            for doctor in _DOCTOR:
                compiled = folder / f"compiled-{turn}-{doctor}"
                for start in ("first", "second"):
                    log(f"start: round {turn} of {rounds}, --{doctor}, {start} start")
                    workdir = folder / f"run-{turn}-{doctor}-{start}"
                    arguments = [f"--config={path}", f"--workdir={workdir}", f"--{doctor}"]
                    phases = _time_phases(arguments, {"JAX_COMPILATION_CACHE_DIR": str(compiled)})
                    taken.setdefault(doctor, {}).setdefault(start, []).append(phases)
    return {
        "stories": origin,
        "rows": rows,
        **{doctor: {start: _summarize(runs) for start, runs in starts.items()} for doctor, starts in taken.items()},
    }


def _with_prepared_data(config: Config, folder: Path) -> tuple[Config, str]:
    """Returns `config` with data that is prepared, and where its stories come from."""
    if find_data(config) is not None:
        return config, "the config's own caches"
    origin = f"the config's files {config.data.train_files}"
    data = dataclasses.replace(config.data, cache_dir=str(folder / "cache"))
    if config.data.source != "files":
        origin = "the bundled sample"
        data = dataclasses.replace(data, source="sample")
    # Of the same stories, since what a config trains its tokenizer on may be a large download.
    tokenizer = dataclasses.replace(config.tokenizer, source="stories")
    config = dataclasses.replace(config, data=data, tokenizer=tokenizer)
    prepare_data(config, show_progress=False, log=lambda line: None)
    return config, origin


def _shortened(config: Config, rows: int) -> Config:
    """Returns `config` with updates of one micro-batch, and without an end soon after the first."""
    train = dataclasses.replace(with_rows(config, rows).train, grad_accum_steps=1, max_updates=1000)
    return dataclasses.replace(config, train=train)


def _to_json(config: Config) -> str:
    values = to_dict(config)
    # What `resolve` derives it also refuses to read.
    for section, name in ((values, "schedule"), (values["model"], "head_dim"), (values["model"], "vocab_size")):
        del section[name]
    return json.dumps(values)


def _time_phases(arguments: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Returns the seconds of each phase of a training script, which is killed after its first update."""
    began = before = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(_TRAIN), *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    phases: dict[str, float] = {}
    lines: list[str] = []
    ends = iter(_PHASES.items())
    phase, end = next(ends)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if not line.startswith(end):
                continue
            now = time.perf_counter()
            phases[phase], before = now - before, now
            if phase == "first_update":
                return {"total": now - began, **phases}
            phase, end = next(ends)
    finally:
        process.kill()
        process.communicate()
    raise UserError([f"training ended before its {phase} with exit code {process.returncode}; it said:", *lines[-5:]])


def _summarize(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {phase: spread_of([run[phase] for run in runs])._asdict() for phase in runs[0]}
