"""Stories from local files (.txt, .jsonl, .parquet): one of the sources of `stories.py`. Files are only ever read."""

import contextlib
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinystories_jax.data.folders import read_small_file
from tinystories_jax.data.parquet import BrokenPageError, find_large_page
from tinystories_jax.errors import UserError

END_OF_STORY = "<|endoftext|>"
MAX_STORY_CHARACTERS = 2**20
_MOST_CHARACTERS_ALONE = 20_000  # of a .txt without a separator: some twenty stories of TinyStories

_FIELDS = ("text", "story")  # of a JSON line or a Parquet row, the first that is there
_CHUNK_BYTES = 2**20
_MAX_LINE_BYTES = 16 * 2**20  # of a JSON line, which may hold more than its story
_PARQUET_ROWS = 32  # at once: what a small file says of each can be as long as a page
_MAX_MEMO_BYTES = 64 * 2**20
_BOM = b"\xef\xbb\xbf"
# Younger files may change again within one tick of the file system's clock, and look the same.
_SETTLED_SECONDS = 2.0


def iter_files(files: str) -> Iterator[tuple[int, int, str]]:
    """Yields (bytes read, bytes of all files, raw story) for comma-separated paths or globs.

    Raises `UserError` with file and place for whatever cannot be read as stories.
    """
    paths = find_files(files)
    size, before = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        reader, unit = _READERS[path.suffix.lower()]
        num_stories = 0
        try:
            for position, place, story in reader(path):
                if len(story) > MAX_STORY_CHARACTERS:
                    raise _too_long(path, f"{unit} {place}")
                num_stories += 1
                yield before + position, size, story
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if not num_stories:
            raise UserError(f"{path}: holds no story; leave it out or mend it")
        before += path.stat().st_size


def find_files(files: str) -> list[Path]:
    """Returns the files that comma-separated paths or globs name, sorted within a glob; raises all problems at once."""
    problems: list[str] = []
    paths: list[Path] = []
    first_name: dict[tuple[int, int], Path] = {}
    for pattern in filter(None, (part.strip() for part in files.split(","))):
        # Path.glob takes no absolute pattern, and Path.expanduser raises where a user is unknown.
        expanded = os.path.expanduser(pattern)  # noqa: PTH111
        # A name that holds a glob's characters is still a name.
        matches = glob.glob(glob.escape(expanded)) or sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207
        if not matches:
            problems.append(f"{pattern}: matches no file; give existing paths or globs, separated by commas")
        for path in map(Path, matches):
            if problem := _find_problem(path):
                problems.append(problem)
                continue
            status = path.stat()
            other = first_name.setdefault((status.st_dev, status.st_ino), path)
            if other is not path:
                problems.append(f"{path}: is the same file as {other}; give each file once")
            paths.append(path)
    if not paths and not problems:
        problems.append(f"no file is named in {files!r}; give paths or globs, separated by commas")
    if problems:
        raise UserError(problems)
    return paths


def _find_problem(path: Path) -> str | None:
    if path.is_dir():
        return f"{path}: is a folder; give its files, for instance {path / '*.txt'}"
    if path.suffix.lower() not in _READERS:
        return f"{path}: suffix {path.suffix!r} is unknown; stories are read from {', '.join(_READERS)}"
    if not path.is_file():
        return f"{path}: is not a regular file"
    try:
        with path.open("rb") as file:
            return None if file.read(1) else f"{path}: is empty"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"


