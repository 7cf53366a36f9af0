"""Reads checkpoints: only arrays that are bit for bit what was saved come back.

Only committed checkpoints are ever seen. Orbax's handlers read JSON and arrays: nothing is unpickled.
"""

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tinystories_jax.config import Config, contradictions, follows_from_the_data, with_unknown_data
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import Params, init_params
from tinystories_jax.training.memory import device_memory_bytes
from tinystories_jax.training.meta import (
    DamagedCheckpointError,
    Leaves,
    Meta,
    NotFiniteError,
    another_run,
    describe_leaves,
    read_meta,
    require_same_run,
    shapes_of,
)
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.orbax_noise import hush_orbax
from tinystories_jax.training.retention import best_of
from tinystories_jax.training.steps import TrainState, init_state

_MAX_MORE_BYTES = 2**26  # of one file of a checkpoint, beyond its arrays


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


def require_same_config(workdir: Path, config: Config) -> None:
    """Raises `UserError` where `config`, as resolved and before its data are prepared, would not continue the run in
    `workdir`. What follows from the data is left out, and so are damaged checkpoints: training sees both."""
    for update in reversed(finished_updates(workdir / "checkpoints")):
        try:
            saved, _ = read_meta(workdir / "checkpoints" / str(update))
        except DamagedCheckpointError:
            continue
        found = contradictions(saved.config, with_unknown_data(config, vocab_size=saved.config.model.vocab_size))
        if differing := [line for line in found if not follows_from_the_data(line)]:
            raise another_run(workdir, differing)
        return


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


def restore_state(workdir: Path, update: int, now: Meta) -> tuple[TrainState, Meta]:
    """Returns the state saved at `update`, and what stands beside it.

    Raises `UserError` where `now`, the meta of the run as it was started this time, would not continue it.
    """
    checkpoint = (workdir / "checkpoints").absolute() / str(update)
    meta, leaves = _open(checkpoint)
    require_same_run(meta, now, workdir)
    # Of shapes: a second state beside the one that comes back would be memory that training needs.
    like = _shapes_on_device(lambda: init_state(now.config, make_optimizer(now.config)))
    params = _restore_part(checkpoint, "params", leaves, like.params)
    training = _restore_part(checkpoint, "training", leaves, training_part(like))
    return TrainState(training["micro_step"], params, training["opt_state"]), meta


def training_part(state: TrainState) -> dict[str, Any]:
    """Returns what of a state stands in the part `training` of a checkpoint."""
    return {"micro_step": state.micro_step, "opt_state": state.opt_state}


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
        epochs = ", ".join(str(index) for index, end in enumerate(ends, start=1) if end in updates)
        told = f"kept are epochs {epochs}, and updates" if epochs else "kept is no end of an epoch, but updates"
        raise UserError(f"--step={step}: no checkpoint of that epoch; {told} {kept}")
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


def _restore_part(checkpoint: Path, part: str, leaves: dict[str, Leaves], like: Any) -> Any:
    """Returns the arrays of `part`, laid out as `like`, after comparing them with the checksums in `leaves`."""
    path = checkpoint / part
    saved = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves[part].items()}
    _require_same_shapes(path, saved, shapes_of(like))
    needed = sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(like))
    if needed > device_memory_bytes():
        raise UserError(f"{path}: takes {needed / 1e9:,.1f} GB, which this device does not have; take a larger one")
    _require_plain_files(path, needed + _MAX_MORE_BYTES)
    hush_orbax()
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
