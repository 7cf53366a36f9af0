"""The pages of a Parquet file, looked at before they are read: a few kilobytes can stand for gigabytes of stories.

The footer says how large a column is, but not its pages, which are what a reader must hold in memory one at a time.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

# Parquet's own numbers, https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_HEADER_OF = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # the field of PageHeader with what is the type's own
_ENCODING_FIELD = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
_PLAIN, _DELTA_LENGTH = 0, 6  # each value has bytes of its own

# Writers make pages of a megabyte, or of a whole row group of some 100 MB.
_MAX_PAGE_BYTES = 128 * 2**20
# Where values share their bytes, each story may be as large as all of the page.
_MAX_SHARED_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 16 * 2**20  # statistics hold values of the column
_MAX_DEPTH = 16


class BrokenPageError(Exception):
    """Something else stands where the footer says that a page does."""


@dataclass(frozen=True)
class Page:
    """One page of a column chunk; `num_bytes` is what it takes once it is decompressed."""

    offset: int
    num_bytes: int
    num_values: int
    is_plain: bool  # no two values share bytes


def find_large_page(file: BinaryIO, field: str, max_story_bytes: int) -> str | None:
    """Returns which page of column `field` would fill the memory, in words with the figures; None where none does.

    Raises `BrokenPageError` for what is no Parquet, OSError.
    """
    for column in _read_columns(file):
        if not column.get(3) or column[3][0] != field.encode():
            continue
        for page in _read_pages(file, column):
            largest = _MAX_PAGE_BYTES if page.is_plain else _MAX_SHARED_BYTES
            if page.num_bytes > min(largest, max(1, page.num_values) * max_story_bytes):
                return (
                    f"the page at byte {page.offset:,} takes {page.num_bytes:,} bytes for {page.num_values:,} "
                    "stories once it is decompressed"
                )
    return None


def _read_columns(file: BinaryIO) -> list[dict[int, Any]]:
    """Returns the ColumnMetaData of each column chunk, by Parquet's numbers of its fields.

    Read here, since pyarrow ends the process when it is asked about some damaged ones.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    start = size - 8 - int.from_bytes(file.read(8)[:4], "little")
    if start < 0:
        raise BrokenPageError("the footer is cut off")
    file.seek(start)
    try:
        groups = _Thrift(file).read_struct()[4]
        return [chunk[3] for group in groups for chunk in group[1] if isinstance(chunk[3].get(3, []), list)]
    except (AttributeError, KeyError, TypeError) as error:
        raise BrokenPageError(f"the footer does not say where the columns are ({error!r})") from error


def _read_pages(file: BinaryIO, column: dict[int, Any]) -> Iterator[Page]:
    """Yields the pages of a column chunk up to the last one that holds values."""
    offset, left, dictionary = _size(column, 9, 0), _size(column, 5, 0), column.get(11)
    if isinstance(dictionary, int) and 0 < dictionary < offset:
        offset = dictionary
    size = file.seek(0, os.SEEK_END)
    while left > 0:
        if not 0 <= offset < size:
            raise BrokenPageError(f"byte {offset:,}, where a page should be, is outside of the file")
        file.seek(offset)
        thrift = _Thrift(file)
        header = thrift.read_struct()
        kind, num_bytes, compressed_bytes = (_size(header, number, offset) for number in (1, 2, 3))
        if kind in _HEADER_OF:
            own = header.get(_HEADER_OF[kind])
            if not isinstance(own, dict):
                raise BrokenPageError(f"no page stands at byte {offset:,}")
            num_values, encoding = _size(own, 1, offset), own.get(_ENCODING_FIELD[kind])
            is_plain = kind != _DICTIONARY and encoding in (_PLAIN, _DELTA_LENGTH)
            yield Page(offset, num_bytes, num_values, is_plain)
            left -= 0 if kind == _DICTIONARY else num_values
        offset += thrift.num_bytes + compressed_bytes


def _size(fields: dict[int, Any], number: int, offset: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or value < 0:
        raise BrokenPageError(f"no page stands at byte {offset:,}")
    return value


class _Thrift:
    """Reads one struct of Thrift's compact protocol without knowing its fields, which it returns by number.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.num_bytes = 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise BrokenPageError("a header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._read(1)[0]) & 0x0F:
            number = number + (head >> 4) if head >> 4 else self._read_integer()
            fields[number] = self._read_value(head & 0x0F, depth)
        return fields

    def _read_value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:  # true, false
                return kind == 1
            case 3:
                return self._read(1)[0]
            case 4 | 5 | 6:
                return self._read_integer()
            case 7:
                return self._read(8)
            case 8:
                return self._read(self._read_unsigned())
            case 9 | 10:
                return self._read_list(depth)
            case 12:
                return self.read_struct(depth + 1)
        raise BrokenPageError(f"a header has a field of the unknown type {kind}")

    def _read_list(self, depth: int) -> list[Any]:
        head = self._read(1)[0]
        count = head >> 4 if head >> 4 < 15 else self._read_unsigned()
        kind = 3 if head & 0x0F in (1, 2) else head & 0x0F  # in a list a truth value is a byte
        return [self._read_value(kind, depth + 1) for _ in range(count)]

    def _read_integer(self) -> int:
        value = self._read_unsigned()
        return (value >> 1) ^ -(value & 1)

    def _read_unsigned(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._read(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise BrokenPageError("a header has a number without an end")

    def _read(self, count: int) -> bytes:
        self.num_bytes += count
        if self.num_bytes > _MAX_HEADER_BYTES:
            raise BrokenPageError(f"a header has more than {_MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(count)
        if len(data) < count:
            raise BrokenPageError("a header is cut off")
        return data
