"""Compiled programs are kept for the next start, and nothing that is wrong with them stops or changes a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import ROOT, script_environment
from tinystories_jax import compiled

# A script that compiles two programs and says how many were found.
PROGRAM = """
from tinystories_jax import cli

def main():
    import jax
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
    doubled = jax.jit(lambda x: x + x)(jax.numpy.float32(21))
    print(int(jax.jit(lambda x: x * 1.0 + 0)(doubled)), sum(hits) > 1)

cli.run(main, compiles=True)
"""


class Place:
    """A user's cache folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *flags: str, **variables: str) -> tuple[str, list[str]]:
        """Returns what the script printed, and its lines on stderr."""
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, *flags],
            cwd=ROOT,
            env=script_environment(XDG_CACHE_HOME=str(self.folder), **variables),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip(), result.stderr.splitlines()

    def entries(self) -> list[Path]:
        return sorted(self.folder.glob("tinystories_jax/compiled/*/*-cache"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "caches")


def test_the_second_start_finds_what_the_first_compiled(place):
    assert place.run() == ("42 False", [])
    assert len(place.entries()) >= 2
    assert place.run() == ("42 True", [])
    assert place.run("--nocompile_cache") == ("42 False", [])


def test_a_damaged_program_is_told_in_one_line_and_compiled_anew(place):
    place.run()
    for entry in place.entries():
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 1
        entry.write_bytes(content)
    printed, lines = place.run()
    assert printed == "42 False"
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: a compiled program in {place.entries()[0].parent} is damaged (")
    place.run()
    assert place.run() == ("42 True", [])


def test_a_folder_that_cannot_be_written_is_told_in_one_line(place):
    place.folder.write_text("a file")
    printed, lines = place.run()
    assert printed == "42 False"
    assert len(lines) == 1
    assert lines[0].startswith("warning: compiled programs are not kept (")
    assert "--nocompile_cache" in lines[0]


def test_programs_of_others_are_not_run(place):
    place.run()
    place.entries()[0].parent.chmod(0o777)
    printed, lines = place.run()
    assert printed == "42 False"
    assert len(lines) == 1
    assert "can be written by others" in lines[0]


def test_an_entry_that_is_no_file_is_told_in_one_line(place):
    place.run()
    folder = place.entries()[0].parent
    for entry in place.entries():
        entry.unlink()
        entry.mkdir()
        (entry / "file").touch()
    _, lines = place.run()
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert str(folder) in lines[0]


def test_what_cannot_be_kept_is_told_once_and_other_warnings_as_ever(tmp_path, capsys):
    others: list[tuple[object, ...]] = []
    show = compiled._tell_once(tmp_path, lambda *arguments: others.append(arguments))
    (tmp_path / "kept").touch()
    for name in ("jit_f", "jit_g"):
        show(
            UserWarning(f"Error writing persistent compilation cache entry for '{name}': OSError: no\nspace"),
            UserWarning,
        )
    show(UserWarning("another"), UserWarning, "file.py", 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"cannot be kept in {tmp_path} (OSError: no space)" in lines[0]
    assert len(others) == 1
    assert (tmp_path / "kept").exists()


def test_a_folder_of_the_user_is_taken(place, tmp_path):
    place.run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert list((tmp_path / "own").iterdir())
    assert not place.folder.exists()


def test_without_a_cache_folder_it_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert compiled.programs_folder().parent == tmp_path / ".cache" / "tinystories_jax" / "compiled"


def test_another_processor_has_a_folder_of_its_own(monkeypatch):
    here = compiled.programs_folder()
    described = compiled.describe_processor()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "describe_processor", lambda: described | {"flags": "fewer"})
        fewer = compiled.programs_folder()
    monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    assert compiled.programs_folder().parent == here.parent == fewer.parent
    assert len({compiled.programs_folder(), here, fewer}) == 3


def test_what_was_not_used_for_longest_goes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_MAX_BYTES", 250)
    for age, name in enumerate(("new/a", "old/b", "new/c", "old/d")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    compiled._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["a", "b"]
