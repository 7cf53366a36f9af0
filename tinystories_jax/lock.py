"""Locks between processes: one trainer per run, one builder per token cache and tokenizer.

A lock is `flock` on a file, so the system itself lets go of it when its owner dies, however that happens. Python opens
files close-on-exec, so no program that the owner has started keeps it.
"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tinystories_jax.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MAX_OWNER_BYTES = 300


@contextmanager
def sole_trainer(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and keeps other trainers out of it; a folder that is new and still empty in the end goes again.

    Raises `UserError` with PID, host and start of the trainer that is there, and OSError where no folder can be made.
    """

    def refuse(owner: str) -> None:
        raise UserError(f"{workdir} is in use by {owner}; wait for it, or give another --workdir")

    is_new = not workdir.exists()
    try:
        with locked(workdir / "train.lock", when_held=refuse):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty: the rule
                workdir.rmdir()


@contextmanager
def locked(path: Path, *, when_held: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock file `path` while the block runs, and removes it after; yields whether it keeps others out.

    While another process holds it, `when_held` is called with "PID ... on HOST since ..." once; unless it raises, this
    call then waits. A file system without locks gets a warning. Raises OSError where the file cannot be made.
    """
    descriptor = _acquire(path, when_held)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Before the lock goes: afterwards the file may be somebody else's.
            if _stands_at(path, descriptor):
                path.unlink()
            os.close(descriptor)


def _acquire(path: Path, when_held: Callable[[str], None]) -> int | None:
    """Returns the descriptor that holds the lock, None where the file system has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    has_asked = False
    while True:
        with ExitStack() as on_failure:
            # A link there is not followed: it may lead to a file that is none of ours.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            on_failure.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not has_asked:
                    when_held(_read_owner(descriptor))
                    has_asked = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                path.unlink()
                print(f"warning: {path.parent} takes no locks ({error.strerror}); start one process", file=sys.stderr)
                return None
            # The owner before has removed the file: a lock on what no longer stands there keeps nobody out.
            if _stands_at(path, descriptor):
                _write_owner(descriptor)
                on_failure.pop_all()
                return descriptor


def _stands_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):  # no room: the lock holds all the same, only nobody can read whose it is
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"PID {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)


def _read_owner(descriptor: int) -> str:
    """Returns what the owner wrote, which it may not have done yet, on one line."""
    text = os.pread(descriptor, _MAX_OWNER_BYTES, 0).decode(errors="replace")
    return " ".join(text.split()) or "another process"
