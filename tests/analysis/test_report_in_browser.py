"""The pages in a real browser: quiet, drawn, legible, no wider than a phone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.analysis.browser import Browser, View
from tests.analysis.make_run import make_run, write_evaluation
from tinystories_jax.analysis.compare import compare
from tinystories_jax.analysis.compare_output import write_comparison_page
from tinystories_jax.analysis.report import write_report
from tinystories_jax.training.environment import recorded_start

PHONE, DESKTOP = 390, 1200
IN_ALL_WAYS = pytest.mark.parametrize(
    ("width", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)]
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    write_evaluation(run, articles=(0.94, 0.93, 0.95), grammar=(6.9, 6.6, 7.2))
    with recorded_start(run):
        pass
    return write_report(run)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    runs = [make_run(folder / f"a{seed}", seed=seed, loss=2.0 + 0.01 * seed) for seed in range(2)]
    runs += [make_run(folder / f"b{seed}", seed=seed, loss=1.5, optim__weight_decay=0.0) for seed in range(2)]
    return write_comparison_page(compare(runs), folder / "compare.html")


def check(view: View, *, width: int, dark: bool, num_plots: int) -> None:
    assert view.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in view.requests)
    # A phone makes its viewport as wide as what does not fit.
    assert view.look["page"] <= view.look["viewport"] == width
    assert (np.median(view.pixels) < 0.3) == dark
    assert len(view.look["plots"]) == num_plots
    for plot in view.look["plots"]:
        assert plot["width"] > 250
        assert plot["height"] > 150
        assert plot["longestPath"] > 50
        assert plot["lowestText"] >= 11
        colors = np.unique(view.pixels_of(plot).reshape(-1, 3), axis=0)
        assert len(colors) > 20


@IN_ALL_WAYS
def test_a_report_is_drawn_without_a_complaint(browser, report, width, dark):
    view = browser.show(report, width=width, dark=dark)
    check(view, width=width, dark=dark, num_plots=7)
    for words in ("Finished: 20 updates", "Loss over wall time", "grammar of 10", "PASS", "orbax-checkpoint"):
        assert words in view.look["text"]


@IN_ALL_WAYS
def test_a_comparison_is_drawn_without_a_complaint(browser, comparison, width, dark):
    check(browser.show(comparison, width=width, dark=dark), width=width, dark=dark, num_plots=3)


def test_a_report_of_a_run_that_has_not_begun_is_quiet_too(browser, tmp_path):
    page = write_report(make_run(tmp_path / "run", num_updates=0))
    check(browser.show(page, width=PHONE, dark=False), width=PHONE, dark=False, num_plots=0)


def test_the_browser_tells_of_what_is_wrong(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><p style="width: 600px">wide</p>'
        "<img src='missing.png'><script>console.warn('careful'); missing()</script>"
    )
    view = browser.show(page, width=PHONE, dark=False)
    assert view.look["page"] > PHONE
    assert any("careful" in complaint for complaint in view.complaints)
    assert any("missing is not defined" in complaint for complaint in view.complaints)
