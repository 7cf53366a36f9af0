"""Checks of tokenizer, token caches and the order of blocks, on the opened files that training reads."""

import contextlib
from collections.abc import Iterator

import numpy as np
import xxhash

from tinystories_jax.analysis.check import Check, pass_or_fail
from tinystories_jax.config import Config
from tinystories_jax.data.cache import TokenCache, batch_at, load_hashes, num_blocks
from tinystories_jax.data.prepare import PreparedData, count_shared_stories, expected_fingerprints
from tinystories_jax.data.sources import train_source, valid_source
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import END_OF_STORY_ID

_CHUNK = 2**24  # tokens read at a time: memory does not grow with the cache
_STORIES = 1_000
_SHARED_BOUND = 0.01  # of the validation stories


def check_tokenizer_and_cache(config: Config, data: PreparedData) -> Check:
    """Checks that both caches belong to tokenizer and source, hold whole stories, and that tokens become text again.

    Stories are cut out of the cache at the end tokens; the hash of each decoded text must be among the hashes of the
    source's stories, which were taken before any tokenizer saw them.
    """
    problems: list[str] = []
    details: list[str] = []
    compared = 0
    sources = (train_source(config.data), valid_source(config.data))
    fingerprints = expected_fingerprints(config, data.tokenizer)
    for source, cache, expected in zip(sources, (data.train, data.valid), fingerprints, strict=True):
        split = source.split
        problems += _fingerprint_problems(split, cache, data, expected)
        ends, highest = _scan(cache)
        if highest >= data.tokenizer.vocab_size:
            problems.append(f"{split}: token {highest:,}, but the tokenizer has {data.tokenizer.vocab_size:,}")
        stories = cache.manifest.num_stories
        if len(ends) != stories or cache.tokens[-1] != END_OF_STORY_ID:
            problems.append(f"{split}: {len(ends):,} end tokens for {stories:,} stories; without them stories run on")
            continue
        compared += _compare_stories(split, cache, data, ends, problems, details)
        problems += _first_story_problems(split, cache, data, int(ends[0]), source)
    return pass_or_fail(
        "tokenizer and cache",
        not problems,
        f"{len(problems)} problems; {compared:,} stories came back",
        "0; each as in the source",
        on_fail=f"{'; '.join(problems)}. Tokens and tokenizer must be of one making: build both again with "
        "python scripts/prepare.py and the same --config flags, and --rebuild.",
        figures={"problems": problems, "stories_compared": compared},
        details=details,
    )


def _fingerprint_problems(split: str, cache: TokenCache, data: PreparedData, expected: str) -> list[str]:
    manifest = cache.manifest
    if manifest.tokenizer_sha256 != data.tokenizer.sha256:
        return [
            f"{split}: the cache was made with tokenizer {manifest.tokenizer_sha256[:16]}, the run has "
            f"{data.tokenizer.sha256[:16]}"
        ]
    if manifest.fingerprint != expected:
        return [f"{split}: the cache was made from another source ({manifest.fingerprint[:16]}, not {expected[:16]})"]
    return []


def _token_chunks(cache: TokenCache) -> Iterator[tuple[int, np.ndarray]]:
    tokens = cache.tokens.view(np.ndarray)
    for start in range(0, len(tokens), _CHUNK):
        yield start, tokens[start : start + _CHUNK]


def _scan(cache: TokenCache) -> tuple[np.ndarray, int]:
    """Returns the positions of all end tokens and the highest token."""
    ends, highest = [], 0
    for start, chunk in _token_chunks(cache):
        ends.append(start + np.flatnonzero(chunk == END_OF_STORY_ID))
        highest = max(highest, int(chunk.max()))
    return np.concatenate(ends), highest


