"""What stands beside the arrays of a checkpoint, all that sampling and going on need, under a checksum of its own."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from tinystories_jax.config import Config, contradictions, follows_from_the_data, from_dict, to_dict
from tinystories_jax.data.folders import read_small_file
from tinystories_jax.data.tokenizer import StoryTokenizer, parse_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.training.environment import Environment
from tinystories_jax.training.jsonl import FileState

_FORMAT = 2  # 1 had no checksums
_MAX_FILE_BYTES = 2**28  # a tokenizer of a million tokens, several times over


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was saved, or cannot be read; another one may be sound."""


class NotFiniteError(UserError):
    """Arrays that hold nan or infinity, which nobody can go on from."""


@dataclass(frozen=True)
class LoggedLoss:
    """The validation loss in nats per token after `update`, and the same in bits per byte."""

    update: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class History:
    """What a run has measured so far and decides by: which checkpoint is best, when to stop, what is a loss spike.

    recent_losses: of the last updates, nats per token. seconds: what the run has taken, over all its processes.
    """

    evaluations: tuple[LoggedLoss, ...] = ()
    recent_losses: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Leaf:
    """One array of a state. `xxh3_128` is the checksum of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


Leaves = dict[str, Leaf]  # by the path in the tree


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of, besides its arrays. `logs`: metrics.jsonl and samples.jsonl when it was saved."""

    update: int
    config: Config
    tokenizer: StoryTokenizer
    train_fingerprint: str
    valid_fingerprint: str
    environment: Environment
    history: History = History()
    logs: dict[str, FileState] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "update": self.update,
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer.json,
            "tokenizer_sha256": self.tokenizer.sha256,
            "train_fingerprint": self.train_fingerprint,
            "valid_fingerprint": self.valid_fingerprint,
            "environment": dataclasses.asdict(self.environment),
            "history": dataclasses.asdict(self.history),
            "logs": {name: dataclasses.asdict(state) for name, state in self.logs.items()},
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Meta":
        """Returns what `to_json` wrote; raises `DamagedCheckpointError` naming `where` when it is not that."""
        try:
            tokenizer = parse_tokenizer(_typed(values["tokenizer"], str), where)
            if tokenizer.sha256 != values["tokenizer_sha256"]:
                raise ValueError(
                    f"its tokenizer has SHA-256 {tokenizer.sha256}, but {values['tokenizer_sha256']} was saved"
                )
            config = from_dict(values["config"])
            if config.model.vocab_size != tokenizer.vocab_size:
                raise ValueError(f"its config has {config.model.vocab_size} tokens, its tokenizer others")
            return cls(
                update=_count(values["update"]),
                config=config,
                tokenizer=tokenizer,
                train_fingerprint=_typed(values["train_fingerprint"], str),
                valid_fingerprint=_typed(values["valid_fingerprint"], str),
                environment=_read_environment(values["environment"]),
                history=_read_history(values["history"]),
                logs={
                    name: FileState(_count(state["num_bytes"]), _typed(state["xxh3_128"], str))
                    for name, state in values["logs"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"{where}: not a checkpoint of this project ({type(error).__name__}: {error})"
            ) from error


def describe_leaves(tree: Any, what: str) -> Leaves:
    """Returns dtype, shape and checksum of each array of `tree`; raises `NotFiniteError` where a value is none."""
    leaves: Leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values, name = np.ascontiguousarray(leaf), jax.tree_util.keystr(path, simple=True, separator=".")
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{what}: {name} holds values that are not finite")
        leaves[name] = Leaf(str(values.dtype), np.shape(leaf), xxhash.xxh3_128_hexdigest(values.data))
    return leaves


def shapes_of(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each leaf by its path, of arrays or of what stands for them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (str(leaf.dtype), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_file(meta: Meta, params: Leaves, training: Leaves) -> dict[str, Any]:
    """Returns what `read_meta` reads."""
    leaves = {
        part: {path: dataclasses.asdict(leaf) for path, leaf in table.items()}
        for part, table in (("params", params), ("training", training))
    }
    values = {"format": _FORMAT, **meta.to_json(), "leaves": leaves}
    return {**values, "xxh3_128": digest_of_meta(values)}


def read_meta(checkpoint: Path) -> tuple[Meta, dict[str, Leaves]]:
    """Returns what stands beside the arrays in the folder of a checkpoint, and the tables `params` and `training`.

    Raises `DamagedCheckpointError` where it is not what was saved, `UserError` for another format of checkpoints.
    """
    path = checkpoint / "meta" / "metadata"
    try:
        values = json.loads(read_small_file(path, _MAX_FILE_BYTES))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    saved = values.pop("xxh3_128", None)
    if saved is None and "format" not in values and "tokenizer_sha256" in values:
        raise UserError(f"{path}: made by an older version, without checksums; go on with that one, or train again")
    try:
        digest = digest_of_meta(values)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if saved != digest:
        raise DamagedCheckpointError(f"{path} is not what was saved: its checksum is wrong")
    if values["format"] != _FORMAT:
        raise UserError(
            f"{path}: checkpoint format {values['format']}, this version reads {_FORMAT}; use the version that wrote it"
        )
    return Meta.from_json(values, str(path)), _read_leaves(values, path)


def require_same_run(saved: Meta, now: Meta, workdir: Path) -> None:
    """Raises `UserError` naming what differs, unless `now` would continue the run that `saved` is of."""
    differing = contradictions(saved.config, now.config)
    if saved.tokenizer.sha256 != now.tokenizer.sha256:
        shas = saved.tokenizer.sha256[:16], now.tokenizer.sha256[:16]
        differing.append(f"tokenizer: the run has SHA-256 {shas[0]}, requested {shas[1]}")
    other_stories = _other_stories(saved, now, workdir)
    # What follows from the data cannot be given; which data they were can.
    if differing and not (other_stories and all(map(follows_from_the_data, differing))):
        raise another_run(workdir, differing)
    if other_stories:
        raise UserError(other_stories)


def another_run(workdir: Path, differing: Sequence[str]) -> UserError:
    """Returns what a user is told where the config would not continue the run in `workdir`."""
    return UserError(
        [f"{workdir} holds another run; give another --workdir, or the run's own values:"]
        + [f"  {line}" for line in differing]
    )


def _other_stories(saved: Meta, now: Meta, workdir: Path) -> str:
    """Returns what to say where `now` would train on other stories than `saved` did, else nothing."""
    for split, before, given in (
        ("train", saved.train_fingerprint, now.train_fingerprint),
        ("validation", saved.valid_fingerprint, now.valid_fingerprint),
    ):
        if before != given:
            fields, new = dataclasses.asdict(saved.config.data), dataclasses.asdict(now.config.data)
            other = [f"data.{key}: {fields[key]!r} then, {new[key]!r} now" for key in new if fields[key] != new[key]]
            return (
                f"{workdir}: the run was trained on other stories (its {split} cache is {before[:16]}, the data now "
                f"gives {given[:16]}; {'; '.join(other) or 'the same fields, so other contents'}); give back the same "
                "stories, or another --workdir"
            )
    return ""


def digest_of_meta(values: dict[str, Any]) -> str:
    """Returns the checksum that stands beside `values` in a checkpoint's meta."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _read_leaves(values: dict[str, Any], path: Path) -> dict[str, Leaves]:
    try:
        return {
            part: {
                name: Leaf(_typed(leaf["dtype"], str), tuple(map(_count, leaf["shape"])), _typed(leaf["xxh3_128"], str))
                for name, leaf in values["leaves"][part].items()
            }
            for part in ("params", "training")
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: no table of arrays ({type(error).__name__}: {error})") from error


def _read_environment(values: dict[str, Any]) -> Environment:
    return Environment(
        device=_typed(values["device"], str),
        num_devices=_count(values["num_devices"]),
        platform=_typed(values["platform"], str),
        versions={name: _typed(version, str) for name, version in values["versions"].items()},
    )


def _read_history(values: dict[str, Any]) -> History:
    return History(
        evaluations=tuple(
            LoggedLoss(_count(row["update"]), _finite(row["loss"]), _finite(row["bits_per_byte"]))
            for row in values["evaluations"]
        ),
        recent_losses=tuple(map(_finite, values["recent_losses"])),
        seconds=_finite(values["seconds"]),
    )


def _typed(value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted):
        raise TypeError(f"{value!r:.50} is no {wanted.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r:.50} is no count")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.50} is no finite number")
    return float(value)
