import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from tinystories_jax.data import files as files_module
from tinystories_jax.data.sample import NUM_STORIES, sample_identity
from tinystories_jax.data.stories import (
    END_OF_STORY,
    SeenStories,
    StoryReport,
    StorySource,
    format_report,
    iter_stories,
    source_identity,
)
from tinystories_jax.errors import UserError


def read(*paths: object, max_stories: int = 0) -> tuple[list[str], StoryReport]:
    source = StorySource("files", "train", files=",".join(map(str, paths)), max_stories=max_stories)
    report = StoryReport()
    return list(iter_stories(source, report, SeenStories())), report


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_real_stories_come_out_as_they_went_in(tinystories_data):
    raw = (tinystories_data / "train.txt").read_text(encoding="utf-8").split(END_OF_STORY)
    stories, report = read(tinystories_data / "train.txt")
    assert stories == [story.strip() for story in raw if story.strip()]
    assert (report.stories, report.dropped_empty, report.dropped_duplicates, report.mojibake_fixed) == (6955, 0, 0, 0)
    assert report.utf8_bytes == sum(len(story.encode()) for story in stories)
    assert report.words == sum(len(story.split()) for story in stories)
    assert report.non_ascii_characters == sum(not c.isascii() for story in stories for c in story)
    assert report.position == report.size == (tinystories_data / "train.txt").stat().st_size


def test_separators_may_stand_anywhere_and_across_chunks(tmp_path, monkeypatch):
    path = write(
        tmp_path / "a.txt", "one<|endoftext|>two\n<|endoftext|>\n\nthree\nlines <|endoftext|><|endoftext|>four"
    )
    for chunk_bytes in (1, 3, 7, 100):
        monkeypatch.setattr(files_module, "_CHUNK_BYTES", chunk_bytes)
        stories, report = read(path)
        assert stories == ["one", "two", "three\nlines", "four"]
        assert (report.raw_stories, report.dropped_empty) == (5, 1)


def test_a_txt_without_separators_is_not_taken_for_one_story(tmp_path):
    paragraph = "Tom had a cat. The cat was red.\n\n"
    stories, _ = read(write(tmp_path / "short.txt", paragraph * 10))
    assert len(stories) == 1
    many = write(tmp_path / "many.txt", paragraph * 1000)
    with pytest.raises(
        UserError, match=rf"{many}: holds no <\|endoftext\|>, so that its 33,000 characters would be one"
    ):
        read(many)
    # One that ends with a separator says that it is one story.
    stories, _ = read(write(tmp_path / "one.txt", paragraph * 1000 + END_OF_STORY))
    assert len(stories) == 1


def test_jsonl_and_parquet_give_what_txt_gives(tmp_path):
    stories = ["one", "two\nlines", "three é “quoted”"]
    write(tmp_path / "a.TXT", END_OF_STORY.join(stories))
    lines = [json.dumps({"id": 1, "story": stories[0]}), "", *(json.dumps({"text": story}) for story in stories[1:])]
    write(tmp_path / "b.jsonl", "\n".join(lines))
    write_parquet(tmp_path / "c.parquet", text=stories, id=[1, 2, 3])
    write_parquet(tmp_path / "d.parquet", story=pa.array(stories).dictionary_encode().to_pylist())
    for path in sorted(tmp_path.iterdir()):
        assert read(path)[0] == stories, path


def test_a_separator_inside_any_story_ends_it(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"text": f"one{END_OF_STORY}two{END_OF_STORY}"}))
    # Only mending makes this one a separator.
    write(tmp_path / "b.jsonl", json.dumps({"text": "three<|endof\x00text|>four"}))
    stories, report = read(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert stories == ["one", "two", "three", "four"]
    assert report.raw_stories == 4


def test_mojibake_is_mended_and_typography_left_alone(tmp_path):
    proper = ["“Yes,” said Zoë of the café — fine…", "\ufb01 \uff21 &amp; 1 < 2", "e\u0301 decomposed", "tab\tand more"]
    broken = [text.encode().decode("windows-1252") for text in ("He didn\u2019t", "a café — fine…")]
    raw = [*proper, *broken, "bell\x07 null\x00", "one\r\ntwo\rthree", "\ufeffBOM", "lone \ud83d surrogate"]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in raw))
    stories, report = read(path)
    mended = ["He didn\u2019t", "a café — fine…", "bell null", "one\ntwo\nthree", "BOM", "lone \ufffd surrogate"]
    assert stories == [*proper, *mended]
    assert report.mojibake_fixed == 5  # line breaks of another system are no mistake


