"""Checkpoints: what is kept, what comes back bit for bit, and what is refused by name."""

import dataclasses
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config, EvalConfig
from tinystories_jax.data.tokenizer import StoryTokenizer, train_bpe
from tinystories_jax.errors import UserError, explain_refusal
from tinystories_jax.model.transformer import num_params
from tinystories_jax.training.checkpoint import Checkpoints
from tinystories_jax.training.environment import describe_environment
from tinystories_jax.training.meta import History, LoggedLoss, Meta, require_same_run
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.restore import require_same_config, restore_params, restore_state
from tinystories_jax.training.retention import checkpoint_bytes, is_due, max_checkpoints
from tinystories_jax.training.steps import TrainState, init_state, make_train_step


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return train_bpe(["Once upon a time there was a cat.", "The cat sat on the mat."], vocab_size=280)


@pytest.fixture(name="config")
def make_config(tokenizer) -> Config:
    config = make_tiny_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size),
        checkpoint=dataclasses.replace(config.checkpoint, every=1),
    )


def meta_at(update: int, config: Config, tokenizer: StoryTokenizer) -> Meta:
    fingerprints = "train fingerprint", "validation fingerprint"
    return Meta(update, config, tokenizer, *fingerprints, describe_environment())


def save_run(
    workdir, config: Config, tokenizer: StoryTokenizer, losses: dict[int, float | None]
) -> dict[int, TrainState]:
    """Trains over as many updates as `losses` names and saves each; returns copies of the saved states."""
    assert config.schedule is not None
    optimizer = make_optimizer(config)
    step = make_train_step(config, optimizer)
    state, saved = init_state(config, optimizer), {}
    now, evaluations = meta_at(0, config, tokenizer), []
    block = np.random.RandomState(0).randint(0, 280, (4, 17)).astype(np.int32)
    with Checkpoints(workdir, config) as checkpoints:
        if resumed := checkpoints.restore_latest(now):
            state, evaluations = resumed[0], list(resumed[1].history.evaluations)
        for update, loss in losses.items():
            for _ in range(config.train.grad_accum_steps):
                state, _ = step(state, block, jnp.zeros(tokenizer.vocab_size, bool))
            if loss is not None:
                evaluations.append(LoggedLoss(update, loss, loss / 2))
            history = History(tuple(evaluations), (5.0, 4.0), 1.5 * update)
            checkpoints.save(state, dataclasses.replace(now, update=update, history=history))
            # The next step reuses the state's buffers while the save goes on in the background.
            saved[update] = jax.tree.map(np.array, state)
    return saved


def assert_trees_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def kept(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_file_in_the_place_of_the_checkpoints_is_to_be_moved_away(tmp_path, config):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="is no folder, as a run has there; move it away"):
        Checkpoints(tmp_path, config)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "let it be written to"),
        (errno.EISDIR, "move away what stands in its place"),
        (errno.ENAMETOOLONG, "take a shorter path"),
        (errno.EIO, "mend that"),
    ],
)
def test_the_way_out_is_that_of_the_fault(number, advice):
    said = os.strerror(number)
    assert explain_refusal(OSError(number, said, "/No space left on device")) == (said, advice)
    assert explain_refusal(ValueError(f"of another library: {'x' * 400} {said}")) == (said, advice)


def test_a_fault_that_nobody_foresaw_is_told_in_its_own_words():
    said = os.strerror(errno.EXDEV)
    assert explain_refusal(OSError(errno.EXDEV, said)) == (said, "mend that")
    long = f"of another library: {'x' * 400}"
    assert explain_refusal(ValueError(long)) == (long[:300], "mend that")


def test_other_stories_are_told_of_where_only_what_follows_from_them_differs(tmp_path, config, tokenizer):
    saved = meta_at(1, config, tokenizer)
    ends = tuple(range(1, 2000))
    longer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, num_blocks=999, epoch_ends=ends))
    now = dataclasses.replace(saved, config=longer)
    with pytest.raises(UserError, match="holds another run") as caught:
        require_same_run(saved, now, tmp_path)
    assert max(map(len, caught.value.problems)) < 300
    with pytest.raises(UserError, match="trained on other stories"):
        require_same_run(saved, dataclasses.replace(now, train_fingerprint="0" * 64), tmp_path)
    seeded = dataclasses.replace(now, config=dataclasses.replace(longer, seed=7), train_fingerprint="0" * 64)
    with pytest.raises(UserError, match="seed: the run has 0, requested 7"):
        require_same_run(saved, seeded, tmp_path)


def test_another_run_is_refused_before_its_data_are_prepared(tmp_path, config, tokenizer):
    require_same_config(tmp_path, config)  # nothing is there
    save_run(tmp_path, config, tokenizer, {1: None, 2: None})
    unprepared = dataclasses.replace(
        config,
        schedule=None,
        model=dataclasses.replace(config.model, vocab_size=0),
        eval=EvalConfig(7, config.eval.max_batches, 0),
    )
    require_same_config(tmp_path, unprepared)
    other = dataclasses.replace(unprepared, seed=5, train=dataclasses.replace(config.train, max_updates=9_999))
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("damaged")
    with pytest.raises(UserError) as caught:
        require_same_config(tmp_path, other)
    assert caught.value.problems[1:] == (
        "  seed: the run has 0, requested 5",
        f"  train.max_updates: the run has {config.train.max_updates}, requested 9999",
    )


