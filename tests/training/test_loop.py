"""The loop where runs go wrong: divergence, a full disk, early stopping, another machine's memory."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import pytest

from tests.tiny import read_tiny_values
from tinystories_jax.config import Config, resolve
from tinystories_jax.data.prepare import prepare_data
from tinystories_jax.errors import UserError
from tinystories_jax.training import loop
from tinystories_jax.training.loop import TrainResult, train


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Once there was a cat. The cat saw {n} birds." for n in range(60)))
    return path


@pytest.fixture(name="config")
def make_config(stories) -> Config:
    values = read_tiny_values()
    values.data.update(source="files", train_files=str(stories), valid_files=str(stories))
    values.data.cache_dir = str(stories.parent / "cache")
    values.tokenizer.vocab_size = 270
    values.train.update(max_updates=6)
    values.eval.update(every=2, max_batches=1)
    values.checkpoint.every = 2
    values.sample.update(prompts=("A",), max_new_tokens=4)
    values.logging.update(every=1, tensorboard=False)
    return resolve(values)


def change(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def train_on(config: Config, workdir: Path) -> TrainResult:
    return train(config, prepare_data(config), workdir)


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def poison(monkeypatch, *, after_updates: int) -> None:
    """Makes the parameters not finite after some updates, as a diverging run would."""
    make_train_step = loop.make_train_step

    def make_poisoned_step(config, optimizer, schedule):
        step = make_train_step(config, optimizer, schedule)

        def poisoned_step(state, block, article_mask_V):
            if int(state.opt_state.gradient_step) >= after_updates:
                state = state._replace(params=jax.tree.map(lambda leaf: leaf * float("nan"), state.params))
            return step(state, block, article_mask_V)

        return poisoned_step

    monkeypatch.setattr(loop, "make_train_step", make_poisoned_step)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_update(config, tmp_path, monkeypatch):
    poison(monkeypatch, after_updates=4)
    with pytest.raises(UserError, match=r"update 5: the loss is not finite; .*update 4.*try a lower"):
        train_on(config, tmp_path)
    assert [row["update"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert max(checkpoints_of(tmp_path)) == 4


def test_without_a_checkpoint_the_message_says_so(config, tmp_path, monkeypatch):
    poison(monkeypatch, after_updates=1)
    with pytest.raises(UserError, match=r"update 2: the loss is not finite; no checkpoint was saved"):
        train_on(change(config, "logging", every=100), tmp_path)


def test_a_full_disk_spares_the_checkpoints_before_and_the_run_goes_on_with_room(config, tmp_path, monkeypatch):
    disk_usage, asked = shutil.disk_usage, []

    def full_from_the_second_time(path):
        asked.append(path)
        return disk_usage(path)._replace(free=1000 if len(asked) > 1 else 10**9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full_from_the_second_time)
        with pytest.raises(UserError, match=r"takes 0 MB but 0 MB are free; .*make room and run the same command"):
            train_on(config, tmp_path)
    assert checkpoints_of(tmp_path) == [2]
    assert train_on(config, tmp_path).update == 6


def test_early_stopping_saves_where_it_stops_and_a_rerun_trains_nothing(config, tmp_path):
    # At such a rate the loss soon gets worse from one evaluation to the next.
    config = change(
        change(config, "optim", learning_rate=3.0, min_learning_rate=3.0, warmup_updates=0), "eval", every=1
    )
    config = change(change(config, "eval", early_stopping_patience=1), "train", max_updates=50)
    config = change(config, "checkpoint", every=100)
    first = train_on(config, tmp_path)
    assert first.stopped_early
    assert first.update < 50
    assert first.update in checkpoints_of(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train_on(config, tmp_path)
    assert (again.update, again.stopped_early) == (first.update, True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_advice_for_out_of_memory_can_be_followed_in_the_same_workdir(config, tmp_path, monkeypatch):
    class OutOfMemory:
        def __init__(self, **arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "ProgressLine", OutOfMemory)
        with pytest.raises(UserError, match=r"=4; this fits: --config.train.batch_size=2 .*grad_accum_steps=4,"):
            train_on(config, tmp_path)
    assert train_on(change(config, "train", batch_size=2, grad_accum_steps=4), tmp_path).update == 6


def test_a_signal_before_the_first_update_saves_nothing_and_says_so(config, tmp_path, monkeypatch):
    start = loop._start_or_resume

    def start_and_be_stopped(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return start(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_start_or_resume", start_and_be_stopped)
        result = train_on(config, tmp_path)
    assert (result.update, result.signal) == (0, signal.SIGTERM)
    assert "before the first update" in result.summary()
    assert "sample.py" not in result.summary()
    assert train_on(config, tmp_path).update == 6


def test_other_stories_are_refused_by_field_and_fingerprint(config, tmp_path, stories):
    train_on(config, tmp_path / "run")
    other = tmp_path / "other.txt"
    separator = "\n<|endoftext|>\n"
    # In another order: as many tokens, so no field of the config tells them apart.
    other.write_text(separator.join(reversed(stories.read_text().split(separator))))
    tokenizer = change(config, "tokenizer", path=str(tmp_path / "run" / "tokenizer"))
    with pytest.raises(UserError, match=r"trained on other stories.*data\.train_files: .*other\.txt"):
        train_on(change(tokenizer, "data", train_files=str(other)), tmp_path / "run")


def test_without_its_config_json_a_run_is_still_not_continued_with_other_values(config, tmp_path):
    train_on(config, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"optim\.learning_rate: the run has 0\.004, requested 0\.003"):
        train_on(change(config, "optim", learning_rate=0.003), tmp_path)
