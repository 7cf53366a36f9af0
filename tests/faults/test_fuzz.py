"""Random input: whatever a config or a file of stories holds gives a result or an error that names field or file."""

import dataclasses
import gzip
import json
import math
import os
import random
import resource
import runpy
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.place import ROOT, write_stories
from tests.test_cli import run_script
from tinystories_jax.config import from_dict, resolve, to_dict, with_data
from tinystories_jax.data.cache import cache_fingerprint, open_cache, write_cache
from tinystories_jax.data.stories import END_OF_STORY, SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import train_bpe
from tinystories_jax.errors import UserError

SEED = 20_231
SECONDS_PER_CASE = 20.0


@contextmanager
def time_limit(case: object) -> Iterator[None]:
    """Fails the test when the block takes longer than a user would wait for an answer, computing or waiting.

    Seconds in which this process is not let run do not count: the ticks of a stopped one come as a single signal.
    """
    ticks, cpu_before = 0, time.process_time()

    def tick(number: int, frame: object) -> None:
        nonlocal ticks
        ticks += 1
        if max(ticks, time.process_time() - cpu_before) >= SECONDS_PER_CASE:
            raise AssertionError(f"no answer within {SECONDS_PER_CASE} s: {case!r:.500}")

    previous = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


ODD_VALUES: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**53, 2**63, 10**18, 10**400, 10**5_000, -(10**18)),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, -1e308, math.nan, math.inf, -math.inf, 5e-324),
    *(True, False, None),
    *("", " ", "x", "None", "0", "\x00", "a\nb", "\ud800", "…", "x" * 10_000, "../..", "a/b", "/", "%s%n", "*"),
    *((), ("",), ("a", "b"), (1,), [], ["Once upon a time"], ("\ud800",), ("\x00",), {}, {"a": 1}, {1, 2}),
    *(b"bytes", object(), 1j, range(3), lambda: 3),
]


def config_values(name: str = "quickstart") -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()


def config_leaves(values: dict[str, Any]) -> list[tuple[str, ...]]:
    nested = [(section, key) for section, inner in values.items() if isinstance(inner, dict) for key in inner]
    return [("seed",), *nested]


