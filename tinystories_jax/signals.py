"""Which signals ask a process of ours to stop, and how a loop is told."""

import contextlib
import os
import signal
from types import FrameType

from tinystories_jax.streams import let_go_of_lost_streams

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def obeyed_signals() -> list[signal.Signals]:
    """Returns those that this process is to obey: all, but SIGHUP where whoever started it has it ignored (nohup)."""
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]


class StopSignals:
    """Notes a signal to stop, for the loop to act on between two updates; a second SIGINT exits at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in obeyed_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.signal:
            # What ended us may have ended whoever read what we say, as Ctrl-C does with `| tee`.
            let_go_of_lost_streams()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        with contextlib.suppress(OSError):  # nobody reads it any longer
            again = b"a second Ctrl-C" if number == signal.SIGINT else b"Ctrl-C"
            os.write(2, b"\nfinishing this update and saving; " + again + b" exits at once\n")
