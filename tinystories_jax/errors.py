"""What a user can mend: one exception for it, and how to know a device without room for what is asked."""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can mend (config, data, checkpoint, machine); scripts print it and exit with 2.

    Each problem is one line: what is wrong, which value, what to do.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device, or this machine, had no room for what was asked."""
    said = str(error)  # by XLA, by PyTorch
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "CUDA out of memory" in said
