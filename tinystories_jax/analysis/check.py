"""What a check of the doctor returns, and how a row of checks is shown."""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

_WIDTH = 120
_NAME_WIDTH = 24
_MEASURED_WIDTH = 50


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


def pass_or_fail(
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
    """Returns PASS with `remark`, or FAIL with `on_fail`, what it means and what to do.

    A figure that is not finite fails whatever was compared: nothing is below a bound that is not a number.
    """
    if broken := [key for key, value in _flatten(figures) if isinstance(value, float) and not math.isfinite(value)]:
        good, on_fail = False, f"not finite: {', '.join(broken)}. {on_fail}"
    outcome, note = (Outcome.PASS, remark) if good else (Outcome.FAIL, on_fail)
    return Check(name, outcome, measured, bound, note, figures, tuple(details))


def _flatten(figures: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


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


def to_json(checks: Sequence[Check]) -> str:
    """Returns all checks as one JSON object; a figure that is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    failed = any(check.outcome == Outcome.FAIL for check in checks)
    values = finite({"failed": failed, "checks": [asdict(check) for check in checks]})
    return json.dumps(values, indent=1, allow_nan=False)
