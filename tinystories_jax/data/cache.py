"""From stories to token IDs in a memory-mapped file, and from there to the blocks of a training step.

On the way: train_bpe -> `write_cache` -> `open_cache` -> `batch_at` -> train_step. A cache is a folder of three files:
the token IDs, the sorted hashes of the stories, and a manifest that ties both to a tokenizer and a source.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import numpy as np
import xxhash
from tqdm import tqdm

from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer, batch_stories
from tinystories_jax.errors import UserError

FORMAT_VERSION = 1  # raise it with any change of the files below, the fields of Manifest or those of StoryReport
TOKENS_FILE = "tokens.bin"  # little-endian IDs, each story followed by END_OF_STORY_ID
HASHES_FILE = "story_hashes.bin"  # little-endian uint64, ascending
MANIFEST_FILE = "manifest.json"


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
    checksum: str  # xxh3_128 of the tokens file, in hex
    report: dict[str, Any]  # StoryReport of the reading


@dataclass(frozen=True, eq=False)
class TokenCache:
    """A verified cache; `tokens` is its read-only memory map."""

    tokens: np.memmap
    manifest: Manifest
    folder: Path


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
    stays, unless `replace`. Memory does not grow with the corpus. Raises `UserError` for no story and no space.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")
    report, seen = StoryReport(), SeenStories()
    with new_folder(Path(folder), replace=replace) as building:
        with (building / TOKENS_FILE).open("wb") as file, _progress_bar(source, show_progress) as bar:
            counts = _write_tokens(file, _track(iter_stories(source, report, seen), report, bar), tokenizer, dtype)
            sync(file)
        with (building / HASHES_FILE).open("wb") as file:
            for hashes in seen.sorted_hashes():
                file.write(np.ascontiguousarray(hashes, "<u8").data)
            sync(file)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=cache_fingerprint(tokenizer.sha256, identity),
            tokenizer_sha256=tokenizer.sha256,
            source=identity,
            dtype=dtype.name,
            report=asdict(report),
            **vars(counts),
        )
        with (building / MANIFEST_FILE).open("wb") as file:
            file.write(json.dumps(asdict(manifest), indent=1).encode())
            sync(file)
    return manifest


@dataclass
class _Counts:
    num_stories: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    checksum: str = ""


def _write_tokens(file: BinaryIO, stories: Iterable[str], tokenizer: StoryTokenizer, dtype: np.dtype) -> _Counts:
    counts, checksum = _Counts(), xxhash.xxh3_128()
    for tokens, num_stories, num_bytes in _encode_ahead(stories, tokenizer, dtype):
        file.write(tokens.data)
        checksum.update(tokens.data)
        counts.num_stories += num_stories
        counts.num_tokens += len(tokens)
        counts.num_bytes += num_bytes
    counts.checksum = checksum.hexdigest()
    return counts


def _encode_ahead(
    stories: Iterable[str], tokenizer: StoryTokenizer, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields (tokens, number of stories, UTF-8 bytes) per batch, in order.

    While a thread encodes one batch, mostly outside the interpreter lock, the caller writes the one before and the
    next is read: never more than two batches are under way.
    """
    end = np.array([END_OF_STORY_ID], np.uint32)

    def encode(batch: list[str]) -> tuple[np.ndarray, int, int]:
        tokens = np.concatenate([part for ids in tokenizer.encode_batch(batch) for part in (ids, end)])
        assert tokens.max() < tokenizer.vocab_size, "parse_tokenizer has checked that the IDs are dense"
        return tokens.astype(dtype), len(batch), sum(len(story.encode()) for story in batch)

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


