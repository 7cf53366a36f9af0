"""Keeps orbax silent about what a user cannot use; what they must know reaches them as an exception."""

import functools
import logging
import sys
import warnings
from pathlib import Path
from typing import Any


@functools.cache
def hush_orbax() -> None:
    """Keeps orbax from telling each step that it takes, and what reads and writes that failed leave behind.

    Their exception has been raised to us. Python says once more what it was when the coroutines of the others are
    collected, and that their event loop is closed when tensorstore answers them.
    """
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Of the arrays that orbax has not begun to write when writing another one failed.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_coroutine = code is not None and _is_orbax(code.co_filename)
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (of_coroutine or late):
            previous(unraisable)

    sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return not _is_orbax(record.pathname)


def _is_orbax(file: str) -> bool:
    return "orbax" in Path(file).parts
