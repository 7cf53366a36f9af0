"""Keeps compiled programs on the disk, so that the second start of a config need not compile them. JAX does the work.

All but one: the training step in float32 of an x86 processor cannot be kept (training/steps.py).
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinystories_jax.processor import describe_processor

_MAX_BYTES = 2**30
_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_ENABLE_COMPILATION_CACHE")
# A program is one for this processor: JAX looks it up by other things, and one for another might crash here.
_PROCESSOR_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def keep_programs() -> None:
    """Tells JAX, which reads it when it is imported, to keep what it compiles; where the user names a folder, there.

    Whatever is wrong with the folder becomes one line of warning: a run can do without.
    """
    folder_setting, least_seconds, _ = _SETTINGS
    os.environ.setdefault(least_seconds, "0")  # the doctor makes many small programs
    if os.environ.get(folder_setting):
        return
    try:
        folder = programs_folder()
        _make_private(folder)
        _prune(folder.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the user's home
        _warn(f"compiled programs are not kept ({error}); XDG_CACHE_HOME names another place, --nocompile_cache none")
        return
    os.environ[folder_setting] = str(folder)
    warnings.showwarning = _tell_once(folder, warnings.showwarning)


def keep_no_programs() -> None:
    """Tells JAX to compile everything, whatever has been kept."""
    os.environ[_SETTINGS[-1]] = "false"


def programs_folder() -> Path:
    """Returns where this user's programs for this processor are kept."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        caches = Path.home() / ".cache"
    return caches / "tinystories_jax" / "compiled" / _processor()


def _processor() -> str:
    described = describe_processor()
    lines = [platform.machine(), *(described.get(field, "") for field in _PROCESSOR_FIELDS)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _make_private(folder: Path) -> None:
    """Raises OSError unless this user can write there, and nobody else: programs are run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _prune(folder: Path) -> None:
    """Removes what has not been read for the longest time until `_MAX_BYTES` are left."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in found) - _MAX_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _tell_once(folder: Path, show: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `warnings.showwarning` that makes one line of all that JAX says of programs it can't read or write.

    JAX goes on without them, but never replaces a damaged one. So all are removed, to be kept anew.
    """
    told: set[str] = set()

    def show_warning(message: Warning | str, *arguments: Any, **more: Any) -> None:
        verb = next((verb for verb in ("reading", "writing") if str(message).startswith(_JAX_SAYS.format(verb))), None)
        if verb is None:
            show(message, *arguments, **more)
            return
        if verb in told:
            return
        told.add(verb)
        reason = " ".join(str(message).split(": ", 1)[-1].split())
        if verb == "reading":
            for path in folder.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            _warn(f"a compiled program in {folder} is damaged ({reason:.200}); all there are compiled and kept anew")
        else:
            _warn(f"compiled programs cannot be kept in {folder} ({reason:.200}); the next start compiles them again")

    return show_warning


_JAX_SAYS = "Error {} persistent compilation cache entry"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
