"""Which differences between two sides are larger than what chance makes of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, variance

from tinystories_jax.analysis.run_files import Interval

_TAIL = 0.025  # above a 95 % interval
_NUM_PANELS = 400


@dataclass(frozen=True)
class Verdict:
    """`found`: whether the sides differ by more than the noise, None where nothing says how large the noise is; `why`
    says what decided. `difference` is second minus first, of the means; `interval` its 95 % interval, where known."""

    difference: float
    interval: Interval | None
    found: bool | None
    why: str


def compare_to_noise(
    first: Sequence[float],
    second: Sequence[float],
    first_intervals: Sequence[Interval] = (),
    second_intervals: Sequence[Interval] = (),
) -> Verdict:
    """Returns whether two sides differ, from one value per seed, and from the values' own 95 % intervals if they have.

    With two seeds or more on both sides, Welch's interval of the difference decides: only it knows what seeds do. With
    fewer, intervals that do not overlap; without those, nothing.
    """
    difference = mean(second) - mean(first)
    if len(first) > 1 and len(second) > 1:
        interval = welch_interval(first, second)
        if interval is None:
            return Verdict(difference, None, None, "the seeds do not vary: no noise estimate")
        return Verdict(difference, interval, not interval[0] <= 0 <= interval[1], "Welch's interval over seeds")
    if len(first_intervals) == len(first) and len(second_intervals) == len(second):
        (low_1, high_1), (low_2, high_2) = _hull(first_intervals), _hull(second_intervals)
        return Verdict(difference, None, high_1 < low_2 or high_2 < low_1, "the 95 % intervals of the scores")
    sides = "one seed per side" if len(first) == len(second) == 1 else "one seed on one side"
    return Verdict(difference, None, None, f"{sides}: no noise estimate")


def welch_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Returns the 95 % interval of mean(second) - mean(first), the sides' variances unequal; None if both are 0.

    Welch 1947, with Satterthwaite's degrees of freedom. At two seeds a side these are 1 to 2, and the interval is as
    wide as so little evidence makes it: 4.3 to 12.7 standard errors either way.
    """
    parts = [(variance(values) / len(values), len(values) - 1) for values in (first, second)]
    square = sum(part for part, _ in parts)
    if square == 0:
        return None
    degrees = square**2 / sum(part**2 / freedom for part, freedom in parts)
    difference, reach = mean(second) - mean(first), t_quantile(degrees) * math.sqrt(square)
    return difference - reach, difference + reach


def t_quantile(degrees: float) -> float:
    """Returns the t that 0.025 of Student's distribution lies above; `degrees` is any real number from 1.

    With t = sqrt(degrees) tan(angle) the density becomes cos(angle)^(degrees - 1): finite range, no tail to cut.
    """
    half = math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)) * math.sqrt(math.pi) / 2
    low, high = 0.0, math.atan(12.8 / math.sqrt(degrees))  # 12.71 is the quantile at one degree, the largest
    for _ in range(60):
        angle = (low + high) / 2
        below = 0.5 + 0.5 * _integrate_cosine_power(angle, degrees - 1) / half
        low, high = (angle, high) if below < 1 - _TAIL else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _integrate_cosine_power(angle: float, power: float) -> float:
    """Returns the integral of cos^power from 0 to `angle`, by Simpson's rule."""
    step = angle / _NUM_PANELS
    total = 1.0 + math.cos(angle) ** power
    total += sum((4 if panel % 2 else 2) * math.cos(panel * step) ** power for panel in range(1, _NUM_PANELS))
    return total * step / 3


def _hull(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)