def near(value: Any, rng: random.Random) -> Any:
    """Returns a value of the same type, often one that passes the check of the field alone."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return value
    factor = rng.choice([0, 0.5, 2, 3, 10, 1000, 1e6, 1e9, -1])
    return type(value)(value * factor)


def change_config(values: dict[str, Any], rng: random.Random) -> list[tuple[str, ...]]:
    """Changes up to five leaves, or rarely a whole section; returns which."""
    changed = []
    for _ in range(rng.randint(1, 5)):
        *sections, key = leaf = rng.choice(config_leaves(values))
        inner = values[sections[0]] if sections else values
        inner[key] = near(inner[key], rng) if rng.random() < 0.5 else rng.choice(ODD_VALUES)
        changed.append(leaf)
    if rng.random() < 0.03:
        section = rng.choice([name for name, inner in values.items() if isinstance(inner, dict)])
        values[section] = rng.choice(ODD_VALUES)
        changed.append((section,))
    return changed


def check_names(error: UserError, changed: list[tuple[str, ...]]) -> None:
    names = {".".join(leaf) for leaf in changed} | {leaf[0] for leaf in changed if len(leaf) == 1}
    for problem in error.problems:
        assert "\n" not in problem
        assert len(problem) < 20_000
        assert any(name in problem for name in names), (problem, changed)


def test_a_config_is_sound_or_refused_by_the_names_of_its_fields(full, tally: Counter[str]):
    rng = random.Random(SEED)
    for _ in range(50_000 if full else 2_000):
        values = config_values_copy()
        changed = change_config(values, rng)
        with time_limit(changed):
            try:
                config = resolve(values)
                vocab_size, num_blocks = rng.choice([257, 10_000]), rng.choice([1, 7, 1_000, 10**9])
                config = with_data(config, vocab_size=vocab_size, num_blocks=num_blocks)
                stored = json.loads(json.dumps(to_dict(config)))
                assert from_dict(stored) == config
                tally["sound"] += 1
            except UserError as error:
                check_names(error, changed)
                tally["refused"] += 1


_VALUES = config_values()


def config_values_copy() -> dict[str, Any]:
    return {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in _VALUES.items()}


def test_a_stored_config_is_sound_or_refused(full, tally: Counter[str]):
    rng = random.Random(SEED + 1)
    stored = json.loads(json.dumps(to_dict(with_data(resolve(config_values()), vocab_size=300, num_blocks=50))))
    odd = [value for value in ODD_VALUES if isinstance(value, (int, float, str, list, dict, type(None)))]
    for _ in range(20_000 if full else 1_000):
        values = json.loads(json.dumps(stored))
        section = rng.choice(list(values))
        if isinstance(values[section], dict) and rng.random() < 0.8:
            key = rng.choice(list(values[section]))
            if rng.random() < 0.2:
                del values[section][key]
            else:
                values[section][key] = rng.choice([*odd, [2**60, -1], [True], ["x"]])
        else:
            values[section] = rng.choice(odd)
        with time_limit(section):
            try:
                from_dict(values)
                tally["sound"] += 1
            except UserError:
                tally["refused"] += 1


def test_the_command_ends_with_0_or_2_whatever_the_config(tmp_path, full, tally: Counter[str]):
    rng = random.Random(SEED + 2)
    train, valid = write_stories(tmp_path / "a.txt", range(40)), write_stories(tmp_path / "b.txt", range(9))
    texts = ["", "0", "-1", "1e308", "nan", "inf", "-inf", "None", "True", "x", "9" * 400, "()", "('a',)", "'", "\\"]
    texts += ["1", "2", "4", "16", "300", "300", "0.5", "False"]
    texts += ["\udcff", "a\nb", "{}", "[1", "0x10", "1_000", "…", "--help", "=", "2.5", "1000000000"]
    leaves = [leaf for leaf in config_leaves(_VALUES) if leaf[0] != "data"]
    leaves += [("data", key) for key in ("source", "max_stories", "sequence_length", "hub_name", "hub_revision")]
    for _ in range(60 if full else 8):
        flags = [f"--config.{'.'.join(rng.choice(leaves))}={rng.choice(texts)}" for _ in range(rng.randint(1, 3))]
        result = run_script(
            "prepare",
            *("--config=configs/quickstart.py", "--config.data.source=files", f"--config.data.cache_dir={tmp_path}"),
            *(f"--config.data.train_files={train}", f"--config.data.valid_files={valid}", *flags),
        )
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, bool(errors)) in ((0, False), (2, True)), (flags, result.stderr)
        assert "Traceback" not in result.stderr, flags
        tally[f"exit {result.returncode}"] += 1


WORDS = [
    "Once",
    "upon",
    "a",
    "time",
    "the",
    "cat",
    "saw",
    "an",
    "owl",
    "é",
    "“Yes,”",
    "🙂",
    "\u2028",
    "ﬁ",
    "Ã©",
    "\x07",
]
SEPARATORS = [END_OF_STORY, "\n<|endoftext|>\n", "\r\n", "\n\n", "<|endof", "text|>", "\t", "\x00", "\ufeff", "\r"]


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))


def random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 2, 3, 10, 1_000, 70_000]))


def many_texts(rng: random.Random) -> bytes:
    parts = [rng.choice([random_text(rng), rng.choice(SEPARATORS), END_OF_STORY]) for _ in range(rng.randint(1, 40))]
    encoding = rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1"])
    return "".join(parts).encode(encoding, errors="replace")


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Returns the content with bits flipped, an end or a middle cut away, or something put in."""
    content_ = bytearray(content or b"x")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content_) + 1)
        match rng.randrange(4):
            case 0 if place < len(content_):
                content_[place] ^= 1 << rng.randrange(8)
            case 1:
                del content_[place:]
            case 2:
                content_[place:place] = rng.choice([b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", rng.randbytes(5)])
            case 3:
                del content_[place : place + rng.randint(1, 50)]
    return bytes(content_)


def random_json(rng: random.Random) -> str:
    text = json.dumps(random_text(rng), ensure_ascii=rng.random() < 0.5)
    return rng.choice(
        [
            *(f'{{"text": {text}}}', f'{{"story": {text}, "id": 3}}', f'{{"text": {text}, "story": null}}') * 3,
            *('{"text": null}', '{"text": 3}', '{"text": ["a"]}', '{"text": {"text": "a"}}', '{"title": "a"}', "{}"),
            *('"text"', "3", "null", "NaN", "[]", "{", '{"text": "\\ud800"}', '{"text": "\\u0000"}', "[" * 5_000),
            *('{"text": 1e999}', f'{{"text": {"9" * 5_000}}}', '{"text": "a", "text": 3}', "", " ", "\ufeff", "//"),
        ]
    )


def many_json(rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        lines = [json.dumps({"text": random_text(rng) + str(number)}) for number in range(rng.randint(1, 20))]
    else:
        lines = [random_json(rng) for _ in range(rng.randint(1, 4))]
    return rng.choice(["\n", "\n", "\r\n", "\n\n"]).join(lines).encode(errors="surrogatepass")


def random_table(rng: random.Random) -> pa.Table:
    texts = [random_text(rng) + str(row) for row in range(rng.randint(0, 30))]
    numbers = list(range(len(texts)))
    columns: list[tuple[str, Any]] = [
        *(("text", pa.array(texts, pa.string())),) * 6,
        ("story", pa.array(texts, pa.large_string())),
        ("text", pa.array(texts, pa.string()).dictionary_encode()),
        ("text", pa.array([None if row % 3 == 0 else text for row, text in enumerate(texts)], pa.string())),
        ("text", pa.array([text.encode() for text in texts], pa.binary())),
        ("text", pa.array(numbers, pa.int64())),
        ("text", pa.array(numbers, pa.timestamp("ns"))),
        ("text", pa.array([[text] for text in texts], pa.list_(pa.string()))),
        ("text", pa.array([{"text": text} for text in texts], pa.struct([("text", pa.string())]))),
        ("text", pa.nulls(len(texts))),
        ("title", pa.array(texts, pa.string())),
    ]
    name, column = rng.choice(columns)
    table = pa.table({name: column})
    return table.append_column("id", [numbers]) if rng.random() < 0.3 else table


def random_parquet(rng: random.Random) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        random_table(rng),
        sink,
        row_group_size=rng.choice([1, 7, 1_000]),
        compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
        use_dictionary=rng.random() < 0.5,
    )
    return sink.getvalue().to_pybytes()


MAKERS: dict[str, list[Callable[[random.Random], bytes]]] = {
    ".txt": [random_bytes, many_texts, many_texts, lambda rng: gzip.compress(many_texts(rng))],
    ".jsonl": [random_bytes, many_texts, many_json, many_json],
    ".parquet": [random_bytes, many_json, random_parquet, random_parquet],
    ".txt.gz": [many_texts, random_bytes],
    ".csv": [many_texts],
    "": [many_texts],
}
NAMES = ["stories", "a b", "ä…🙂", "[1]", "*", "?", "-x", "~", "a\nb", "%s", "\udcff", "'\"", "x" * 200, ".hidden", "#"]


def make_case(folder: Path, rng: random.Random) -> Path:
    """Writes a random file, or something else of that name; returns its path."""
    suffix = rng.choice([".txt", ".jsonl", ".parquet"] * 5 + list(MAKERS))
    suffix = suffix.upper() if rng.random() < 0.05 else suffix
    path = folder / (rng.choice(NAMES if rng.random() < 0.2 else ["stories"]) + suffix)
    kind = rng.random()
    if kind < 0.01:
        path.mkdir()
    elif kind < 0.02:
        path.symlink_to(rng.choice([path, folder / "nowhere", "/dev/zero", "/dev/null", folder]))
    elif kind < 0.025:
        os.mkfifo(path)
    elif kind > 0.03:
        content = rng.choice(MAKERS[suffix.lower()])(rng)
        path.write_bytes(spoiled(content, rng) if rng.random() < 0.5 else content)
    return path


def pass_through(path: Path, folder: Path) -> None:
    """Takes the file all the way into a cache and out again; raises `UserError` where it is refused."""
    source = StorySource(kind="files", split="train", files=str(path))
    stories = list(iter_stories(source, StoryReport(), SeenStories()))
    tokenizer = train_bpe(stories, vocab_size=260)
    write_cache(source, tokenizer, folder / "cache", identity={"split": "train"})
    cache = open_cache(
        folder / "cache",
        fingerprint=cache_fingerprint(tokenizer.sha256, {"split": "train"}),
        vocab_size=tokenizer.vocab_size,
        rebuild_command="REBUILD",
    )
    # The end-of-story token is a text of its own, so that the stories can be told apart again.
    assert tokenizer.decode(cache.tokens) == "".join(story + END_OF_STORY for story in stories)


def try_file(path: Path, folder: Path, case: object) -> str:
    with time_limit(case):
        try:
            pass_through(path, folder)
        except UserError as error:
            for problem in error.problems:
                assert str(path) in problem or str(path.parent) in problem, (case, problem)
            return "refused"
    return "stories"


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_file_gives_stories_or_is_refused_by_its_name(tmp_path, full, tally: Counter[str]):
    before = None
    for number in range(12_000 if full else 1_000):
        rng = random.Random(SEED * 100_000 + number)
        folder = tmp_path / "case"
        folder.mkdir()
        path = make_case(folder, rng)
        tally[f"{path.suffix.lower() or 'none'} {try_file(path, tmp_path, number)}"] += 1
        remove(folder)
        folder.rmdir()
        remove(tmp_path)
        if number == 200:
            before = peak_megabytes()
    assert before is not None
    assert peak_megabytes() - before < 400


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_single_story_of_50_megabytes_is_refused(tmp_path, suffix, tally: Counter[str]):
    path, text = tmp_path / f"large{suffix}", "Once upon a time. " * (50 * 2**20 // 18)
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(json.dumps({"text": text}) if suffix == ".jsonl" else text)
    before = peak_megabytes()
    assert try_file(path, tmp_path, suffix) == "refused"
    assert peak_megabytes() - before < 400
    tally["refused"] += 1


def test_dataclasses_have_no_field_that_the_fuzzing_leaves_out():
    config = with_data(resolve(config_values()), vocab_size=300, num_blocks=50)
    fuzzed = {".".join(leaf) for leaf in config_leaves(_VALUES)}
    for section in dataclasses.fields(config):
        inner = getattr(config, section.name)
        if dataclasses.is_dataclass(inner) and section.name != "schedule":
            given = {item.name for item in dataclasses.fields(inner) if not item.metadata.get("derived")}
            assert {f"{section.name}.{name}" for name in given} <= fuzzed
