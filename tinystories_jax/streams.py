"""Standard output and error whose reader went away: a terminal that was closed, a `tee` that Ctrl-C ended as well."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def go_on_unread() -> Iterator[None]:
    """Goes on where what is written in the block has no reader any longer."""
    try:
        yield
    except OSError:
        let_go_of_lost_streams()


def let_go_of_lost_streams() -> None:
    """Points standard output and error at nothing where nobody reads them any longer, so that writing to them does not
    fail. What still has a reader stays as it is."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # reported all the same: a reader that is gone, a terminal that hung up
    lost = poll.poll(0)
    if lost:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor, _ in lost:
            os.dup2(nothing, descriptor)
        os.close(nothing)


def log_to_stderr(line: str) -> None:
    """Writes one line at once, clear of stdout, which belongs to results; nobody has to read it."""
    with go_on_unread():
        print(line, file=sys.stderr, flush=True)
