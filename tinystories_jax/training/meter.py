"""What training tells of itself between two looks at the device: losses, speed, and how long it waited for data."""

import statistics
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from tinystories_jax.config import Config
from tinystories_jax.training.flops import flops_per_token, model_flops_utilization
from tinystories_jax.training.meta import History
from tinystories_jax.training.steps import StepMetrics

_SPIKE_WINDOW = 100  # updates whose median a loss spike stands out from


class Meter:
    """Collects the metrics of micro-steps on the device, and reads them with the clock when they are due.

    Evaluations, checkpoints and a process's first update, which takes longer, are no part of tokens per second: those
    of the micro-steps that the device has finished between two looks at the clock. While updates follow each other, one
    more than those looked at has begun; a CPU has finished it by then, since JAX runs it while it is asked for. The
    share of time waiting for data is the host's time in `batch_at` and in starting the transfer: since the device has
    work queued meanwhile, it is what the device can have waited at most.
    """

    def __init__(self, config: Config, update: int, history: History, *, began: float):
        """Goes on after `update`; `began` is when the data was ready, by `time.perf_counter`."""
        assert config.schedule is not None
        self._run_began = began - history.seconds
        self.recent_losses = deque(history.recent_losses, maxlen=_SPIKE_WINDOW)
        self._config, self._schedule = config, config.schedule
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._pending: list[StepMetrics] = []
        self._first_update, self._update = update + 1, update
        self._speed = 0.0  # tokens per second
        self.restart()

    def restart(self, *, num_ahead: int = 0) -> None:
        """Begins to measure speed; of micro-steps not looked at yet, `num_ahead` are finished."""
        self._began, self._waited, self._num_ahead = time.perf_counter(), 0.0, num_ahead

    def wait_for(self, load, *arguments) -> jax.Array:
        """Returns `load(*arguments)`, counting its time as waiting for data."""
        began = time.perf_counter()
        block = load(*arguments)
        self._waited += time.perf_counter() - began
        return block

    def run_seconds(self) -> float:
        """Returns the run's wall time since its data was ready, of all processes, with compiling and evaluations."""
        return time.perf_counter() - self._run_began

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)

    def is_due(self) -> bool:
        """Says whether the updates that are complete end with one that is looked at."""
        new, begun = divmod(len(self._pending), self._config.train.grad_accum_steps)
        return new > 0 and not begun and (self._update + new) % self._config.logging.every == 0

    def read(self, under_way: StepMetrics | None = None) -> tuple[list[dict[str, Any]], str | None]:
        """Waits for what was added; returns one row per update since the last call, times on the newest one.

        `under_way` is a micro-step that has begun and is added later. `seconds` are those of `run_seconds`. The rows
        end before an update that is not finite, which the second value then describes.
        """
        per_update = self._config.train.grad_accum_steps
        values = np.array(jax.device_get(self._pending), np.float64).reshape(-1, per_update, 3)
        num_ahead = int(under_way is not None and under_way.loss.is_ready())  # type: ignore[attr-defined]
        num_finished = len(self._pending) - self._num_ahead + num_ahead
        self._pending = []
        seconds = time.perf_counter() - self._began
        rows = []
        tokens_per_update = self._schedule.blocks_per_update * self._config.data.sequence_length
        for micro_steps in values:
            if not np.isfinite(micro_steps).all():
                what = "loss" if not np.isfinite(micro_steps[:, 0]).all() else "gradient"
                return rows, f"update {self._update + 1}: the {what} is not finite"
            self._update += 1
            row: dict[str, Any] = {
                "update": self._update,
                "epoch": self._schedule.epoch_at(self._update),
                "tokens": self._update * tokens_per_update,
                "train/loss": float(micro_steps[:, 0].mean()),
                "train/grad_norm": float(micro_steps[-1, 1]),
                "train/learning_rate": float(micro_steps[-1, 2]),
            }
            if self._is_spike(row["train/loss"]):
                row["train/loss_spike"] = True
            rows.append(row)
        if rows:
            rows[-1]["seconds"] = self.run_seconds()
        if num_finished and self._update > self._first_update:
            self._speed = num_finished * tokens_per_update / per_update / seconds
            rows[-1] |= {
                "train/tokens_per_second": self._speed,
                "train/mfu": model_flops_utilization(self._speed, self._flops_per_token),
                "train/data_wait_fraction": self._waited / seconds,
            }
        self.restart(num_ahead=num_ahead)
        return rows, None

    def _is_spike(self, loss: float) -> bool:
        """Notes the loss of an update; says whether it stands out among those before it."""
        before, factor = list(self.recent_losses), self._config.logging.loss_spike_factor
        self.recent_losses.append(loss)
        return bool(factor and before) and loss > factor * statistics.median(before)

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
            parts.append(f"{row['train/tokens_per_second']:,.0f} tok/s")
            if row["train/mfu"] is not None:  # of a device whose peak is known
                parts.append(f"mfu {row['train/mfu']:.1%}")
            parts.append(f"data wait {row['train/data_wait_fraction']:.1%}")
        return "  ".join(parts)
