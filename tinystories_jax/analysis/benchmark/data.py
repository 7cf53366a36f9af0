"""The way from stories to blocks: encoding beside the bare tokenizer, opening a large cache, and cutting batches.

Nothing here imports JAX, so that memory is that of the data's own code.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tinystories_jax.analysis.benchmark.child import peak_resident_bytes, run_in_child
from tinystories_jax.analysis.timing import spread_of
from tinystories_jax.config import Config
from tinystories_jax.data.cache import (
    MANIFEST_FILE,
    TOKENS_FILE,
    batch_at,
    cache_fingerprint,
    fingerprint_of,
    open_cache,
    write_cache,
)
from tinystories_jax.data.files import END_OF_STORY
from tinystories_jax.data.sample import iter_sample
from tinystories_jax.data.sources import train_source
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories, source_identity
from tinystories_jax.data.tokenizer import batch_stories, load_tokenizer, save_tokenizer, train_bpe
from tinystories_jax.errors import UserError

_CACHE_BYTES = 10**9
_FREE_BYTES = 3 * 10**9
_NUM_ROWS, _SEQUENCE_LENGTH = 64, 512
_NUM_HOT, _NUM_COLD = 200, 20


def measure_data(config: Config, rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Returns the figures of the data's way; encoding takes turns with the bare tokenizer, `rounds` times.

    The stories are the config's training files, or the bundled sample where it names none: no network is asked.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            raise UserError(
                f"{folder.parent} has less than {_FREE_BYTES / 1e9:.0f} GB free; set TMPDIR to another folder"
            )
        source, origin = _find_stories(config, folder)
        log(f"data: training a tokenizer on {origin}")
        vocabulary = run_in_child(prepare_vocabulary, config, source, folder / "tokenizer")
        taken: dict[str, list[dict[str, Any]]] = {"pipeline": [], "bare": []}
        for turn in range(1, rounds + 1):
            for side, encode in (("pipeline", encode_into_cache), ("bare", encode_bare)):
                log(f"data: round {turn} of {rounds}, encoding: {side}")
                taken[side].append(run_in_child(encode, source, folder))
        log(f"data: opening a cache of {_CACHE_BYTES / 1e9:.1f} GB")
        cache = run_in_child(measure_cache, folder, _CACHE_BYTES)
    sides = {side: _summarize(runs) for side, runs in taken.items()}
    return {
        "stories": origin,
        **vocabulary,
        "encode": sides,
        "ratio": sides["pipeline"]["bytes_per_second"]["median"] / sides["bare"]["bytes_per_second"]["median"],
        "cache": cache,
    }


def _find_stories(config: Config, folder: Path) -> tuple[StorySource, str]:
    if config.data.source == "files":
        return train_source(config.data), f"the config's files {config.data.train_files}"
    # As a file: the pipeline is to be timed, not the grammar that writes the sample.
    path = folder / "stories.txt"
    stories = itertools.islice(iter_sample("train"), config.data.max_stories or None)
    path.write_text(END_OF_STORY.join(stories), encoding="utf-8")
    return StorySource("files", "train", files=str(path)), "the bundled sample"


def prepare_vocabulary(config: Config, source: StorySource, folder: Path) -> dict[str, Any]:
    """Saves a tokenizer in `folder`, that of tokenizer.path or one trained on `source`; `training_seconds` is None for
    one that was given."""
    began, path = time.perf_counter(), config.tokenizer.path
    if path:
        tokenizer = load_tokenizer(path)
    else:
        stories = iter_stories(source, StoryReport(), SeenStories())
        tokenizer = train_bpe(stories, vocab_size=config.tokenizer.vocab_size, max_samples=config.tokenizer.max_samples)
    seconds = time.perf_counter() - began
    save_tokenizer(tokenizer, folder)
    return {"vocab_size": tokenizer.vocab_size, "training_seconds": None if path else seconds}


def encode_into_cache(source: StorySource, folder: Path) -> dict[str, Any]:
    """Times `write_cache` as a whole: reading, cleaning, hashing, encoding, writing, and waiting for the disk."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    identity = source_identity(source, None)
    began = time.perf_counter()
    manifest = write_cache(source, tokenizer, folder / "cache", identity=identity, replace=True)
    seconds = time.perf_counter() - began
    return _encoded(manifest.num_stories, manifest.num_bytes, manifest.num_tokens, seconds)


