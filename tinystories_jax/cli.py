"""Runs a script's main function with the exit codes that DESIGN promises: 0, 2 for the user, 130 / 143 for signals."""

import errno
import re
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags

from tinystories_jax.errors import UserError

_USER_EXIT = 2
# What a full, read-only or missing place on a disk says; anything else from the system is a bug of ours.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MENDABLE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main`, and exits with its code; `UserError` becomes one `error:` line per problem."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app.define_help_flags()
    try:
        _parse_flags()
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _complain(error.problems)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `| head` does
        code = 0
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        place = error.filename or "a file of this run"
        code = _complain([f"{place}: {error.strerror}; make room there, or give a place that can be written"])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parse_flags() -> None:
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS:
            # The library keeps a failure to read the file until somebody looks into the config.
            getattr(flags.FLAGS["config"].value, "items", None)
    except Exception as error:  # whatever a config file, which is the user's code, may raise
        raise UserError(f"{_describe(error)}; see --help") from error
    if rest:
        raise UserError(f"argument {rest[0]!r} is not a flag; flags read --name=value, see --help")


def _describe(error: Exception) -> str:
    """Returns in one line which flag is wrong and why, or where in the config file."""
    # What the libraries wrap: a traceback in the text, or a KeyError in an AttributeError.
    text = str(error.args[0].args[0] if error.args and isinstance(error.args[0], KeyError) else error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    if required := re.search(r"Flag (--\w+) must have a value other than None", text):
        return f"{required[1]} is missing"
    if "Traceback (most recent call last)" in text:
        text = f"{text.partition(chr(10))[0]} {text.split('; see')[0].strip().splitlines()[-1]}"
    in_file = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    if in_file:
        return f"{in_file[-1].filename}, line {in_file[-1].lineno}: {type(error).__name__}: {text}"
    if isinstance(error, flags.Error):
        return text
    key = text.split("\n")[0].strip("'")
    given = [argument for argument in sys.argv[1:] if argument.startswith("--config") and key in argument]
    named = given[0] if given else next((a for a in sys.argv[1:] if a.startswith("--config")), "--config")
    return f"{named}: {text}"


def _complain(problems: list[str] | tuple[str, ...]) -> int:
    for problem in problems:
        print("error:", *problem.splitlines(), file=sys.stderr)
    return _USER_EXIT
