"""On which machine, with which versions and by which command a run was made; kept over all its starts."""

import contextlib
import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import xxhash

from tinystories_jax.data.folders import read_small_file
from tinystories_jax.training.run_folder import MAX_JSON_BYTES, set_aside, warn, write_atomically
from tinystories_jax.versions import find_settings, find_versions

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")
# Of those that change what XLA makes of a program.
_SETTINGS = ("JAX_", "XLA_", "NVIDIA_TF32_OVERRIDE")


@dataclass(frozen=True)
class Environment:
    """What the last bits of a run's numbers depend on besides its config and data."""

    device: str
    num_devices: int
    platform: str
    versions: dict[str, str]


def describe_environment() -> Environment:
    """Returns the environment of this process."""
    devices = jax.devices()
    return Environment(
        device=devices[0].device_kind,
        num_devices=len(devices),
        platform=platform.platform(),
        versions=find_versions(_PACKAGES),
    )


def environment_changes(before: Environment, now: Environment) -> list[str]:
    """Returns what differs, each as `name WAS -> IS`; the kind of operating system changes no numbers."""
    pairs = [("device", before.device, now.device), ("devices", before.num_devices, now.num_devices)]
    names = sorted({*before.versions, *now.versions})
    pairs += [(name, before.versions.get(name), now.versions.get(name)) for name in names]
    return [f"{name} {was} -> {now_is}" for name, was, now_is in pairs if was != now_is]


@contextlib.contextmanager
def recorded_start(workdir: Path, *, resumed: bool = False) -> Iterator[None]:
    """Adds this process to the `starts` of WORKDIR/environment.json, and on leaving when it ended, however it did.

    A last start without `ended` is thus one that goes on, or that was killed. A damaged history is set aside with a
    warning, and so is said that one is missing where a run is `resumed`: it is no reason not to train.
    """
    path = workdir / "environment.json"
    command = shlex.join(["python", *sys.argv])
    start: dict[str, Any] = {
        "started": _now(),
        "command": command,
        "settings": find_settings(_SETTINGS),
        **dataclasses.asdict(describe_environment()),
    }
    starts = [*_earlier_starts(path, resumed), start]
    _write(path, starts)
    try:
        yield
    finally:
        start["ended"] = _now()
        # The disk that is full now has stopped the run already, and that is what the user is told.
        with contextlib.suppress(OSError, ValueError):
            _write(path, starts)


def _earlier_starts(path: Path, resumed: bool) -> list[dict[str, Any]]:
    try:
        values = json.loads(read_small_file(path, MAX_JSON_BYTES))
        if values["xxh3_128"] != _digest(values["starts"]):
            raise ValueError("its checksum is wrong")
        return values["starts"]
    except FileNotFoundError:
        if resumed:
            warn(f"{path} is missing; the history of starts begins anew")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warn(f"{path} is damaged ({type(error).__name__}: {error}); kept as {set_aside(path)}, the history begins anew")
    return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(starts: list[dict[str, Any]]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(starts, sort_keys=True).encode())


def _write(path: Path, starts: list[dict[str, Any]]) -> None:
    values = {"starts": starts, "xxh3_128": _digest(starts)}
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")
