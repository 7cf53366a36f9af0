"""From stories to token IDs in a memory-mapped file, and from there to the blocks of a training step.

On the way: train_bpe -> `write_cache` -> `open_cache` -> `batch_at` -> train_step. A cache is a folder of three files:
the token IDs, the sorted hashes of the stories, and a manifest that ties both to a tokenizer and a source.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import numpy as np
import xxhash
from tqdm import tqdm

from tinystories_jax.background import in_background
from tinystories_jax.config import Config
from tinystories_jax.data.encode import StoryEncoder
from tinystories_jax.data.folders import new_folder, parse_json, read_small_file, sync, write_file
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories, source_identity
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer, batch_stories
from tinystories_jax.errors import UserError

FORMAT_VERSION = 2  # raise it with any change of the files below, the fields of Manifest or those of StoryReport
TOKENS_FILE = "tokens.bin"  # little-endian IDs, each story followed by END_OF_STORY_ID
HASHES_FILE = "story_hashes.bin"  # little-endian uint64, ascending
MANIFEST_FILE = "manifest.json"

_HASH_DTYPE = np.dtype("<u8")
_MAX_MANIFEST_BYTES = 64 * 2**20  # some hundred thousand files of stories
_AT_ONCE_BYTES = 2**25  # of tokens, which a checksum takes 10 ms for: damage is then told on opening


@dataclass(frozen=True)
class Manifest:
    """What a token cache holds and what it was made from."""

    format_version: int
    fingerprint: str  # cache_fingerprint of the next two
    tokenizer_sha256: str
    source: dict[str, object]  # source_identity of the stories
    num_stories: int
    num_tokens: int  # one end-of-story token per story included
    num_bytes: int  # UTF-8 bytes of the stories alone
    dtype: str  # uint16 or uint32
    tokens_checksum: str  # xxh3_128 of the tokens file, in hex
    hashes_checksum: str  # likewise of the hashes file
    report: dict[str, Any]  # StoryReport of the reading
    checksum: str  # fingerprint_of all the fields above


@dataclass(frozen=True, eq=False)
class TokenCache:
    """An open cache. Nobody sees its tokens before every byte of them has been verified."""

    manifest: Manifest
    folder: Path
    verified_tokens: Future[np.memmap]

    @property
    def tokens(self) -> np.memmap:
        """The read-only memory map. Waits for the verification to end; raises `UserError` when they are damaged."""
        return self.verified_tokens.result()


def cache_fingerprint(tokenizer_sha256: str, identity: dict[str, object]) -> str:
    """Returns the SHA-256, in hex, of the format, the tokenizer and the source (split included) of a cache."""
    return fingerprint_of({"format": FORMAT_VERSION, "tokenizer_sha256": tokenizer_sha256, "source": identity})


def fingerprint_of(values: dict[str, object]) -> str:
    """Returns the SHA-256, in hex, of `values` as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_cache(
    source: StorySource,
    tokenizer: StoryTokenizer,
    folder: str | Path,
    *,
    identity: dict[str, object],
    show_progress: bool = False,
    replace: bool = False,
) -> Manifest:
    """Encodes the stories of `source` into a cache at `folder`, complete or not at all; returns its manifest.

    `identity` is the source_identity of `source`. When another process has put the same cache there meanwhile, that one
    stays, unless `replace`. Memory does not grow with the corpus. Raises `UserError` for no story, no space, and files
    that are not those of `identity` when all is read.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    report, seen = StoryReport(), SeenStories()
    with new_folder(Path(folder), replace=replace) as building:
        with (building / TOKENS_FILE).open("wb") as file, _progress_bar(source, show_progress) as bar:
            counts = _write_tokens(file, _track(iter_stories(source, report, seen), report, bar), tokenizer, dtype)
            sync(file)
        if "files" in identity and source_identity(source, None)["files"] != identity["files"]:
            raise UserError(
                f"{source.files}: changed while it was read; start again when nothing writes there any longer"
            )
        with (building / HASHES_FILE).open("wb") as file:
            hashes_checksum = _write_hashes(file, seen)
            sync(file)
        values = {
            "format_version": FORMAT_VERSION,
            "fingerprint": cache_fingerprint(tokenizer.sha256, identity),
            "tokenizer_sha256": tokenizer.sha256,
            "source": identity,
            "dtype": dtype.name,
            "hashes_checksum": hashes_checksum,
            "report": asdict(report),
            **vars(counts),
        }
        manifest = Manifest(**values, checksum=fingerprint_of(values))
        write_file(building / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns what a cache holds the IDs of a vocabulary in."""
    return np.dtype("<u2" if vocab_size <= 65_535 else "<u4")


