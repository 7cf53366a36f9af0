"""Checkpoints of a run (orbax): the latest, the best by validation loss, one per epoch.

A checkpoint is the folder WORKDIR/checkpoints/UPDATE with four parts: `params`; `training` (optimizer state and
micro-step); `meta` (update, resolved config, tokenizer, fingerprints of the data: with `params`, all that sampling
needs); `metrics` (validation loss, where it was measured). Only committed checkpoints are ever seen.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from tinystories_jax.config import Config, from_dict, to_dict
from tinystories_jax.data.tokenizer import StoryTokenizer, parse_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import Params, init_params, num_params
from tinystories_jax.training.steps import TrainState

_ITEMS = ("params", "training", "meta")
# orbax says at each step what it does through absl's logger; what a user must know reaches them as an exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Meta:
    """What stands beside the parameters in every checkpoint."""

    update: int
    config: Config
    tokenizer: StoryTokenizer
    train_fingerprint: str
    valid_fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return {
            "update": self.update,
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer.json,
            "tokenizer_sha256": self.tokenizer.sha256,
            "train_fingerprint": self.train_fingerprint,
            "valid_fingerprint": self.valid_fingerprint,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Meta":
        """Returns what `to_json` wrote; raises `UserError` naming `where` when it is not that."""
        try:
            tokenizer = parse_tokenizer(values["tokenizer"], where)
            if tokenizer.sha256 != values["tokenizer_sha256"]:
                raise UserError(
                    f"{where}: its tokenizer has SHA-256 {tokenizer.sha256}, but {values['tokenizer_sha256']} was "
                    "saved; the checkpoint is damaged, take another one with --step"
                )
            config = from_dict(values["config"])
            fingerprints = str(values["train_fingerprint"]), str(values["valid_fingerprint"])
            return cls(int(values["update"]), config, tokenizer, *fingerprints)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not a checkpoint of this project ({error!r})") from error


class Checkpoints:
    """Saves and restores the checkpoints of one run under way; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, config: Config):
        assert config.schedule is not None
        self.folder = (workdir / "checkpoints").absolute()
        policies = [
            checkpoint_managers.LatestN(config.checkpoint.keep),
            checkpoint_managers.BestN(
                get_metric_fn=_valid_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
            checkpoint_managers.CustomSteps(config.schedule.epoch_ends),
        ]
        options = ocp.CheckpointManagerOptions(
            # Without best_fn orbax forgets the metrics with the process, and the best checkpoint after a restart.
            best_fn=_valid_loss,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._explain():
            self._manager.close()

    def check(self) -> None:
        """Raises what a background save has raised since."""
        with self._explain():
            self._manager.check_for_errors()

    def save(self, state: TrainState, meta: Meta, *, valid_loss: float | None) -> None:
        """Starts saving; returns once the arrays are copied to the host. A failed earlier save is raised here."""
        training = {"micro_step": state.micro_step, "opt_state": state.opt_state}
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: a checkpoint takes {needed / 1e6:,.0f} MB but {free / 1e6:,.0f} MB are free; those "
                "before are intact: make room and run the same command again"
            )
        with self._explain():
            self._manager.save(
                meta.update,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    training=ocp.args.StandardSave(training),
                    meta=ocp.args.JsonSave(meta.to_json()),
                ),
                metrics=None if valid_loss is None else {"valid_loss": valid_loss},
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
                f"{self.folder}: a checkpoint cannot be written ({reason[0][:300]}); those before are intact: make "
                "room and run the same command again"
            ) from error

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the update of the best validation loss among the kept checkpoints, None when none was evaluated."""
        return self._manager.best_step()

    def restore(self, update: int, like: TrainState) -> tuple[TrainState, Meta]:
        """Returns the state saved at `update`, laid out as `like`, and what stands beside it."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        training = {"micro_step": shapes.micro_step, "opt_state": shapes.opt_state}
        items = _restore(
            self._manager,
            self.folder / str(update),
            update,
            params=ocp.args.StandardRestore(shapes.params),
            training=ocp.args.StandardRestore(training),
            meta=ocp.args.JsonRestore(),
        )
        meta = Meta.from_json(items["meta"], str(self.folder / str(update)))
        return TrainState(items["training"]["micro_step"], items["params"], items["training"]["opt_state"]), meta


def checkpoint_bytes(config: Config) -> int:
    """Returns the size of one checkpoint: parameters, AdamW's two moments and the sum of gradients, all float32."""
    return num_params(config.model) * 4 * 4


def max_checkpoints(config: Config) -> int:
    """Returns how many checkpoints a run can end with: the latest ones, the best, and one per epoch."""
    assert config.schedule is not None
    return config.checkpoint.keep + 1 + len(config.schedule.epoch_ends)


def has_checkpoint(run: Path) -> bool:
    """Returns whether `run` holds a finished checkpoint."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def restore_params(run: Path, step: str = "best") -> tuple[Params, Meta]:
    """Returns the parameters of one checkpoint of `run` and what stands beside them; the optimizer state is not read.

    step: "best" by validation loss (the latest where none was evaluated), "latest", "epoch:N", or an update number.
    Raises `UserError` when there is no such run or checkpoint, or when it cannot be read.
    """
    folder = (run / "checkpoints").absolute()
    if not folder.is_dir():
        raise UserError(f"{run}: no run with checkpoints stands there; --checkpoint takes a workdir that train.py made")
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_valid_loss, best_mode="min")
    try:
        opened = ocp.CheckpointManager(folder, options=options, item_names=_ITEMS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{folder}: its checkpoints cannot be read ({type(error).__name__}: {reason}); move the damaged one away"
        ) from error
    with opened as manager:
        update = _choose(manager, run, step)
        where = folder / str(update)
        meta = Meta.from_json(_restore(manager, where, update, meta=ocp.args.JsonRestore())["meta"], str(where))
        shapes = jax.eval_shape(lambda: init_params(meta.config.model, jax.random.key(0)))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        return _restore(manager, where, update, params=ocp.args.StandardRestore(shapes))["params"], meta


def _choose(manager: ocp.CheckpointManager, run: Path, step: str) -> int:
    updates = sorted(manager.all_steps())
    if not updates:
        raise UserError(f"{run}: no finished checkpoint yet; let train.py reach its first one")
    if step == "latest":
        return updates[-1]
    if step == "best":
        best = manager.best_step()
        return updates[-1] if best is None else best
    kept = ", ".join(map(str, updates))
    if match := re.fullmatch(r"epoch:(\d+)", step):
        meta = _restore(manager, run / "checkpoints", updates[-1], meta=ocp.args.JsonRestore())["meta"]
        schedule = Meta.from_json(meta, str(run)).config.schedule
        epoch = int(match[1])
        assert schedule is not None
        if not 1 <= epoch <= len(schedule.epoch_ends) or schedule.epoch_ends[epoch - 1] not in updates:
            raise UserError(f"--step={step}: no checkpoint of that epoch; updates with one: {kept}")
        return schedule.epoch_ends[epoch - 1]
    if step.isdecimal() and int(step) in updates:
        return int(step)
    raise UserError(f"--step={step}: must be best, latest, epoch:N or one of the updates kept: {kept}")


def _restore(manager: ocp.CheckpointManager, where: Path, update: int, **items: Any) -> Any:
    try:
        return manager.restore(update, args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{where}: cannot be restored ({type(error).__name__}: {reason[0] if reason else ''}); "
            "take another checkpoint with --step, or move this folder away and rerun to continue from the one before"
        ) from error


def _valid_loss(metrics: dict[str, float]) -> float:
    return metrics["valid_loss"]
