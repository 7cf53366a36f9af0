"""Faults on purpose. In an ordinary run of the tests a fixed, small set; with FAULTS=full (`make faults`) the whole.

Either ends with a tally: what was tried and what came of it.
"""

import os
from collections import Counter

import pytest

_TALLIES: dict[str, Counter[str]] = {}


@pytest.fixture(scope="session")
def full() -> bool:
    """Returns whether the whole set is asked for."""
    return os.environ.get("FAULTS") == "full"


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """Returns counts by outcome, over all parameters of a test, which are printed in the end even when it fails."""
    return _TALLIES.setdefault(request.node.originalname, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TALLIES:
        terminalreporter.section("tally of faults")
    for name, counts in _TALLIES.items():
        outcomes = ", ".join(f"{outcome}: {count:,}" for outcome, count in counts.items())
        terminalreporter.write_line(f"{name}: {outcomes}")
