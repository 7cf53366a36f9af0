"""What a user can mend: one exception for it, and the exit codes that scripts promise."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can mend (config, data, checkpoint, machine); scripts print it and exit with 2.

    Each problem is one line: what is wrong, which value, what to do.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