def encode_bare(source: StorySource, folder: Path) -> dict[str, Any]:
    """Times `encode_batch_fast` alone on the stories that `write_cache` encodes, in batches of the same size."""
    backend = load_tokenizer(folder / "tokenizer").backend
    seconds, num_stories, num_bytes, num_tokens = 0.0, 0, 0, 0
    for batch in batch_stories(iter_stories(source, StoryReport(), SeenStories())):
        began = time.perf_counter()
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        num_stories += len(batch)
        num_bytes += sum(len(story.encode()) for story in batch)
        # With the end token of each, which the pipeline counts.
        num_tokens += sum(map(len, encodings)) + len(batch)
    return _encoded(num_stories, num_bytes, num_tokens, seconds)


def _encoded(num_stories: int, num_bytes: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "num_stories": num_stories,
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "bytes_per_second": num_bytes / seconds,
        "process_bytes": peak_resident_bytes(),
    }


def _summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the runs' common counts, the spread of their speed, and the most memory that one took."""
    peaks = [run["process_bytes"] for run in runs if run["process_bytes"] is not None]
    return {
        **runs[0],
        "bytes_per_second": spread_of([run["bytes_per_second"] for run in runs])._asdict(),
        "process_bytes": max(peaks, default=None),
    }


def measure_cache(folder: Path, num_bytes: int) -> dict[str, Any]:
    """Times opening a cache of about `num_bytes` and cutting 64 x 513 blocks from it; `folder`/cache is grown to it.

    Cold: its pages have been dropped from the system's memory before, as far as the system allows.
    """
    cache = folder / "cache"
    fingerprint, vocab_size = _grow(cache, num_bytes), load_tokenizer(folder / "tokenizer").vocab_size

    def open_it() -> tuple[dict[str, float], np.ndarray]:
        began = time.perf_counter()
        opened = open_cache(cache, fingerprint=fingerprint, vocab_size=vocab_size, rebuild_command="none: made up")
        opening = time.perf_counter() - began
        tokens = opened.tokens
        return {"open": opening, "verified": time.perf_counter() - began}, tokens

    _drop_pages(cache / TOKENS_FILE)
    cold_seconds, tokens = open_it()
    shuffle_seconds = _time_batch(tokens, 0)
    hot = [_time_batch(tokens, 0) for _ in range(_NUM_HOT)]
    hot_seconds = open_it()[0]
    dtype = tokens.dtype
    del tokens
    # Mapped pages cannot be dropped: the map has gone, and a new one reads nothing yet.
    _drop_pages(cache / TOKENS_FILE)
    mapped = np.memmap(cache / TOKENS_FILE, dtype=dtype, mode="r")
    cold = [_time_batch(mapped, micro_step) for micro_step in range(1, _NUM_COLD + 1)]
    return {
        "num_bytes": mapped.nbytes,
        "open_cold_seconds": cold_seconds,
        "open_hot_seconds": hot_seconds,
        "rows": _NUM_ROWS,
        "row_length": _SEQUENCE_LENGTH + 1,
        "shuffle_seconds": max(shuffle_seconds - spread_of(hot).median, 0.0),
        "batch_hot_seconds": spread_of(hot)._asdict(),
        "batch_cold_seconds": spread_of(cold)._asdict(),
    }


def _time_batch(tokens: np.ndarray, micro_step: int) -> float:
    began = time.perf_counter()
    batch_at(tokens, seed=0, micro_step=micro_step, batch_size=_NUM_ROWS, sequence_length=_SEQUENCE_LENGTH)
    return time.perf_counter() - began


def _grow(cache: Path, num_bytes: int) -> str:
    """Repeats the tokens of a cache until they are about `num_bytes`; returns its fingerprint."""
    tokens = (cache / TOKENS_FILE).read_bytes()
    times, checksum = max(num_bytes // len(tokens), 1), xxhash.xxh3_128()
    with (cache / TOKENS_FILE).open("wb") as file:
        for _ in range(times):
            file.write(tokens)
            checksum.update(tokens)
        file.flush()
        os.fsync(file.fileno())
    manifest = json.loads((cache / MANIFEST_FILE).read_bytes())
    del manifest["checksum"]
    manifest |= {"num_tokens": manifest["num_tokens"] * times, "tokens_checksum": checksum.hexdigest()}
    manifest["checksum"] = fingerprint_of(manifest)
    (cache / MANIFEST_FILE).write_text(json.dumps(manifest))
    return cache_fingerprint(manifest["tokenizer_sha256"], manifest["source"])


def _drop_pages(path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
