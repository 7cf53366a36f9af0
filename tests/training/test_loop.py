"""The loop where runs go wrong: divergence, a full disk, early stopping, another machine's memory."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.test_cli import ROOT
from tests.training.small_run import checkpoints_of, make_small_config, shared_programs, train_on
from tinystories_jax.config import Config
from tinystories_jax.errors import UserError
from tinystories_jax.training import loop
from tinystories_jax.training.restore import restore_params
from tinystories_jax.training.steps import StepMetrics, TrainState


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("loop")
    with shared_programs(folder / "compiled"):
        yield make_small_config(folder)


def change_section(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def change_step(monkeypatch, change: Callable[[int, TrainState, StepMetrics], tuple[TrainState, StepMetrics]]) -> None:
    """Passes what each micro-step returns through `change`, with the number of the update that it is part of."""
    compile_step = loop.compile_step

    def compile_changed_step(config, rows):
        step = compile_step(config, rows)

        def changed_step(state, block, article_mask_V):
            update = int(state.opt_state.gradient_step) + 1
            return change(update, *step(state, block, article_mask_V))

        return changed_step

    monkeypatch.setattr(loop, "compile_step", compile_changed_step)


class Device:
    """Takes a second for each micro-step, and for nothing else: while it is asked for, as a CPU, or after it, as a GPU.
    `now` is the host's clock."""

    def __init__(self, monkeypatch, *, runs_at_once: bool):
        self.now = self.done_at = 0.0
        device_get = jax.device_get

        def run(update: int, state: TrainState, metrics: StepMetrics) -> tuple[TrainState, StepMetrics]:
            self.done_at = max(self.now, self.done_at) + 1
            if runs_at_once:
                self.now = self.done_at
            scalars: Any = [PendingScalar(self, value) for value in metrics]
            return state, StepMetrics(*scalars)

        def get(values):
            pending = [value for value in jax.tree.leaves(values) if isinstance(value, PendingScalar)]
            self.now = max([self.now, *(value.done_at for value in pending)])
            return device_get(jax.tree.map(lambda value: getattr(value, "value", value), values))

        change_step(monkeypatch, run)
        monkeypatch.setattr(loop.jax, "device_get", get)
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)


class PendingScalar:
    def __init__(self, device: Device, value: jax.Array):
        self.value, self.done_at, self._device = value, device.done_at, device

    def is_ready(self) -> bool:
        return self._device.now >= self.done_at


@pytest.mark.parametrize("runs_at_once", [True, False])
@pytest.mark.parametrize("accum_steps", [1, 3])
def test_the_speed_is_that_of_the_device(config, tmp_path, monkeypatch, runs_at_once, accum_steps):
    Device(monkeypatch, runs_at_once=runs_at_once)
    config = change_section(config, "train", max_updates=12, grad_accum_steps=accum_steps)
    config = change_section(change_section(config, "logging", every=3), "eval", every=7)
    train_on(change_section(config, "checkpoint", every=8), tmp_path / "run")
    speed = config.train.batch_size * config.data.sequence_length
    expected: dict[int, int | None] = dict.fromkeys([1, 3, 6, 7, 8, 9, 12], speed)
    expected[1] = None  # it takes longer
    if runs_at_once and accum_steps == 1:
        expected[7] = None  # it was over when update 6 was looked at
    rows = [row for row in rows_of(tmp_path / "run") if "seconds" in row]
    assert {row["update"]: row.get("train/tokens_per_second") for row in rows} == expected


@pytest.mark.parametrize("runs_at_once", [True, False])
def test_the_first_update_is_told_when_it_is_done_and_its_seconds_count_compiling(
    config, tmp_path, monkeypatch, runs_at_once
):
    device = Device(monkeypatch, runs_at_once=runs_at_once)
    compile_step = loop.compile_step

    def compile_slowly(*arguments):
        device.now += 5
        return compile_step(*arguments)

    monkeypatch.setattr(loop, "compile_step", compile_slowly)
    config = change_section(change_section(config, "train", grad_accum_steps=3), "logging", every=100)
    train_on(config, tmp_path)
    assert rows_of(tmp_path)[0]["seconds"] == 5 + 3


