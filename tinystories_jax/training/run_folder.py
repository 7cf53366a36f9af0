"""The files of a run beside its checkpoints: written whole or not at all; damaged, they are set aside, not deleted."""

import json
import os
import sys
from io import FileIO
from pathlib import Path

from tinystories_jax.config import Config, contradictions, from_dict, to_dict
from tinystories_jax.data.folders import read_small_file, replace_file
from tinystories_jax.data.tokenizer import TOKENIZER_FILE, StoryTokenizer, save_tokenizer
from tinystories_jax.errors import UserError, explain_refusal

MAX_JSON_BYTES = 2**26  # of config.json, tokenizer.json and environment.json: far more than any that a run writes
_FOLDERS = ("checkpoints", "damaged", "tensorboard", "tokenizer")
_APPENDED = ("metrics.jsonl", "samples.jsonl")
_REPLACED = ("config.json", "environment.json")  # whole, and so a link, too


def warn(line: str) -> None:
    """Says on stderr what is wrong with the run and how training goes on all the same."""
    print("warning:", " ".join(line.split()), file=sys.stderr, flush=True)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Returns what a user is told when a file of a run cannot be written, for instance on a full disk."""
    reason, way_out = explain_refusal(error)
    return UserError(
        f"{path}: cannot be written ({reason}); the checkpoints, if any, are intact: {way_out} and run "
        "the same command again"
    )


def require_own_files(workdir: Path) -> None:
    """Raises `UserError` where what a run writes would land elsewhere, through a link in its folder, or where something
    else stands in its place."""
    problems = []
    for name in (*_FOLDERS, *_APPENDED, *_REPLACED):
        path, is_right = workdir / name, os.path.isdir if name in _FOLDERS else os.path.isfile
        if path.is_symlink() and name not in _REPLACED:
            problems.append(
                f"{path}: is a link, and a run writes into its own folder alone; put a folder or file in its place, or "
                "give the place where all of the run is to lie as --workdir"
            )
        elif path.exists() and not path.is_symlink() and not is_right(path):
            kind = "folder" if name in _FOLDERS else "regular file"
            problems.append(f"{path}: is no {kind}, as a run has there; move it away, or give another --workdir")
    if problems:
        raise UserError(problems)


def open_unbuffered(path: Path, *, keep_bytes: int) -> FileIO:
    """Opens `path` to append to its first bytes; what could not be written is not tried again on closing."""
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
        file.truncate(keep_bytes)
        file.seek(0, os.SEEK_END)
    except OSError as error:
        raise cannot_write(path, error) from error
    return file


def append(file: FileIO, data: bytes, path: Path) -> None:
    """Writes all of `data`; raises `UserError` when there is no room for it."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise cannot_write(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `path` at once or not at all; raises `UserError` when there is no room or no right to."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def set_aside(path: Path, workdir: Path | None = None) -> Path:
    """Moves a damaged file or folder of a run into WORKDIR/damaged, under a name that is free, and returns where to."""
    folder = (workdir or path.parent) / "damaged"
    try:
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while os.path.lexists(target):
            number += 1
            target = folder / f"{path.name}.{number}"
        path.rename(target)
    except OSError as error:
        raise UserError(
            f"{path}: is damaged and cannot be moved into {folder} ({error.strerror}); move it away"
        ) from error
    return target


def write_run(workdir: Path, config: Config, tokenizer: StoryTokenizer) -> None:
    """Writes WORKDIR/config.json and WORKDIR/tokenizer, so that the run is whole without what it was started from."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(workdir, error) from error
    save_tokenizer(tokenizer, workdir / "tokenizer")
    write_atomically(workdir / "config.json", json.dumps(to_dict(config), indent=2).encode() + b"\n")


def warn_of_damage(workdir: Path, config: Config, tokenizer: StoryTokenizer) -> None:
    """Warns where config.json or the tokenizer of the run is not that of its checkpoint, which `config` is from.

    A config.json that differs in fields which a restart may change is sound: it may be from a start that saved nothing.
    """
    written_again = "written again from the checkpoint"
    path = workdir / "config.json"
    try:
        differing = contradictions(from_dict(json.loads(read_small_file(path, MAX_JSON_BYTES))), config)
        if differing:
            warn(f"{path} is not the config of this run's checkpoints ({'; '.join(differing)}); {written_again}")
    except FileNotFoundError:
        warn(f"{path} is missing; {written_again}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        warn(f"{path} cannot be read as a run's config ({type(error).__name__}: {reason}); {written_again}")
    path = workdir / "tokenizer" / TOKENIZER_FILE
    try:
        if read_small_file(path, MAX_JSON_BYTES) != tokenizer.json.encode():
            warn(f"{path} is not the tokenizer of this run's checkpoints; {written_again}")
    except FileNotFoundError:
        warn(f"{path} is missing; {written_again}")
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read ({error}); {written_again}")