def sync(file: BinaryIO) -> None:
    """Returns when the bytes written so far are on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` when the block ends well, and vanishes when it does not.

    If `folder` has appeared meanwhile it stays as it is, unless `replace`. Raises `UserError` when the disk refuses.
    """
    temporary = _temporary_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        _publish(temporary, folder, replace)
        _sync_folder(folder.parent)
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):  # the network, not the disk
            raise
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free space or mend the permissions there, "
            "or choose another place with --config.data.cache_dir=FOLDER"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path, replace: bool) -> None:
    retired = _temporary_name(folder)
    if replace:
        with suppress(FileNotFoundError):
            folder.rename(retired)
    try:
        temporary.rename(folder)
    except OSError as error:
        # Somebody else has finished the same folder first; theirs is as good.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _temporary_prefix(folder: Path) -> str:
    # With the host, because a process of another machine may be building in a shared folder.
    return f".{folder.name}.building-{socket.gethostname()}-"


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(f"{_temporary_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}")


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed builders of `folder` on this machine have left."""
    prefix = _temporary_prefix(folder)
    for path in folder.parent.iterdir():
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but belongs to somebody else
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_cache(folder: str | Path, *, fingerprint: str, rebuild_command: str) -> TokenCache:
    """Returns the cache at `folder` after checking every byte of its tokens against the manifest.

    Raises `UserError` naming the folder, what was expected and found, and `rebuild_command`, when it is incomplete,
    damaged, or not the cache of `fingerprint`.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder / MANIFEST_FILE)
        _check_manifest(manifest, fingerprint)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        _check_size(folder / TOKENS_FILE, manifest.num_tokens * dtype.itemsize)
        _check_size(folder / HASHES_FILE, manifest.num_stories * 8)
        checksum = _checksum(folder / TOKENS_FILE)
        if checksum != manifest.checksum:
            raise ValueError(f"{TOKENS_FILE} is damaged: checksum {manifest.checksum} expected, got {checksum}")
        tokens = np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r")
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read: {error.strerror}"
        raise UserError(f"token cache {folder}: {problem}; rebuild it with: {rebuild_command}") from error
    except ValueError as error:
        raise UserError(f"token cache {folder}: {error}; rebuild it with: {rebuild_command}") from error
    return TokenCache(tokens=tokens, manifest=manifest, folder=folder)


def load_hashes(cache: TokenCache) -> np.ndarray:
    """Returns the memory map of the stories' hashes: xxh3_64 of their UTF-8 bytes, uint64, ascending."""
    return np.memmap(cache.folder / HASHES_FILE, dtype="<u8", mode="r")


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{MANIFEST_FILE} is not JSON ({error})") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST_FILE} has format version {version}, expected {FORMAT_VERSION}")
    wanted = {item.name for item in fields(Manifest)}
    if set(values) != wanted:
        raise ValueError(f"{MANIFEST_FILE} has fields {sorted(values)}, expected {sorted(wanted)}")
    for name, hint in get_type_hints(Manifest).items():
        kind = getattr(hint, "__origin__", hint)
        if type(values[name]) is not kind:
            raise ValueError(f"{MANIFEST_FILE} has {name}={values[name]!r}, expected {kind.__name__}")
    return Manifest(**values)


def _check_manifest(manifest: Manifest, fingerprint: str) -> None:
    if manifest.fingerprint != fingerprint:
        raise ValueError(
            f"it has fingerprint {manifest.fingerprint}, expected {fingerprint}: it was made with tokenizer "
            f"{manifest.tokenizer_sha256} from {manifest.source}"
        )
    own = cache_fingerprint(manifest.tokenizer_sha256, manifest.source)
    if own != fingerprint:
        raise ValueError(
            f"its manifest is of another cache: tokenizer {manifest.tokenizer_sha256} and its source "
            f"give fingerprint {own}, expected {fingerprint}"
        )
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"{MANIFEST_FILE} has dtype {manifest.dtype!r}, expected uint16 or uint32")
    if not 0 < manifest.num_stories < manifest.num_tokens:
        raise ValueError(f"{manifest.num_stories} stories cannot have {manifest.num_tokens} tokens")


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path.name} has {size:,} bytes, expected {expected:,}")


def _checksum(path: Path) -> str:
    # Read rather than mapped: pages that a checksum has touched would count as this process's memory.
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


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