def test_bom_and_crlf_of_a_text_file(tmp_path):
    stories, report = read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\nmore\r\n<|endoftext|>\r\ntwo\r\n"))
    assert stories == ["one\n\nmore", "two"]
    assert report.mojibake_fixed == 0


def test_duplicates_and_empty_stories_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.txt", END_OF_STORY.join(["one", "two", " one\n", "", "two", "three"]))
    stories, report = read(path)
    assert stories == ["one", "two", "three"]
    assert (report.raw_stories, report.dropped_duplicates, report.dropped_empty) == (6, 2, 1)


def test_max_stories_counts_what_is_kept_and_reads_no_further(tmp_path):
    good = write(tmp_path / "a.txt", END_OF_STORY.join(["one", "one", "two", "three"]))
    bad = write(tmp_path / "b.txt", b"\xff\xff")
    stories, report = read(good, bad, max_stories=2)
    assert stories == ["one", "two"]
    assert report.position < report.size


def test_globs_are_sorted_and_paths_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b2.txt", "b1.txt", "a.txt", "c[1].txt"):
        write(tmp_path / name, name)
    assert read("~/b*.txt", tmp_path / "a.txt", tmp_path / "c[1].txt")[0] == ["b1.txt", "b2.txt", "a.txt", "c[1].txt"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "holds no story"),
        ("a.txt", b"fine<|endoftext|>not \xff fine", "byte 21: is not UTF-8"),
        ("a.txt", "x" * (2**20 + 1), r"holds no <\|endoftext\|>, so that its 1,048,577 characters"),
        (
            "a.txt",
            "x" * (2**20 + 1) + "<|endoftext|>",
            "byte 0: a story of more than 1,048,576 characters .* separators",
        ),
        ("a.txt", "x" * 6_000_000, "byte 0: a story of more than 1,048,576 characters .* separators"),
        ("a.txt", "one<|endoftext|>" + "x" * 6_000_000, "byte 16: a story of more than 1,048,576 characters"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"', "line 2: is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: is not JSON"),
        ("a.jsonl", '{"text": "one"}\n\n["two"]', "line 3: is a list, not an object"),
        ("a.jsonl", '{"title": "one"}', "line 1: has no field `text` or `story`, only title"),
        ("a.jsonl", '{"text": 7}', "line 1: `text` is int, not a string"),
        ("a.jsonl", b'{"text": "\xff"}', "byte 10: is not UTF-8"),
        ("a.parquet", b"PAR1 no, not really PAR1", "is not readable as Parquet"),
        ("a.csv", "text\none", "suffix '.csv' is unknown.*txt, .jsonl, .parquet"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{path}.*{expected}"):
        read(path)


def test_parquet_errors_name_column_and_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["one"])
    with pytest.raises(UserError, match="no column `text` or `story`, only body"):
        read(path)
    path = write_parquet(tmp_path / "b.parquet", text=["one", "two", "three", None])
    with pytest.raises(UserError, match="row 4: `text` is null, not a string"):
        read(path)
    path = write_parquet(tmp_path / "c.parquet", text=[1, 2])
    with pytest.raises(UserError, match="row 1: `text` is int, not a string"):
        read(path)
    invalid = pa.array([b"one", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet, row .* is not UTF-8"):
        read(tmp_path / "d.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    damaged = write(tmp_path / "e.parquet", whole[:20] + bytes(20) + whole[40:])
    with pytest.raises(UserError, match=r"e\.parquet"):
        read(damaged)


def test_all_problems_of_the_paths_are_raised_at_once(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    (tmp_path / "link.txt").symlink_to(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        read(path, tmp_path / "none*.txt", tmp_path / "folder", path, tmp_path / "link.txt", "x" * 5000)
    expected = ("matches no file", "is a folder", "the same file", "the same file", "matches no file")
    for problem, fault in zip(caught.value.problems, expected, strict=True):
        assert fault in problem
    with pytest.raises(UserError, match="no file is named"):
        read(" , ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    path.chmod(0)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        read(path)


def test_seen_stories_are_found_again_and_their_hashes_sorted():
    seen = SeenStories()
    stories = [f"story {number} é" for number in range(70_000)]
    assert all(seen.add(story) for story in stories)
    assert not any(seen.add(story) for story in stories)
    chunks = list(seen.sorted_hashes())
    hashes = np.concatenate(chunks)
    assert len(chunks) > 1
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == sorted(xxhash.xxh3_64_intdigest(story.encode()) for story in stories)


def test_sample_source_is_whole_and_known_by_its_grammar():
    source, report = StorySource("sample", "validation"), StoryReport()
    stories = list(iter_stories(source, report, SeenStories()))
    assert len(stories) == report.stories == report.position == report.size == NUM_STORIES["validation"]
    identity = source_identity(source, None)
    assert identity["sample"] == sample_identity()
    assert identity != source_identity(StorySource("sample", "train"), None)


def test_identity_is_of_contents_and_order_not_of_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    one, two = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two")
    copy = write(tmp_path / "sub" / "copy.txt", "one")

    def identity(*paths: Path, max_stories: int = 0) -> str:
        source = StorySource("files", "train", files=",".join(map(str, paths)), max_stories=max_stories)
        return json.dumps(source_identity(source, None))

    assert identity(one, two) == identity(copy, two)
    different = {identity(one, two), identity(two, one), identity(one), identity(one, two, max_stories=1)}
    assert len(different) == 4
    assert str(tmp_path) not in identity(one)


def test_memo_spares_hashing_only_while_a_file_is_unchanged(tmp_path, monkeypatch):
    path, memo = write(tmp_path / "1.txt", "one"), tmp_path / "cache" / "memo.json"
    source = StorySource("files", "train", files=str(path))
    monkeypatch.setattr(files_module, "_SETTLED_SECONDS", 0.0)
    first = source_identity(source, memo)
    planted = "0" * 64
    # A planted hash shows that the memo is what is read.
    known = json.loads(memo.read_text())["files"]
    known[str(path)]["sha256"] = planted
    memo.write_text(json.dumps({"files": known, "checksum": files_module._checksum(known)}))
    assert source_identity(source, memo)["files"] == [{"suffix": ".txt", "sha256": planted}]
    status = path.stat()
    write(path, "two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert planted not in json.dumps(source_identity(source, memo))
    write(path, "one")
    corrupt_files: list[Any] = [[], {"a": 1}, {"a": []}, {"a": {"stamp": 3, "sha256": planted}}]
    corrupt_files.append({"a": {"stamp": [1] * 4, "sha256": "b"}})
    sealed = [json.dumps({"files": files, "checksum": files_module._checksum(files)}) for files in corrupt_files]
    for corrupt in ("{", "[]", '{"files": {}}', "[" * 100_000, *sealed):
        memo.write_text(corrupt)
        assert source_identity(source, memo) == first
        assert list(json.loads(memo.read_text())["files"]) == [str(path)]
    assert [item.name for item in memo.parent.iterdir()] == ["memo.json"]


def test_memo_does_not_trust_a_file_that_has_just_changed(tmp_path):
    path, memo = write(tmp_path / "1.txt", "one"), tmp_path / "memo.json"
    source_identity(StorySource("files", "train", files=str(path)), memo)
    assert not memo.exists()


def test_hub_identity_is_the_commit():
    source = StorySource("hub", "train", hub_name="a/b", hub_subset="c", hub_revision="d" * 40)
    expected = {"kind": "hub", "name": "a/b", "subset": "c", "revision": "d" * 40, "split": "train"}
    assert source_identity(source, None).items() >= expected.items()


def test_report_has_a_column_per_split_and_fits_a_screen():
    train = StoryReport(raw_stories=2_119_719, stories=2_000_000, dropped_duplicates=7, utf8_bytes=1_911_420_483)
    text = format_report({"train": train, "validation": StoryReport(stories=21_990)}, shared=12)
    for figure in (
        "train",
        "validation",
        "2,119,719",
        "1,911,420,483",
        "21,990",
        "7",
        "shared by train and validation: 12",
    ):
        assert figure in text
    assert max(map(len, text.splitlines())) <= 80


def test_import_is_light():
    script = (
        "import sys, tinystories_jax.data.stories; print({'datasets', 'pandas', 'pyarrow', 'jax'} & {*sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"
