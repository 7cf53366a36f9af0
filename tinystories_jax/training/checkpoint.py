"""Checkpoints of a run (orbax): the latest ones, the best by validation loss, those at ends of epochs.

A checkpoint is the folder WORKDIR/checkpoints/UPDATE with three parts: `params`; `training` (optimizer state and
micro-step); `meta` (all else, with checksums of everything: see meta.py). Only committed checkpoints are ever seen, and
only arrays that are bit for bit what was saved come back. Orbax's handlers read JSON and arrays: nothing is unpickled.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from tinystories_jax.config import Config, Schedule
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import Params, init_params
from tinystories_jax.training.environment import environment_changes
from tinystories_jax.training.memory import device_memory_bytes
from tinystories_jax.training.meta import (
    DamagedCheckpointError,
    Evaluation,
    Leaves,
    Meta,
    NotFiniteError,
    describe_leaves,
    read_meta,
    require_same_run,
    shapes_of,
    to_file,
)
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.run_folder import require_own_files, set_aside, warn, way_out
from tinystories_jax.training.steps import TrainState, init_state

_ITEMS = ("params", "training", "meta")
_MAX_EPOCH_CHECKPOINTS = 20
_MAX_MORE_BYTES = 2**26  # of one file of a checkpoint, beyond its arrays
# orbax says at each step what it does through absl's logger; what a user must know reaches them as an exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
# Nor of the arrays that orbax has not begun to write when writing another one failed.
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


class Checkpoints:
    """Saves and restores the checkpoints of one run under way; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, config: Config):
        self.folder = (workdir / "checkpoints").absolute()
        self._workdir = workdir
        self._kept = _Kept(config)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
        require_own_files(workdir)
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
        training = _training_part(state)
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
            self._kept.evaluations = meta.history.evaluations
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
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({reason[0][:300]}); earlier ones, if any, are intact: "
                f"{way_out(error)} and run the same command again"
            ) from error

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the update of the best validation loss among the kept checkpoints, None when none was evaluated."""
        return best_of(self._kept.evaluations, self._manager.all_steps())

    def restore_latest(self, now: Meta) -> tuple[TrainState, Meta] | None:
        """Returns the newest sound state and what stands beside it; None without a checkpoint.

        Damaged checkpoints are set aside with a warning. Raises `UserError` where all are, or where `now`, the meta of
        the run as it was started this time, would not continue them.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for update in sorted(finished_updates(self.folder), reverse=True):
            try:
                state, meta = self.restore(update, now)
            except DamagedCheckpointError as error:
                damaged[update] = error
                continue
            self._set_aside(damaged, update)
            if changes := environment_changes(meta.environment, now.environment):
                warn(f"since update {update} has changed: {', '.join(changes)}; the last digits of results may, too")
            self._kept.evaluations = meta.history.evaluations
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

    def restore(self, update: int, now: Meta) -> tuple[TrainState, Meta]:
        """Returns the state saved at `update`, which `now` continues."""
        folder = self.folder / str(update)
        meta, leaves = _open(folder)
        require_same_run(meta, now, self._workdir)
        # Of shapes: a second state beside the one that comes back would be memory that training needs.
        like = _shapes_on_device(lambda: init_state(now.config, make_optimizer(now.config)))
        params = _restore_part(folder, "params", leaves, like.params)
        training = _restore_part(folder, "training", leaves, _training_part(like))
        return TrainState(training["micro_step"], params, training["opt_state"]), meta

    def _set_aside(self, damaged: dict[int, DamagedCheckpointError], update: int) -> None:
        for other, error in damaged.items():
            place = set_aside(self.folder / str(other), self._workdir)
            warn(f"{error}; the checkpoint was moved to {place}, going on from update {update}")
        if damaged:
            self._manager.reload()


def best_of(evaluations: Sequence[Evaluation], updates: Collection[int]) -> int | None:
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


class _Kept(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoint, the last `checkpoint.keep` ones that a run which nobody stops has, the best of all,
    and those at ends of epochs. What a stopped run saved between goes when it has gone on: in the end there is what
    would have been. Best is what the run's own history says: orbax's metrics have no checksum."""

    def __init__(self, config: Config):
        self._config = config
        self.evaluations: Sequence[Evaluation] = ()

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


def finished_updates(checkpoints: Path) -> list[int]:
    """Returns the updates whose checkpoint is in the folder, sorted; one still being saved has another name."""
    if not checkpoints.is_dir():
        return []
    names = [path.name for path in checkpoints.iterdir()]
    # As orbax names them: not 007, nor digits of other scripts.
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))


def has_checkpoint(run: Path) -> bool:
    """Returns whether `run` holds a finished checkpoint."""
    return bool(finished_updates(run / "checkpoints"))


def require_checkpoints(run: Path) -> list[int]:
    """Returns the updates of the finished checkpoints of `run`, sorted; raises `UserError` where there is none."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run}: no run with checkpoints stands there; --checkpoint takes a workdir that train.py made")
    updates = finished_updates(folder)
    if not updates:
        raise UserError(f"{run}: no finished checkpoint yet; let train.py reach its first one")
    return updates


