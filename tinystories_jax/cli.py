"""Runs a script's main function with the exit codes all scripts share: 0, 2 for the user, 128 + N for signal N."""

import gc
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags

from tinystories_jax.allocator import keep_freed_memory
from tinystories_jax.compiled import keep_no_programs, keep_programs
from tinystories_jax.errors import UserError, explain_refusal, is_out_of_memory, is_refusal
from tinystories_jax.signals import STOP_SIGNALS, obeyed_signals

_USER_EXIT = 2
_GRACE_SECONDS = 3  # to end in good order
# In the path of a file that is neither ours nor of the standard library.
_FOREIGN = ("site-packages", "dist-packages", "<frozen importlib")
_COMPILE_CACHE_HELP = (
    "Keep compiled programs for the next start: in JAX_COMPILATION_CACHE_DIR, or below XDG_CACHE_HOME or ~/.cache."
)


def run(
    main: Callable[..., int | None],
    *,
    positional: str = "",
    at_least: int = 0,
    at_most: int | None = 0,
    compiles: bool = False,
) -> None:
    """Parses the flags, calls `main`, and exits with its code; `UserError` becomes one `error:` line per problem.

    `main` gets the arguments that are no flags, from `at_least` to `at_most` (None: any number) of what `positional`
    names. What a `main` that `compiles` compiles is kept for the next start; it imports JAX itself.
    """
    _obey_signals()
    _mend_streams()
    app.define_help_flags()
    keep_freed_memory()
    if compiles:
        # As if the script had defined it, so that --help shows it.
        flags.DEFINE_bool("compile_cache", True, _COMPILE_CACHE_HELP, module_name=sys.argv[0])
    try:
        arguments = _parse_flags()
        _check_count(arguments, positional, at_least, at_most)
        if compiles:
            keep_programs() if flags.FLAGS.compile_cache else keep_no_programs()
        code = main(*arguments) or 0
        sys.stdout.flush()
    except UserError as error:
        code = _complain(error.problems)
    except _StoppedError as stop:
        # All is tidied up, and the interpreter would wait for what the device is still busy with.
        _end(stop.code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `| head` does
        code = 0
    except Exception as error:
        problem = _explain(error)
        if not problem:
            raise
        code = _complain([problem])
    finally:
        # All is done. The interpreter takes a second to end, in which a signal would change what the exit code says.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


@contextmanager
def importing() -> Iterator[None]:
    """Looks for no garbage while the block imports modules, nor ever among what they are made of: that takes a fifth of
    the time of importing JAX and what stands on it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _mend_streams() -> None:
    # Closed by whoever started us, which Python shows as None: what is printed to None as stderr stands on stdout.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold bytes that are no text, and a terminal may not know every character of a story.
        sys.stdout.reconfigure(errors="backslashreplace")


class _StoppedError(SystemExit):
    """A signal on its way up, past everything that tidies up behind itself."""


def _obey_signals() -> None:
    sys.unraisablehook = _end_where_dropped
    for number in obeyed_signals():
        signal.signal(number, _stop)
    _watch_for_signals()


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process: by an exception where one may be raised.

    In the Python code of other packages, and while they are imported, it may not: native code that called it crashes,
    or drops the exception, as was seen with JAX. Nothing is lost by ending there.
    """
    code = 128 + number
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _FOREIGN):
            _end(code)
        frame = frame.f_back
    raise _StoppedError(code)


def _watch_for_signals() -> None:
    """Ends the process where a signal has not, some seconds ago.

    Python calls no handler while native code runs, and a compilation or the writing of many texts can take minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if signal.getsignal(number) is _stop:  # else somebody else obeys it, in time of their own
                time.sleep(_GRACE_SECONDS)
                if signal.getsignal(number) is _stop:
                    _end(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _end_where_dropped(unraisable: Any) -> None:
    """Obeys a signal that Python has dropped, as it does with what is raised while it destroys an object."""
    if isinstance(unraisable.exc_value, _StoppedError):
        _end(unraisable.exc_value.code)
    sys.__unraisablehook__(unraisable)


def _end(code: Any) -> NoReturn:
    with suppress(RuntimeError, OSError):  # RuntimeError: the signal came while it was being written
        sys.stdout.flush()
    os._exit(code)


def _parse_flags() -> list[str]:
    """Returns the arguments that are no flags."""
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS:
            # The library keeps a failure to read the file until somebody looks into the config.
            getattr(flags.FLAGS["config"].value, "items", None)
    except SystemExit as error:
        sys.exit(0 if error.code == 1 else error.code)  # absl ends --help with 1
    except Exception as error:  # whatever a config file, which is the user's code, may raise
        raise UserError(f"{_describe(error)}; see --help") from error
    return arguments


def _check_count(arguments: list[str], positional: str, at_least: int, at_most: int | None) -> None:
    if not positional and arguments:
        raise UserError(f"argument {arguments[0]!r} is not a flag; flags read --name=value, see --help")
    if len(arguments) < at_least:
        raise UserError(f"{positional} is missing: needed {at_least}, given {len(arguments)}; see --help")
    if at_most is not None and len(arguments) > at_most:
        raise UserError(f"argument {arguments[at_most]!r} is one {positional} too many: at most {at_most}; see --help")


def _explain(error: Exception) -> str:
    """Returns what the user can mend, nothing for a bug of ours."""
    if is_out_of_memory(error):
        return (
            "too little memory for what is asked, on this machine or its device; scripts/plan.py says what training "
            "takes"
        )
    if is_refusal(error):
        place = error.filename or "a file of this run or standard output"
        reason, way_out = explain_refusal(error)
        return f"{place}: {reason}; {way_out}, or give another place"
    return ""


def _describe(error: Exception) -> str:
    """Returns which flag is wrong and why, or where in the config file."""
    text = str(_innermost(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    in_file = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name in ("get_config", "<module>")]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    if in_file:
        return f"{in_file[-1].filename}, line {in_file[-1].lineno}: {type(error).__name__}: {' '.join(lines)}"
    if isinstance(error, OSError):
        return f"the config file cannot be read: {lines[-1]}"
    if required := re.search(r"Flag (--\w+) must have a value other than None", text):
        return f"{required[1]} is missing"
    if isinstance(error, flags.Error):
        # A TypeError or ValueError of a config file comes with its traceback in the text.
        return " ".join((lines[0], lines[-1]) if "Traceback (most recent call last):" in lines else lines)
    # What is left: a field that the config has not, which the libraries name without the rest of the flag.
    name = lines[0].strip("'")
    given = [flag for flag in sys.argv if name in re.split("[.=]", flag)]
    if name.isidentifier():
        lines[0] = f"there is no {name!r} in the config"
    return ": ".join([*given[:1], *lines])


def _innermost(error: BaseException) -> object:
    """Returns what says best what is wrong: a KeyError's text is its argument, and the config library wraps twice."""
    if isinstance(error, OSError) and error.__cause__ is not None:
        return error.__cause__
    if isinstance(error, (KeyError, AttributeError)) and error.args:
        inner = error.args[0]
        return _innermost(inner) if isinstance(inner, KeyError) else inner
    return error


def _complain(problems: list[str] | tuple[str, ...]) -> int:
    for problem in problems:
        print("error:", *problem.splitlines(), file=sys.stderr)
    return _USER_EXIT
