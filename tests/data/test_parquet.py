"""Parquet files that are small and stand for gigabytes: refused by page, before anything is decompressed."""

import contextlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinystories_jax.data.files import iter_files
from tinystories_jax.errors import UserError

STORIES = [f"Once upon a time {number} " + "owls " * (number % 300) for number in range(2_000)]


def read(path: Path) -> list[str]:
    return [story for _, _, story in iter_files(str(path))]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def repeat(story: str, count: int) -> pa.Table:
    """Returns a column that holds the story once and says `count` times that it is that."""
    indices = pa.array(np.zeros(count, np.int32))
    return pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array([story]))})


def write(path: Path, table: pa.Table, **settings: Any) -> Path:
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, **settings)
    assert path.stat().st_size < 100_000
    return path


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", ["PLAIN", "RLE_DICTIONARY", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_pages_of_every_kind_are_walked_to_their_end(tmp_path, version, encoding):
    encodings: dict[str, Any] = {"use_dictionary": True}
    if encoding != "RLE_DICTIONARY":
        encodings = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    pq.write_table(
        pa.table({"id": list(range(len(STORIES))), "text": STORIES}),
        tmp_path / "stories.parquet",
        data_page_version=version,
        row_group_size=700,
        data_page_size=20_000,
        write_page_checksum=True,
        **encodings,
    )
    assert read(tmp_path / "stories.parquet") == STORIES


def test_a_large_story_said_over_and_over_is_refused_with_its_page(tmp_path):
    path = write(tmp_path / "bomb.parquet", repeat("a" * 20_000_000, 100_000))
    before = peak_megabytes()
    with pytest.raises(UserError, match=rf"{path}: the page at byte 4 takes 20,000,004 bytes for 1 stories once"):
        read(path)
    assert peak_megabytes() - before < 100


def test_a_page_of_hundreds_of_megabytes_is_refused(tmp_path):
    table = pa.table({"text": pa.array(["a" * 1_000_000] * 150)})
    path = write(tmp_path / "bomb.parquet", table, use_dictionary=False, data_page_size=2**30)
    before = peak_megabytes()
    with pytest.raises(UserError, match=r"takes 150,000,6\d\d bytes for 150 stories once it is decompressed"):
        read(path)
    assert peak_megabytes() - before < 100


def test_two_gigabytes_of_stories_in_a_few_kilobytes_are_read_a_few_at_a_time(tmp_path):
    path = write(tmp_path / "many.parquet", repeat("a" * 2**20, 2_000))
    before = peak_megabytes()
    assert sum(len(story) for _, _, story in iter_files(str(path))) == 2_000 * 2**20
    assert peak_megabytes() - before < 300


def test_a_broken_page_is_refused_by_its_place(tmp_path):
    path = tmp_path / "stories.parquet"
    pq.write_table(pa.table({"text": STORIES}), path)
    content = bytearray(path.read_bytes())
    content[4:12] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}, after row 0: is not readable as Parquet \(.*header"):
        read(path)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_footer_ends_in_a_refusal_and_not_the_process(tmp_path, seed):
    path, rng = tmp_path / "stories.parquet", np.random.default_rng(seed)
    pq.write_table(pa.table({"text": STORIES[:50]}), path)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    for _ in range(100):
        damaged = bytearray(content)
        damaged[len(content) - 8 - int(rng.integers(1, footer))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            read(path)
