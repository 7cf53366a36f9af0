"""What is wrong with a device, its driver or a checkpoint is found, by name; what is sound passes."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.small_run import Run, finished_run
from tinystories_jax.analysis import doctor
from tinystories_jax.analysis.check import Outcome
from tinystories_jax.analysis.machine_checks import _OLDEST_DRIVER, _device_problems, check_checkpoint
from tinystories_jax.data.prepare import PreparedData, prepare_data
from tinystories_jax.data.tokenizer import save_tokenizer

GPU, CPU = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")


@pytest.fixture
def plant_driver(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Plants an nvidia-smi that answers with a version; without one there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def plant(version: str) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\necho {version}\n")
        command.chmod(0o755)

    return plant


def test_a_machine_without_a_driver_has_no_problem(plant_driver):
    assert _device_problems(CPU) == []


def test_a_gpu_that_is_not_used_is_found_unless_that_is_meant(plant_driver, monkeypatch):
    plant_driver("570.86.15")
    assert _device_problems(GPU) == []
    (problem,) = _device_problems(CPU)
    assert "this JAX runs on the CPU" in problem
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert _device_problems(CPU) == []


def test_a_driver_that_is_too_old_is_found(plant_driver):
    plant_driver(f"{_OLDEST_DRIVER}.60.13")
    assert _device_problems(GPU) == []
    plant_driver(f"{_OLDEST_DRIVER - 1}.60.13")
    (problem,) = _device_problems(GPU)
    assert f"driver is {_OLDEST_DRIVER - 1}" in problem
    plant_driver("no devices were found")
    assert _device_problems(GPU) == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Iterator[Run]:
    with finished_run(tmp_path_factory.mktemp("checkpoint")) as run:
        yield run


@pytest.fixture
def workdir(sound, tmp_path) -> Path:
    """Returns a copy of the run, to be changed."""
    return shutil.copytree(sound.workdir, tmp_path / "run")


def the_problem(data: PreparedData, workdir: Path) -> str:
    check = check_checkpoint(data, workdir)
    assert check.outcome == Outcome.FAIL
    return check.note


def test_a_sound_checkpoint_passes_and_is_skipped_without_data(sound, workdir):
    check = check_checkpoint(sound.data, workdir)
    assert check.outcome == Outcome.PASS
    assert check.figures["loss"] == pytest.approx(check.figures["logged_loss"], rel=1e-3)
    check = check_checkpoint(None, workdir, "no cache")
    assert (check.outcome, "no cache" in check.note) == (Outcome.SKIP, True)


def write_loss(change: Callable[[float], Any]) -> Callable[[Path], None]:
    """Returns what changes every validation loss of a log."""

    def write(log: Path) -> None:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        changed = [row | {key: change(row[key]) for key in row if key == "valid/loss"} for row in rows]
        log.write_text("".join(f"{json.dumps(row)}\n" for row in changed))

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write_loss(lambda loss: loss * 1.01), "metrics.jsonl says"),
        (write_loss(lambda loss: float("nan")), "valid/loss=nan for update 6, which is no loss"),
        (write_loss(lambda loss: "low"), "valid/loss='low' for update 6, which is no loss"),
        (lambda log: log.unlink(), "metrics.jsonl is missing"),
        (lambda log: log.write_text(""), "metrics.jsonl has no line for update 6"),
        (lambda log: log.write_text("{\n" + log.read_text()), "metrics.jsonl has damaged lines (1)"),
        (lambda log: (log.unlink(), log.mkdir()), "metrics.jsonl cannot be read"),
    ],
)
def test_a_log_that_does_not_fit_is_found(sound, workdir, damage, said):
    damage(workdir / "metrics.jsonl")
    assert said in the_problem(sound.data, workdir)


@pytest.fixture(scope="module")
def other(sound, tmp_path_factory) -> PreparedData:
    """Returns data whose stories and tokenizer are not those of the run."""
    stories = tmp_path_factory.mktemp("other") / "stories.txt"
    stories.write_text("\n<|endoftext|>\n".join(f"A dog dug up {n} old bones." for n in range(60)))
    files = dataclasses.replace(sound.config.data, train_files=str(stories), valid_files=str(stories))
    return prepare_data(dataclasses.replace(sound.config, data=files))


def test_the_checkpoint_of_another_config_is_found_without_data(sound, workdir):
    planned = doctor._plan_checkpoint(sound.config, None, workdir, "no token cache yet")
    assert [check.outcome for check in doctor._make([planned], set())] == [Outcome.SKIP]
    planned = doctor._plan_checkpoint(dataclasses.replace(sound.config, seed=5), None, workdir, "no token cache yet")
    (check,) = doctor._make([planned], set())
    assert check.outcome == Outcome.FAIL
    assert f"seed: the run has {sound.config.seed}, requested 5" in check.note


def test_another_tokenizer_in_the_run_is_found(sound, workdir, other):
    save_tokenizer(other.tokenizer, workdir / "tokenizer")
    problem = the_problem(sound.data, workdir)
    assert f"{workdir / 'tokenizer'} has SHA-256 {other.tokenizer.sha256[:16]}" in problem
    assert sound.data.tokenizer.sha256[:16] in problem


def test_another_tokenizer_of_the_caches_is_found(workdir, other):
    problem = the_problem(other, workdir)
    assert f"the token caches were made with the tokenizer of SHA-256 {other.tokenizer.sha256[:16]}" in problem
    assert "validation stories" not in problem


def test_other_validation_stories_are_found(sound, workdir, other):
    problem = the_problem(dataclasses.replace(sound.data, valid=other.valid), workdir)
    assert "validation stories are not those of the run" in problem
