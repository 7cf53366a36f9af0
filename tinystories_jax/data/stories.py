"""Where stories come from: the start of the way from story to story. Clean, distinct stories stream out of here.

`tokenizer.py` learns its vocabulary from them and `cache.py` stores them. Sources: the Hub (`hub.py`), local files
(`files.py`) and the bundled sample (`sample.py`). Memory does not grow with the corpus.
"""

import contextlib
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ftfy
import numpy as np
import xxhash

from tinystories_jax.data.files import END_OF_STORY, hash_files, iter_files
from tinystories_jax.data.hub import iter_hub
from tinystories_jax.data.sample import NUM_STORIES, iter_sample, sample_identity
from tinystories_jax.errors import UserError

# Raise it when cleaning or splitting gives other stories than before: caches of the old ones are then not taken.
CLEANING_VERSION = 1

_SEEN_CACHE_KIB = 64 * 1024
_HASH_CHUNK = 65_536
_CONTROL_CHARACTERS = bytes(sorted({*range(32), 127} - set(b"\t\n")))
# Mistakes of encoding are mended; ligatures, wide characters, curly quotes, accents and HTML are as the author wrote.
_MOJIBAKE_ONLY = ftfy.TextFixerConfig(
    unescape_html=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    normalization=None,
    explain=False,
)


@dataclass(frozen=True)
class StorySource:
    """One split of stories: where it lies and how much of it to read."""

    kind: str  # hub | files | sample
    split: str  # train | validation
    files: str = ""  # kind files: comma-separated paths or globs
    hub_name: str = ""  # kind hub: OWNER/NAME
    hub_subset: str = ""  # kind hub: the data set's configuration, if it has several
    hub_revision: str = ""  # kind hub: commit
    max_stories: int = 0  # stories to yield at most; 0 is all


@dataclass
class StoryReport:
    """Counts of one reading, filled while the stories stream by."""

    raw_stories: int = 0  # read, before anything is dropped
    stories: int = 0  # yielded; the next three are of these
    words: int = 0  # separated by whitespace
    utf8_bytes: int = 0
    non_ascii_characters: int = 0
    mojibake_fixed: int = 0  # raw stories with mistakes of encoding or control characters, mended
    dropped_empty: int = 0
    dropped_duplicates: int = 0
    position: int = 0  # of the raw input: bytes for files, stories for hub and sample
    size: int = 0  # likewise, of the whole input whatever max_stories is; 0 is unknown


