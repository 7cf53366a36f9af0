"""Near-copies of training stories, against a search that compares everything with everything."""

import math

import numpy as np
import pytest

from tinystories_jax.evaluation import copies
from tinystories_jax.evaluation.copies import SEED_LENGTH, longest_runs, score_copies


def search_naively(story: list[int], tokens: np.ndarray, prompt_length: int = 0) -> int:
    """Returns the length of the longest common run, all pairs of places compared; 0 below the seed's length."""
    cache, best = tokens.tolist(), 0
    for start in range(len(story)):
        for place in range(len(cache)):
            length = 0
            while (
                start + length < len(story)
                and place + length < len(cache)
                and story[start + length] == cache[place + length]
            ):
                length += 1
            if length > best and start + length > prompt_length:
                best = length
    return best if best >= SEED_LENGTH else 0


def random_tokens(count: int, seed: int, vocab_size: int = 50_000) -> np.ndarray:
    return np.random.RandomState(seed).randint(1, vocab_size, count).astype(np.uint16)


@pytest.fixture
def small_chunks(monkeypatch) -> int:
    monkeypatch.setattr(copies, "_CHUNK", 64)
    return 64


def test_planted_copies_are_found_at_their_length_wherever_they_stand(small_chunks):
    tokens = random_tokens(1000, seed=0)
    # At the beginning, at the end, up to and over borders of chunks, over several of them.
    planted = [(0, 20), (1000 - 17, 17), (48, 16), (49, 16), (64, 40), (63, 2), (60, 31), (100, 15), (130, 200)]
    stories = []
    for number, (start, length) in enumerate(planted):
        own = random_tokens(30, seed=100 + number) // 2 + 30_000  # nowhere in the cache twice in a row
        copied = tokens[start : start + length]
        stories.append([*own[:11].tolist(), *copied.tolist(), *own[11:].tolist()])
    runs = longest_runs(stories, tokens)
    assert runs.tolist() == [search_naively(story, tokens) for story in stories]
    assert runs.tolist() == [length if length >= SEED_LENGTH else 0 for _, length in planted]


@pytest.mark.parametrize("seed", range(6))
def test_text_full_of_repetition_gives_what_a_search_of_everything_gives(small_chunks, seed):
    # Two tokens only: each seed stands in many places, and runs grow through many others.
    rng = np.random.RandomState(seed)
    tokens = (rng.random_sample(400) < 0.15).astype(np.uint16)
    stories = [(rng.random_sample(length) < 0.15).astype(int).tolist() for length in (60, 35, 17, 16, 15, 0, 60)]
    stories[-1] = [0] * 60
    prompt_lengths = [20, 0, 17, 0, 0, 0, 30]
    expected = [search_naively(story, tokens, prompt) for story, prompt in zip(stories, prompt_lengths, strict=True)]
    assert longest_runs(stories, tokens, prompt_lengths).tolist() == expected
    assert max(expected) > SEED_LENGTH


def test_a_prompt_counts_with_what_follows_it_and_not_alone():
    tokens = random_tokens(300, seed=1)
    prompt, own = tokens[50:70].tolist(), [60_000] * 20
    alone, followed = prompt + own, [*prompt, *tokens[70:75].tolist(), *own]
    assert longest_runs([alone, followed], tokens, [20, 20]).tolist() == [0, 25]
    assert longest_runs([alone, followed], tokens).tolist() == [20, 25]


def test_no_run_reaches_from_one_story_into_the_next():
    tokens = random_tokens(300, seed=2)
    stories = [tokens[100:118].tolist(), tokens[118:150].tolist()]
    assert longest_runs(stories, tokens).tolist() == [18, 32]
    # Nor over the end of a training story, which no story's text holds.
    tokens[125] = 0
    assert longest_runs([random_tokens(300, seed=2)[100:150].tolist()], tokens).tolist() == [25]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_caches_of_both_kinds_and_any_size_are_searched(dtype):
    tokens = random_tokens(200, seed=3).astype(dtype)
    tokens[10:40] = np.iinfo(dtype).max - np.arange(30)
    story = tokens[5:45].tolist()
    assert longest_runs([story], tokens).tolist() == [40]
    assert longest_runs([story], tokens[:15]).tolist() == [0]
    assert longest_runs([story], tokens[:0]).tolist() == [0]
    assert longest_runs([], tokens).tolist() == []


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_a_run_is_as_long_in_one_chunk_as_in_many(monkeypatch, chunk):
    tokens = random_tokens(600, seed=4, vocab_size=3)
    stories = [random_tokens(200, seed=10 + number, vocab_size=3).tolist() for number in range(8)]
    whole = longest_runs(stories, tokens)
    assert whole.max() >= SEED_LENGTH
    monkeypatch.setattr(copies, "_CHUNK", chunk)
    assert longest_runs(stories, tokens).tolist() == whole.tolist()


def test_the_figures_are_those_of_the_runs():
    scores = score_copies(np.array([0, 0, 30, 31, 100, 16]))
    assert scores.num_stories == 6
    assert scores.near_copies == pytest.approx(2 / 6)
    assert scores.near_copies_interval == pytest.approx((0.0968, 0.7000), abs=1e-4)
    assert score_copies(np.zeros(200)).near_copies_interval == pytest.approx((0, 0.0188), abs=1e-4)
    assert (scores.median, scores.longest) == (16, 100)
    assert math.isnan(score_copies(np.array([], np.int64)).near_copies)
