"""No room while data is prepared: said in one line, nothing half-made left, and with room the same command goes on."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.place import write_stories
from tests.faults.small_disk import SmallDisk, small_disk
from tests.test_cli import error_line

FULL = ("No space left on device", "File too large", "database or disk is full", "disk I/O error")

# Fills the list of stories until its disk is full; what little it keeps in memory makes it need the disk soon.
FILL = """
from tinystories_jax import cli
from tinystories_jax.data import stories
def main(count):
    stories._SEEN_CACHE_KIB = 64
    seen = stories.SeenStories()
    for number in range(int(count)):
        seen.add(f"story {number}")
    print(sum(map(len, seen.sorted_hashes())))
cli.run(main, positional="COUNT", at_least=1, at_most=1)
"""


@pytest.fixture
def stories(tmp_path: Path) -> list[str]:
    """Returns flags for stories of 1.2 MB."""
    train = write_stories(tmp_path / "train.txt", range(15_000))
    valid = write_stories(tmp_path / "valid.txt", range(15_000, 15_100))
    return [
        *("scripts/prepare.py", "--config=configs/quickstart.py", "--config.data.source=files"),
        *(f"--config.data.train_files={train}", f"--config.data.valid_files={valid}"),
        "--config.tokenizer.vocab_size=300",
    ]


def prepare_until_full(disk: SmallDisk, arguments: list[str], tally: Counter[str]) -> str:
    """Runs the command; returns the one error line, which says what is full and what to do."""
    result = disk.run(*arguments)
    line = error_line(result, after_log=True)
    assert any(reason in line for reason in FULL)
    assert "--config.data.cache_dir=FOLDER" in line
    tally[f"refused ({disk.kind})"] += 1
    return line


def test_no_room_for_the_tokens(tmp_path, stories, tally: Counter[str]):
    with small_disk(tmp_path / "disk", 128 * 1024) as disk:
        arguments = [*stories, f"--config.data.cache_dir={disk.folder / 'cache'}"]
        line = prepare_until_full(disk, arguments, tally)
        assert f"cannot write {disk.folder}/cache/tokens/train-" in line
        kept = disk.files()
        assert [Path(name).name for name in kept] == ["meta.json", "tokenizer.json"]
        # Again, still without room: nothing piles up.
        prepare_until_full(disk, arguments, tally)
        assert disk.files() == kept
        disk.grow()
        result = disk.run(*arguments)
        assert result.returncode == 0, result.stderr
        assert "tokenizer: reusing" in result.stderr
        assert result.stderr.count(": wrote ") == 2
        assert not any(Path(name).name.startswith(".") for name in disk.files())
        tally["gone on with room"] += 1


def test_no_room_for_the_tokenizer(tmp_path, stories, tally: Counter[str]):
    with small_disk(tmp_path / "disk", 4096) as disk:
        arguments = [*stories, f"--config.data.cache_dir={disk.folder / 'cache'}"]
        line = prepare_until_full(disk, arguments, tally)
        assert f"{disk.folder}/cache/tokenizers/" in line
        assert disk.files() == []
        disk.grow()
        result = disk.run(*arguments)
        assert result.returncode == 0, result.stderr
        tally["gone on with room"] += 1


def test_no_room_for_a_tokenizer_of_its_own(tmp_path, stories, tally: Counter[str]):
    with small_disk(tmp_path / "disk", 4096) as disk:
        arguments = ["scripts/train_tokenizer.py", "--source=files", f"--train_files={tmp_path / 'train.txt'}"]
        arguments += ["--vocab_size=1000", f"--output_dir={disk.folder}"]
        line = error_line(disk.run(*arguments))
        assert f"cannot write {disk.folder}/tokenizer.json" in line
        assert disk.files() == []
        disk.grow()
        assert disk.run(*arguments).returncode == 0
        assert disk.files() == ["tokenizer.json"]
        tally["gone on with room"] += 1


def test_no_room_for_the_list_of_stories(tmp_path, tally: Counter[str]):
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        line = error_line(disk.run("-c", FILL, "100000", SQLITE_TMPDIR=str(disk.folder)))
        assert "no room for the temporary list of stories" in line
        assert "SQLITE_TMPDIR" in line
        assert disk.files() == []
        disk.grow()
        result = disk.run("-c", FILL, "100000", SQLITE_TMPDIR=str(disk.folder))
        assert result.stdout == "100000\n", result.stderr
        tally["gone on with room"] += 1
