"""What a user can mend: one exception for it, what to do where the disk refuses, and how to know a full memory."""

import errno
import os
from collections.abc import Sequence
from typing import TypeGuard

_WAYS_OUT = (
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    ((errno.EROFS, errno.EACCES, errno.EPERM), "let it be written to"),
    ((errno.ENOENT,), "put the folder back"),
    ((errno.EEXIST, errno.EISDIR, errno.ENOTDIR), "move away what stands in its place"),
    ((errno.ELOOP,), "take a path without that loop"),
    ((errno.ENAMETOOLONG,), "take a shorter path"),
    ((errno.EIO, errno.ESTALE), "mend that"),
)


class UserError(ValueError):
    """Something the user can mend (config, data, checkpoint, machine); scripts print it and exit with 2.

    Each problem is one line: what is wrong, which value, what to do.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def is_refusal(error: Exception) -> TypeGuard[OSError]:
    """Returns whether a place on a disk is full, closed, missing, occupied or broken."""
    return isinstance(error, OSError) and any(error.errno in numbers for numbers, _ in _WAYS_OUT)


def explain_refusal(error: Exception) -> tuple[str, str]:
    """Returns why the disk refuses, in the system's words where they are known, and what the user must do."""
    number = error.errno if isinstance(error, OSError) else None
    # tensorstore raises other errors, with the system's words somewhere in them.
    found = [
        (known, advice)
        for numbers, advice in _WAYS_OUT
        for known in numbers
        if known == number or (number is None and os.strerror(known) in str(error))
    ]
    if found:
        return os.strerror(found[0][0]), found[0][1]
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:300], "mend that"


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device, or this machine, had no room for what was asked."""
    said = str(error)  # by XLA, by PyTorch
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "CUDA out of memory" in said
