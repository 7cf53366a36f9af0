"""A run stopped and started again, wherever and how often, against the same run undisturbed: bit for bit."""

import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.training.small_run import are_equal, make_small_config, metrics_of, shared_programs, state_of, train_on
from tinystories_jax.config import Config
from tinystories_jax.training import loop

UPDATES = 28  # two epochs of 12.5 updates each, and some


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("resume")
    with shared_programs(folder / "compiled"):
        yield make_small_config(
            folder,
            model__dropout=0.1,
            train__max_updates=UPDATES,
            eval__every=7,
            checkpoint__every=5,
            logging__loss_spike_factor=1.001,
        )


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    train_on(config, workdir)
    return workdir


class KilledError(Exception):
    """The end of a process that has no time to save."""


def stop_at(patch: pytest.MonkeyPatch, micro_step: int, *, kill: bool) -> None:
    load_block = loop._load_block

    def load_and_stop(data, config, now):
        if now == micro_step:
            if kill:
                raise KilledError
            signal.raise_signal(signal.SIGTERM)
        return load_block(data, config, now)

    patch.setattr(loop, "_load_block", load_and_stop)


def test_a_run_stopped_many_times_is_the_run_undisturbed(config, undisturbed, tmp_path, monkeypatch):
    schedule = state_of(config, undisturbed)
    # Before and behind each half of an update, at the first one, over the ends of both epochs (within 13 and at 25).
    for micro_step, kill in [(0, False), (3, False), (9, True), (10, False), (24, True), (25, False), (27, True),
                             (49, False), (50, True), (51, False), (54, True)]:  # fmt: skip
        with monkeypatch.context() as patch:
            stop_at(patch, micro_step, kill=kill)
            if kill:
                with pytest.raises(KilledError):
                    train_on(config, tmp_path)
            else:
                result = train_on(config, tmp_path)
                # A signal within an update lets it be finished.
                assert (result.update, result.signal) == (micro_step // 2 + 1, signal.SIGTERM)
    assert train_on(config, tmp_path).update == UPDATES
    assert are_equal(state_of(config, tmp_path), schedule)
    assert [row["update"] for row in metrics_of(tmp_path)] == list(range(1, UPDATES + 1))
    assert metrics_of(tmp_path) == metrics_of(undisturbed)
    assert any("train/loss_spike" in row for row in metrics_of(undisturbed))
    assert (tmp_path / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_update_is_the_run_undisturbed(config, undisturbed, tmp_path, monkeypatch):
    for update in range(UPDATES - 1):
        with monkeypatch.context() as patch:
            # Before the first half of the update, or in its middle.
            stop_at(patch, 2 * update + update % 2, kill=False)
            assert train_on(config, tmp_path).update == update + 1
    assert train_on(config, tmp_path).update == UPDATES
    assert are_equal(state_of(config, tmp_path), state_of(config, undisturbed))
    assert metrics_of(tmp_path) == metrics_of(undisturbed)
    assert (tmp_path / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def test_what_decides_is_in_the_checkpoint_and_not_in_the_logs(config, undisturbed, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(patch, 40, kill=False)
        train_on(config, tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl", "environment.json", "config.json", "tokenizer/tokenizer.json"):
        (tmp_path / name).unlink()
    capfd.readouterr()
    result = train_on(config, tmp_path)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ") and ".js" in line]
    assert len(warnings) == 5
    assert any("metrics.jsonl is missing; no rows are left of updates 1-21" in line for line in warnings)
    assert are_equal(state_of(config, tmp_path), state_of(config, undisturbed))
    assert metrics_of(tmp_path) == metrics_of(undisturbed)[21:]
    again = train_on(config, undisturbed)
    assert (result.best_update, result.best_loss) == (again.best_update, again.best_loss)


def test_a_run_with_muon_goes_on_bit_for_bit_and_compiles_nothing_anew(tmp_path, monkeypatch, caplog):
    with shared_programs(tmp_path / "compiled"):
        config = make_small_config(tmp_path, optim__muon_learning_rate=0.01)
        train_on(config, tmp_path / "undisturbed")
        with monkeypatch.context() as patch:
            stop_at(patch, 6, kill=False)
            assert train_on(config, tmp_path / "run").update == 4
        with jax.log_compiles():
            result = train_on(config, tmp_path / "run")
        assert result.update == 6
        assert " s of this start" in result.summary()
        assert [record.message for record in caplog.records if "XLA compilation" in record.message] == []
        assert are_equal(state_of(config, tmp_path / "run"), state_of(config, tmp_path / "undisturbed"))
        assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
