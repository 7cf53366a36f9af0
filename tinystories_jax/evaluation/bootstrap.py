"""How far a figure would move with other stories of the same author: the bootstrap over stories."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

MIN_STORIES = 20  # with fewer, draws are so often alike that intervals come out too narrow, or of no width

_NUM_DRAWS = 2_000
_DRAWS_AT_ONCE = 20  # bounds the memory
_NORMAL_QUANTILE = 1.959964  # 2.5 % lie above


class Interval(NamedTuple):
    """A 95 % interval; nan with fewer than 20 stories, and where the figure is."""

    low: float
    high: float


def resample(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the sums of each count over 2,000 draws of as many stories, with replacement; nan with fewer than 20.

    A count is an array with a value per story. The same number of stories always gives the same draws.
    """
    columns = np.stack(list(counts.values()), axis=1)
    num_stories = len(columns)
    sums = np.full((_NUM_DRAWS, len(counts)), math.nan)
    # Frozen for good, unlike the newer generators of NumPy: the same draws under any version.
    rng = np.random.RandomState(0)
    for start in range(0, _NUM_DRAWS if num_stories >= MIN_STORIES else 0, _DRAWS_AT_ONCE):
        drawn = rng.randint(num_stories, size=(_DRAWS_AT_ONCE, num_stories), dtype=np.int64)
        sums[start : start + _DRAWS_AT_ONCE] = columns[drawn].sum(axis=1)
    return dict(zip(counts, sums.T, strict=True))


def interval_of(draws: np.ndarray) -> Interval:
    """Returns the middle 95 % of a figure's draws; those where it is not defined are left out."""
    defined = draws[~np.isnan(draws)]
    return Interval(*map(float, np.percentile(defined, (2.5, 97.5)))) if len(defined) else Interval(math.nan, math.nan)


def mean_interval(values: np.ndarray) -> Interval:
    """Returns the interval of the mean of one value per story."""
    values = np.asarray(values, np.float64)
    return interval_of(resample({"values": values})["values"] / max(len(values), 1))


def share_interval(hits: int, num_stories: int) -> Interval:
    """Returns Wilson's score interval (1927) of a share of stories: unlike draws, it is never of no width."""
    if not num_stories:
        return Interval(math.nan, math.nan)
    share, shrink = hits / num_stories, 1 + _NORMAL_QUANTILE**2 / num_stories
    centre = (share + _NORMAL_QUANTILE**2 / (2 * num_stories)) / shrink
    spread = share * (1 - share) / num_stories + _NORMAL_QUANTILE**2 / (4 * num_stories**2)
    reach = _NORMAL_QUANTILE * math.sqrt(spread) / shrink
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))
