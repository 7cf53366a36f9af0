"""The training loop: assembles data, model, optimizer, checkpoints and metrics, and goes from update to update.

Everything that it leaves behind stands in the workdir, so that rerunning the same command goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from tinystories_jax.config import Config, contradictions, from_dict, to_dict, with_data
from tinystories_jax.data.cache import batch_at, num_blocks
from tinystories_jax.data.prepare import PreparedData
from tinystories_jax.data.tokenizer import StoryTokenizer, load_tokenizer, save_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.checker import checker_problem
from tinystories_jax.evaluation.grammar import score_stories
from tinystories_jax.evaluation.samples import check_prompts, write_stories
from tinystories_jax.evaluation.validation import article_mask, validate
from tinystories_jax.model.generate import Sampling
from tinystories_jax.model.transformer import Params, num_params, uses_flash_attention
from tinystories_jax.training.checkpoint import Checkpoints, Meta, checkpoint_bytes, has_checkpoint, max_checkpoints
from tinystories_jax.training.environment import recorded_start
from tinystories_jax.training.jsonl import append_jsonl
from tinystories_jax.training.metrics import (
    MetricsLog,
    ProgressLine,
    drop_after,
    flops_per_token,
    model_flops_utilization,
)
from tinystories_jax.training.optim import learning_rate_schedule, make_optimizer
from tinystories_jax.training.steps import StepMetrics, TrainState, init_state, make_train_step

_STORIES_PER_PROMPT = 4  # at each evaluation: enough to see articles appear, little enough to hold nothing up
_NON_FINITE_ADVICE = (
    "In a new --workdir try a lower --config.optim.learning_rate, a longer --config.optim.warmup_updates, "
    "or --config.model.dtype=float32"
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `best_update` and `best_loss` (nats per token) are None when nothing was evaluated; `seconds`
    and `updates_done` count this process, without the preparation of data; `signal` is what stopped it, None when it
    came to its end."""

    workdir: Path
    update: int
    updates_done: int
    total_updates: int
    best_update: int | None
    best_loss: float | None
    bits_per_byte: float | None
    seconds: float
    stopped_early: bool
    signal: int | None

    def summary(self) -> str:
        """Returns what the user needs next, a few lines."""
        minutes, seconds = divmod(round(self.seconds), 60)
        lines = [f"update {self.update:,} of {self.total_updates:,} in {minutes} min {seconds} s"]
        if self.signal:
            saved = " and saved" if self.update else " before the first update"
            lines[0] += f", stopped by {signal.Signals(self.signal).name}{saved}; the same command goes on from here"
        elif self.stopped_early:
            lines[0] += ", stopped early: no better validation loss for eval.early_stopping_patience evaluations"
        if self.best_update is not None:
            lines.append(
                f"best checkpoint: update {self.best_update:,}, validation loss {self.best_loss:.4f} nats per token, "
                f"{self.bits_per_byte:.4f} bits per byte"
            )
        command = f"python scripts/sample.py --checkpoint {shlex.quote(str(self.workdir))}"
        return "\n".join([*lines, f"write stories with: {command}"] if self.update else lines)


