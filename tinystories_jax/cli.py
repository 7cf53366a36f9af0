"""Runs a script's main function with the exit codes that DESIGN promises: 0, 2 for the user, 130 / 143 for signals."""

import errno
import signal
import sys
from collections.abc import Callable

from absl import app, flags

from tinystories_jax.errors import UserError

_USER_EXIT = 2
# What a full, read-only or missing disk says; anything else from the system is a bug of ours.
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR}


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main`, and exits with its code; `UserError` becomes one `error:` line per problem."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app.define_help_flags()
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise UserError(f"argument {rest[0]!r} is not a flag; flags read --name=value, see --help")
        code = main() or 0
        sys.stdout.flush()
    except flags.Error as error:
        code = _complain([f"{error}; see --help"])
    except UserError as error:
        code = _complain(error.problems)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `| head` does
        code = 0
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        code = _complain([f"{error.filename or 'a file'}: {error.strerror}; make room, or give a path that can be written"])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _complain(problems: list[str] | tuple[str, ...]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return _USER_EXIT