def _read_txt(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (bytes read, byte offset, story), split at END_OF_STORY wherever it stands."""
    separator = END_OF_STORY.encode()
    offset, rest = 0, b""
    with path.open("rb") as file:
        if file.read(len(_BOM)) == _BOM:
            offset = len(_BOM)
        file.seek(offset)
        begin = offset
        while chunk := file.read(_CHUNK_BYTES):
            *pieces, rest = (rest + chunk).split(separator)
            for piece in pieces:
                end = offset + len(piece) + len(separator)
                yield end, offset, _decode(piece, path, offset)
                offset = end
            # Four bytes a character at most: what is longer must not fill the memory first.
            if len(rest) > 4 * MAX_STORY_CHARACTERS:
                raise _too_long(path, f"byte {offset}")
    if rest.strip():
        story = _decode(rest, path, offset)
        if offset == begin and len(story) > _MOST_CHARACTERS_ALONE:
            raise UserError(
                f"{path}: holds no {END_OF_STORY}, so that its {len(story):,} characters would be one story; put "
                f"{END_OF_STORY} between stories, or give one story a line (.jsonl) or row (.parquet)"
            )
        yield offset + len(rest), offset, story


def _read_jsonl(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (bytes read, line number from 1, story)."""
    offset = number = 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{path}, line {number}: is longer than {_MAX_LINE_BYTES:,} bytes; one story a line")
            text = _decode(line, path, offset).removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                yield offset, number, _parse_line(text, path, number)


def _parse_line(text: str, path: Path, number: int) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: is a {type(value).__name__}, not an object with a field `text`")
    for field in _FIELDS:
        if field in value:
            return _check_string(value[field], field, f"{path}, line {number}")
    raise UserError(f"{path}, line {number}: has no field `text` or `story`, only {', '.join(value) or 'none'}")


def _read_parquet(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (bytes read, as far as rows tell, row number from 1, story)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, row = path.stat().st_size, 0
    try:
        # An open file, since a name is tried as a URI. Without a buffer size, whole column chunks are read ahead.
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False, buffer_size=_CHUNK_BYTES) as file:
            names = file.schema_arrow.names
            field = next((field for field in _FIELDS if field in names), None)
            if field is None:
                raise UserError(f"{path}: has no column `text` or `story`, only {', '.join(names) or 'none'}")
            if large := find_large_page(opened, field, 4 * MAX_STORY_CHARACTERS + _CHUNK_BYTES):
                raise UserError(
                    f"{path}: {large}; a story has at most {MAX_STORY_CHARACTERS:,} characters, so put "
                    "one in each row, and write smaller pages"
                )
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for story in batch.column(0).to_pylist():
                    row += 1
                    story = _check_string(story, field, f"{path}, row {row}")
                    yield size * row // file.metadata.num_rows, row, story
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row + 1} to {row + _PARQUET_ROWS}: is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, BrokenPageError) as error:
        raise UserError(f"{path}, after row {row}: is not readable as Parquet ({error})") from error


_READERS: dict[str, tuple[Callable[[Path], Iterator[tuple[int, int, str]]], str]] = {
    ".txt": (_read_txt, "byte"),
    ".jsonl": (_read_jsonl, "line"),
    ".parquet": (_read_parquet, "row"),
}


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, byte {offset + error.start}: is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _check_string(value: object, field: str, place: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{place}: `{field}` is {'null' if value is None else type(value).__name__}, not a string")


def _too_long(path: Path, place: str) -> UserError:
    return UserError(
        f"{path}, {place}: a story of more than {MAX_STORY_CHARACTERS:,} characters starts here, "
        f"so its separators are probably missing; put {END_OF_STORY} between stories, or give one story a line or row"
    )


def hash_files(files: str, memo_path: Path | None, *, remember: bool = True) -> list[dict[str, str]]:
    """Returns suffix and SHA-256 of each file, in order; `memo_path` remembers them, so that a start need not read all.

    A memo that cannot be read is ignored, and written anew; without `remember` nothing is written.
    """
    memo = _read_memo(memo_path)
    known = dict(memo)
    hashes = []
    for path in find_files(files):
        key = str(path.absolute())
        stamp = _stamp(path)
        if known.get(key, {}).get("stamp") != stamp:
            known[key] = {"stamp": stamp, "sha256": _hash_file(path)}
        hashes.append({"suffix": path.suffix.lower(), "sha256": known[key]["sha256"]})
        if _stamp(path) != stamp or time.time_ns() - max(stamp[1:3]) < _SETTLED_SECONDS * 1e9:
            del known[key]
    if remember and memo_path is not None and known != memo:
        _write_memo(memo_path, known)
    return hashes


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_memo(memo_path: Path | None) -> dict[str, dict]:
    """Returns stamp and hash by path; nothing at all where one byte is not as it was written: a wrong hash would give
    a cache another identity."""
    try:
        memo = json.loads(read_small_file(memo_path, _MAX_MEMO_BYTES)) if memo_path else {}
        files = memo["files"]
        is_sound = memo["checksum"] == _checksum(files) and all(
            len(entry["stamp"]) == 4 and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in files.values()
        )
        return files if is_sound else {}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}


def _write_memo(memo_path: Path, files: dict[str, dict]) -> None:
    # Only a memo, with a checksum: where it cannot be kept, or only in part, the next start hashes again.
    with contextlib.suppress(OSError):
        memo_path.parent.mkdir(parents=True, exist_ok=True)
        memo_path.unlink(missing_ok=True)  # a link there is not followed
        with memo_path.open("x", encoding="utf-8") as file:
            json.dump({"files": files, "checksum": _checksum(files)}, file, indent=1)


def _checksum(files: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