def train(config: Config, data: PreparedData, workdir: Path) -> TrainResult:
    """Trains on `data` until `config` is fulfilled, from the latest checkpoint in `workdir` if there is one.

    Raises `UserError` for anything that the user can mend; what was saved before stays.
    """
    started = time.perf_counter()
    blocks = num_blocks(len(data.train.tokens), config.data.sequence_length)
    config = with_data(config, vocab_size=data.tokenizer.vocab_size, num_blocks=blocks)
    schedule = config.schedule
    assert schedule is not None
    check_prompts(data.tokenizer, config.sample.prompts, config.data.sequence_length)
    _claim_workdir(workdir, config, data.tokenizer)
    _announce(config, workdir)
    article_mask_V = article_mask(data.tokenizer.article_ids, data.tokenizer.vocab_size)
    optimizer = make_optimizer(config)
    train_step = make_train_step(config, optimizer, learning_rate_schedule(config.optim, schedule))
    epoch_ends = frozenset(schedule.epoch_ends)
    micro_steps = config.train.grad_accum_steps

    with _StopSignals() as stop, _explain_out_of_memory(config), Checkpoints(workdir, config) as checkpoints:
        fresh = jax.jit(lambda: init_state(config, optimizer))()
        state, update = _start_or_resume(checkpoints, fresh, config, data)
        drop_after(workdir / "samples.jsonl", update)
        resumed_at = update
        writes_board = config.logging.tensorboard and update < schedule.total_updates
        with (
            MetricsLog(workdir, resume_after=update, tensorboard=writes_board) as log,
            ProgressLine(total=schedule.total_updates, initial=update) as progress,
            contextlib.ExitStack() as record,
        ):
            if update < schedule.total_updates and not _out_of_patience(config, log):
                record.enter_context(recorded_start(workdir))
            meter = _Meter(config, update, log.seconds)
            while update < schedule.total_updates and not stop.signal and not _out_of_patience(config, log):
                for micro_step in range(update * micro_steps, (update + 1) * micro_steps):
                    block = meter.wait_for(_load_block, data, config, micro_step)
                    state, metrics = train_step(state, block, article_mask_V)
                    if meter.is_due():  # figures up to the update before, read while the device is busy with this one
                        log.write(_look(meter, log, progress, checkpoints))
                    meter.add(metrics)
                update += 1
                last = update == schedule.total_updates
                evaluates = last or update % config.eval.every == 0
                saves = last or update % config.checkpoint.every == 0 or update in epoch_ends
                if not (evaluates or saves):
                    continue
                rows = _look(meter, log, progress, checkpoints)
                valid_loss = None
                if evaluates:
                    valid_loss, improved = _evaluate(state.params, data, config, log, rows, progress)
                    _sample(state.params, data.tokenizer, config, workdir, rows[-1], progress)
                    saves = saves or improved
                log.write(rows)
                if saves:
                    checkpoints.save(state, _meta(update, config, data), valid_loss=valid_loss)
                meter.restart()
            # Stopped between two saves, by a signal or for lack of patience.
            if update and checkpoints.latest() != update:
                log.write(_look(meter, log, progress, checkpoints))
                checkpoints.save(state, _meta(update, config, data), valid_loss=None)
            checkpoints.wait()
            best_update = checkpoints.best()
            best = log.evaluations.get(best_update, {}) if best_update is not None else {}
            return TrainResult(
                workdir=workdir,
                update=update,
                updates_done=update - resumed_at,
                total_updates=schedule.total_updates,
                best_update=best_update,
                best_loss=best.get("valid/loss"),
                bits_per_byte=best.get("valid/bits_per_byte"),
                seconds=time.perf_counter() - started,
                stopped_early=update < schedule.total_updates and not stop.signal,
                signal=stop.signal if update < schedule.total_updates else None,
            )


def _load_block(data: PreparedData, config: Config, micro_step: int) -> jax.Array:
    return jax.device_put(
        batch_at(
            data.train.tokens,
            seed=config.seed,
            micro_step=micro_step,
            batch_size=config.train.batch_size,
            sequence_length=config.data.sequence_length,
        )
    )


def _meta(update: int, config: Config, data: PreparedData) -> Meta:
    return Meta(update, config, data.tokenizer, *_fingerprints(data))


def _fingerprints(data: PreparedData) -> tuple[str, str]:
    return data.train.manifest.fingerprint, data.valid.manifest.fingerprint


def _claim_workdir(workdir: Path, config: Config, tokenizer: StoryTokenizer) -> None:
    """Writes config and tokenizer into the run; refuses one with checkpoints that `config` would not continue."""
    path = workdir / "config.json"
    if path.exists() and has_checkpoint(workdir):
        try:
            of_run = from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{path}: cannot be read as a run's config ({error}); give another --workdir") from error
        differing = contradictions(of_run, config)
        stored = load_tokenizer(workdir / "tokenizer")
        if stored.sha256 != tokenizer.sha256:
            differing.append(f"tokenizer: the run has SHA-256 {stored.sha256[:16]}, requested {tokenizer.sha256[:16]}")
        if differing:
            raise UserError(
                [f"{workdir} holds another run; give another --workdir, or the run's own values:"]
                + [f"  {line}" for line in differing]
            )
    workdir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, workdir / "tokenizer")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _announce(config: Config, workdir: Path) -> None:
    schedule, device = config.schedule, jax.devices()[0]
    assert schedule is not None
    tokens_per_update = schedule.blocks_per_update * config.data.sequence_length
    attention = "cuDNN flash" if uses_flash_attention(config.model, device) else "plain, by blocks of queries"
    checkpoint_megabytes = checkpoint_bytes(config) / 1e6
    lines = [
        f"run       {workdir}",
        f"device    {device.device_kind}, attention: {attention}",
        f"model     {num_params(config.model):,} parameters, {config.model.vocab_size:,} tokens, {config.model.dtype}",
        f"schedule  {schedule.total_updates:,} updates of {tokens_per_update:,} tokens, "
        f"{schedule.epoch_at(schedule.total_updates):.2f} epochs, warm-up {schedule.warmup_updates:,} updates",
    ]
    lines.insert(-1, f"disk      up to {max_checkpoints(config):,} checkpoints of {checkpoint_megabytes:,.1f} MB")
    if config.data.source == "sample":
        lines.insert(1, "stories   the bundled sample: made up by this project, not TinyStories")
    if schedule.warmup_updates < config.optim.warmup_updates:
        lines[-1] += f" (optim.warmup_updates={config.optim.warmup_updates:,} cut to half of the run)"
    print("\n".join(lines), file=sys.stderr)


