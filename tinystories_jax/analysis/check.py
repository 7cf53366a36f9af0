"""What a check of the doctor returns, and how a row of checks is shown."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_WIDTH = 120
_NAME_WIDTH = 24
_MEASURED_WIDTH = 48


class Outcome(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    measured and bound are for reading, `figures` holds the numbers themselves, JSON-able. note: on FAIL what it means
    and what to do; on SKIP why; on PASS what to know about the measurement. details: lines for --verbose.
    """

    name: str
    outcome: Outcome
    measured: str = ""
    bound: str = ""
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    details: tuple[str, ...] = ()
    seconds: float = 0.0


def judge(
    name: str,
    good: bool,
    measured: str,
    bound: str,
    *,
    on_fail: str,
    remark: str = "",
    figures: dict[str, Any],
    details: Sequence[str] = (),
) -> Check:
    """Returns PASS with `remark`, or FAIL with `on_fail`, what it means and what to do."""
    outcome, note = (Outcome.PASS, remark) if good else (Outcome.FAIL, on_fail)
    return Check(name, outcome, measured, bound, note, figures, tuple(details))


def skip(name: str, reason: str) -> Check:
    """Returns a check that could not be made, with the reason."""
    return Check(name, Outcome.SKIP, note=reason)


HEADER = f"{'check':<{_NAME_WIDTH}}{'':6}{'measured':<{_MEASURED_WIDTH}}  bound"


def format_check(check: Check, *, verbose: bool = False) -> str:
    """Returns the check's line of the table, and below it what is to be known of it."""
    line = f"{check.name:<{_NAME_WIDTH}}{check.outcome}  "
    indent = " " * len(line)
    if check.outcome == Outcome.SKIP:
        return "\n".join(textwrap.wrap(line + check.note, _WIDTH, subsequent_indent=indent))
    lines = [f"{line}{check.measured:<{_MEASURED_WIDTH}}  {check.bound}".rstrip()]
    lines += textwrap.wrap(check.note, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if verbose:
        lines += [f"{indent}{detail}" for detail in check.details]
    return "\n".join(lines)


def summarize(checks: Sequence[Check]) -> str:
    """Returns one line: how many checks passed, failed and were skipped, and the seconds they took."""
    counts = ", ".join(
        f"{sum(check.outcome == outcome for check in checks)} {word}"
        for outcome, word in ((Outcome.PASS, "passed"), (Outcome.FAIL, "failed"), (Outcome.SKIP, "skipped"))
    )
    return f"{counts}, in {sum(check.seconds for check in checks):.1f} s"
