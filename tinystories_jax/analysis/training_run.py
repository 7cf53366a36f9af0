"""The very `train_step` of training, run for the clock: `plan.py` and the benchmark time nothing else."""

import time

import jax
import numpy as np

from tinystories_jax.config import Config
from tinystories_jax.data.cache import micro_batch_at
from tinystories_jax.evaluation.validation import article_mask
from tinystories_jax.training.memory import compile_step, read_memory
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.steps import TrainState, init_state


class TrainingRun:
    """A training state on `tokens`, and the step for micro-batches of `rows` rows that was compiled last.

    `compiled` is that program, `memory` what it needs, `compile_seconds` what tracing and compiling it took.
    """

    def __init__(self, config: Config, tokens: np.ndarray):
        self.config = config
        self._tokens = tokens
        self._article_mask_V = article_mask((), config.model.vocab_size)
        self._state: TrainState | None = None
        self._micro_step = 0
        self._waited_seconds = self._ran_seconds = 0.0

    def compile(self, rows: int) -> None:
        """Makes the step for `rows` rows the one that runs; nothing is allocated yet."""
        began = time.perf_counter()
        self.compiled = compile_step(self.config, rows)
        self.compile_seconds = time.perf_counter() - began
        self.rows, self.memory = rows, read_memory(self.compiled)

    def warm_up(self, num_micro_steps: int = 1) -> None:
        """Runs what counts nowhere: a program's first run takes longer than all others."""
        self.run(num_micro_steps)
        self._waited_seconds = self._ran_seconds = 0.0

    def run(self, num_micro_steps: int) -> float:
        """Returns the seconds of that many micro-steps, until the device has finished the last; blocks are read and
        sent as training does it."""
        state = self._state or init_state(self.config, make_optimizer(self.config))
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(num_micro_steps):
            state, _ = self.compiled(state, self._next_block(), self._article_mask_V)
        self._state = jax.block_until_ready(state)
        took = time.perf_counter() - began
        self._ran_seconds += took
        return took

    def run_updates(self, num_updates: int) -> float:
        """Returns the seconds of that many updates."""
        return self.run(num_updates * self.config.train.grad_accum_steps)

    def data_wait_fraction(self) -> float:
        """Returns the share of the time since `warm_up` in which the host cut blocks and began to send them."""
        return self._waited_seconds / self._ran_seconds

    def _next_block(self) -> jax.Array:
        began = time.perf_counter()
        block = micro_batch_at(self._tokens, self.config, self._micro_step, num_rows=self.rows)
        self._micro_step += 1
        on_device = jax.device_put(block)
        self._waited_seconds += time.perf_counter() - began
        return on_device