def _start_or_resume(
    checkpoints: Checkpoints, fresh: TrainState, config: Config, data: PreparedData
) -> tuple[TrainState, int]:
    latest = checkpoints.latest()
    if latest is None:
        return fresh, 0
    state, meta = checkpoints.restore(latest, fresh)
    # Again, and against the checkpoint itself: config.json may have been lost or replaced.
    if differing := contradictions(meta.config, config):
        raise UserError(
            [f"{checkpoints.folder.parent} holds checkpoints of another run; give another --workdir or these:"]
            + [f"  {line}" for line in differing]
        )
    for split, saved, now in zip(
        ("train", "validation"), (meta.train_fingerprint, meta.valid_fingerprint), _fingerprints(data), strict=True
    ):
        if saved != now:
            before, given = dataclasses.asdict(meta.config.data), dataclasses.asdict(config.data)
            differing = [
                f"data.{key}: {before[key]!r} then, {given[key]!r} now" for key in given if before[key] != given[key]
            ]
            raise UserError(
                f"{checkpoints.folder.parent}: the run was trained on other stories (its {split} cache is {saved[:16]}"
                f", the data now gives {now[:16]}; {'; '.join(differing) or 'the same fields, so other contents'}); "
                "give back the same stories, or another --workdir"
            )
    finished = meta.config.schedule is not None and latest >= meta.config.schedule.total_updates
    print(f"resumed   after update {latest:,}{', nothing left to do' * finished}", file=sys.stderr)
    return state, latest


