"""From stories to a model that tells stories: the real scripts, in processes of their own, on tiny settings."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.hub_stand_in import REVISION, HubDataset, hub_environment, hub_stand_in
from tests.test_cli import OBEYING_HANGUPS, ROOT, error_line, error_lines, interrupt, run_script, script_environment
from tinystories_jax.lock import locked

SEPARATOR = "\n<|endoftext|>\n"
STORIES_PER_PROMPT = 4
PROMPTS = ["Once upon a time", "Tom had a", "A girl saw the red"]
TIMES = ("seconds", "train/tokens_per_second", "train/mfu", "train/data_wait_fraction")
CONTEXT, BLOCKS_PER_UPDATE, EVAL_EVERY = 32, 8, 4
TINY = [
    "--nodoctor",  # half a minute each time; tests/analysis/test_doctor.py has it on
    "--config=configs/cpu_real.py",
    f"--config.data.sequence_length={CONTEXT}",
    "--config.tokenizer.vocab_size=300",
    "--config.model.d_model=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.d_ff=64",
    "--config.model.dropout=0.1",
    "--config.train.batch_size=4",
    "--config.train.grad_accum_steps=2",
    "--config.train.num_epochs=2",
    "--config.train.max_updates=0",
    "--config.optim.warmup_updates=2",
    f"--config.eval.every={EVAL_EVERY}",
    "--config.eval.max_batches=4",
    "--config.checkpoint.every=100",
    "--config.checkpoint.keep=1",
    f"--config.sample.prompts={tuple(PROMPTS)!r}",
    "--config.sample.max_new_tokens=16",
    "--config.logging.every=3",
]

NO_DROPOUT = "--config.model.dropout=0"  # compiles in half the time


def make_stories(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    names, things, places = (
        ["Tom", "Anna", "the girl"],
        ["an apple", "a red ball", "the cat"],
        ["park", "house", "wood"],
    )
    return [
        f"Once upon a time {rng.choice(names)} went to the {rng.choice(places)}. There {rng.choice(names)} "
        f"found {rng.choice(things)} and number {number} was {rng.choice(things)}."
        for number in range(count)
    ]


@dataclass(frozen=True)
class Place:
    """A folder with stories, where runs share a token cache and compiled programs."""

    folder: Path
    train_files: str
    valid_files: str
    cache: Path

    def flags(self, workdir: Path) -> list[str]:
        return [
            *TINY,
            "--config.data.source=files",
            f"--config.data.train_files={self.train_files}",
            f"--config.data.valid_files={self.valid_files}",
            f"--config.data.cache_dir={self.cache}",
            f"--workdir={workdir}",
        ]

    @property
    def environment(self) -> dict[str, str]:
        return script_environment(
            JAX_COMPILATION_CACHE_DIR=str(self.folder / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
        )

    def train(self, workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return run_script("train", *self.flags(workdir), *more, environment=self.environment)

    def sample(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return run_script("sample", *flags, environment=self.environment)


def write_txt(path: Path, stories: list[str]) -> Path:
    path.write_text(SEPARATOR.join(stories))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    train = write_txt(folder / "train.txt", make_stories(30, seed=0))
    valid = write_txt(folder / "valid.txt", make_stories(10, seed=1))
    return Place(folder, str(train), str(valid), folder / "cache")


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    """Returns the workdir of an undisturbed run."""
    workdir = place.folder / "finished"
    result = place.train(workdir)
    assert result.returncode == 0, result.stderr
    assert f"python scripts/sample.py --checkpoint {workdir}" in result.stdout
    assert f"report: {workdir / 'report.html'}\n" in result.stdout
    return workdir


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]


def schedule_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "config.json").read_text())["schedule"]


def total_updates(workdir: Path) -> int:
    return schedule_of(workdir)["total_updates"]


def starts_of(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "environment.json").read_text())["starts"]


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of the metrics without the measured times, which no two runs share."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def checkpoints_of(workdir: Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def best_update(workdir: Path) -> int:
    evaluations = [row for row in metrics_of(workdir) if "valid/loss" in row]
    return min(evaluations, key=lambda row: row["valid/loss"])["update"]


def parameter_bytes(workdir: Path, step: str = "latest") -> dict[str, bytes]:
    import jax

    from tinystories_jax.training.restore import restore_params

    params, _ = restore_params(workdir, step)
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def contents_of(folder: Path) -> dict[str, str]:
    """Returns the hashes of all files by path, but TensorBoard's and the memory of what sources hashed to, which is
    written only once a source is old enough to be trusted."""
    left_out = {"tensorboard", "source_hashes.json"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not left_out.intersection(path.parts)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_leaves_behind_all_that_belongs_to_it(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "environment.json", "tokenizer", "checkpoints", "metrics.jsonl", "samples.jsonl"),
        *("tensorboard", "report.html"),
    }
    assert (finished / "tokenizer" / "tokenizer.json").is_file()
    assert any((finished / "tensorboard").glob("events.out.tfevents.*"))
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["d_model"] == 32
    assert config["model"]["vocab_size"] == 300
    schedule = config["schedule"]
    # An epoch ends within an update, so that the tests below go over such an end.
    assert schedule["num_blocks"] % BLOCKS_PER_UPDATE != 0
    assert checkpoints_of(finished) == {*schedule["epoch_ends"], total_updates(finished), best_update(finished)}


def test_each_update_is_logged_exactly_once_with_what_falls_due(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    last, blocks = total_updates(finished), schedule_of(finished)["num_blocks"]
    assert [row["update"] for row in rows] == list(range(1, last + 1))
    every_row = {"update", "epoch", "tokens", "train/loss", "train/learning_rate", "train/grad_norm"}
    scores = {"valid/loss", "valid/bits_per_byte", "valid/article_loss", "valid/article_recall"}
    scores |= {"samples/articles", "samples/grammar"}
    for row in rows:
        evaluated = row["update"] % EVAL_EVERY == 0 or row["update"] == last
        assert set(row) - set(TIMES) == every_row | (scores if evaluated else set())
        assert row["tokens"] == row["update"] * BLOCKS_PER_UPDATE * CONTEXT
        assert row["epoch"] == pytest.approx(row["update"] * BLOCKS_PER_UPDATE / blocks)
        # A share of nothing is null: what is written here may need no article and have no sentence.
        assert all(math.isfinite(row[key]) for key in set(row) - {"train/mfu", "samples/articles", "samples/grammar"})
    assert all(set(TIMES) <= set(row) for row in rows if row["update"] % EVAL_EVERY == 0)


def test_the_loss_falls_from_that_of_a_guess_and_the_learning_rate_ends_at_its_minimum(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert rows[0]["train/loss"] == pytest.approx(math.log(300), abs=0.2)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    evaluations = [row for row in rows if "valid/loss" in row]
    assert evaluations[-1]["valid/loss"] < evaluations[0]["valid/loss"]
    assert max(row["train/learning_rate"] for row in rows) == pytest.approx(4e-3)
    assert rows[-1]["train/learning_rate"] == pytest.approx(4e-4)


def test_bits_per_byte_is_the_loss_in_other_units(finished, place):
    manifests = [json.loads(path.read_text()) for path in place.cache.glob("tokens/validation-*/manifest.json")]
    (manifest,) = [m for m in manifests if m["num_stories"] == 10]
    evaluated = read_jsonl(finished / "metrics.jsonl")[-1]
    expected = evaluated["valid/loss"] * manifest["num_tokens"] / (math.log(2) * manifest["num_bytes"])
    assert evaluated["valid/bits_per_byte"] == pytest.approx(expected)


def test_a_run_says_on_what_it_was_made(finished):
    (start,) = starts_of(finished)
    assert start["command"].startswith("python scripts/train.py --nodoctor --config=configs/cpu_real.py")
    assert (start["device"], start["num_devices"]) == ("cpu", 1)
    assert start["versions"]["jax"] == version("jax")
    assert start["started"] <= start["ended"]


def test_a_run_ends_with_a_report(finished):
    page = (finished / "report.html").read_text()
    assert f"Finished: {total_updates(finished)} updates" in page
    assert "<svg" in page


def test_a_report_that_cannot_be_written_fails_no_training(finished, place, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "report.html").unlink()
    (workdir / "evaluation.json").mkdir()
    result = place.train(workdir)
    assert result.returncode == 0, result.stderr
    warning = result.stderr.splitlines()[-1]
    assert warning.startswith("warning: no report was written (")
    assert "evaluation.json" in warning
    assert "report:" not in result.stdout


def test_stories_are_sampled_at_each_evaluation(finished):
    rows = read_jsonl(finished / "samples.jsonl")
    evaluated = [row["update"] for row in metrics_of(finished) if "valid/loss" in row]
    prompts = [prompt for prompt in PROMPTS for _ in range(STORIES_PER_PROMPT)]
    assert [row["update"] for row in rows] == [update for update in evaluated for _ in prompts]
    assert [row["prompt"] for row in rows] == prompts * len(evaluated)
    assert all(row["text"].startswith(row["prompt"]) for row in rows)


def test_rerunning_a_finished_run_changes_nothing_reuses_the_cache_and_says_so(finished, place):
    before, cached = contents_of(finished), contents_of(place.cache)
    result = place.train(finished)
    assert result.returncode == 0, result.stderr
    last = total_updates(finished)
    assert f"after update {last}" in result.stderr
    assert f"update {last} of {last}" in result.stdout
    assert f"best checkpoint: update {best_update(finished)}" in result.stdout
    assert contents_of(finished) == before
    assert contents_of(place.cache) == cached
    assert result.stderr.count(": reusing ") == 3  # the tokenizer, the training and the validation split


def test_a_report_older_than_the_last_checkpoint_is_written_again(finished, place, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "report.html").write_text("Stopped")
    os.utime(workdir / "report.html", (1e9, 1e9))
    assert place.train(workdir).returncode == 0
    assert f"Finished: {total_updates(workdir)} updates" in (workdir / "report.html").read_text()


def test_the_same_flags_write_the_stories_of_the_run_streamed_or_not(finished, place):
    last = total_updates(finished)
    written = [row["text"] for row in read_jsonl(finished / "samples.jsonl") if row["update"] == last]
    flags = [f"--checkpoint={finished}", "--temperature=0.8", "--seed=0", "--max_new_tokens=16"]
    flags += [f"--num_samples={STORIES_PER_PROMPT}"]
    flags += [f"--prompt={prompt}" for prompt in PROMPTS]
    for more in (["--step=latest"], [f"--step={last}", "--stream"]):
        result = place.sample(*flags, *more)
        assert result.returncode == 0, result.stderr
        assert f"checkpoint of update {last} " in result.stderr
        # Read as text, any end of a line is a line feed, and such a model writes all of them.
        assert result.stdout == re.sub("\r\n?", "\n", SEPARATOR.join(written)) + "\n"
        assert result.stderr.endswith(f" of {len(written)} stories reached the limit on their length\n")


def test_a_limit_that_the_context_has_no_room_for_is_said(finished, place):
    context = json.loads((finished / "config.json").read_text())["data"]["sequence_length"]
    result = place.sample(f"--checkpoint={finished}", f"--max_new_tokens={context}")
    assert result.returncode == 0, result.stderr
    assert f"--max_new_tokens={context} is cut to what the model's context of {context} has room for\n" in result.stderr


def test_greedy_writes_the_same_story_twice_and_it_begins_with_the_prompt(finished, place):
    best = best_update(finished)
    flags = [f"--checkpoint={finished}", "--temperature=0", "--prompt=Tom had a"]
    by_name, by_number = place.sample(*flags), place.sample(*flags, f"--step={best}", "--seed=7")
    for result in (by_name, by_number):
        assert result.returncode == 0, result.stderr
        assert f"checkpoint of update {best} " in result.stderr
    assert by_name.stdout == by_number.stdout
    assert by_name.stdout.startswith("Tom had a")
    assert len(by_name.stdout) > len("Tom had a\n")


def test_the_checkpoint_of_an_epoch_can_be_sampled(finished, place):
    result = place.sample(f"--checkpoint={finished}", "--step=epoch:1", "--num_samples=2", "--max_new_tokens=4")
    assert result.returncode == 0, result.stderr
    assert f"checkpoint of update {schedule_of(finished)['epoch_ends'][0]} " in result.stderr
    stories = result.stdout.split(SEPARATOR)
    assert len(stories) == 2
    assert all(story.startswith("Once upon a time there was") for story in stories)


def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(finished, place):
    for step in ("100000", "epoch:9", "first", "-1"):
        line = error_line(place.sample(f"--checkpoint={finished}", f"--step={step}"))
        assert f"--step={step}" in line
        assert all(str(update) in line for update in checkpoints_of(finished))


def test_prompts_that_leave_no_room_are_refused_by_name(finished, place):
    flags = [f"--checkpoint={finished}", "--prompt=" + "word " * 100, "--prompt=Tom", "--prompt=" + "noise " * 100]
    for more in ([], ["--stream"]):
        first, second = error_lines(place.sample(*flags, *more))
        assert "'word word" in first
        assert "'noise noise" in second
        assert f"context of {CONTEXT}" in first


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["whole", "streamed"])
def test_a_reader_that_goes_away_leaves_no_traceback(finished, place, more):
    command = [sys.executable, "scripts/sample.py", f"--checkpoint={finished}", "--num_samples=2", *more]
    process = subprocess.Popen(
        command, cwd=ROOT, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


def start_training(
    place: Place, workdir: Path, *, num_prompts: int, within: tuple[str, ...] = (), **how: Any
) -> subprocess.Popen[str]:
    """Starts a run that no compiled program is there for when it samples from that many prompts for the first time.

    So it takes seconds over its next evaluation, time for a signal to arrive before the run has come to its end.
    """
    prompts = tuple(f"{PROMPTS[0]} {number}" for number in range(num_prompts))
    command = [*within, sys.executable, "scripts/train.py", *place.flags(workdir)]
    command += ["--config.logging.every=1", f"--config.sample.prompts={prompts!r}"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(command, cwd=ROOT, env=place.environment, text=True, **how)


# Makes standard input the terminal that the session hangs on; run by what is to start there.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_is_saved(finished, place, tmp_path):
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 200))  # room for the bar of progress
    how: dict[str, Any] = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}
    within = (sys.executable, "-c", TAKE_TERMINAL, *OBEYING_HANGUPS)
    process = start_training(place, tmp_path / "run", num_prompts=4, within=within, **how)
    os.close(terminal)
    with process:
        seen = b""
        while b"update 4: validation loss" not in seen:
            seen += os.read(ours, 4096)
        assert b"| update " in seen
        os.close(ours)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP, seen
    (stopped_at,) = checkpoints_of(tmp_path / "run")
    assert stopped_at < total_updates(finished)
    assert f"Stopped at update {stopped_at} of " in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, None], ids=["by the same Ctrl-C", "alone"])
def test_a_run_whose_progress_nobody_reads_any_longer_is_saved_all_the_same(finished, place, tmp_path, number):
    """As with `2>&1 | tee`, when tee is ended."""
    process = start_training(place, tmp_path / "run", num_prompts=5, stderr=subprocess.STDOUT)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("update 1/"):
                break
        process.stdout.close()
        if number:
            process.send_signal(number)
        assert process.wait(timeout=300) == (128 + number if number else 0)
    assert (tmp_path / "run" / "report.html").exists()
    last, saved_at = total_updates(finished), max(checkpoints_of(tmp_path / "run"))
    assert saved_at < last if number else saved_at == last


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_very_same_end(finished, place, tmp_path):
    workdir, last = tmp_path / "run", total_updates(finished)

    code, stdout, stderr = interrupt(start_training(place, workdir, num_prompts=1), signal.SIGTERM, at="update 1/")
    assert code == 143, stderr
    assert "stopped by SIGTERM and saved; the same command goes on from here" in stdout
    assert "Traceback" not in stderr
    assert "stories shared by train and validation: " in stderr
    (stopped_at,) = checkpoints_of(workdir)
    assert stopped_at < last
    assert f"Stopped at update {stopped_at} of {last}, on " in (workdir / "report.html").read_text()

    process = start_training(place, workdir, num_prompts=2)
    code, stdout, stderr = interrupt(process, signal.SIGINT, at=f"update {stopped_at + 1}/")
    assert code == 130, stderr
    assert "stopped by SIGINT and saved" in stdout
    assert f"resumed   after update {stopped_at}\n" in stderr
    assert "stories shared by" not in stderr
    assert stopped_at < max(checkpoints_of(workdir)) < last
    # An epoch ends after this, within an update.
    assert max(checkpoints_of(workdir)) < schedule_of(workdir)["epoch_ends"][-1]

    # The way to the stories and how much is kept may change; what is learnt from may not.
    shutil.copytree(place.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("cache", "compiled", "finished"))
    moved = replace(
        place,
        train_files=str(tmp_path / "moved" / "train.txt"),
        valid_files=str(tmp_path / "moved" / "valid.txt"),
        cache=tmp_path / "other_cache",
    )
    result = moved.train(workdir, f"--config.tokenizer.path={finished / 'tokenizer'}", "--config.sample.prompts=('x',)")
    assert result.returncode == 0, result.stderr
    # The prompts were others, and so are the scores of what was written.
    learnt, expected = (
        [{key: value for key, value in row.items() if not key.startswith("samples/")} for row in metrics_of(run)]
        for run in (workdir, finished)
    )
    assert learnt == expected
    assert parameter_bytes(workdir) == parameter_bytes(finished)
    assert checkpoints_of(workdir) == checkpoints_of(finished)
    assert len(starts_of(workdir)) == 3
    assert f"Finished: {last} updates" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_another_number_of_devices_is_said_and_changes_nothing(finished, place, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    last = total_updates(finished)
    shutil.rmtree(workdir / "checkpoints" / str(last))
    stopped_at = max(checkpoints_of(workdir))
    two_devices = {**place.environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = run_script("train", *place.flags(workdir), environment=two_devices, timeout=600)
    assert result.returncode == 0, result.stderr
    assert f"warning: since update {stopped_at} has changed: devices 1 -> 2; the last digits" in result.stderr
    assert parameter_bytes(workdir) == parameter_bytes(finished)
    assert metrics_of(workdir) == metrics_of(finished)
    # And back; a checkpoint of two devices is read on one.
    result = place.train(workdir)
    assert result.returncode == 0, result.stderr
    assert f"warning: since update {last} has changed: devices 2 -> 1; the last digits" in result.stderr
    assert [start["num_devices"] for start in starts_of(workdir)] == [1, 2]


def test_what_would_not_continue_a_run_is_refused_with_the_fields_that_differ(finished, place):
    before = contents_of(finished)
    flags = ["--config.model.d_model=64", "--config.seed=1", "--config.optim.learning_rate=1e-3"]
    result = place.train(finished, *flags)
    lines = "\n".join(error_lines(result, after_log=True))
    assert "another --workdir" in lines
    for words in ("model.d_model: the run has 32, requested 64", "seed: the run has 0, requested 1"):
        assert words in lines
    assert "optim.learning_rate: the run has 0.004, requested 0.001" in lines
    assert "eval.every" not in lines
    assert contents_of(finished) == before


def test_another_tokenizer_is_refused(finished, place, tmp_path):
    other = write_txt(tmp_path / "other.txt", ["Quite another story, told for nobody in words unlike the rest."] * 3)
    trained = run_script(
        *("train_tokenizer", "--source=files", f"--train_files={other}", f"--output_dir={tmp_path}"),
        *("--vocab_size=300",),
    )
    assert trained.returncode == 0, trained.stderr
    result = place.train(finished, f"--config.tokenizer.path={tmp_path}")
    assert any("tokenizer: the run has SHA-256" in line for line in error_lines(result, after_log=True))


def test_other_stories_are_refused_even_when_there_are_as_many_of_them(finished, place, tmp_path):
    stories = make_stories(30, seed=0)
    swapped = write_txt(tmp_path / "swapped.txt", [*stories[1:], stories[0]])
    flags = [f"--config.data.train_files={swapped}", f"--config.tokenizer.path={finished / 'tokenizer'}"]
    assert "train cache" in error_line(place.train(finished, *flags), after_log=True)


def test_a_second_trainer_is_refused_at_once_and_readers_are_not(finished, place):
    before = contents_of(finished)
    with locked(finished / "train.lock", when_held=print):
        owner = (finished / "train.lock").read_text().strip()
        line = error_line(place.train(finished))
        assert line == f"error: {finished} is in use by {owner}; wait for it, or give another --workdir"
        assert place.sample(f"--checkpoint={finished}", "--max_new_tokens=4").returncode == 0
        assert run_script("report", str(finished), environment=place.environment).returncode == 0
    assert set(contents_of(finished)) == set(before)
    assert {**contents_of(finished), "report.html": ""} == {**before, "report.html": ""}


def cached_stories(place: Place, split: str) -> set[int]:
    return {json.loads(path.read_text())["num_stories"] for path in place.cache.glob(f"tokens/{split}-*/manifest.json")}


@pytest.mark.slow
def test_stories_come_from_a_hub(place, tmp_path):
    dataset = HubDataset({"default": {"train": make_stories(40, seed=2), "validation": make_stories(10, seed=3)}})
    with hub_stand_in({"roneneldan/TinyStories": dataset}) as endpoint:
        environment = {**place.environment, **hub_environment(endpoint, tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_NUMPY_RANK_PROMOTION", None)
        flags = [*TINY, "--config.data.source=hub", f"--config.data.cache_dir={tmp_path / 'cache'}"]
        flags += [f"--workdir={tmp_path / 'run'}", "--config.train.max_updates=2", NO_DROPOUT]
        result = run_script("train", *flags, environment=environment)
    assert result.returncode == 0, result.stderr
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("tokens/*/manifest.json")]
    assert {(m["source"]["split"], m["num_stories"]) for m in manifests} == {("train", 40), ("validation", 10)}
    assert all(REVISION in json.dumps(m["source"]) for m in manifests)
    assert [row["update"] for row in metrics_of(tmp_path / "run")] == [1, 2]


def test_files_of_all_kinds_are_one_corpus_and_patience_stops_a_run_that_learns_nothing(place, tmp_path):
    stories = make_stories(45, seed=4)
    write_txt(tmp_path / "a.txt", stories[:15])
    lines = [json.dumps({"text" if n % 2 else "story": story}) for n, story in enumerate(stories[15:30])]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"text": stories[30:]}), tmp_path / "c.parquet")
    mixed = replace(place, train_files=f"{tmp_path}/*.txt,{tmp_path}/b.jsonl,{tmp_path}/c.parquet", cache=tmp_path)
    result = mixed.train(
        tmp_path / "run",
        *("--config.optim.learning_rate=0", "--config.optim.min_learning_rate=0", NO_DROPOUT),
        *("--config.eval.every=1", "--config.eval.early_stopping_patience=2"),
    )
    assert result.returncode == 0, result.stderr
    assert cached_stories(mixed, "train") == {45}
    assert total_updates(tmp_path / "run") > 3
    assert [row["update"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert "stopped early" in result.stdout
    assert "best checkpoint: update 1," in result.stdout


@pytest.mark.slow
def test_the_article_weight_changes_what_is_learnt_and_not_what_is_reported(finished, place, tmp_path):
    result = place.train(tmp_path / "run", "--config.train.article_loss_weight=10.0")
    assert result.returncode == 0, result.stderr
    weighted, plain = metrics_of(tmp_path / "run"), metrics_of(finished)
    # The first update's losses come before any step: the same parameters, blocks and dropout.
    assert weighted[0]["train/loss"] == pytest.approx(plain[0]["train/loss"], rel=1e-6)
    assert weighted[0]["train/grad_norm"] != pytest.approx(plain[0]["train/grad_norm"], rel=1e-3)
    assert weighted[-1]["valid/article_loss"] < plain[-1]["valid/article_loss"]
    assert weighted[-1]["valid/loss"] > plain[-1]["valid/loss"]
    assert parameter_bytes(tmp_path / "run") != parameter_bytes(finished)
