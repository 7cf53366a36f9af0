"""Measures in a process of its own: nothing that ran before changes its memory, its threads or its allocator."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from tinystories_jax.allocator import keep_freed_memory
from tinystories_jax.errors import UserError, is_out_of_memory

_Result = TypeVar("_Result")
_SMALLER = "try a smaller model, --config.train.batch_size or --config.data.sequence_length"
# Variables to set for a process; None removes one.
Environment = Mapping[str, str | None]


def run_in_child(function: Callable[..., _Result], *arguments: Any, environment: Environment = {}) -> _Result:  # noqa: B006
    """Returns `function(*arguments)` of a fresh process; `function` stands at the top of a module.

    Raises its `UserError`, and one where memory ran out. What it prints goes to stderr: stdout belongs to results.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    with _changed_environment(environment):
        process.start()
    sender.close()
    try:
        problems, result = receiver.recv()
    except EOFError:
        process.join()
        code, name = process.exitcode, _name(function, arguments)
        if code is not None and code < 0:  # by the system, or by native code
            raise UserError(
                f"{name} was ended by signal {-code}, as happens where memory runs out; {_SMALLER}"
            ) from None
        raise RuntimeError(f"{name} ended with exit code {code}; see above") from None
    finally:
        # It has answered, has failed, or is not waited for any longer.
        process.kill()
        process.join()
    if problems:
        raise UserError(problems)
    return result


def call_as_script(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Returns `function(*arguments)` with memory held as in a script."""
    keep_freed_memory()
    return function(*arguments)


def peak_resident_bytes() -> int | None:
    """Returns the most memory that this process has held so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        sender.send(((), function(*arguments)))
    except UserError as error:
        sender.send((error.problems, None))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = f"{_name(function, arguments)}: too little memory for shapes of this size, here or on the device"
        sender.send(((f"{what}; {_SMALLER}",), None))


def _name(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    return (arguments[0] if function is call_as_script else function).__name__


@contextlib.contextmanager
def _changed_environment(changes: Environment) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Environment) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