def cache_bytes(vocab_size: int, *, num_stories: int, num_tokens: int) -> int:
    """Returns the size of a cache's files, but for some kB of its manifest."""
    return num_tokens * dtype_for(vocab_size).itemsize + num_stories * _HASH_DTYPE.itemsize


@dataclass
class _Counts:
    num_stories: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    tokens_checksum: str = ""


def _write_tokens(file: BinaryIO, stories: Iterable[str], tokenizer: StoryTokenizer, dtype: np.dtype) -> _Counts:
    counts, checksum = _Counts(), xxhash.xxh3_128()
    for tokens, num_stories, num_bytes in _encode_ahead(stories, tokenizer, dtype):
        file.write(tokens.data)
        checksum.update(tokens.data)
        counts.num_stories += num_stories
        counts.num_tokens += len(tokens)
        counts.num_bytes += num_bytes
    counts.tokens_checksum = checksum.hexdigest()
    return counts


def _write_hashes(file: BinaryIO, seen: SeenStories) -> str:
    """Returns the checksum of what it has written."""
    checksum = xxhash.xxh3_128()
    for hashes in seen.sorted_hashes():
        content = np.ascontiguousarray(hashes, _HASH_DTYPE).data
        file.write(content)
        checksum.update(content)
    return checksum.hexdigest()


def _encode_ahead(
    stories: Iterable[str], tokenizer: StoryTokenizer, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields (tokens, number of stories, UTF-8 bytes) per batch, in order.

    While a thread encodes one batch, mostly outside the interpreter lock, the caller writes the one before and the
    next is read: never more than two batches are under way.
    """
    encoder = StoryEncoder(tokenizer, dtype)

    def encode(batch: list[str]) -> tuple[np.ndarray, int, int]:
        tokens = encoder.encode(batch)
        assert tokens.max() < tokenizer.vocab_size, "parse_tokenizer has checked that the IDs are dense"
        return tokens, len(batch), sum(len(story.encode()) for story in batch)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as pool:
        pending: Future[tuple[np.ndarray, int, int]] | None = None
        for batch in batch_stories(stories):
            upcoming = pool.submit(encode, batch)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


@contextmanager
def _progress_bar(source: StorySource, show_progress: bool) -> Iterator[tqdm]:
    # A log file gets no bar: the caller's line about the finished cache is enough.
    hidden = not (show_progress and sys.stderr.isatty())
    unit = "B" if source.kind == "files" else " stories"  # that of StoryReport.position
    with tqdm(desc=source.split, unit=unit, unit_scale=True, disable=hidden, file=sys.stderr) as bar:
        yield bar


def _track(stories: Iterable[str], report: StoryReport, bar: tqdm) -> Iterator[str]:
    for count, story in enumerate(stories):
        if count % 256 == 0:
            # The size is known only once the source has been opened.
            bar.total = report.size or None
            bar.update(report.position - bar.n)
        yield story
    bar.update(report.position - bar.n)


def open_cache(folder: str | Path, *, fingerprint: str, vocab_size: int, rebuild_command: str) -> TokenCache:
    """Returns the cache at `folder`, its manifest and hashes checked; many tokens are verified meanwhile in a thread.

    Raises `UserError` naming the folder, the file, what was expected and found, and `rebuild_command`, when it is
    incomplete, damaged, not the cache of `fingerprint`, or holds an ID that a vocabulary of `vocab_size` has not. What
    only reading all tokens can show is raised by `TokenCache.tokens` where they are many, else here.
    """
    folder = Path(folder)
    with _explain_damage(folder, rebuild_command):
        manifest = _read_manifest(folder / MANIFEST_FILE)
        _check_manifest(manifest, fingerprint, vocab_size)
        _check_file(folder / HASHES_FILE, _HASH_DTYPE, manifest.num_stories, manifest.hashes_checksum)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        _check_size(folder / TOKENS_FILE, dtype, manifest.num_tokens)

    def verify() -> np.memmap:
        with _explain_damage(folder, rebuild_command):
            return _open_tokens(folder / TOKENS_FILE, dtype, manifest, vocab_size)

    tokens = in_background("verify", verify)
    if manifest.num_tokens * dtype.itemsize <= _AT_ONCE_BYTES:
        tokens.result()
    return TokenCache(manifest, folder, tokens)


@contextmanager
def _explain_damage(folder: Path, rebuild_command: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read: {error.strerror}"
        raise UserError(f"token cache {folder}: {problem}; rebuild it with: {rebuild_command}") from error
    except ValueError as error:
        raise UserError(f"token cache {folder}: {error}; rebuild it with: {rebuild_command}") from error


def load_hashes(cache: TokenCache) -> np.ndarray:
    """Returns the memory map of the stories' hashes: xxh3_64 of their UTF-8 bytes, uint64, ascending."""
    return np.memmap(cache.folder / HASHES_FILE, dtype=_HASH_DTYPE, mode="r")


def _read_manifest(path: Path) -> Manifest:
    values = parse_json(read_small_file(path, _MAX_MANIFEST_BYTES), MANIFEST_FILE)
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST_FILE} has format version {version!r:.80}, expected {FORMAT_VERSION}")
    wanted = {item.name for item in fields(Manifest)}
    if set(values) != wanted:
        differing = ", ".join(sorted(set(values) ^ wanted))
        raise ValueError(f"{MANIFEST_FILE} has missing or unknown fields: {differing:.200}")
    for name, hint in get_type_hints(Manifest).items():
        kind = getattr(hint, "__origin__", hint)
        if type(values[name]) is not kind:
            raise ValueError(f"{MANIFEST_FILE} has {name}={values[name]!r:.80}, expected {kind.__name__}")
    return Manifest(**values)


