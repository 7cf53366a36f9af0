"""Files of JSON objects, one per line and each with its `update`: metrics.jsonl and samples.jsonl."""

import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tinystories_jax.training.run_folder import append, open_unbuffered, set_aside, warn, write_atomically

_MAX_BYTES = 2**28  # of all rows of a run, about a million of them
_MAX_MORE_BYTES = 2**24  # written after a checkpoint, of updates that are done again


@dataclass(frozen=True)
class FileState:
    """What a file held when a checkpoint was saved."""

    num_bytes: int
    xxh3_128: str


class JsonLines:
    """A file that rows are appended to, and that goes on from where it was when a checkpoint was saved.

    What was written after the checkpoint is of a stretch that is done again, and goes. Where the rest is not what was
    written, its rows that can be read are kept, the file as it was is set aside, and a warning says what is lost.
    """

    def __init__(self, path: Path, state: FileState | None, *, updates: Sequence[int], once: bool):
        """Opens `path` as it was at `state`, None for a run from the start.

        updates: those that have rows then. once: each of them has just one.
        """
        self.path = path
        self._hash = xxhash.xxh3_128()
        data = b"" if state is None else self._restore(state, updates, once)
        self._hash.update(data)
        self._num_bytes = len(data)
        self._file = open_unbuffered(path, keep_bytes=len(data))

    @property
    def state(self) -> FileState:
        return FileState(self._num_bytes, self._hash.hexdigest())

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends the rows; raises `UserError` when there is no room for them."""
        data = _encode(rows)
        self._hash.update(data)
        self._num_bytes += len(data)
        append(self._file, data, self.path)

    def close(self) -> None:
        self._file.close()

    def _restore(self, state: FileState, updates: Sequence[int], once: bool) -> bytes:
        """Returns what the file holds up to `state`, mended if it must be."""
        data, reason = b"", "is not what was written"
        try:
            data = _read(self.path, state.num_bytes + _MAX_MORE_BYTES)
        except FileNotFoundError:
            reason = "is missing"
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error})"
        until_then = data[: state.num_bytes]
        if xxhash.xxh3_128_hexdigest(until_then) == state.xxh3_128:
            return until_then
        if 0 < len(data) < state.num_bytes:
            reason = f"has {len(data):,} bytes, of {state.num_bytes:,} that were written"
        rows = _rows_to_keep(data, updates, once)
        # A file that was mended at an earlier restart is as it should be until the next checkpoint knows of it.
        if (mended := _encode(rows)) != data and self.path.exists():
            reason += f", kept as {set_aside(self.path)}"
        lost = sorted(set(updates) - {row["update"] for row in rows})
        gone = f"no rows are left of updates {_ranges(lost)}" if lost else "each update still has a row, changed maybe"
        warn(f"{self.path} {reason}; {gone}; training does not depend on it")
        write_atomically(self.path, mended)
        return mended


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows and how many lines are damaged; a last line still being written is not counted.

    Raises ValueError for a file that is none of a run's, for it is a pipe or too large.
    """
    data = _read(path, _MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, more than the {_MAX_BYTES:,} that are read")
    return _parse(data)


def _read(path: Path, max_bytes: int) -> bytes:
    """Returns the file, or its first bytes where it is larger; raises OSError, or ValueError for what is no file."""
    if not stat.S_ISREG(path.lstat().st_mode):  # reading a pipe would wait for ever
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        return file.read(max_bytes)


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    rows, num_damaged = [], 0
    # Not splitlines: a story may hold other line separators of Unicode, which JSON leaves as they are.
    lines = data.decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also an integer of thousands of digits
            row = None
        if isinstance(row, dict) and type(row.get("update")) is int:
            rows.append(row)
        elif number < len(lines):
            num_damaged += 1
    return rows, num_damaged


def _rows_to_keep(data: bytes, updates: Sequence[int], once: bool) -> list[dict[str, Any]]:
    """Returns the rows of `updates`; where each has one, two rows of the same update tell nothing of which is whose."""
    wanted = set(updates)
    rows = [row for row in _parse(data)[0] if row["update"] in wanted]
    counts = Counter(row["update"] for row in rows)
    kept = [row for row in rows if not once or counts[row["update"]] == 1]
    return sorted(kept, key=lambda row: row["update"])


def _encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    # A damaged line can name half of a surrogate pair, which UTF-8 cannot say.
    return "".join(lines).encode(errors="replace")


def _ranges(numbers: Sequence[int]) -> str:
    """Returns sorted numbers as `1, 3-5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