def _look(meter: "_Meter", log: MetricsLog, progress: ProgressLine, checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """Waits for the device; returns the rows not written yet, and raises what went wrong since the last look."""
    rows, problem = meter.read()
    if problem:
        log.write(rows)
        last = checkpoints.latest()
        kept = "no checkpoint was saved" if last is None else f"the last checkpoint is update {last}"
        raise UserError(f"{problem}; {kept}. {_NON_FINITE_ADVICE}")
    checkpoints.check()
    if rows:
        progress.show(rows[-1]["update"], text=meter.text(rows[-1]), eta_seconds=meter.eta_seconds())
    return rows


def _evaluate(
    params: Params,
    data: PreparedData,
    config: Config,
    log: MetricsLog,
    rows: list[dict[str, Any]],
    progress: ProgressLine,
) -> tuple[float, bool]:
    """Adds the validation scores to the newest row; returns the loss and whether it is the best so far."""
    scores = validate(params, data.valid, config, data.tokenizer.article_forms)
    if not math.isfinite(scores.loss):
        log.write(rows)
        raise UserError(f"update {rows[-1]['update']}: the validation loss is not finite. {_NON_FINITE_ADVICE}")
    improved = scores.loss < min((row["valid/loss"] for row in log.evaluations.values()), default=float("inf"))
    rows[-1] |= {
        "valid/loss": scores.loss,
        "valid/bits_per_byte": scores.bits_per_byte,
        "valid/article_loss": scores.all_articles.loss,
        "valid/article_recall": scores.all_articles.recall,
    }
    best = " (best)" if improved else ""
    progress.note(
        f"update {rows[-1]['update']}: validation loss {scores.loss:.4f}, {scores.bits_per_byte:.4f} bits per byte, "
        f"articles: loss {scores.all_articles.loss:.3f}, recall {scores.all_articles.recall:.1%}{best}"
    )
    return scores.loss, improved


def _sample(
    params: Params,
    tokenizer: StoryTokenizer,
    config: Config,
    workdir: Path,
    row: dict[str, Any],
    progress: ProgressLine,
) -> None:
    """Writes a few stories per configured prompt into samples.jsonl, adds their scores to `row`, and shows one."""
    stories = write_stories(
        params,
        tokenizer,
        config,
        [prompt for prompt in config.sample.prompts for _ in range(_STORIES_PER_PROMPT)],
        Sampling(temperature=config.sample.temperature),
        seed=config.seed,
        max_new_tokens=config.sample.max_new_tokens,
    )
    append_jsonl(
        workdir / "samples.jsonl", [{"update": row["update"], **dataclasses.asdict(story)} for story in stories]
    )
    checks_grammar = checker_problem() is None
    scores = score_stories(
        [story.text for story in stories],
        finished=[story.finished for story in stories],
        check_grammar=checks_grammar,
    )
    row["samples/articles"] = scores.articles
    said = f"{len(stories)} stories: {scores.articles:.0%} of the articles needed"
    if checks_grammar:
        row["samples/grammar"] = scores.grammar
        said += f", grammar {scores.grammar:.1f} of 10"
    progress.note(f"update {row['update']}: {said}, for instance\n{textwrap.indent(stories[0].text, '  | ')}")


def _out_of_patience(config: Config, log: MetricsLog) -> bool:
    patience = config.eval.early_stopping_patience
    losses = [row["valid/loss"] for row in log.evaluations.values()]
    return bool(patience and losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


class _Meter:
    """Collects the metrics of micro-steps on the device, and reads them with the clock when they are due.

    Evaluations, checkpoints and the first update of a process, which compiles, are not part of tokens per second. The
    share of time waiting for data is the host's time in `batch_at` and in starting the transfer: since the device has
    work queued meanwhile, it is what the device can have waited at most.
    """

    def __init__(self, config: Config, update: int, seconds_before: float):
        assert config.schedule is not None
        self._run_began = time.perf_counter() - seconds_before
        self._config, self._schedule = config, config.schedule
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._pending: list[StepMetrics] = []
        self._first_update, self._update = update + 1, update
        self._speed = 0.0  # tokens per second
        self.restart()

    def restart(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    def wait_for(self, load, *arguments) -> jax.Array:
        """Returns `load(*arguments)`, counting its time as waiting for data."""
        began = time.perf_counter()
        block = load(*arguments)
        self._waited += time.perf_counter() - began
        return block

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)

    def is_due(self) -> bool:
        """Says whether the updates that are complete end with one that is looked at."""
        new, begun = divmod(len(self._pending), self._config.train.grad_accum_steps)
        update = self._update + new
        return new > 0 and not begun and (update == self._first_update or update % self._config.logging.every == 0)

    def read(self) -> tuple[list[dict[str, Any]], str | None]:
        """Waits for the device; returns one row per update since the last call, times on the newest one.

        `seconds` counts the run's wall time after its data was ready, compiling and evaluations included, over all the
        processes that it took. The rows end before an update that is not finite, which the second value then describes.
        """
        per_update = self._config.train.grad_accum_steps
        values = np.array(jax.device_get(self._pending), np.float64).reshape(-1, per_update, 3)
        self._pending = []
        seconds = time.perf_counter() - self._began
        rows = []
        tokens_per_update = self._schedule.blocks_per_update * self._config.data.sequence_length
        for micro_steps in values:
            if not np.isfinite(micro_steps).all():
                what = "loss" if not np.isfinite(micro_steps[:, 0]).all() else "gradient"
                return rows, f"update {self._update + 1}: the {what} is not finite"
            self._update += 1
            rows.append(
                {
                    "update": self._update,
                    "epoch": self._schedule.epoch_at(self._update),
                    "tokens": self._update * tokens_per_update,
                    "train/loss": float(micro_steps[:, 0].mean()),
                    "train/grad_norm": float(micro_steps[-1, 1]),
                    "train/learning_rate": float(micro_steps[-1, 2]),
                }
            )
        if rows:
            rows[-1]["seconds"] = time.perf_counter() - self._run_began
        if rows and self._update > self._first_update:
            self._speed = len(rows) * tokens_per_update / seconds
            rows[-1] |= {
                "train/tokens_per_second": self._speed,
                "train/mfu": model_flops_utilization(self._speed, self._flops_per_token),
                "train/data_wait_fraction": self._waited / seconds,
            }
        self.restart()
        return rows, None

    def eta_seconds(self) -> float | None:
        left = (self._schedule.total_updates - self._update) * self._schedule.blocks_per_update
        return left * self._config.data.sequence_length / self._speed if self._speed else None

    def text(self, row: dict[str, Any]) -> str:
        parts = [
            f"epoch {row['epoch']:.2f}",
            f"loss {row['train/loss']:.3f}",
            f"lr {row['train/learning_rate']:.2e}",
        ]
        if "train/tokens_per_second" in row:
            mfu = row["train/mfu"]
            parts += [
                f"{row['train/tokens_per_second']:,.0f} tok/s",
                "mfu unknown device" if mfu is None else f"mfu {mfu:.1%}",
                f"data {row['train/data_wait_fraction']:.1%}",
            ]
        return "  ".join(parts)


class _StopSignals:
    """Notes SIGTERM and SIGINT for the loop to act on between two updates; a second SIGINT exits at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        os.write(2, b"\nfinishing this update and saving; a second Ctrl-C exits at once\n")


@contextlib.contextmanager
def _explain_out_of_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        batch_size, micro_steps = config.train.batch_size, config.train.grad_accum_steps
        raise UserError(
            f"out of memory on {jax.devices()[0].device_kind} with train.batch_size={batch_size}; "
            f"try --config.train.batch_size={max(1, batch_size // 2)} "
            f"--config.train.grad_accum_steps={micro_steps * 2}, the same update in smaller pieces, in another "
            "--workdir if this one has checkpoints; or --config.model.remat=True, slower"
        ) from error
