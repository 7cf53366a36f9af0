"""Which checkpoints a run saves and keeps, and the disk that they take."""

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import checkpoint_managers

from tinystories_jax.config import Config, Schedule
from tinystories_jax.training.meta import LoggedLoss
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.steps import init_state

_MAX_EPOCH_CHECKPOINTS = 20


def best_of(evaluations: Sequence[LoggedLoss], updates: Collection[int]) -> int | None:
    """Returns the one of `updates` with the lowest validation loss, the first of equals; None without an evaluation."""
    kept = [evaluation for evaluation in evaluations if evaluation.update in updates]
    return min(kept, key=lambda evaluation: evaluation.loss).update if kept else None


def is_due(update: int, config: Config) -> bool:
    """Says whether a run that nobody stops saves after `update`, whatever an evaluation there says."""
    schedule = config.schedule
    assert schedule is not None
    return update % config.checkpoint.every == 0 or update in (schedule.total_updates, *_kept_epoch_ends(schedule))


def _kept_epoch_ends(schedule: Schedule) -> tuple[int, ...]:
    """Returns the ends of epochs whose checkpoints are kept: of each epoch, of many each second, third and so on."""
    every = -(-len(schedule.epoch_ends) // _MAX_EPOCH_CHECKPOINTS) or 1
    return schedule.epoch_ends[every - 1 :: every]


class Retention(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoint, the last `checkpoint.keep` ones that a run which nobody stops has, the best of all,
    and those at ends of epochs. What a stopped run saved between goes when it has gone on: in the end there is what
    would have been. Best is what the run's own history says: orbax's metrics have no checksum."""

    def __init__(self, config: Config):
        self._config = config
        self.evaluations: Sequence[LoggedLoss] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        assert self._config.schedule is not None
        updates = [checkpoint.step for checkpoint in checkpoints]
        due = sorted(update for update in updates if is_due(update, self._config) or self._improved(update))
        kept = {max(updates), *due[-self._config.checkpoint.keep :], *_kept_epoch_ends(self._config.schedule)}
        kept.add(best_of(self.evaluations, updates))
        return [update in kept for update in updates]

    def _improved(self, update: int) -> bool:
        return best_of(self.evaluations, range(update + 1)) == update


def checkpoint_bytes(config: Config) -> int:
    """Returns the size of one checkpoint, from the shapes alone: parameters, the optimizer's moments (two of AdamW, one
    of Muon) and, where several micro-steps are an update, the sum of gradients, all float32."""
    state = jax.eval_shape(lambda: init_state(config, make_optimizer(config)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def max_checkpoints(config: Config) -> int:
    """Returns how many checkpoints a run can hold: the latest ones, that of a stop, the best, and those of epochs."""
    assert config.schedule is not None
    return config.checkpoint.keep + 2 + len(_kept_epoch_ends(config.schedule))


def bytes_to_come(config: Config, workdir: Path) -> int:
    """Returns the free disk that the checkpoints of the run in `workdir` may still need beside those that are there.

    It is room for one at least: a new one is written before an old one goes.
    """
    size = checkpoint_bytes(config)
    return max(size, size * max_checkpoints(config) - _bytes_in(workdir / "checkpoints"))


def _bytes_in(folder: Path) -> int:
    """Returns the size of all files below `folder`, 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run under way deletes its older ones meanwhile
                total += (Path(place) / name).lstat().st_size
    return total