@pytest.mark.parametrize(("num_epochs", "kept_epochs"), [(0, 0), (1, 1), (20, 20), (21, 10), (400, 20), (11_719, 19)])
def test_of_many_epochs_not_every_checkpoint_is_kept(config, num_epochs, kept_epochs):
    ends = tuple(range(5, 5 * num_epochs + 1, 5))
    config = dataclasses.replace(
        config, schedule=dataclasses.replace(config.schedule, total_updates=10**6, epoch_ends=ends)
    )
    assert max_checkpoints(config) == config.checkpoint.keep + 2 + kept_epochs
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=10**6))
    assert sum(is_due(end, config) for end in ends) == kept_epochs


def test_the_whole_state_comes_back_bit_for_bit(tmp_path, config, tokenizer):
    saved = save_run(tmp_path, config, tokenizer, {1: None, 2: None})
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest() == 2
        fresh = init_state(config, make_optimizer(config))
        for update in (1, 2):
            state, meta = restore_state(tmp_path, update, meta_at(0, config, tokenizer))
            assert_trees_equal(saved[update], state)
            assert jax.tree.structure(state) == jax.tree.structure(fresh)
            history = History((), (5.0, 4.0), 1.5 * update)
            assert meta == dataclasses.replace(meta_at(update, config, tokenizer), history=history)


def test_the_checkpoint_of_a_stop_goes_when_the_run_has_gone_on(tmp_path, config, tokenizer):
    # Due are the even ones, the end of an epoch, 5, and 7, which improves; 3 and 9 are saved by a stop alone.
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=2, keep=2))
    save_run(tmp_path, config, tokenizer, {1: None, 2: None, 3: None})
    assert kept(tmp_path) == [2, 3]
    save_run(tmp_path, config, tokenizer, {4: 5.0, 5: None, 6: None, 7: 4.0, 8: None, 9: 4.5})
    assert kept(tmp_path) == [5, 7, 8, 9]
    save_run(tmp_path, config, tokenizer, {10: None})
    assert kept(tmp_path) == [5, 7, 8, 10]


def test_latest_best_and_epochs_are_kept_also_after_a_restart(tmp_path, config, tokenizer):
    # epoch_ends is (5, 10, 15, 20); two latest are kept.
    losses: dict[int, float | None] = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 4.5, 6: 4.4, 7: 4.3}
    saved = save_run(tmp_path, config, tokenizer, losses)
    assert kept(tmp_path) == [2, 5, 6, 7]
    save_run(tmp_path, config, tokenizer, {8: 4.1, 9: None, 10: 4.0, 11: 3.5})
    assert kept(tmp_path) == [2, 5, 10, 10 + 1]
    for step, update in {"best": 2, "latest": 11, "epoch:1": 5, "epoch:2": 10, "2": 2}.items():
        params, meta = restore_params(tmp_path, step)
        assert meta.update == update
        if update in saved:
            assert_trees_equal(saved[update].params, params)


def test_without_an_evaluation_best_is_the_latest(tmp_path, config, tokenizer):
    save_run(tmp_path, config, tokenizer, {1: None, 2: None})
    assert restore_params(tmp_path, "best")[1].update == 2


def test_a_checkpoint_holds_all_that_sampling_needs(tmp_path, config, tokenizer):
    save_run(tmp_path, config, tokenizer, {1: 1.0})
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoints", moved / "checkpoints")
    _, meta = restore_params(moved)
    assert (meta.config, meta.tokenizer) == (config, tokenizer)


@pytest.mark.parametrize("step", ["3", "epoch:2", "epoch:0", "newest", "-1", "", "\u0661", "9" * 5000])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path, config, tokenizer, step):
    save_run(tmp_path, config, tokenizer, {1: 1.0, 2: 0.5})
    with pytest.raises(UserError, match=rf"--step={step:.100}.*1, 2"):
        restore_params(tmp_path, step)


def test_folders_without_a_finished_checkpoint_are_refused(tmp_path, config, tokenizer):
    with pytest.raises(UserError, match="no run with checkpoints"):
        restore_params(tmp_path)
    save_run(tmp_path, config, tokenizer, {1: 1.0})
    # What a killed process leaves: a folder that was never committed.
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match="no finished checkpoint"):
        restore_params(tmp_path)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest() is None


@pytest.mark.parametrize("part", ["meta", "params"])
def test_a_missing_part_is_refused_by_name(tmp_path, config, tokenizer, part):
    save_run(tmp_path, config, tokenizer, {1: 1.0})
    shutil.rmtree(tmp_path / "checkpoints" / "1" / part)
    with pytest.raises(
        UserError, match=rf"checkpoints/1/{part}.* (is missing|cannot be read).*there is no other checkpoint"
    ):
        restore_params(tmp_path)


def test_a_foreign_tokenizer_in_a_checkpoint_is_refused(config, tokenizer):
    values = meta_at(1, config, tokenizer).to_json()
    values["tokenizer"] = train_bpe(["another text"], vocab_size=270).json
    with pytest.raises(UserError, match="SHA-256"):
        Meta.from_json(values, "here")
    with pytest.raises(UserError, match="here: not a checkpoint"):
        Meta.from_json({"update": 1}, "here")


@pytest.mark.parametrize(("muon_learning_rate", "moments_of_matrices"), [(0.0, 2), (0.01, 1)])
def test_the_size_of_a_checkpoint_counts_what_the_optimizer_keeps(config, muon_learning_rate, moments_of_matrices):
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, muon_learning_rate=muon_learning_rate))
    d_model, d_ff, kv_width = 32, 48, 16
    in_matrices = 2 * (2 * d_model * d_model + 2 * d_model * kv_width + 3 * d_model * d_ff)
    others = num_params(config.model) - in_matrices
    counted = 4 * (4 * others + (2 + moments_of_matrices) * in_matrices)
    assert 0 <= checkpoint_bytes(config) - counted < 64
