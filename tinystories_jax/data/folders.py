"""What the data leaves on the disk: folders that are complete or not there, and small files read within limits."""

import errno
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tinystories_jax.errors import UserError, explain_refusal
from tinystories_jax.lock import locked

_IS_CONFIG_FLAG = re.compile(r"--?(?:no)?config\b")


def build_once(folder: Path, build: Callable[[], object], *, rebuild: bool = False, log: Callable[[str], None]) -> bool:
    """Calls `build`, which makes `folder`, where that is not there or has to be made again; returns whether it did.

    Raises `UserError` when the disk refuses.
    """
    if not rebuild and folder.exists() and not _lock_of(folder).exists():  # else somebody builds it, or was killed
        return False
    with sole_builder(folder, log=log):
        # Another process may have built it while this one waited.
        if not rebuild and folder.exists():
            return False
        build()
    return True


@contextmanager
def sole_builder(folder: Path, *, log: Callable[[str], None]) -> Iterator[None]:
    """Keeps other builders of `folder` out, or waits for the one that is there; removes what killed ones have left.

    Raises `UserError` when the disk refuses.
    """

    def wait(owner: str) -> None:
        log(f"waiting for {owner}, which builds {folder}")

    with explain_disk(folder), locked(_lock_of(folder), when_held=wait) as keeps_out:
        if keeps_out:
            for path in folder.parent.iterdir():
                if path.name.startswith(_temporary_prefix(folder)):
                    shutil.rmtree(path, ignore_errors=True)
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` when the block ends well, and vanishes when it does not.

    If `folder` has appeared meanwhile it stays as it is, unless `replace`. Raises `UserError` when the disk refuses.
    """
    temporary = _temporary_name(folder)
    try:
        with explain_disk(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _sync_folder(temporary)
            _publish(temporary, folder, replace)
            _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def explain_disk(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses while `folder` is built into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):  # the network, not the disk
            raise
        # A folder for temporary files may lie elsewhere.
        elsewhere = error.filename if folder.parent not in Path(error.filename or folder).parents else None
        reason, way_out = explain_refusal(error)
        raise UserError(
            f"cannot write {elsewhere or folder}: {reason}; {way_out}, or choose another place with "
            "--config.data.cache_dir=FOLDER"
        ) from error


def _publish(temporary: Path, folder: Path, replace: bool) -> None:
    retired = _temporary_name(folder)
    if replace:
        with suppress(FileNotFoundError):
            folder.rename(retired)
    try:
        temporary.rename(folder)
    except OSError as error:
        # Somebody else has finished the same folder first; theirs is as good.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _temporary_prefix(folder: Path) -> str:
    return f".{folder.name}.building-"


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(f"{_temporary_prefix(folder)}{secrets.token_hex(8)}")


def sync(file: BinaryIO) -> None:
    """Returns when the bytes written so far are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Writes `path`; returns when it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path` at once or not at all; a link there is replaced and not followed. Raises OSError."""
    temporary = path.with_name(f".{path.name}.building")
    # The temporary file is its own lock. So every writer can use the one name, and finds what a killed one has left.
    with locked(temporary, when_held=lambda owner: None):
        try:
            write_file(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file; raises ValueError for another kind or a larger one, else OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{path} has {status.st_size:,} bytes, but is expected to have at most {max_bytes:,}")
    return path.read_bytes()


def parse_json(content: bytes | str, where: str) -> Any:
    """Returns the value that the JSON stands for; raises ValueError, which names `where`, for whatever is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error


def rebuild_command() -> str:
    """Returns the command that builds again what this process's command line asks for."""
    flags = [
        argument
        for before, argument in zip(["", *sys.argv], sys.argv, strict=False)
        if _IS_CONFIG_FLAG.match(argument)
        or (_IS_CONFIG_FLAG.match(before) and "=" not in before and not argument.startswith("-"))
    ]
    return shlex.join(["python", "scripts/prepare.py", *(flags or ["--config", "CONFIG"]), "--rebuild"])
