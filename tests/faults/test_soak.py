"""A long run of a tiny model: memory, open files and threads stay what they were, and nothing is compiled anew."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.place import ROOT, write_stories
from tests.test_cli import script_environment

FLAGS = [
    *("--nodoctor", "--config=configs/quickstart.py", "--config.data.source=files"),
    *("--config.data.sequence_length=16", "--config.tokenizer.vocab_size=300"),
    *("--config.model.d_model=16", "--config.model.num_layers=1", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.d_ff=16", "--config.train.batch_size=2"),
    *("--config.eval.max_batches=2", "--config.checkpoint.keep=1", "--config.logging.every=5"),
    *("--config.sample.prompts=('Once upon a time',)", "--config.sample.max_new_tokens=8"),
]


SEEN = ("resident_megabytes", "open_files", "threads")


@dataclass(frozen=True)
class Look:
    """One look at a process from outside."""

    update: int
    resident_megabytes: float
    open_files: int
    threads: int


def look_at(pid: int, update: int) -> Look:
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Look(
        update,
        resident_megabytes=int(fields["VmRSS"].split()[0]) / 1024,
        open_files=sum(1 for _ in (folder / "fd").iterdir()),
        threads=int(fields["Threads"]),
    )


def watch(command: list[str]) -> tuple[list[Look], list[str]]:
    """Runs the command; returns what was seen of it at each line on an update, and its lines."""
    looks, lines = [], []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=script_environment(JAX_LOG_COMPILES="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            # The last line comes when the process may already be on its way to the report.
            if (said := re.match(r"update (\d+)/(\d+) ", line)) and said[1] != said[2]:
                looks.append(look_at(process.pid, int(said[1])))
    assert process.returncode == 0, "".join(lines)
    return looks, lines


@pytest.mark.slow
def test_a_long_run_grows_in_nothing(tmp_path, full, tally: Counter[str]):
    # A save takes as long as some 30 updates: there must be looks between two.
    num_updates, every = (2_000 if full else 600), 100
    train, valid = write_stories(tmp_path / "train.txt", range(200)), write_stories(tmp_path / "valid.txt", range(9))
    looks, lines = watch(
        [
            *(sys.executable, "scripts/train.py", *FLAGS, f"--workdir={tmp_path / 'run'}"),
            *(f"--config.train.max_updates={num_updates}", f"--config.eval.every={every}"),
            f"--config.checkpoint.every={every // 2}",
            *(f"--config.data.train_files={train}", f"--config.data.valid_files={valid}"),
            f"--config.data.cache_dir={tmp_path / 'cache'}",
        ]
    )
    # Warmed up after two evaluations; then the first third against the last.
    warm = [look for look in looks if look.update > 2 * every]
    early, late = warm[: len(warm) // 3], warm[-(len(warm) // 3) :]
    assert len(early) >= 5
    # A save under way has files and threads of its own, ten and more, and most looks of a third may fall into one.
    # What leaks lifts them all, so the least of each third are compared.
    before, after = ({name: min(getattr(look, name) for look in part) for name in SEEN} for part in (early, late))
    tally |= Counter({"updates": num_updates, "looks": len(warm)})
    for name in SEEN:
        tally |= Counter({f"{name} early": round(before[name]), f"{name} late": round(after[name])})
    assert after["resident_megabytes"] < before["resident_megabytes"] * 1.02
    assert after["open_files"] <= before["open_files"] + 2
    assert after["threads"] <= before["threads"] + 2
    evaluated = [number for number, line in enumerate(lines) if re.match(r"update \d+: \d+ stories", line)]
    assert len(evaluated) == num_updates // every
    compiled = [number for number, line in enumerate(lines) if "Compiling " in line]
    assert compiled, "the log says nothing of compiling"
    after_first = [lines[number] for number in compiled if number > evaluated[0]]
    assert after_first == []
