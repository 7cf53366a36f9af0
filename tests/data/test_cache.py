"""Token caches: complete or absent, tied to their tokenizer and source, and dealt out block by block."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinystories_jax.data import cache as cache_module
from tinystories_jax.data.cache import (
    Manifest,
    TokenCache,
    batch_at,
    cache_fingerprint,
    eval_batches,
    fingerprint_of,
    num_blocks,
    open_cache,
    write_cache,
)
from tinystories_jax.data.folders import new_folder, sole_builder
from tinystories_jax.data.stories import END_OF_STORY, SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import StoryTokenizer, save_tokenizer, train_bpe
from tinystories_jax.errors import UserError

ROOT = Path(__file__).parents[2]
REBUILD = "python scripts/prepare.py --rebuild"
IDENTITY: dict[str, object] = {"split": "train", "name": "0f", "max_stories": 0}

# Builds a cache in a process of its own: build(tokenizer.json, stories.txt, folder).
PROGRAM = f"""
import sys
from tinystories_jax.data.cache import write_cache
from tinystories_jax.data.stories import StorySource
from tinystories_jax.data.tokenizer import load_tokenizer
source = StorySource(kind="files", split="train", files=sys.argv[2])
write_cache(source, load_tokenizer(sys.argv[1]), sys.argv[3], identity={IDENTITY!r})
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def story(index: int, num_sentences: int = 2) -> str:
    return " ".join(f"The cat number {index} saw {index + 7 * n} red balls and an owl." for n in range(num_sentences))


