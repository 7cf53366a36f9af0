"""From a config to a tokenizer and two verified token caches: builds what is missing and reuses the rest.

This is the whole way of the data in one call: iter_stories -> train_bpe -> write_cache -> open_cache.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinystories_jax.config import Config, DataConfig
from tinystories_jax.data.cache import TokenCache, cache_fingerprint, load_hashes, open_cache, write_cache
from tinystories_jax.data.folders import build_once, rebuild_command
from tinystories_jax.data.sources import identify_splits, name_of, train_source, valid_source
from tinystories_jax.data.stories import StoryReport, StorySource, format_report
from tinystories_jax.data.tokenizer import StoryTokenizer
from tinystories_jax.data.tokenizer_store import find_tokenizer, prepare_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.streams import log_to_stderr

_HASHES_PER_CHUNK = 1_000_000


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer, the caches of both splits, and the one-screen report on their stories."""

    tokenizer: StoryTokenizer
    train: TokenCache
    valid: TokenCache
    report: str


def prepare_data(
    config: Config, *, rebuild: bool = False, show_progress: bool = True, log: Callable[[str], None] = log_to_stderr
) -> PreparedData:
    """Returns tokenizer and token caches of `config`, built where missing (all of them with `rebuild`).

    Raises `UserError` for sources, tokenizers and caches that cannot be used, and for a split without stories.
    """
    sources = train_source(config.data), valid_source(config.data)
    # Both before anything is built: a wrong path of the second split is noticed now and not in an hour.
    identities = identify_splits(config.data)
    tokenizer = prepare_tokenizer(config.data, config.tokenizer, rebuild=rebuild, show_progress=show_progress, log=log)
    train, valid = (
        _prepare_cache(
            source, identity, tokenizer, config.data.cache_dir, rebuild=rebuild, show_progress=show_progress, log=log
        )
        for source, identity in zip(sources, identities, strict=True)
    )
    return _gather(tokenizer, train, valid)


def find_data(config: Config) -> PreparedData | None:
    """Returns what `prepare_data` would reuse, or None when tokenizer or caches are still to be built.

    Writes nothing and asks no network. Raises `UserError` as `prepare_data` does, for sources that cannot be read and
    for what is there but damaged.
    """
    sources = train_source(config.data), valid_source(config.data)
    identities = identify_splits(config.data, remember=False)
    tokenizer = find_tokenizer(config.data, config.tokenizer)
    if tokenizer is None:
        return None
    places = [
        _cache_place(source, identity, tokenizer, config.data.cache_dir)
        for source, identity in zip(sources, identities, strict=True)
    ]
    if not all(folder.exists() for folder, _ in places):
        return None
    train, valid = (_open_cache(folder, fingerprint, tokenizer) for folder, fingerprint in places)
    return _gather(tokenizer, train, valid)


def find_vocab_size(config: Config) -> int:
    """Returns the size of the tokenizer that is there, else that asked for; raises `UserError` as `find_data` does."""
    tokenizer = find_tokenizer(config.data, config.tokenizer)
    return config.tokenizer.vocab_size if tokenizer is None else tokenizer.vocab_size


def find_cache(data: DataConfig, split: str, fingerprint: str, tokenizer: StoryTokenizer) -> TokenCache | None:
    """Returns the cache of a split (train or validation) that a checkpoint names by its fingerprint; None if not there.

    Where the stories themselves are does not matter. Raises `UserError` for a damaged cache, and for a fingerprint
    that is none.
    """
    # It comes from a file, and a part of it becomes a path.
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise UserError(f"{split}_fingerprint={fingerprint[:80]!r} of the checkpoint is no SHA-256; it is damaged")
    folder = _cache_folder(data.cache_dir, split, fingerprint)
    return _open_cache(folder, fingerprint, tokenizer) if folder.exists() else None


def _open_cache(folder: Path, fingerprint: str, tokenizer: StoryTokenizer) -> TokenCache:
    return open_cache(
        folder, fingerprint=fingerprint, vocab_size=tokenizer.vocab_size, rebuild_command=rebuild_command()
    )


def expected_fingerprints(config: Config, tokenizer: StoryTokenizer) -> tuple[str, str]:
    """Returns the fingerprints that the caches of the training and the validation split must have; writes nothing."""
    train, valid = identify_splits(config.data, remember=False)
    return cache_fingerprint(tokenizer.sha256, train), cache_fingerprint(tokenizer.sha256, valid)


def _gather(tokenizer: StoryTokenizer, train: TokenCache, valid: TokenCache) -> PreparedData:
    reports = {
        "train": StoryReport(**train.manifest.report),
        "validation": StoryReport(**valid.manifest.report),
    }
    report = format_report(reports, count_shared_stories(train, valid))
    return PreparedData(tokenizer=tokenizer, train=train, valid=valid, report=report)


def _cache_place(
    source: StorySource, identity: dict[str, object], tokenizer: StoryTokenizer, cache_dir: str
) -> tuple[Path, str]:
    """Returns the folder of a token cache and its whole fingerprint."""
    fingerprint = cache_fingerprint(tokenizer.sha256, identity)
    return _cache_folder(cache_dir, source.split, fingerprint), fingerprint


def _cache_folder(cache_dir: str, split: str, fingerprint: str) -> Path:
    return Path(cache_dir) / "tokens" / f"{split}-{fingerprint[:16]}"


def _prepare_cache(
    source: StorySource,
    identity: dict[str, object],
    tokenizer: StoryTokenizer,
    cache_dir: str,
    *,
    rebuild: bool,
    show_progress: bool,
    log: Callable[[str], None],
) -> TokenCache:
    folder, fingerprint = _cache_place(source, identity, tokenizer, cache_dir)

    def build() -> None:
        log(f"{source.split}: encoding the stories of {name_of(source)}")
        write_cache(source, tokenizer, folder, identity=identity, show_progress=show_progress, replace=rebuild)

    built = build_once(folder, build, rebuild=rebuild, log=log)
    cache = _open_cache(folder, fingerprint, tokenizer)
    counts = f"{cache.manifest.num_stories:,} stories, {cache.manifest.num_tokens:,} tokens"
    log(f"{source.split}: {'wrote' if built else 'reusing'} {folder} ({counts})")
    return cache


def count_shared_stories(one: TokenCache, other: TokenCache) -> int:
    """Returns how many stories stand in both caches, by hash, in memory that does not grow with either."""
    smaller, larger = sorted((load_hashes(one), load_hashes(other)), key=len)
    return sum(
        int(np.intersect1d(part, _between(smaller, part[0], part[-1]), assume_unique=True).size)
        for part in _chunks(larger)
    )


def _chunks(hashes: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(hashes), _HASHES_PER_CHUNK):
        yield hashes[start : start + _HASHES_PER_CHUNK]


def _between(hashes: np.ndarray, low: np.uint64, high: np.uint64) -> np.ndarray:
    start, end = np.searchsorted(hashes, low, side="left"), np.searchsorted(hashes, high, side="right")
    return hashes[start:end]
