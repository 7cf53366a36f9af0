"""Which signals ask a process of ours to stop."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def obeyed_signals() -> list[signal.Signals]:
    """Returns those that this process is to obey: all, but SIGHUP where whoever started it has it ignored (nohup)."""
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
