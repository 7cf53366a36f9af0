"""Near-copies of training stories: the longest run of tokens that a written story shares with the training cache.

Seeds of 16 tokens are found by their hashes, in one pass over the cache, and grown token by token from there: a run of
16 tokens or more is found at its full length, wherever it stands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinystories_jax.evaluation.bootstrap import Interval, share_interval

SEED_LENGTH = 16  # a power of two
NEAR_COPY = 30

# Windows of the cache at a time: about 50 MB of arrays.
_CHUNK = 2**20
_FILTER_BITS = 22
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying loses nothing
# No token: larger than any, and never equal to each other.
_STORY_END, _CACHE_END = 2**32, 2**32 + 1
_KEYS_PER_CLASS = 2**33


@dataclass(frozen=True)
class CopyScores:
    """Lengths of the longest copied runs, in tokens; a run under 16 counts as 0.

    near_copies: share of stories with a run of more than 30. median: the lower of the middle two.
    """

    num_stories: int
    near_copies: float
    near_copies_interval: Interval
    median: int
    longest: int


def score_copies(runs: np.ndarray) -> CopyScores:
    """Returns the figures of what `longest_runs` gave."""
    if not len(runs):
        return CopyScores(0, math.nan, Interval(math.nan, math.nan), 0, 0)
    above = runs > NEAR_COPY
    median = np.sort(runs)[(len(runs) - 1) // 2]
    return CopyScores(
        len(runs), float(above.mean()), share_interval(int(above.sum()), len(runs)), int(median), int(runs.max())
    )


def longest_runs(
    stories: Sequence[Sequence[int]], tokens: np.ndarray, prompt_lengths: Sequence[int] | None = None
) -> np.ndarray:
    """Returns int64 (num_stories,): the longest run of tokens of each story that stands in `tokens`, 0 for under 16.

    The first `prompt_lengths` tokens of a story are part of a run, but a run of nothing else does not count. Memory
    does not grow with `tokens`, a cache or any array of IDs. Seeds are compared by 64-bit hashes.
    """
    written = _Written.lay_out(stories, prompt_lengths or [0] * len(stories))
    runs = np.zeros(len(stories), np.int64)
    reach = max(map(len, stories), default=0)
    for start in range(0, len(tokens) - SEED_LENGTH + 1 if len(written.starts) else 0, _CHUNK):
        # With what follows, so that a run is whole although it goes on into the next chunk.
        part = np.append(tokens[start : start + _CHUNK + reach].astype(np.int64), _CACHE_END)
        hits, classes = written.find_seeds(part[: _CHUNK + SEED_LENGTH - 1])
        if len(hits):
            written.grow(runs, part, hits, classes)
    return runs


@dataclass(frozen=True)
class _Written:
    """The written stories in one row, each with an end behind it, and where in it runs may start.

    Starts whose next tokens are the same, 16 at first, are of one class.
    """

    tokens: np.ndarray
    story_of: np.ndarray  # of each token
    prompt_end: np.ndarray  # of each story, in `tokens`
    starts: np.ndarray
    class_of_start: np.ndarray
    hashes: np.ndarray  # of each class, ascending
    may_be_seed: np.ndarray  # by the first bits of a hash

    @classmethod
    def lay_out(cls, stories: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> "_Written":
        row = [token for story in stories for token in (*story, _STORY_END)]
        tokens = np.array(row, np.int64)
        lengths = np.array([len(story) + 1 for story in stories], np.int64)
        begins = np.cumsum(lengths) - lengths
        story_of = np.repeat(np.arange(len(stories)), lengths)
        windows = np.lib.stride_tricks.sliding_window_view(np.append(tokens, [_STORY_END] * SEED_LENGTH), SEED_LENGTH)
        starts = np.flatnonzero((windows != _STORY_END).all(axis=1))
        hashes, class_of_start = np.unique(_hash_windows(windows[starts])[:, 0], return_inverse=True)
        may_be_seed = np.zeros(2**_FILTER_BITS, bool)
        may_be_seed[_filter_slots(hashes)] = True
        prompt_end = begins + np.array(prompt_lengths, np.int64)
        return cls(tokens, story_of, prompt_end, starts, class_of_start, hashes, may_be_seed)

    def find_seeds(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places in `part` where a seed stands, and the class of each."""
        hashes = _hash_windows(part)
        hits = np.flatnonzero(self.may_be_seed[_filter_slots(hashes)])
        return _match(self.hashes, hashes[hits], hits)

    def grow(self, runs: np.ndarray, part: np.ndarray, hits: np.ndarray, class_of_hit: np.ndarray) -> None:
        """Raises `runs` to the longest ones that begin at `hits`.

        All of them grow by a token at a time. However often a run stands in the stories, its class is one.
        """
        starts, class_of_start, length = self.starts, self.class_of_start, SEED_LENGTH
        num_classes = len(self.hashes)
        while len(hits):
            is_hit = np.zeros(num_classes, bool)
            is_hit[class_of_hit] = True
            alive = is_hit[class_of_start]
            starts, class_of_start = starts[alive], class_of_start[alive]
            stories = self.story_of[starts]
            stories = stories[starts + length > self.prompt_end[stories]]
            runs[stories] = np.maximum(runs[stories], length)
            keys, class_of_start = np.unique(
                class_of_start * _KEYS_PER_CLASS + self.tokens[starts + length], return_inverse=True
            )
            hits, class_of_hit = _match(keys, class_of_hit * _KEYS_PER_CLASS + part[hits + length], hits)
            num_classes, length = len(keys), length + 1


def _match(keys: np.ndarray, wanted: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns those of `places` whose `wanted` is among the ascending `keys`, and where it stands there."""
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    same = keys[found] == wanted
    return places[same], found[same]


def _hash_windows(tokens: np.ndarray) -> np.ndarray:
    """Returns uint64 hashes of all windows of 16 tokens along the last axis: polynomials modulo 2**64 (Karp, Rabin).

    The hashes of 2, 4, 8 and 16 tokens are made of two halves each.
    """
    hashes, width = tokens.astype(np.uint64), 1
    while width < SEED_LENGTH:
        hashes = hashes[..., :-width] * np.uint64(pow(_BASE, width, 2**64)) + hashes[..., width:]
        width *= 2
    return hashes


def _filter_slots(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)