def write_stories(path: Path, num_stories: int, num_sentences: int = 2) -> StorySource:
    marker = f"\n{END_OF_STORY}\n"
    path.write_text(marker.join(story(index, num_sentences) for index in range(num_stories)) + marker)
    return StorySource(kind="files", split="train", files=str(path))


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return train_bpe((story(index) for index in range(50)), vocab_size=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> StorySource:
    return write_stories(tmp_path_factory.mktemp("stories") / "train.txt", 1_500)


@pytest.fixture
def written(tmp_path, source, tokenizer) -> Manifest:
    return write_cache(source, tokenizer, tmp_path / "cache", identity=IDENTITY)


def open_written(folder: Path, manifest: Manifest, vocab_size: int = 300) -> TokenCache:
    return open_cache(folder, fingerprint=manifest.fingerprint, vocab_size=vocab_size, rebuild_command=REBUILD)


def start_builder(tmp_path: Path, tokenizer: StoryTokenizer, source: StorySource) -> subprocess.Popen[str]:
    arguments = [str(save_tokenizer(tokenizer, tmp_path)), source.files, str(tmp_path / "caches" / "one")]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_cache_holds_every_story_and_its_end(tmp_path, source, tokenizer, written):
    stories = list(iter_stories(source, StoryReport(), SeenStories()))
    expected = [token for text in stories for token in (*tokenizer.encode(text), 0)]
    cache = open_written(tmp_path / "cache", written)
    assert cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == expected
    assert not cache.tokens.flags.writeable
    assert cache.manifest == written
    assert (written.num_stories, written.num_tokens) == (len(stories), len(expected))
    assert written.num_bytes == sum(len(text.encode()) for text in stories)
    assert written.tokenizer_sha256 == tokenizer.sha256
    assert StoryReport(**written.report).stories == len(stories)
    hashes = np.fromfile(tmp_path / "cache" / "story_hashes.bin", "<u8")
    assert len(hashes) == len(stories)
    assert (np.diff(hashes.astype(object)) > 0).all()


def test_two_builds_give_the_same_bytes(tmp_path, source, tokenizer, written):
    write_cache(source, tokenizer, tmp_path / "again", identity=IDENTITY)
    for name in ("tokens.bin", "manifest.json", "story_hashes.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()


def test_large_vocabulary_takes_four_bytes(tmp_path, source, tokenizer):
    values = json.loads(tokenizer.json)
    vocab = values["model"]["vocab"]
    vocab.update({f"unused{row}": row for row in range(len(vocab), 65_536)})
    large = dataclasses.replace(
        tokenizer, json=json.dumps(values), backend=tokenizer.backend.from_str(json.dumps(values))
    )
    manifest = write_cache(source, large, tmp_path / "large", identity=IDENTITY)
    cache = open_written(tmp_path / "large", manifest, vocab_size=65_536)
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens[: len(tokenizer.encode(story(0)))].tolist() == tokenizer.encode(story(0))


def test_fingerprint_tells_tokenizer_and_every_part_of_the_source_apart():
    changed = [{**IDENTITY, "split": "validation"}, {**IDENTITY, "max_stories": 5}, {**IDENTITY, "name": "1f"}]
    fingerprints = {cache_fingerprint("aa", identity) for identity in (IDENTITY, *changed)}
    fingerprints.add(cache_fingerprint("ab", IDENTITY))
    assert len(fingerprints) == 5
    assert cache_fingerprint("aa", dict(reversed(IDENTITY.items()))) == cache_fingerprint("aa", IDENTITY)


def test_split_without_stories_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("\n \n")
    source = StorySource(kind="files", split="validation", files=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no story"):
        write_cache(source, tokenizer, tmp_path / "caches" / "one", identity=IDENTITY)
    assert not list((tmp_path / "caches").iterdir())


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest with the checksum that belongs to its other fields."""
    others = {name: value for name, value in manifest.items() if name != "checksum"}
    return {**others, "checksum": fingerprint_of(others)}


def damage_cache(folder: Path, damage: str) -> None:
    manifest_path, tokens_path = folder / "manifest.json", folder / "tokens.bin"
    manifest, tokens = json.loads(manifest_path.read_text()), bytearray(tokens_path.read_bytes())
    match damage:
        case "list":
            manifest = [1]
        case "version":
            manifest["format_version"] = 99
        case "field missing":
            del manifest["num_bytes"]
        case "field of another type":
            manifest["num_tokens"] = "many"
        case "other tokenizer":
            manifest = seal({**manifest, "tokenizer_sha256": "ff"})
        case "other fingerprint":
            manifest = seal({**manifest, "fingerprint": cache_fingerprint("ff", IDENTITY)})
        case "truncated":
            del tokens[-2:]
        case "flipped":
            tokens[1000] ^= 1
    tokens_path.write_bytes(tokens)
    manifest_path.write_text(json.dumps(manifest)[: -20 if damage == "corrupt manifest" else None])
    match damage.split():
        case ["no", "folder"]:
            shutil.rmtree(folder)
        case ["no", file]:
            (folder / file).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no manifest.json", r"manifest\.json cannot be read: No such file"),
        ("no tokens.bin", r"tokens\.bin cannot be read: No such file"),
        ("no story_hashes.bin", r"story_hashes\.bin cannot be read: No such file"),
        ("no folder", "cannot be read: No such file"),
        ("corrupt manifest", r"manifest\.json is not JSON"),
        ("list", "format version None, expected 2"),
        ("version", "format version 99, expected 2"),
        ("field missing", "has missing or unknown fields: num_bytes;"),
        ("field of another type", "num_tokens='many', expected int"),
        ("other tokenizer", "manifest is of another cache: tokenizer ff"),
        ("other fingerprint", "has fingerprint [0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("truncated", r"tokens\.bin has [\d,]+ bytes, expected [\d,]+"),
        ("flipped", r"tokens\.bin is damaged: checksum [0-9a-f]{32} expected, got [0-9a-f]{32}"),
    ],
)
def test_damaged_cache_is_refused_by_name(tmp_path, written, damage, words):
    folder = tmp_path / "cache"
    damage_cache(folder, damage)
    with pytest.raises(UserError, match=words) as caught:
        open_written(folder, written)
    assert str(folder) in str(caught.value)
    assert REBUILD in str(caught.value)


@pytest.mark.parametrize("damage", ["flipped", "an ID too high"])
def test_nobody_sees_many_tokens_before_they_are_verified(tmp_path, written, monkeypatch, damage):
    monkeypatch.setattr(cache_module, "_AT_ONCE_BYTES", 0)
    folder = tmp_path / "cache"
    sound = open_written(folder, written)
    assert np.array_equal(sound.tokens, np.fromfile(folder / "tokens.bin", "<u2"))
    vocab_size, words = 300, r"tokens\.bin is damaged: checksum"
    if damage == "flipped":
        damage_cache(folder, damage)
    else:
        vocab_size, words = 200, r"tokens\.bin holds ID \d+, but its tokenizer has 200 tokens"
    cache = open_written(folder, written, vocab_size=vocab_size)
    for _ in range(2):
        with pytest.raises(UserError, match=words) as caught:
            _ = cache.tokens
        assert str(folder) in str(caught.value)
        assert REBUILD in str(caught.value)


@pytest.mark.parametrize("damage", ["no tokens.bin", "truncated", "no story_hashes.bin", "corrupt manifest"])
def test_what_no_checksum_is_needed_for_is_told_on_opening(tmp_path, written, monkeypatch, damage):
    monkeypatch.setattr(cache_module, "_AT_ONCE_BYTES", 0)
    damage_cache(tmp_path / "cache", damage)
    with pytest.raises(UserError, match=REBUILD):
        open_written(tmp_path / "cache", written)


def test_opening_does_not_wait_for_the_verification(tmp_path, written, monkeypatch):
    monkeypatch.setattr(cache_module, "_AT_ONCE_BYTES", 0)
    may_go_on = threading.Event()
    open_tokens = cache_module._open_tokens

    def wait_and_open(*arguments):
        assert may_go_on.wait(60)
        return open_tokens(*arguments)

    monkeypatch.setattr(cache_module, "_open_tokens", wait_and_open)
    cache = open_written(tmp_path / "cache", written)
    assert not cache.verified_tokens.done()
    may_go_on.set()
    assert len(cache.tokens) == written.num_tokens


def test_replace_mends_a_damaged_cache(tmp_path, source, tokenizer, written):
    damage_cache(tmp_path / "cache", "flipped")
    write_cache(source, tokenizer, tmp_path / "cache", identity=IDENTITY, replace=True)
    assert open_written(tmp_path / "cache", written).manifest == written
    assert [item.name for item in tmp_path.iterdir()] == ["cache"]


def test_finished_by_somebody_else_meanwhile(tmp_path):
    folder = tmp_path / "cache"
    with new_folder(folder) as ours:
        (ours / "file").write_text("ours")
        with new_folder(folder) as theirs:
            (theirs / "file").write_text("theirs")
    assert (folder / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_folder_leaves_nothing(tmp_path, interruption):
    def build() -> None:
        with new_folder(tmp_path / "caches" / "one") as building:
            (building / "file").write_text("half")
            raise interruption

    with pytest.raises(interruption):
        build()
    assert not list((tmp_path / "caches").iterdir())


def wait_for_build(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob("*/tokens.bin")) and not list(folder.glob(".*/tokens.bin")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the builder has not begun"
        time.sleep(0.02)


def test_interrupted_build_leaves_nothing_and_killed_one_is_cleaned_up(tmp_path, source, tokenizer):
    large = write_stories(tmp_path / "large.txt", 20_000, num_sentences=20)
    caches = tmp_path / "caches"
    process = start_builder(tmp_path, tokenizer, large)
    wait_for_build(caches, process)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert not list(caches.iterdir())

    process = start_builder(tmp_path, tokenizer, large)
    wait_for_build(caches, process)
    process.kill()
    process.communicate(timeout=30)
    (left_over,) = caches.iterdir()
    assert left_over.name.startswith(".one.building-")
    with sole_builder(caches / "one", log=print):
        assert list(caches.iterdir()) == [caches / ".one.lock"]
        write_cache(source, tokenizer, caches / "one", identity=IDENTITY)
    assert [item.name for item in caches.iterdir()] == ["one"]


def test_concurrent_builders_end_in_one_valid_cache(tmp_path, source, tokenizer):
    processes = [start_builder(tmp_path, tokenizer, source) for _ in range(3)]
    for process in processes:
        assert process.wait(timeout=60) == 0, process.communicate()[1]
        process.communicate()
    assert [item.name for item in (tmp_path / "caches").iterdir()] == ["one"]
    cache = open_cache(
        tmp_path / "caches" / "one",
        fingerprint=cache_fingerprint(tokenizer.sha256, IDENTITY),
        vocab_size=300,
        rebuild_command=REBUILD,
    )
    assert cache.manifest.num_stories == 1_500


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    # Few words, of which the encoder keeps the tokens; and more stories than are under way at a time.
    rest, peaks = " The cat saw 7 red balls and an owl." * 24, []
    for num_stories in (8_000, 20_000):
        stories = tmp_path / f"{num_stories}.txt"
        stories.write_text(END_OF_STORY.join(f"Cat {n // 200} of {n % 200}.{rest}" for n in range(num_stories)))
        source = StorySource(kind="files", split="train", files=str(stories))
        shutil.rmtree(tmp_path / "caches", ignore_errors=True)
        output, errors = start_builder(tmp_path, tokenizer, source).communicate(timeout=120)
        assert output, errors
        peaks.append(int(output) / 1024)
    # Twelve thousand more stories are 11 MB of text and 6 MB of tokens; what is remembered of them takes 1 MB.
    assert peaks[1] - peaks[0] < 4, peaks


def test_full_disk_is_told_and_leaves_nothing(tmp_path, source, tokenizer):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match=r"cannot write .*one: File too large; make room") as caught:
            write_cache(source, tokenizer, tmp_path / "caches" / "one", identity=IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--config.data.cache_dir" in str(caught.value)
    assert not list((tmp_path / "caches").iterdir())


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (101, 25)])
def test_blocks_share_their_border_token(num_tokens, blocks):
    assert num_blocks(num_tokens, 4) == blocks


def deal(micro_step: int, *, seed: int = 3, batch_size: int = 4, num_tokens: int = 43) -> np.ndarray:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return batch_at(tokens, seed=seed, micro_step=micro_step, batch_size=batch_size, sequence_length=4)


def test_batch_at_is_a_pure_function_of_seed_and_micro_step():
    straight = [deal(step) for step in range(12)]
    for step in (11, 0, 5):
        assert np.array_equal(deal(step), straight[step])
    assert not np.array_equal(deal(0, seed=4), straight[0])
    assert straight[0].dtype == np.int32
    assert straight[0].shape == (4, 5)


def test_order_of_blocks_is_frozen():
    # A run resumed under another version of NumPy must go on where it was.
    assert deal(0)[:, 0].tolist() == [36, 4, 0, 32]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_every_block_exactly_once_per_epoch(batch_size):
    # 10 blocks: batches of 4 and 7 straddle epochs, one of 23 holds two whole epochs.
    rows = np.concatenate([deal(step, batch_size=batch_size) for step in range(60 // batch_size + 1)])
    assert np.array_equal(rows, rows[:, :1] + np.arange(5))
    epochs = rows[:60, 0].reshape(6, 10)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(10) * 4, (6, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_batch_at_reads_a_memory_map(tmp_path, written):
    cache = open_written(tmp_path / "cache", written)
    block = batch_at(cache.tokens, seed=0, micro_step=0, batch_size=1, sequence_length=64)[0]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(cache.tokens), 65)[::64]
    assert (windows == block).all(axis=1).sum() >= 1


def test_too_few_tokens_for_a_block_are_refused():
    with pytest.raises(UserError, match="4 tokens are less than one block of sequence_length=4"):
        deal(0, num_tokens=4)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 11, 12, 13, 24, 100])
def test_eval_batches_cover_every_token_once_in_order(num_tokens):
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)
    batches = list(eval_batches(tokens, batch_size=3, sequence_length=4))
    assert {(blocks.shape, weights.shape) for blocks, weights in batches} == {((3, 5), (3, 4))}
    blocks = np.concatenate([blocks for blocks, _ in batches])
    weights = np.concatenate([weights for _, weights in batches])
    assert (blocks.dtype, weights.dtype) == (np.int32, np.float32)
    counted = weights == 1
    assert np.array_equal(blocks[:, 1:][counted], tokens)
    # Each target stands behind the token before it in the file; the first behind an end-of-story token.
    assert np.array_equal(blocks[:, :-1][counted], np.concatenate([[0], tokens[:-1]]))
    assert (weights[~counted] == 0).all()
    assert len(batches) == -(-num_tokens // 12)
