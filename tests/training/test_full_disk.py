"""A disk that fills up under a run: one error, the last good checkpoint, and the same end once there is room."""

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import ROOT, error_line, script_environment
from tests.training.small_run import (
    are_equal,
    checkpoints_of,
    make_small_config,
    metrics_of,
    shared_programs,
    state_of,
    train_on,
)
from tinystories_jax.config import Config
from tinystories_jax.data.prepare import prepare_data
from tinystories_jax.errors import UserError
from tinystories_jax.training import loop
from tinystories_jax.training.checkpoint import Checkpoints
from tinystories_jax.training.restore import has_checkpoint, restore_params

DISK_BYTES = 8 * 2**20


class SmallDisk:
    """A file system of 8 MB, or, where none may be mounted, a limit on the size of files that does the same."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        self.is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def leave(self, free_bytes: int) -> None:
        """Takes all room but `free_bytes`."""
        if not self.is_mounted:
            self.limit_files(min(free_bytes, 2**14))  # below the arrays of a checkpoint and above the logs
            return
        state = os.statvfs(self.folder)
        # Without room for all of it, since a checkpoint is being saved meanwhile, it is as full as can be.
        with contextlib.suppress(OSError), (self.folder / "ballast").open("wb", buffering=0) as ballast:
            ballast.write(bytes(state.f_bavail * state.f_frsize - free_bytes))

    def limit_files(self, num_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, self._limits[1]))

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        self.make_room()
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("full")
    # So many updates that the logs go over several pages of a file system.
    fields: dict[str, Any] = {"train__max_updates": 60, "checkpoint__every": 10, "eval__every": 10}
    with shared_programs(folder / "compiled"):
        yield make_small_config(folder, logging__tensorboard=True, sample__prompts=("A",) * 10, **fields)


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run with room, which also compiles what the others need."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train_on(config, workdir)
    return workdir


def before(patch: pytest.MonkeyPatch, where: Any, name: str, act: Callable[..., None], *, time: int) -> None:
    """Calls `act` before the `time`-th call of a function, with its arguments."""
    function, calls = getattr(where, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == time:
            act(*arguments)
        return function(*arguments, **named)

    patch.setattr(where, name, wrapped)


def assert_goes_on_to_the_same_end(config: Config, workdir: Path, undisturbed: Path) -> None:
    train_on(config, workdir)
    assert are_equal(state_of(config, workdir), state_of(config, undisturbed))
    assert metrics_of(workdir) == metrics_of(undisturbed)
    assert (workdir / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    assert checkpoints_of(workdir) == checkpoints_of(undisturbed)
    assert not list(workdir.rglob("*tmp*"))


def test_a_disk_full_during_a_save(config, disk, undisturbed, monkeypatch, capfd):
    workdir = disk.folder / "run"

    def fill(checkpoints: Checkpoints, *_: Any) -> None:
        checkpoints.wait()
        # Enough by the count before a save, and not for what a checkpoint takes besides its arrays.
        disk.leave(2**17)

    with monkeypatch.context() as patch:
        before(patch, Checkpoints, "save", fill, time=3)
        with pytest.raises(UserError, match=r"checkpoints: a checkpoint cannot.*make room and run") as caught:
            train_on(config, workdir)
    assert len(caught.value.problems) == 1
    assert restore_params(workdir, "latest")[1].update == 13  # the end of an epoch, the save before
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "Exception" not in err
    assert "update 20/60" in err
    assert "update 26/60" not in err  # the next save is that of update 25
    disk.make_room()
    assert_goes_on_to_the_same_end(config, workdir, undisturbed)


def test_a_disk_full_while_samples_are_written(config, disk, undisturbed, monkeypatch, capfd):
    workdir = disk.folder / "run"
    with monkeypatch.context() as patch:
        before(patch, loop, "write_stories", lambda *_: disk.leave(0), time=2)
        with pytest.raises(UserError, match=r"samples.jsonl: cannot be written \((No space|File too).*make room"):
            train_on(config, workdir)
    assert "Traceback" not in capfd.readouterr().err
    assert restore_params(workdir, "latest")[1].update in (10, 13)  # that of 13 may have been under way
    disk.make_room()
    assert_goes_on_to_the_same_end(config, workdir, undisturbed)


@pytest.mark.usefixtures("undisturbed")
def test_a_disk_full_while_metrics_are_written(config, disk, monkeypatch, capfd):
    workdir = disk.folder / "run"

    def fill(meter: Any, logs: Any, checkpoints: Checkpoints) -> None:
        checkpoints.wait()
        # To the byte, where a full file system would still have the rest of a page.
        disk.limit_files((workdir / "metrics.jsonl").stat().st_size + 10)

    with monkeypatch.context() as patch:
        before(patch, loop, "_look", fill, time=15)
        with pytest.raises(UserError, match=r"(metrics.jsonl|tfevents.\d+): cannot be written \(File too.*make room"):
            train_on(config, workdir)
    assert "Traceback" not in capfd.readouterr().err
    disk.make_room()
    assert restore_params(workdir, "latest")[1].update in (10, 13)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Lets nothing be written into `folder`, as when the system has remounted its file system."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        undo = ["umount", "--lazy", str(folder)]
    elif os.geteuid():
        folder.chmod(0o555)
        undo = ["chmod", "755", str(folder)]
    else:
        pytest.skip("root, to whom every folder is open, may mount nothing here")
    try:
        yield
    finally:
        subprocess.run(undo, check=True)


def test_a_folder_that_turns_read_only_under_a_run(config, tmp_path, undisturbed, monkeypatch, capfd):
    workdir, closed = tmp_path / "run", contextlib.ExitStack()

    def close(checkpoints: Checkpoints, *_: Any) -> None:
        checkpoints.wait()
        closed.enter_context(read_only(checkpoints.folder))

    with closed:
        with monkeypatch.context() as patch:
            before(patch, Checkpoints, "save", close, time=3)
            with pytest.raises(UserError, match=r"(Read-only|denied).*let it be written to and run the same command"):
                train_on(config, workdir)
        # orbax's threads would wait for minutes for folders that cannot be made, and the end of the process for them.
        assert not [thread.name for thread in threading.enumerate() if thread.name in ("json_ch_save", "save_finalize")]
        assert restore_params(workdir, "latest")[1].update == 13
        # Nor does another start, while it is so.
        with pytest.raises(UserError, match=rf"{workdir}.*(Read-only|denied).*let it be written to"):
            train_on(config, workdir)
    assert "Traceback" not in capfd.readouterr().err
    assert_goes_on_to_the_same_end(config, workdir, undisturbed)


def test_a_run_whose_folder_is_taken_away_says_so(config, tmp_path, undisturbed, monkeypatch, capfd):
    workdir = tmp_path / "run"

    def take_away(checkpoints: Checkpoints, *_: Any) -> None:
        checkpoints.wait()
        workdir.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        before(patch, Checkpoints, "save", take_away, time=3)
        with pytest.raises(UserError, match=rf"{workdir}/checkpoints: .*No such file.*put the folder back and run"):
            train_on(config, workdir)
    assert "Traceback" not in capfd.readouterr().err
    assert_goes_on_to_the_same_end(config, tmp_path / "elsewhere", undisturbed)


@pytest.mark.usefixtures("undisturbed")
def test_a_disk_full_from_the_start(config, disk):
    data = prepare_data(config)
    disk.leave(2**12)
    with pytest.raises(UserError, match=r"(No space|File too).*(free|make room)"):
        loop.train(config, data, disk.folder / "run")


@pytest.mark.slow
def test_the_command_ends_with_one_error_and_no_traceback(config, tmp_path):
    """A limit on the size of files stands for the full disk: the logs stay below it, and a checkpoint does not."""
    flags = [f"--config.data.{key}={getattr(config.data, key)}" for key in ("train_files", "valid_files", "cache_dir")]
    flags += ["--nodoctor", "--config.data.source=files", f"--workdir={tmp_path}/run"]
    flags += ["--config.data.sequence_length=64", "--config.tokenizer.vocab_size=270", "--config.train.batch_size=4"]
    flags += ["--config.checkpoint.every=2", "--config.logging.every=1"]
    limited = ["bash", "-c", 'ulimit -f 128 && exec "$@"', "bash"]  # KB
    result = subprocess.run(
        [*limited, sys.executable, "scripts/train.py", "--config=configs/quickstart.py", *flags],
        cwd=ROOT,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    line = error_line(result, after_log=True)
    assert f"{tmp_path}/run/checkpoints: a checkpoint cannot be written" in line
    assert "Exception" not in result.stderr
    assert not has_checkpoint(tmp_path / "run")


def test_orbax_leaves_no_word_of_arrays_it_has_not_begun_to_write():
    """Whether it begins with them is a matter of moments."""
    program = [
        "from tinystories_jax.training.orbax_noise import hush_orbax",
        "hush_orbax()",
        "async def write_fragment(): pass",
        "write_fragment()",
        "kept_until_the_end = write_fragment()",
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=ROOT, env=script_environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
