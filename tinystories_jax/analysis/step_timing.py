"""What the real `train_step` takes on this device: memory by XLA's own analysis, and time by the clock."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from tinystories_jax.analysis.timing import time_repeated
from tinystories_jax.analysis.training_run import TrainingRun
from tinystories_jax.config import Config
from tinystories_jax.errors import UserError, is_out_of_memory
from tinystories_jax.training.flops import flops_per_token, model_flops_utilization
from tinystories_jax.training.memory import (
    StepMemory,
    device_memory_bytes,
)

# The first micro-batch that is tried: seconds on two CPU cores; an accelerator gets any usual one whole.
_FIRST_STEP_FLOPS, _FIRST_STEP_FLOPS_ON_CPU = 3e13, 3e11
_STEP_SECONDS = 2.0  # it grows while a step is expected to stay below this
_CPU_MEMORY_BYTES = 4e9  # for a step on a CPU, which shares its memory with everything else
_TIMING_SECONDS, _MAX_SAMPLES = 10.0, 10


@dataclass(frozen=True)
class Measurement:
    """Real micro-steps on this device, of `rows` rows, which may be fewer than train.batch_size."""

    rows: int
    memory: StepMemory
    compile_seconds: float
    num_samples: int  # of one or several micro-steps each
    micro_step_seconds: float  # median
    tokens_per_second: float
    mfu: float | None  # None for a device whose peak is unknown


def measure_training(config: Config, tokens: np.ndarray, log: Callable[[str], None]) -> Measurement:
    """Compiles and times `train_step` at the largest micro-batch up to train.batch_size that is cheap on this device.

    `tokens` are what blocks are cut from. Raises `UserError` when not even one row fits into the memory.
    """
    run = TrainingRun(config, tokens)
    try:
        step_seconds = _choose_rows(run, log)
        log(f"timing it: {step_seconds:.3g} s a step")
        micro_step_seconds = time_repeated(run.run, seconds=_TIMING_SECONDS, at_most=_MAX_SAMPLES)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory although it should fit: something else uses this device, too") from error
    speed = run.rows * config.data.sequence_length / micro_step_seconds.median
    return Measurement(
        rows=run.rows,
        memory=run.memory,
        compile_seconds=run.compile_seconds,
        num_samples=micro_step_seconds.num_samples,
        micro_step_seconds=micro_step_seconds.median,
        tokens_per_second=speed,
        mfu=model_flops_utilization(speed, flops_per_token(config.model, config.data.sequence_length)),
    )


def _choose_rows(run: TrainingRun, log: Callable[[str], None]) -> float:
    """Compiles the step for more rows while that is cheap, for fewer while they do not fit; returns its seconds."""
    config = run.config
    ceiling, limit = config.train.batch_size, memory_limit_bytes()
    flops_per_row = flops_per_token(config.model, config.data.sequence_length) * config.data.sequence_length
    first_step_flops = _FIRST_STEP_FLOPS_ON_CPU if jax.default_backend() == "cpu" else _FIRST_STEP_FLOPS
    rows = max(1, min(ceiling, int(first_step_flops / flops_per_row)))
    while True:
        log(f"compiling a micro-step of {rows:,} of {config.train.batch_size:,} rows")
        run.compile(rows)
        needed, temporaries = run.memory.total_bytes, run.memory.temporaries_bytes
        # Rather too few: what part of the temporaries does not grow with the rows is taken for one that does.
        fitting = int(rows * min((limit - needed + temporaries) / temporaries, ceiling))
        if needed > limit:
            if rows == 1:
                raise UserError(f"one row takes {needed / 1e9:,.2f} GB, of {limit / 1e9:,.2f} GB that may be used")
            ceiling = rows - 1
            rows = max(1, min(ceiling, fitting))
            continue
        run.warm_up()
        step_seconds = run.run(1)
        cheap = min(ceiling, fitting, int(rows * _STEP_SECONDS / step_seconds))
        # Another compilation must be worth its time.
        if cheap < 2 * rows and not rows < cheap == ceiling:
            return step_seconds
        rows = cheap


def memory_limit_bytes() -> float:
    """Returns what a step may take of this device's memory."""
    if jax.default_backend() == "cpu":
        return min(_CPU_MEMORY_BYTES, device_memory_bytes() / 2)
    return device_memory_bytes()
