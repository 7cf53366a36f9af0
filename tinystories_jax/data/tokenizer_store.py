"""Trained tokenizers on the disk: each is kept by what it was trained on, and trained once."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tinystories_jax.config import DataConfig, TokenizerConfig
from tinystories_jax.data.cache import fingerprint_of
from tinystories_jax.data.folders import (
    build_once,
    new_folder,
    parse_json,
    read_small_file,
    rebuild_command,
    write_file,
)
from tinystories_jax.data.sources import memo_path, name_of, tokenizer_source
from tinystories_jax.data.stories import SeenStories, StoryReport, iter_stories, source_identity
from tinystories_jax.data.tokenizer import TOKENIZER_FILE, StoryTokenizer, load_tokenizer, train_bpe
from tinystories_jax.errors import UserError
from tinystories_jax.streams import log_to_stderr

_TRAINER_VERSION = 1  # raise it when train_bpe gives another vocabulary for the same stories
_META_FILE = "meta.json"
_MAX_META_BYTES = 64 * 2**20  # it names the files of stories, as a cache's manifest does


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


def find_tokenizer(data: DataConfig, config: TokenizerConfig) -> StoryTokenizer | None:
    """Returns what `prepare_tokenizer` would reuse, None when it is still to be trained; writes nothing."""
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
        "source": source_identity(tokenizer_source(data, config), memo_path(data), remember=remember),
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

    def build() -> None:
        tokenizer = _train_tokenizer(data, config, show_progress=show_progress, log=log)
        _store_tokenizer(tokenizer, trained_on, folder, replace=rebuild)
        log(f"tokenizer: trained {folder} ({tokenizer.vocab_size:,} tokens)")

    if not build_once(folder, build, rebuild=rebuild, log=log):
        log(f"tokenizer: reusing {folder}")
    # A new one too: the one on the disk is the one that every later run gets.
    return _open_tokenizer(folder, fingerprint)


def _train_tokenizer(
    data: DataConfig, config: TokenizerConfig, *, show_progress: bool, log: Callable[[str], None]
) -> StoryTokenizer:
    source = tokenizer_source(data, config)
    samples = f"up to {config.max_samples:,}" if config.max_samples else "all"
    log(f"tokenizer: training {config.vocab_size:,} tokens on {samples} stories of {name_of(source)}")
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