def test_of_a_finished_run_nothing_is_compiled(config, tmp_path, monkeypatch):
    train_on(config, tmp_path)
    compiled = []
    monkeypatch.setattr(loop, "compile_step", lambda *arguments: compiled.append(arguments))
    assert train_on(config, tmp_path).updates_done == 0
    assert compiled == []


def test_where_the_latest_checkpoint_of_a_finished_run_is_damaged_the_step_is_compiled_after_all(config, tmp_path):
    train_on(config, tmp_path)
    latest = tmp_path / "checkpoints" / str(checkpoints_of(tmp_path)[-1])
    for path in (latest / "training").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    assert train_on(config, tmp_path).updates_done > 0


def test_a_start_that_is_refused_ends_when_the_compiler_is_done(config, tmp_path, monkeypatch):
    compiled = []

    def compile_slowly(*arguments):
        time.sleep(0.3)
        compiled.append(arguments)

    def refuse(*arguments):
        raise UserError("refused")

    monkeypatch.setattr(loop, "compile_step", compile_slowly)
    monkeypatch.setattr(loop, "_start_or_resume", refuse)
    with pytest.raises(UserError, match="refused"):
        train_on(config, tmp_path)
    # A process that ends while XLA compiles in a thread of it crashes.
    assert len(compiled) == 1