def restore_params(run: Path, step: str = "best") -> tuple[Params, Meta]:
    """Returns the parameters of one checkpoint of `run` and what stands beside them; the optimizer state is not read.

    step: "best" by validation loss (the latest where none was evaluated), "latest", "epoch:N", or an update number.
    Raises `UserError` when there is no such run or checkpoint, or when it is not what was saved.
    """
    folder, updates = (run / "checkpoints").absolute(), require_checkpoints(run)
    chosen = updates[-1]
    try:
        chosen = _choose(folder, updates, step)
        where = folder / str(chosen)
        meta, leaves = _open(where)
        like = _shapes_on_device(lambda: init_params(meta.config.model, jax.random.key(0)))
        return _restore_part(where, "params", leaves, like), meta
    except DamagedCheckpointError as error:
        others = " or ".join(f"--step={update}" for update in updates if update != chosen)
        advice = f"take another checkpoint, {others}" if others else "there is no other checkpoint"
        raise DamagedCheckpointError(
            f"{error}; {advice}; or rerun train.py, which goes on from the last sound one"
        ) from error


def _choose(folder: Path, updates: list[int], step: str) -> int:
    kept = ", ".join(map(str, updates))
    if step == "latest":
        return updates[-1]
    if step in map(str, updates):
        return int(step)
    epoch = re.fullmatch(r"epoch:([0-9]{1,9})", step)
    if step != "best" and not epoch:
        raise UserError(f"--step={step:.100}: must be best, latest, epoch:N or one of the updates kept: {kept}")
    # The newest one knows of all evaluations before it, and without it nobody could say which is best.
    meta, _ = _open(folder / str(updates[-1]))
    if not epoch:
        best = best_of(meta.history.evaluations, updates)
        return updates[-1] if best is None else best
    assert meta.config.schedule is not None
    ends, number = meta.config.schedule.epoch_ends, int(epoch[1])
    if not 1 <= number <= len(ends) or ends[number - 1] not in updates:
        epochs = ", ".join(str(index) for index, end in enumerate(ends, start=1) if end in updates) or "none"
        raise UserError(f"--step={step}: no checkpoint of that epoch; kept are epochs {epochs}, and updates {kept}")
    return ends[number - 1]


def _open(checkpoint: Path) -> tuple[Meta, dict[str, Leaves]]:
    _require_plain_files(checkpoint)
    meta, leaves = read_meta(checkpoint)
    if meta.update != int(checkpoint.name):
        raise DamagedCheckpointError(f"{checkpoint}: holds the checkpoint of update {meta.update}")
    return meta, leaves


def _require_plain_files(folder: Path, max_bytes: float = float("inf")) -> None:
    """Raises `DamagedCheckpointError` for what orbax has not written: a link, which may lead out of the run, a pipe,
    which would be waited for, a file that is larger than `max_bytes`."""
    for path in (folder, *folder.rglob("*")):
        try:
            status = path.lstat()
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise DamagedCheckpointError(f"{path}: is neither a file nor a folder")
        if status.st_size > max_bytes:
            raise DamagedCheckpointError(f"{path}: has {status.st_size:,} bytes, more than its arrays take")


def _shapes_on_device(make: Callable[[], Any]) -> Any:
    """Returns the shapes of what `make` returns, to be restored to the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), jax.eval_shape(make)
    )


def _training_part(state: TrainState) -> dict[str, Any]:
    return {"micro_step": state.micro_step, "opt_state": state.opt_state}


def _restore_part(checkpoint: Path, part: str, leaves: dict[str, Leaves], like: Any) -> Any:
    """Returns the arrays of `part`, laid out as `like`, after comparing them with the checksums in `leaves`."""
    path = checkpoint / part
    saved = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves[part].items()}
    _require_same_shapes(path, saved, shapes_of(like))
    needed = sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(like))
    if needed > device_memory_bytes():
        raise UserError(f"{path}: takes {needed / 1e9:,.1f} GB, which this device does not have; take a larger one")
    _require_plain_files(path, needed + _MAX_MORE_BYTES)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            restored = checkpointer.restore(path, args=ocp.args.StandardRestore(target))
    except Exception as error:  # orbax raises a bare one for arrays that it cannot read
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DamagedCheckpointError(f"{path}: cannot be read ({type(error).__name__}: {reason[:200]})") from error
    try:
        found = describe_leaves(restored, str(path))
    except NotFiniteError as error:
        raise DamagedCheckpointError(str(error)) from error
    if wrong := [name for name, leaf in leaves[part].items() if found.get(name) != leaf]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DamagedCheckpointError(f"{path}: {wrong[0]}{more} is not what was saved: the checksum is wrong")
    return restored


def _require_same_shapes(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `UserError` naming the arrays that differ: this is a sound checkpoint of something else."""
    differing = [
        f"  {name}: {_say_shape(saved.get(name))} there, {_say_shape(expected.get(name))} expected"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(
            [f"{path}: its arrays are not those of this version; use the version that wrote it:", *differing[:20]]
        )


def _say_shape(shape: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{shape[0]} {shape[1]}" if shape else "nothing"


def _hush_orbax() -> None:
    """Keeps silent about what reads and writes that failed leave behind in orbax and tensorstore, and nothing else.

    Their exception has been raised to us. Python says once more what it was when the coroutines of the others are
    collected, and that their event loop is closed when tensorstore answers them.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_coroutine = code is not None and "orbax" in Path(code.co_filename).parts
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (of_coroutine or late):
            previous(unraisable)

    sys.unraisablehook = hook


_hush_orbax()