class SeenStories:
    """The stories of one split by 64-bit hash: finds exact duplicates in bounded memory, at any size of the corpus.

    The hashes lie in a private temporary database on disk that vanishes with this object.
    """

    def __init__(self):
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        # One endless transaction, since nothing of this outlives the process.
        for command in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_SEEN_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {command}")
        self._database.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._database.execute("BEGIN")
        self._cursor = self._database.cursor()

    def __del__(self):
        self._database.close()

    def add(self, story: str) -> bool:
        """Returns whether `story` is new, and remembers it."""
        # SQLite's integers are signed; the shift keeps the order.
        shifted = xxhash.xxh3_64_intdigest(story.encode()) - 2**63
        try:
            return self._cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (shifted,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def sorted_hashes(self) -> Iterator[np.ndarray]:
        """Yields the xxh3_64 of the stories' UTF-8 bytes as uint64 arrays, in ascending order, each hash once."""
        try:
            rows = self._database.execute("SELECT hash FROM seen ORDER BY hash")
            while chunk := rows.fetchmany(_HASH_CHUNK):
                yield np.array(chunk, dtype=np.int64)[:, 0].view(np.uint64) ^ np.uint64(2**63)
        except sqlite3.OperationalError as error:  # what is read takes the place of what was not written yet
            raise _no_room(error) from error


def _no_room(error: sqlite3.OperationalError) -> UserError:
    return UserError(
        f"no room for the temporary list of stories ({error}); set SQLITE_TMPDIR to a folder with more space"
    )


def iter_stories(source: StorySource, report: StoryReport, seen: SeenStories) -> Generator[str]:
    """Yields the stories of `source`: mended, stripped, none empty, none twice, at most max_stories.

    `report` and `seen` are to be new, and are filled as the stories go by. Raises `UserError` for whatever the user can
    mend in the source; a source without a single story is one such thing.
    """
    with contextlib.closing(_iter_raw(source)) as raw_stories:
        for report.position, report.size, raw in raw_stories:
            for piece in _split(_mend(raw, report)):
                report.raw_stories += 1
                story = piece.strip()
                if not story:
                    report.dropped_empty += 1
                elif not seen.add(story):
                    report.dropped_duplicates += 1
                else:
                    _count(story, report)
                    yield story
                    if report.stories == source.max_stories:
                        return
    report.position = report.size or report.position
    if not report.stories:
        raise UserError(f"split {source.split} of {source.files or source.hub_name or source.kind} holds no story")


def source_identity(source: StorySource, memo_path: Path | None, *, remember: bool = True) -> dict[str, object]:
    """Returns, JSON-able, what makes two readings the same: wherever files lie, their contents count.

    `memo_path` is a small file that remembers the hashes of large files (see `hash_files`); None is no memo, and
    without `remember` it is only read.
    """
    identity: dict[str, object] = {"kind": source.kind}
    if source.kind == "hub":
        identity |= {"name": source.hub_name, "subset": source.hub_subset, "revision": source.hub_revision}
        identity |= {"split": source.split}
    elif source.kind == "files":
        identity |= {"files": hash_files(source.files, memo_path, remember=remember)}
    else:
        identity |= {"sample": sample_identity(), "split": source.split}
    return {**identity, "max_stories": source.max_stories, "cleaning_version": CLEANING_VERSION}


def format_report(reports: Mapping[str, StoryReport], shared: int) -> str:
    """Returns a table with a column per split; `shared` is how many stories train and validation have in common."""
    rows = (
        ("stories read", "raw_stories"),
        ("  dropped: empty", "dropped_empty"),
        ("  dropped: duplicate", "dropped_duplicates"),
        ("  mojibake fixed", "mojibake_fixed"),
        ("stories kept", "stories"),
        ("  words", "words"),
        ("  UTF-8 bytes", "utf8_bytes"),
        ("  non-ASCII characters", "non_ascii_characters"),
    )
    lines = [f"{'split':<24}" + "".join(f"{split:>16}" for split in reports)]
    for title, name in rows:
        lines.append(f"{title:<24}" + "".join(f"{getattr(report, name):>16,}" for report in reports.values()))
    lines.append(f"stories shared by train and validation: {shared:,}")
    return "\n".join(lines)


def _iter_raw(source: StorySource) -> Generator[tuple[int, int, str]]:
    """Yields (position, size, raw story) in the source's own unit; see `StoryReport`."""
    if source.kind == "files":
        yield from iter_files(source.files)
    elif source.kind == "hub":
        yield from iter_hub(source.hub_name, subset=source.hub_subset, revision=source.hub_revision, split=source.split)
    elif source.kind == "sample":
        for position, story in enumerate(iter_sample(source.split), start=1):
            yield position, NUM_STORIES[source.split], story
    else:
        raise ValueError(f"StorySource.kind={source.kind!r} must be hub, files or sample")


def _mend(raw: str, report: StoryReport) -> str:
    # Line breaks of another system are no mistake of encoding, and common: not worth ftfy's time.
    text = raw.replace("\r\n", "\n").replace("\r", "\n") if "\r" in raw else raw
    if text.isascii() and not _has_control_characters(text):
        return text
    mended = ftfy.fix_text(text, _MOJIBAKE_ONLY)
    report.mojibake_fixed += mended != text
    return mended


def _has_control_characters(text: str) -> bool:
    # Deleting them from bytes is ten times as fast as searching for them with a regular expression.
    return len(text.encode().translate(None, _CONTROL_CHARACTERS)) != len(text)


def _split(text: str) -> list[str]:
    """Returns the stories of `text`; what is blank after the last END_OF_STORY is none."""
    if END_OF_STORY not in text:
        return [text]
    pieces = text.split(END_OF_STORY)
    return pieces if pieces[-1].strip() else pieces[:-1]


def _count(story: str, report: StoryReport) -> None:
    num_bytes = len(story.encode())
    report.stories += 1
    report.words += len(story.split())
    report.utf8_bytes += num_bytes
    if num_bytes != len(story):
        report.non_ascii_characters += len(story) - len(story.encode("ascii", "ignore"))
