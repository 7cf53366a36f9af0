"""Samples of a duration, and what a sample says: median and spread, never a single figure."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

# A sample is at least so long, as many repetitions as it takes: then waiting for the device hardly counts.
_SAMPLE_SECONDS = 0.2


class Spread(NamedTuple):
    """Median, least and greatest of `num_samples` values, in their own unit."""

    median: float
    min: float
    max: float
    num_samples: int

    def scaled(self, factor: float) -> "Spread":
        """Returns the spread of the values times `factor`, which is positive."""
        return Spread(self.median * factor, self.min * factor, self.max * factor, self.num_samples)

    def rate(self, amount: float) -> "Spread":
        """Returns `amount` per second, where the values are the seconds it took."""
        return Spread(amount / self.median, amount / self.max, amount / self.min, self.num_samples)


def spread_of(values: Sequence[float]) -> Spread:
    """Returns the spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def take_samples(measure: Callable[[], float], *, seconds: float, at_least: int = 3, at_most: int = 20) -> list[float]:
    """Returns what `measure`, which returns seconds, gave each time, called until they add up to `seconds`."""
    samples: list[float] = []
    while len(samples) < at_least or (len(samples) < at_most and sum(samples) < seconds):
        samples.append(measure())
    return samples


def time_repeated(run: Callable[[int], float], *, seconds: float, at_least: int = 3, at_most: int = 20) -> Spread:
    """Returns the seconds of one repetition, sampled for about `seconds`; `run(n)` does n of them in a row and returns
    the seconds they took. It has been warmed up."""
    per_sample = math.ceil(_SAMPLE_SECONDS / run(1))
    samples = take_samples(lambda: run(per_sample), seconds=seconds, at_least=at_least, at_most=at_most)
    return spread_of(samples).scaled(1 / per_sample)