def _check_manifest(manifest: Manifest, fingerprint: str, vocab_size: int) -> None:
    # Fields that no other file vouches for decide on scores: num_bytes on the bits per byte.
    checksum = fingerprint_of({name: value for name, value in vars(manifest).items() if name != "checksum"})
    if checksum != manifest.checksum:
        raise ValueError(f"{MANIFEST_FILE} is damaged: checksum {manifest.checksum:.80} expected, got {checksum}")
    if manifest.fingerprint != fingerprint:
        raise ValueError(
            f"it has fingerprint {manifest.fingerprint:.80}, expected {fingerprint}: it was made with tokenizer "
            f"{manifest.tokenizer_sha256:.80} from {manifest.source!s:.300}"
        )
    own = cache_fingerprint(manifest.tokenizer_sha256, manifest.source)
    if own != fingerprint:
        raise ValueError(
            f"its manifest is of another cache: tokenizer {manifest.tokenizer_sha256:.80} and its source "
            f"give fingerprint {own}, expected {fingerprint}"
        )
    dtype = dtype_for(vocab_size)
    if manifest.dtype != dtype.name:
        raise ValueError(f"{MANIFEST_FILE} has dtype {manifest.dtype!r:.80}, expected {dtype.name}")
    if not 0 < manifest.num_stories < manifest.num_tokens:
        raise ValueError(f"{manifest.num_stories} stories cannot have {manifest.num_tokens} tokens")
    report = manifest.report
    names = {item.name for item in fields(StoryReport)}
    if set(report) != names or not all(type(count) is int and count >= 0 for count in report.values()):
        raise ValueError(f"{MANIFEST_FILE} has a report that is none: {report!s:.200}")
    counts = {"num_stories": "stories", "num_bytes": "utf8_bytes"}
    for name, reported in counts.items():
        if getattr(manifest, name) != report[reported]:
            raise ValueError(f"{MANIFEST_FILE} has {name}={getattr(manifest, name)}, but reports {report[reported]}")


