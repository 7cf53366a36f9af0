"""From a config to a tokenizer and two verified token caches: builds what is missing and reuses the rest.

This is the whole way of the data in one call: iter_stories -> train_bpe -> write_cache -> open_cache.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinystories_jax.config import Config, DataConfig, TokenizerConfig
from tinystories_jax.data.cache import (
    TokenCache,
    cache_fingerprint,
    fingerprint_of,
    load_hashes,
    open_cache,
    write_cache,
)
from tinystories_jax.data.folders import is_built, new_folder, parse_json, read_small_file, sole_builder, write_file
from tinystories_jax.data.stories import (
    SeenStories,
    StoryReport,
    StorySource,
    format_report,
    iter_stories,
    source_identity,
)
from tinystories_jax.data.tokenizer import (
    TOKENIZER_FILE,
    StoryTokenizer,
    load_tokenizer,
    train_bpe,
)
from tinystories_jax.errors import UserError
from tinystories_jax.streams import go_on_unread

_TRAINER_VERSION = 1  # raise it when train_bpe gives another vocabulary for the same stories
_META_FILE = "meta.json"
_IS_CONFIG_FLAG = re.compile(r"--?(?:no)?config\b")
_MAX_META_BYTES = 64 * 2**20  # it names the files of stories, as a cache's manifest does
_HASHES_PER_CHUNK = 1_000_000


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer, the caches of both splits, and the one-screen report on their stories."""

    tokenizer: StoryTokenizer
    train: TokenCache
    valid: TokenCache
    report: str


def rebuild_command() -> str:
    """Returns the command that builds again what this process's command line asks for."""
    flags = [
        argument
        for before, argument in zip(["", *sys.argv], sys.argv, strict=False)
        if _IS_CONFIG_FLAG.match(argument)
        or (_IS_CONFIG_FLAG.match(before) and "=" not in before and not argument.startswith("-"))
    ]
    return shlex.join(["python", "scripts/prepare.py", *(flags or ["--config", "CONFIG"]), "--rebuild"])


def log_to_stderr(line: str) -> None:
    """Writes one line at once, clear of stdout, which belongs to results; nobody has to read it."""
    with go_on_unread():
        print(line, file=sys.stderr, flush=True)


def prepare_data(
    config: Config, *, rebuild: bool = False, show_progress: bool = True, log: Callable[[str], None] = log_to_stderr
) -> PreparedData:
    """Returns tokenizer and token caches of `config`, built where missing (all of them with `rebuild`).

    Raises `UserError` for sources, tokenizers and caches that cannot be used, and for a split without stories.
    """
    sources = _splits(config.data)
    # Both before anything is built: a wrong path of the second split is noticed now and not in an hour.
    identities = _identify(sources, config.data)
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
    sources = _splits(config.data)
    identities = _identify(sources, config.data, remember=False)
    tokenizer = _find_tokenizer(config.data, config.tokenizer)
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
    tokenizer = _find_tokenizer(config.data, config.tokenizer)
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
    train, valid = _identify(_splits(config.data), config.data, remember=False)
    return cache_fingerprint(tokenizer.sha256, train), cache_fingerprint(tokenizer.sha256, valid)


def _splits(data: DataConfig) -> tuple[StorySource, StorySource]:
    return train_source(data), valid_source(data)


def _gather(tokenizer: StoryTokenizer, train: TokenCache, valid: TokenCache) -> PreparedData:
    reports = {
        "train": StoryReport(**train.manifest.report),
        "validation": StoryReport(**valid.manifest.report),
    }
    report = format_report(reports, count_shared_stories(train, valid))
    return PreparedData(tokenizer=tokenizer, train=train, valid=valid, report=report)


def train_source(data: DataConfig) -> StorySource:
    """Returns the training split that `data` names; max_stories limits this split alone."""
    return StorySource(
        kind=data.source,
        split="train",
        files=data.train_files,
        hub_name=data.hub_name,
        hub_revision=data.hub_revision,
        max_stories=data.max_stories,
    )


def valid_source(data: DataConfig) -> StorySource:
    """Returns the validation split that `data` names, whole."""
    return StorySource(
        kind=data.source,
        split="validation",
        files=data.valid_files,
        hub_name=data.hub_name,
        hub_revision=data.hub_revision,
    )


def tokenizer_source(data: DataConfig, tokenizer: TokenizerConfig) -> StorySource:
    """Returns what a tokenizer is trained on: the training split, or other text from the Hub or files."""
    if tokenizer.source == "stories":
        return train_source(data)
    return StorySource(
        kind=tokenizer.source,
        split="train",
        files=tokenizer.train_files,
        hub_name=tokenizer.hub_name,
        hub_subset=tokenizer.hub_subset,
        hub_revision=tokenizer.hub_revision,
    )


def prepare_tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    *,
    rebuild: bool = False,
    show_progress: bool = True,
    log: Callable[[str], None] = log_to_stderr,
) -> StoryTokenizer:
    """Returns the tokenizer of `config`: loaded from tokenizer.path, or trained once and kept in data.cache_dir.

    Raises `UserError` when it is unusable or has more than tokenizer.vocab_size tokens.
    """
    if config.path:
        tokenizer = _load_given(config)
        log(f"tokenizer: loaded {config.path} ({tokenizer.vocab_size:,} tokens)")
    else:
        tokenizer = _trained_tokenizer(data, config, rebuild=rebuild, show_progress=show_progress, log=log)
    if tokenizer.vocab_size < config.vocab_size:
        log(
            f"tokenizer: {'holds' if config.path else 'the corpus fills'} only {tokenizer.vocab_size:,} of the "
            f"{config.vocab_size:,} tokens asked; the model gets {tokenizer.vocab_size:,} rows"
        )
    return tokenizer


