"""Saves the checkpoints of a run (orbax), and goes on from them.

A checkpoint is the folder WORKDIR/checkpoints/UPDATE with three parts: `params`; `training` (optimizer state and
micro-step); `meta` (all else, with checksums of everything: see meta.py). Which are kept says retention.py; restore.py
reads them.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from tinystories_jax.config import Config
from tinystories_jax.errors import UserError, explain_refusal
from tinystories_jax.training.environment import environment_changes
from tinystories_jax.training.meta import DamagedCheckpointError, Meta, describe_leaves, to_file
from tinystories_jax.training.orbax_noise import hush_orbax
from tinystories_jax.training.restore import finished_updates, restore_state, training_part
from tinystories_jax.training.retention import Retention, best_of
from tinystories_jax.training.run_folder import require_own_files, set_aside, warn
from tinystories_jax.training.steps import TrainState

_ITEMS = ("params", "training", "meta")


class Checkpoints:
    """Saves and restores the checkpoints of one run under way; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, config: Config):
        self.folder = (workdir / "checkpoints").absolute()
        self._workdir = workdir
        self._retention = Retention(config)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._retention, cleanup_tmp_directories=True)
        require_own_files(workdir)
        hush_orbax()
        with self._explain():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What is on its way already is what the user must know; it has asked for a failed save, too, where it can.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext(), self._explain():
            self._manager.close()

    def check(self) -> None:
        """Raises what a background save has raised since; does not wait for one under way."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts saving; returns once the arrays are copied to the host. A failed earlier save is raised here.

        Raises `NotFiniteError` where a value of `state` is none, and `UserError` where there is no room.
        """
        what = f"update {meta.update}: nothing is saved"
        training = training_part(state)
        contents = to_file(meta, describe_leaves(state.params, what), describe_leaves(training, what))
        self.wait()  # before asking for room: why an earlier one failed says more
        with self._explain():
            # Asked first: where orbax cannot make its folders its threads wait for them, and let no process end.
            if not os.access(self.folder, os.W_OK):
                closed = os.statvfs(self.folder).f_flag & os.ST_RDONLY
                number = errno.EROFS if closed else errno.EACCES
                raise OSError(number, os.strerror(number))
            needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: a checkpoint takes {needed / 1e6:,.0f} MB but {free / 1e6:,.0f} MB are free; "
                "earlier ones, if any, are intact: make room and run the same command again"
            )
        with self._explain():
            self._retention.evaluations = meta.history.evaluations
            self._manager.save(
                meta.update,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    training=ocp.args.StandardSave(training),
                    meta=ocp.args.JsonSave(contents),
                ),
            )

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what a background save raised."""
        with self._explain():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            reason, way_out = explain_refusal(error)
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({reason}); earlier ones, if any, are intact: "
                f"{way_out} and run the same command again"
            ) from error

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the update of the best validation loss among the kept checkpoints, None when none was evaluated."""
        return best_of(self._retention.evaluations, self._manager.all_steps())

    def restore_latest(self, now: Meta) -> tuple[TrainState, Meta] | None:
        """Returns the newest sound state and what stands beside it; None without a checkpoint.

        Damaged checkpoints are set aside with a warning. Raises `UserError` where all are, or where `now`, the meta of
        the run as it was started this time, would not continue them.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for update in sorted(finished_updates(self.folder), reverse=True):
            try:
                state, meta = restore_state(self._workdir, update, now)
            except DamagedCheckpointError as error:
                damaged[update] = error
                continue
            self._set_aside(damaged, update)
            if changes := environment_changes(meta.environment, now.environment):
                warn(f"since update {update} has changed: {', '.join(changes)}; the last digits of results may, too")
            self._retention.evaluations = meta.history.evaluations
            return state, meta
        if damaged:
            raise UserError(
                [
                    f"{self.folder}: no checkpoint is sound; to train from the start give another --workdir, or move "
                    "this folder away:",
                    *(f"  {error}" for error in damaged.values()),
                ]
            )
        return None

    def _set_aside(self, damaged: dict[int, DamagedCheckpointError], update: int) -> None:
        for other, error in damaged.items():
            place = set_aside(self.folder / str(other), self._workdir)
            warn(f"{error}; the checkpoint was moved to {place}, going on from update {update}")
        if damaged:
            self._manager.reload()
