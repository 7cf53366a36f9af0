"""Work of our own threads, which no process that ends waits for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def in_background(name: str, function: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
    """Returns what `function(*arguments)`, in a thread called `name`, is going to return or to raise.

    Unlike those of a pool, the thread does not keep the process from ending.
    """
    future: Future[_Result] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