def _open_tokens(path: Path, dtype: np.dtype, manifest: Manifest, vocab_size: int) -> np.memmap:
    highest = _check_file(path, dtype, manifest.num_tokens, manifest.tokens_checksum)
    if highest >= vocab_size:
        raise ValueError(f"{path.name} holds ID {highest:,}, but its tokenizer has {vocab_size:,} tokens")
    return np.memmap(path, dtype=dtype, mode="r")


def _check_size(path: Path, dtype: np.dtype, count: int) -> None:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size:,} bytes, expected {count * dtype.itemsize:,}")


def _check_file(path: Path, dtype: np.dtype, count: int, checksum: str) -> int:
    """Returns the highest of the `count` numbers in the file; raises ValueError when `checksum` is not theirs."""
    _check_size(path, dtype, count)
    # Read rather than mapped: pages that a checksum has touched would count as this process's memory.
    digest, buffer, highest = xxhash.xxh3_128(), memoryview(bytearray(2**20)), 0
    with path.open("rb") as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            highest = max(highest, int(np.frombuffer(buffer[:size], dtype).max()))
    if digest.hexdigest() != checksum:
        raise ValueError(f"{path.name} is damaged: checksum {checksum:.80} expected, got {digest.hexdigest()}")
    return highest


def micro_batch_at(tokens: np.ndarray, config: Config, micro_step: int, *, num_rows: int = 0) -> np.ndarray:
    """Returns the `batch_at` of a run of `config`: train.batch_size rows, unless `num_rows` says how many."""
    return batch_at(
        tokens,
        seed=config.seed,
        micro_step=micro_step,
        batch_size=num_rows or config.train.batch_size,
        sequence_length=config.data.sequence_length,
    )


def num_blocks(num_tokens: int, sequence_length: int) -> int:
    """Returns how many blocks start every `sequence_length` tokens; the last token of each is the next one's first."""
    return max(num_tokens - 1, 0) // sequence_length


def batch_at(tokens: np.ndarray, *, seed: int, micro_step: int, batch_size: int, sequence_length: int) -> np.ndarray:
    """Returns int32 blocks (batch_size, sequence_length + 1), a pure function of seed and micro_step.

    Blocks are dealt out as one endless row of shuffled epochs, so a batch may straddle two. The extra token lets inputs
    and targets be two views of one block: the only place where labels are shifted.
    """
    blocks = num_blocks(len(tokens), sequence_length)
    if not blocks:
        raise UserError(f"{len(tokens)} tokens are less than one block of sequence_length={sequence_length} + 1")
    positions = micro_step * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(positions, blocks)
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, blocks)[offsets[here]]
    # As a plain array: the memmap class makes every view slower.
    windows = np.lib.stride_tricks.sliding_window_view(tokens.view(np.ndarray), sequence_length + 1)[::sequence_length]
    return windows[indices].astype(np.int32)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    # The legacy generator, because its stream is frozen (NEP 19): another NumPy resumes a run in the same order.
    order = np.random.RandomState([seed, epoch]).permutation(length)
    order.setflags(write=False)
    return order


def eval_batches(
    tokens: np.ndarray, *, batch_size: int, sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (blocks int32 (batch_size, sequence_length + 1), weights float32 (batch_size, sequence_length)).

    The whole split in order, every token a target exactly once: the first follows an end-of-story token put before it,
    as at the start of a generated story. Padding has weight 0, up to a full last batch, so that one shape is compiled.
    """
    targets_per_batch = batch_size * sequence_length
    for batch in range(math.ceil(len(tokens) / targets_per_batch)):
        start = batch * targets_per_batch
        targets = np.full(targets_per_batch, END_OF_STORY_ID, np.int32)
        weights = np.zeros(targets_per_batch, np.float32)
        found = tokens[start : start + targets_per_batch]
        targets[: len(found)], weights[: len(found)] = found, 1.0
        targets = targets.reshape(batch_size, sequence_length)
        blocks = np.empty((batch_size, sequence_length + 1), np.int32)
        blocks[:, 1:] = targets
        blocks[1:, 0] = targets[:-1, -1]
        blocks[0, 0] = tokens[start - 1] if start else END_OF_STORY_ID
        yield blocks, weights.reshape(batch_size, sequence_length)