def test_too_little_memory_to_compile_is_told(config, tmp_path, monkeypatch):
    def compile_without_memory(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(loop, "compile_step", compile_without_memory)
    with pytest.raises(UserError, match=r"out of memory on .*=4; this fits: --config.train.batch_size=2"):
        train_on(config, tmp_path)


def poison(monkeypatch, *, update: int, metric: str = "loss") -> None:
    """Makes `metric` and the parameters not finite in an update, as a diverging run would."""

    def change(now: int, state: TrainState, metrics: StepMetrics) -> tuple[TrainState, StepMetrics]:
        if now < update or state.opt_state.mini_step:
            return state, metrics
        nan = float("nan")
        return state._replace(params=jax.tree.map(lambda leaf: leaf * nan, state.params)), metrics._replace(
            **{metric: getattr(metrics, metric) * nan}
        )

    change_step(monkeypatch, change)


@pytest.mark.parametrize(
    ("update", "metric", "said"),
    # Checkpoints are due after updates 2, 4 and 6, the last.
    [(5, "loss", "loss"), (4, "loss", "loss"), (6, "loss", "loss"), (6, "grad_norm", "gradient")],
)
def test_what_is_not_finite_stops_the_run_at_its_update_and_is_never_saved(
    config, tmp_path, monkeypatch, update, metric, said
):
    poison(monkeypatch, update=update, metric=metric)
    last = (update - 1) // 2 * 2
    three = r"lower --config.optim.learning_rate, .*warmup_updates, or --config.model.dtype"
    with pytest.raises(UserError, match=rf"update {update}: the {said} is not finite; .*update {last}\. .*{three}"):
        train_on(config, tmp_path)
    assert [row["update"] for row in rows_of(tmp_path)] == list(range(1, update))
    assert max(checkpoints_of(tmp_path)) == last
    assert restore_params(tmp_path, "latest")[1].update == last


def test_parameters_that_only_the_update_itself_breaks_are_not_saved(config, tmp_path, monkeypatch):
    def change(update: int, state: TrainState, metrics: StepMetrics) -> tuple[TrainState, StepMetrics]:
        if update == 3 and not state.opt_state.mini_step:
            state = state._replace(params=jax.tree.map(lambda leaf: leaf * float("inf"), state.params))
        return state, metrics

    change_step(monkeypatch, change)
    config = change_section(change_section(config, "checkpoint", every=3), "eval", every=100)
    with pytest.raises(
        UserError, match=r"update 3: nothing is saved: .* not finite; no checkpoint was saved.*try a low"
    ):
        train_on(config, tmp_path)
    assert checkpoints_of(tmp_path) == []


@pytest.mark.parametrize("factor", [1.5, 0.0])
def test_a_loss_spike_is_a_warning_and_a_row_says_so(config, tmp_path, monkeypatch, capfd, factor):
    def change(update: int, state: TrainState, metrics: StepMetrics) -> tuple[TrainState, StepMetrics]:
        return state, metrics._replace(loss=metrics.loss * (2.0 if update == 4 else 1.0))

    change_step(monkeypatch, change)
    train_on(change_section(config, "logging", loss_spike_factor=factor), tmp_path)
    spikes = [row["update"] for row in rows_of(tmp_path) if row.get("train/loss_spike") is True]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert spikes == ([4] if factor else [])
    assert [line[: len("warning: update 4:")] for line in warnings] == (["warning: update 4:"] if factor else [])


def test_without_a_checkpoint_the_message_says_so(config, tmp_path, monkeypatch):
    poison(monkeypatch, update=2)
    with pytest.raises(UserError, match=r"update 2: the loss is not finite; no checkpoint was saved"):
        train_on(change_section(config, "logging", every=100), tmp_path)


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
    config = change_section(
        change_section(config, "optim", learning_rate=3.0, min_learning_rate=3.0, warmup_updates=0), "eval", every=1
    )
    config = change_section(change_section(config, "eval", early_stopping_patience=1), "train", max_updates=50)
    config = change_section(config, "checkpoint", every=100)
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
    assert train_on(change_section(config, "train", batch_size=2, grad_accum_steps=4), tmp_path).update == 6


def stopped_before(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, before which the process gets a signal to stop."""

    def act(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments)

    return act


def test_a_run_that_goes_on_makes_no_second_state(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_load_block", stopped_before(loop._load_block))
        assert train_on(config, tmp_path).update == 1
    # A fresh one, beside the one that is restored, would be memory that the run had not needed before.
    monkeypatch.setattr(loop, "init_state", None)
    assert train_on(config, tmp_path).update == 6


def test_devices_that_are_not_used_are_told_of(config, tmp_path, monkeypatch, capfd):
    (device,) = jax.devices()
    train_on(config, tmp_path / "alone")
    assert "device    cpu, attention" in capfd.readouterr().err
    monkeypatch.setattr(jax, "devices", lambda: [device, device])
    train_on(config, tmp_path / "beside")
    assert "device    cpu (one of 2; the others stay idle," in capfd.readouterr().err


def test_a_signal_before_the_first_update_saves_nothing_and_says_so(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_start_or_resume", stopped_before(loop._start_or_resume))
        result = train_on(config, tmp_path)
    assert (result.update, result.signal) == (0, signal.SIGTERM)
    assert "before the first update" in result.summary()
    assert "sample.py" not in result.summary()
    assert "of this start" not in result.summary()
    assert train_on(config, tmp_path).update == 6


def test_other_stories_are_refused_by_field_and_fingerprint(config, tmp_path):
    train_on(config, tmp_path / "run")
    other = tmp_path / "other.txt"
    separator = "\n<|endoftext|>\n"
    # In another order: as many tokens, so no field of the config tells them apart.
    stories = Path(config.data.train_files).read_text().split(separator)
    other.write_text(separator.join(reversed(stories)))
    tokenizer = change_section(config, "tokenizer", path=str(tmp_path / "run" / "tokenizer"))
    with pytest.raises(UserError, match=r"trained on other stories.*data\.train_files: .*other\.txt"):
        train_on(change_section(tokenizer, "data", train_files=str(other)), tmp_path / "run")


def test_without_its_config_json_a_run_is_still_not_continued_with_other_values(config, tmp_path):
    train_on(config, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"optim\.learning_rate: the run has 0\.004, requested 0\.003"):
        train_on(change_section(config, "optim", learning_rate=0.003), tmp_path)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_second_interrupt_exits_at_once_and_the_first_does_not(first):
    lines = [
        "import signal",
        "from tinystories_jax.signals import StopSignals",
        "with StopSignals() as stop:",
        f"    signal.raise_signal(signal.{first})",
        "    print(signal.Signals(stop.signal).name, flush=True)",
        "    signal.raise_signal(signal.SIGINT)",
        "    print('still there')",
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 130
    assert result.stdout == f"{first}\n"
    again = "a second Ctrl-C" if first == "SIGINT" else "Ctrl-C"
    assert f"finishing this update and saving; {again} exits at once" in result.stderr