def _find_tokenizer(data: DataConfig, config: TokenizerConfig) -> StoryTokenizer | None:
    if config.path:
        return _load_given(config)
    fingerprint = fingerprint_of(_trained_on(data, config, remember=False))
    folder = _tokenizer_folder(data, fingerprint)
    return _open_tokenizer(folder, fingerprint) if folder.exists() else None


def _load_given(config: TokenizerConfig) -> StoryTokenizer:
    tokenizer = load_tokenizer(config.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer.path={config.path} has {tokenizer.vocab_size:,} tokens, more than "
            f"tokenizer.vocab_size={config.vocab_size:,}; give --config.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _trained_on(data: DataConfig, config: TokenizerConfig, *, remember: bool = True) -> dict[str, object]:
    """Returns what a trained tokenizer's fingerprint is made of."""
    return {
        "source": source_identity(tokenizer_source(data, config), _memo_path(data), remember=remember),
        "vocab_size": config.vocab_size,
        "max_samples": config.max_samples,
        "trainer": _TRAINER_VERSION,
    }


def _tokenizer_folder(data: DataConfig, fingerprint: str) -> Path:
    return Path(data.cache_dir) / "tokenizers" / fingerprint[:16]


def _trained_tokenizer(
    data: DataConfig, config: TokenizerConfig, *, rebuild: bool, show_progress: bool, log: Callable[[str], None]
) -> StoryTokenizer:
    trained_on = _trained_on(data, config)
    fingerprint = fingerprint_of(trained_on)
    folder = _tokenizer_folder(data, fingerprint)
    if rebuild or not is_built(folder):
        with sole_builder(folder, log=log):
            # Another process may have trained it while this one waited.
            if rebuild or not folder.exists():
                tokenizer = _train_tokenizer(data, config, show_progress=show_progress, log=log)
                _store_tokenizer(tokenizer, trained_on, folder, replace=rebuild)
                log(f"tokenizer: trained {folder} ({tokenizer.vocab_size:,} tokens)")
                # Read back: the one on the disk is the one that every later run gets.
                return _open_tokenizer(folder, fingerprint)
    log(f"tokenizer: reusing {folder}")
    return _open_tokenizer(folder, fingerprint)


def _train_tokenizer(
    data: DataConfig, config: TokenizerConfig, *, show_progress: bool, log: Callable[[str], None]
) -> StoryTokenizer:
    source = tokenizer_source(data, config)
    samples = f"up to {config.max_samples:,}" if config.max_samples else "all"
    log(f"tokenizer: training {config.vocab_size:,} tokens on {samples} stories of {_name_of(source)}")
    return train_bpe(
        iter_stories(source, StoryReport(), SeenStories()),
        vocab_size=config.vocab_size,
        max_samples=config.max_samples,
        show_progress=show_progress and sys.stderr.isatty(),
    )


def _store_tokenizer(tokenizer: StoryTokenizer, trained_on: dict[str, object], folder: Path, *, replace: bool) -> None:
    meta = {**trained_on, "fingerprint": fingerprint_of(trained_on), "tokenizer_sha256": tokenizer.sha256}
    with new_folder(folder, replace=replace) as building:
        write_file(building / TOKENIZER_FILE, tokenizer.json.encode())
        write_file(building / _META_FILE, json.dumps(meta, indent=1).encode())


def _open_tokenizer(folder: Path, fingerprint: str) -> StoryTokenizer:
    try:
        meta = parse_json(read_small_file(folder / _META_FILE, _MAX_META_BYTES), _META_FILE)
        if not isinstance(meta, dict) or not {"fingerprint", "tokenizer_sha256"} <= set(meta):
            raise ValueError(f"{_META_FILE} has no fields fingerprint and tokenizer_sha256")
        found = (meta["fingerprint"], meta["tokenizer_sha256"])
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"stored tokenizer {folder} is damaged ({error}); rebuild it with: {rebuild_command()}"
        ) from error
    expected = (fingerprint, tokenizer.sha256)
    for name, got, wanted in zip(("fingerprint", "SHA-256 of " + TOKENIZER_FILE), found, expected, strict=True):
        if got != wanted:
            raise UserError(
                f"stored tokenizer {folder}: {_META_FILE} has {name} {got!s:.80}, expected {wanted}; "
                f"rebuild it with: {rebuild_command()}"
            )
    return tokenizer


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
    built = False
    if rebuild or not is_built(folder):
        with sole_builder(folder, log=log):
            if rebuild or not folder.exists():
                log(f"{source.split}: encoding the stories of {_name_of(source)}")
                write_cache(source, tokenizer, folder, identity=identity, show_progress=show_progress, replace=rebuild)
                built = True
    cache = _open_cache(folder, fingerprint, tokenizer)
    counts = f"{cache.manifest.num_stories:,} stories, {cache.manifest.num_tokens:,} tokens"
    log(f"{source.split}: {'wrote' if built else 'reusing'} {folder} ({counts})")
    return cache


def _identify(sources: Sequence[StorySource], data: DataConfig, *, remember: bool = True) -> list[dict[str, object]]:
    """Returns what each source's cache is tied to; raises one `UserError` for all that cannot be read."""
    identities: list[dict[str, object]] = []
    problems: list[str] = []
    for source in sources:
        try:
            # The identity of files is their content alone; a cache also belongs to one split.
            identity = source_identity(source, _memo_path(data), remember=remember)
            identities.append({"split": source.split, **identity})
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return identities


def _memo_path(data: DataConfig) -> Path:
    return Path(data.cache_dir) / "source_hashes.json"


def _name_of(source: StorySource) -> str:
    named = {"hub": f"{source.hub_name} ({source.split})", "files": source.files}
    return named.get(source.kind, f"the bundled sample ({source.split}; made up, not TinyStories)")


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
