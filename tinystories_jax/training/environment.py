"""environment.json: on which machine, with which versions and by which command each start of a run was made."""

import contextlib
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import tinystories_jax

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")


@contextlib.contextmanager
def recorded_start(workdir: Path) -> Iterator[None]:
    """Adds this process to the `starts` of WORKDIR/environment.json, and on leaving when it ended, however it did.

    A last start without `ended` is thus one that goes on, or that was killed.
    """
    path = workdir / "environment.json"
    starts = [*_earlier_starts(path), _describe_start()]
    _write(path, starts)
    try:
        yield
    finally:
        starts[-1]["ended"] = _now()
        _write(path, starts)


def _describe_start() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "started": _now(),
        "command": shlex.join(["python", *sys.argv]),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "platform": platform.platform(),
        "versions": {
            "tinystories_jax": tinystories_jax.__version__,
            "python": platform.python_version(),
            **{library: version(library) for library in _LIBRARIES},
        },
    }


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Returns the history, none where it is damaged: it is no reason not to train."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, starts: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"starts": starts}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
