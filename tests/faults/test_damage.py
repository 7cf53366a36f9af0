"""Damaged data: every file of a cache, a byte flipped, cut in half, emptied, deleted. Noticed by name, or harmless."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.faults.place import make_config, prepare, write_stories
from tinystories_jax.config import Config
from tinystories_jax.data.prepare import PreparedData
from tinystories_jax.data.sources import train_source
from tinystories_jax.data.stories import source_identity
from tinystories_jax.errors import UserError

FILES = {
    "tokens.bin": "cache/tokens/train-*/tokens.bin",
    "story_hashes.bin": "cache/tokens/validation-*/story_hashes.bin",
    "manifest.json": "cache/tokens/validation-*/manifest.json",
    "tokenizer.json": "cache/tokenizers/*/tokenizer.json",
    "meta.json": "cache/tokenizers/*/meta.json",
    "source_hashes.json": "cache/source_hashes.json",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    # Files this young are otherwise not remembered.
    monkeypatch.setattr("tinystories_jax.data.files._SETTLED_SECONDS", 0.0)
    write_stories(tmp_path / "train.txt", range(60))
    write_stories(tmp_path / "valid.txt", range(60, 75))
    return make_config(tmp_path)


def is_same(one: PreparedData, other: PreparedData) -> bool:
    manifests = [(data.train.manifest, data.valid.manifest) for data in (one, other)]
    return (
        manifests[0] == manifests[1]
        and one.tokenizer == other.tokenizer
        and one.report == other.report
        and np.array_equal(one.train.tokens, other.train.tokens)
        and np.array_equal(one.valid.tokens, other.valid.tokens)
    )


def check_refusal(text: str, name: str) -> None:
    assert name in text
    assert "rebuild it with: python scripts/prepare.py " in text
    assert "--rebuild" in text
    assert "\n" not in text


def outcome_of(config: Config, sound: PreparedData, name: str) -> str:
    try:
        data = prepare(config)
    except UserError as error:
        check_refusal(str(error), name)
        return "noticed"
    assert is_same(data, sound), "damaged data was taken for sound"
    return "harmless"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_or_harmless(tmp_path, config, name, full, tally: Counter[str]):
    sound = prepare(config)
    (path,) = tmp_path.glob(FILES[name])
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(2_000 if full else 60):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        outcome = outcome_of(config, sound, name)
        tally[outcome] += 1
        # Every byte of these decides on something.
        assert outcome == "noticed" or name in ("manifest.json", "meta.json", "source_hashes.json")
    path.write_bytes(content)
    assert is_same(prepare(config), sound)


@pytest.mark.parametrize("damage", ["cut in half", "emptied", "deleted", "made a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_whole_is_noticed_and_can_be_rebuilt(tmp_path, config, name, damage, tally: Counter[str]):
    sound = prepare(config)
    (path,) = tmp_path.glob(FILES[name])
    content = path.read_bytes()
    path.unlink()
    if damage == "made a folder":
        path.mkdir()
    elif damage != "deleted":
        path.write_bytes(content[: len(content) // 2] if damage == "cut in half" else b"")
    outcome = outcome_of(config, sound, name)
    tally[outcome] += 1
    assert outcome == ("harmless" if name == "source_hashes.json" else "noticed")
    assert is_same(prepare(config, rebuild=True), sound)
    assert is_same(prepare(config), sound)


def test_no_damage_to_the_memory_of_hashes_gives_stories_another_identity(tmp_path, config, full, tally: Counter[str]):
    prepare(config)
    memo = tmp_path / "cache" / "source_hashes.json"
    content = memo.read_bytes()
    identity = source_identity(train_source(config.data), None)
    rng = random.Random(1)
    positions = range(len(content)) if full else rng.sample(range(len(content)), 200)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        memo.write_bytes(damaged)
        assert source_identity(train_source(config.data), memo, remember=False) == identity
        tally["harmless"] += 1
