"""The training loop: assembles data, model, optimizer, checkpoints and metrics, and goes from update to update.

Everything that it leaves behind stands in the workdir, so that rerunning the same command goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinystories_jax.background import in_background
from tinystories_jax.config import Config, with_data
from tinystories_jax.data.cache import micro_batch_at, num_blocks
from tinystories_jax.data.prepare import PreparedData
from tinystories_jax.data.tokenizer import StoryTokenizer
from tinystories_jax.errors import UserError, is_out_of_memory
from tinystories_jax.evaluation.checker import checker_problem
from tinystories_jax.evaluation.grammar import score_stories
from tinystories_jax.evaluation.samples import check_prompts, write_stories
from tinystories_jax.evaluation.validation import article_mask, validate
from tinystories_jax.model.attention import uses_flash_attention
from tinystories_jax.model.generate import Sampling
from tinystories_jax.model.transformer import Params, num_params
from tinystories_jax.signals import StopSignals
from tinystories_jax.training.checkpoint import Checkpoints
from tinystories_jax.training.environment import describe_environment, recorded_start
from tinystories_jax.training.jsonl import JsonLines
from tinystories_jax.training.memory import advise_what_fits, compile_step
from tinystories_jax.training.meta import History, Meta, NotFiniteError
from tinystories_jax.training.meter import Meter
from tinystories_jax.training.metrics import MetricsLog, ProgressLine
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.retention import checkpoint_bytes, is_due, max_checkpoints
from tinystories_jax.training.run_folder import warn_of_damage, write_run
from tinystories_jax.training.steps import StepMetrics, TrainState, TrainStep, init_state

_STORIES_PER_PROMPT = 4  # at each evaluation: enough to see articles appear, little enough to hold nothing up
_FEW_WORDS = 500  # some three real stories
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
        lines = [
            f"update {self.update:,} of {self.total_updates:,} in {minutes} min {seconds} s"
            + " of this start" * (self.updates_done < self.update)
        ]
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
    """Trains on `data` until `config` is fulfilled, from the latest sound checkpoint in `workdir` if there is one.

    Raises `UserError` for anything that the user can mend; what was saved before stays.
    """
    started = time.perf_counter()
    blocks = num_blocks(len(data.train.tokens), config.data.sequence_length)
    config = with_data(config, vocab_size=data.tokenizer.vocab_size, num_blocks=blocks)
    schedule = config.schedule
    assert schedule is not None
    check_prompts(data.tokenizer, config.sample.prompts, config.data.sequence_length)
    _announce(config, workdir)
    article_mask_V = article_mask(data.tokenizer.article_ids, data.tokenizer.vocab_size)
    micro_steps = config.train.grad_accum_steps

    with StopSignals() as stop, _explain_out_of_memory(config), Checkpoints(workdir, config) as checkpoints:
        with _compiling(config, checkpoints) as compiled_step:
            state, meta = _start_or_resume(checkpoints, _meta(config, data), workdir)
        train_step: TrainStep | None = None
        update = resumed_at = meta.update
        with (
            _Logs(workdir, meta, tensorboard=update < schedule.total_updates) as logs,
            contextlib.ExitStack() as record,
        ):
            if update < schedule.total_updates and not _out_of_patience(config, logs.metrics):
                record.enter_context(recorded_start(workdir, resumed=update > 0))
            meter = Meter(config, update, meta.history, began=started)
            while update < schedule.total_updates and not stop.signal and not _out_of_patience(config, logs.metrics):
                train_step = train_step or compiled_step()
                for micro_step in range(update * micro_steps, (update + 1) * micro_steps):
                    block = meter.wait_for(_load_block, data, config, micro_step)
                    state, metrics = train_step(state, block, article_mask_V)
                    if meter.is_due():  # figures up to the update before, read while the device is busy with this one
                        logs.metrics.write(_look(meter, logs, checkpoints, under_way=metrics))
                    meter.add(metrics)
                update += 1
                evaluates = update == schedule.total_updates or update % config.eval.every == 0
                saves = is_due(update, config)
                # Of the first update the user hears at once, and not after a micro-step more.
                if not (evaluates or saves or update == resumed_at + 1):
                    continue
                rows = _look(meter, logs, checkpoints)
                if evaluates:
                    improved = _evaluate(state.params, data, config, logs, rows)
                    _sample(state.params, data.tokenizer, config, logs, rows[-1])
                    saves = saves or improved
                logs.metrics.write(rows)
                if saves:
                    _save(checkpoints, state, logs.add_to(meta, update, meter))
                meter.restart()
            # Stopped between two saves, by a signal or for lack of patience.
            if update and checkpoints.latest() != update:
                logs.metrics.write(_look(meter, logs, checkpoints))
                _save(checkpoints, state, logs.add_to(meta, update, meter))
            checkpoints.wait()
            best_update = checkpoints.best()
            best = None if best_update is None else logs.metrics.evaluations[best_update]
            return TrainResult(
                workdir=workdir,
                update=update,
                updates_done=update - resumed_at,
                total_updates=schedule.total_updates,
                best_update=best_update,
                best_loss=best and best.loss,
                bits_per_byte=best and best.bits_per_byte,
                seconds=time.perf_counter() - started,
                stopped_early=update < schedule.total_updates and not stop.signal,
                signal=stop.signal if update < schedule.total_updates else None,
            )


@contextlib.contextmanager
def _compiling(config: Config, checkpoints: Checkpoints) -> Iterator[Callable[[], TrainStep]]:
    """Compiles the step while the block makes or restores the state; what it yields returns the step, or raises what
    went wrong. Of a finished run nothing is compiled before the step is asked for."""
    compile_whole = functools.partial(compile_step, config, config.train.batch_size)
    assert config.schedule is not None
    if checkpoints.latest() == config.schedule.total_updates:
        yield compile_whole
        return
    compiled = in_background("compile", compile_whole)
    try:
        yield compiled.result
    finally:
        futures.wait([compiled])  # a process must not end while XLA compiles in it


class _Logs:
    """What a run tells while it goes on: metrics, samples and the line of progress."""

    def __init__(self, workdir: Path, meta: Meta, *, tensorboard: bool):
        """Opens the files as they were at the checkpoint that `meta` is of."""
        assert meta.config.schedule is not None
        evaluated = [evaluation.update for evaluation in meta.history.evaluations]
        with contextlib.ExitStack() as stack:
            path = workdir / "samples.jsonl"
            self.samples = JsonLines(path, meta.logs.get("samples.jsonl"), updates=evaluated, once=False)
            stack.callback(self.samples.close)
            metrics = MetricsLog(
                workdir,
                history=meta.history,
                state=meta.logs.get("metrics.jsonl"),
                update=meta.update,
                tensorboard=tensorboard and meta.config.logging.tensorboard,
            )
            self.metrics = stack.enter_context(metrics)
            progress = ProgressLine(total=meta.config.schedule.total_updates, initial=meta.update)
            self.progress = stack.enter_context(progress)
            self._stack = stack.pop_all()

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def add_to(self, meta: Meta, update: int, meter: Meter) -> Meta:
        """Returns the meta of the checkpoint of `update`."""
        history = History(tuple(self.metrics.evaluations.values()), tuple(meter.recent_losses), meter.run_seconds())
        states = {"metrics.jsonl": self.metrics.state, "samples.jsonl": self.samples.state}
        return dataclasses.replace(meta, update=update, history=history, logs=states)


def _load_block(data: PreparedData, config: Config, micro_step: int) -> jax.Array:
    return jax.device_put(micro_batch_at(data.train.tokens, config, micro_step))


def _meta(config: Config, data: PreparedData) -> Meta:
    """Returns what a checkpoint before the first update would say."""
    fingerprints = data.train.manifest.fingerprint, data.valid.manifest.fingerprint
    return Meta(0, config, data.tokenizer, *fingerprints, describe_environment())


def _announce(config: Config, workdir: Path) -> None:
    schedule, device = config.schedule, jax.devices()[0]
    assert schedule is not None
    tokens_per_update = schedule.blocks_per_update * config.data.sequence_length
    flash = uses_flash_attention(config.model, config.data.sequence_length, device)
    attention = "cuDNN flash" if flash else "plain, by blocks of queries"
    checkpoint_megabytes = checkpoint_bytes(config) / 1e6
    lines = [
        f"run       {workdir}",
        f"device    {device.device_kind}{_one_of(len(jax.devices()))}, attention: {attention}",
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


def _one_of(num_devices: int) -> str:
    if num_devices == 1:
        return ""
    return f" (one of {num_devices}; the others stay idle, and CUDA_VISIBLE_DEVICES leaves their memory to others)"


def _start_or_resume(checkpoints: Checkpoints, now: Meta, workdir: Path) -> tuple[TrainState, Meta]:
    """Returns the state to go on from, and `now` with what its checkpoint knows; writes what the run is made from."""
    restored = checkpoints.restore_latest(now)
    if restored is not None:
        state, saved = restored
        warn_of_damage(workdir, saved.config, saved.tokenizer)
    write_run(workdir, now.config, now.tokenizer)
    if restored is None:
        # Placed as a restored one is, or else no program compiled for the one would serve the other.
        return jax.device_put(init_state(now.config, make_optimizer(now.config)), jax.local_devices()[0]), now
    assert now.config.schedule is not None
    finished = saved.update >= now.config.schedule.total_updates
    print(f"resumed   after update {saved.update:,}{', nothing left to do' * finished}", file=sys.stderr)
    return state, dataclasses.replace(now, update=saved.update, history=saved.history, logs=saved.logs)


def _look(
    meter: Meter, logs: _Logs, checkpoints: Checkpoints, under_way: StepMetrics | None = None
) -> list[dict[str, Any]]:
    """Waits for the device, though not for the micro-step `under_way`; returns the rows not written yet, and raises
    what went wrong since the last look."""
    rows, problem = meter.read(under_way)
    if problem:
        logs.metrics.write(rows)
        # A save that is under way counts only when it has succeeded; when it fails, that is said beside.
        failed_save: tuple[str, ...] = ()
        try:
            checkpoints.wait()
        except UserError as error:
            failed_save = error.problems
        raise UserError([f"{problem}; {_last_checkpoint(checkpoints)}. {_NON_FINITE_ADVICE}", *failed_save])
    checkpoints.check()
    for row in rows:
        if row.get("train/loss_spike"):
            logs.progress.note(
                f"warning: update {row['update']}: a training loss of {row['train/loss']:.4f} is a spike, more than "
                "logging.loss_spike_factor times the median before it; training goes on"
            )
    if rows:
        logs.progress.show(rows[-1]["update"], text=meter.text(rows[-1]), eta_seconds=meter.eta_seconds())
    return rows


def _evaluate(params: Params, data: PreparedData, config: Config, logs: _Logs, rows: list[dict[str, Any]]) -> bool:
    """Adds the validation scores to the newest row; returns whether the loss is the best so far."""
    scores = validate(params, data.valid, config, data.tokenizer.article_forms)
    if not math.isfinite(scores.loss):
        logs.metrics.write(rows)
        raise UserError(f"update {rows[-1]['update']}: the validation loss is not finite. {_NON_FINITE_ADVICE}")
    earlier = logs.metrics.evaluations.values()
    improved = scores.loss < min((evaluation.loss for evaluation in earlier), default=float("inf"))
    rows[-1] |= {
        "valid/loss": scores.loss,
        "valid/bits_per_byte": scores.bits_per_byte,
        "valid/article_loss": scores.all_articles.loss,
        "valid/article_recall": scores.all_articles.recall,
    }
    best = " (best)" if improved else ""
    logs.progress.note(
        f"update {rows[-1]['update']}: validation loss {scores.loss:.4f}, {scores.bits_per_byte:.4f} bits per byte, "
        f"articles: loss {scores.all_articles.loss:.3f}, recall {scores.all_articles.recall:.1%}{best}"
    )
    return improved


def _sample(params: Params, tokenizer: StoryTokenizer, config: Config, logs: _Logs, row: dict[str, Any]) -> None:
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
    logs.samples.write({"update": row["update"], **dataclasses.asdict(story)} for story in stories)
    checks_grammar = checker_problem() is None
    scores = score_stories(
        [story.text for story in stories],
        finished=[story.finished for story in stories],
        check_grammar=checks_grammar,
    )
    row["samples/articles"] = scores.articles
    few = ", too few to judge by" * (scores.num_words < _FEW_WORDS)
    said = f"{len(stories)} stories, {scores.num_words:,} words in whole sentences{few}: "
    said += f"{_known(scores.articles, '.0%')} of the articles needed"
    if checks_grammar:
        row["samples/grammar"] = scores.grammar
        said += f", grammar {_known(scores.grammar, '.1f')} of 10"
    logs.progress.note(f"update {row['update']}: {said}, for instance\n{textwrap.indent(stories[0].text, '  | ')}")


def _known(score: float, form: str) -> str:
    """Returns a score as text; there is none where stories have nothing to score."""
    return "unknown" if math.isnan(score) else format(score, form)


def _save(checkpoints: Checkpoints, state: TrainState, meta: Meta) -> None:
    try:
        checkpoints.save(state, meta)
    except NotFiniteError as error:  # the loss and the gradient were finite, the update with them is not
        raise UserError(f"{error}; {_last_checkpoint(checkpoints)}. {_NON_FINITE_ADVICE}") from error


def _last_checkpoint(checkpoints: Checkpoints) -> str:
    last = checkpoints.latest()
    return "no checkpoint was saved" if last is None else f"the last checkpoint is update {last}"


def _out_of_patience(config: Config, log: MetricsLog) -> bool:
    patience = config.eval.early_stopping_patience
    losses = [evaluation.loss for evaluation in log.evaluations.values()]
    return bool(patience and losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


@contextlib.contextmanager
def _explain_out_of_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory on {jax.devices()[0].device_kind} with train.batch_size={config.train.batch_size}"
        print(f"{what}; compiling smaller micro-batches to see which fits", file=sys.stderr, flush=True)
        raise UserError(f"{what}; {advise_what_fits(config)}") from error