def _compare_stories(
    split: str, cache: TokenCache, data: PreparedData, ends: np.ndarray, problems: list[str], details: list[str]
) -> int:
    """Returns how many stories were compared: the first, the last, the longest, and others spread over the cache."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    longest = int((ends - starts).argmax())
    spread = np.linspace(0, len(ends) - 1, min(_STORIES, len(ends))).astype(np.int64)
    chosen = np.unique(np.append(spread, longest))
    hashes = load_hashes(cache)
    if not (hashes[1:] > hashes[:-1]).all():
        problems.append(f"{split}: the hashes of its stories are not ascending, so that file is damaged")
    pieces = [cache.tokens[starts[story] : ends[story]] for story in chosen]
    texts = [data.tokenizer.decode(tokens) for tokens in pieces]
    wrong = [
        f"story {story + 1:,}, which reads {text[:60]!r}"
        for story, tokens, text in zip(chosen, pieces, texts, strict=True)
        if not _contains(hashes, text) or data.tokenizer.encode(text) != tokens.tolist()
    ]
    if wrong:
        problems.append(f"{split}: {len(wrong):,} of {len(chosen):,} stories are not the source's, as {wrong[0]}")
    if len(set(texts)) < len(texts):
        problems.append(f"{split}: {len(texts) - len(set(texts)):,} stories stand in it twice")
    details += [f"{split}, first story: {texts[0][:80]!r}", f"{split}, last story: {texts[-1][:80]!r}"]
    details.append(f"{split}, longest story: {ends[longest] - starts[longest]:,} tokens")
    return len(chosen)


def _first_story_problems(
    split: str, cache: TokenCache, data: PreparedData, end: int, source: StorySource
) -> list[str]:
    """Compares the first story with the source's own, read again; not from the Hub, which a check does not ask."""
    if source.kind == "hub":
        return []
    with contextlib.closing(iter_stories(source, StoryReport(), SeenStories())) as stories:
        wanted = next(stories)
    found = data.tokenizer.decode(cache.tokens[:end])
    return [] if found == wanted else [f"{split}: the first story reads {found[:60]!r}, the source's {wanted[:60]!r}"]


def _contains(hashes: np.ndarray, text: str) -> bool:
    wanted = np.uint64(xxhash.xxh3_64_intdigest(text.encode()))
    place = int(np.searchsorted(hashes, wanted))
    return place < len(hashes) and hashes[place] == wanted


def check_data(config: Config, data: PreparedData) -> Check:
    """Counts stories shared by the splits, rows of the vocabulary that are never used, articles, and how often the
    first epoch visits each block."""
    shared, of_valid = count_shared_stories(data.train, data.valid), data.valid.manifest.num_stories
    dropped = StoryReport(**data.train.manifest.report).dropped_duplicates
    uses_V = np.zeros(data.tokenizer.vocab_size, np.int64)
    for _, chunk in _token_chunks(data.train):
        uses_V += np.bincount(np.minimum(chunk, len(uses_V) - 1), minlength=len(uses_V))
    unused = float((uses_V == 0).mean())
    articles = float(uses_V[list(data.tokenizer.article_ids)].sum() / uses_V.sum())
    blocks, wrong = _count_visits(config, data)
    problems = []
    if shared > _SHARED_BOUND * of_valid:
        problems.append(
            f"{shared:,} of {of_valid:,} validation stories stand in the training split too, so the validation loss "
            "rewards learning by heart; take them out of one of the two"
        )
    if wrong:
        problems.append(
            f"the first epoch does not visit {wrong:,} of {blocks:,} blocks exactly once; see batch_at in data/cache.py"
        )
    return pass_or_fail(
        "data",
        not problems,
        f"{shared:,} shared stories, {blocks - wrong:,} of {blocks:,} blocks once",
        f"at most {_SHARED_BOUND:.0%} of {of_valid:,}; all",
        on_fail="; ".join(problems),
        remark=f"articles are {articles:.1%} of the tokens; {unused:.1%} of the {len(uses_V):,} rows are never used"
        + "; a vocabulary made of these stories would need fewer" * (unused > 0.5),
        figures={
            "shared_stories": shared,
            "duplicates_dropped": dropped,
            "rows_never_used": unused,
            "article_share": articles,
            "blocks": blocks,
            "blocks_not_visited_once": wrong,
        },
        details=[f"{dropped:,} duplicate stories were dropped from the training split"],
    )


def _count_visits(config: Config, data: PreparedData) -> tuple[int, int]:
    """Returns how many blocks there are, and how many the first epoch does not visit exactly once.

    The order depends on the number of blocks alone, so `batch_at` deals out blocks of one token that are their own
    numbers; that real blocks hold the tokens they should is measured on three micro-batches.
    """
    length, batch_size = config.data.sequence_length, config.train.batch_size
    blocks = num_blocks(len(data.train.tokens), length)
    numbers = np.arange(blocks + 1, dtype=np.int64)
    arguments = {"seed": config.seed, "batch_size": batch_size}
    visits = np.zeros(blocks, np.int64)
    for micro_step in range(-(-blocks // batch_size)):
        dealt = batch_at(numbers, micro_step=micro_step, sequence_length=1, **arguments)[:, 0]
        np.add.at(visits, dealt[: blocks - micro_step * batch_size], 1)
    for micro_step in {0, blocks // batch_size // 2, blocks // batch_size}:
        dealt = batch_at(numbers, micro_step=micro_step, sequence_length=1, **arguments)[:, 0]
        real = batch_at(data.train.tokens, micro_step=micro_step, sequence_length=length, **arguments)
        for number, row in zip(dealt, real, strict=True):
            if not np.array_equal(row, data.train.tokens[number * length : (number + 1) * length + 1]):
                visits[number] = -1
    return blocks, int((visits != 1).sum())
