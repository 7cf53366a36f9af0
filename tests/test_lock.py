"""Locks between processes: who holds one is told, the dead hold none, and nothing is left behind."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystories_jax.errors import UserError
from tinystories_jax.lock import locked, sole_trainer

ROOT = Path(__file__).resolve().parents[1]

# Holds a lock, with a child process of its own, until its standard input is closed.
HOLD = """
import subprocess, sys
from pathlib import Path
from tinystories_jax.lock import locked
with locked(Path(sys.argv[1]), when_held=print):
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    print(child.pid, flush=True)
    sys.stdin.read()
    child.kill()
"""
# Adds one to the number in a file, in a way that two at once would spoil.
COUNT = """
import sys, time
from pathlib import Path
from tinystories_jax.lock import locked
counter = Path(sys.argv[2])
for _ in range(25):
    with locked(Path(sys.argv[1]), when_held=lambda owner: None):
        number = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(number + 1))
"""


def start(program: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path):
    """Yields a process that holds tmp_path/run/train.lock, and the PID of its child."""
    process = start(HOLD, tmp_path / "run" / "train.lock")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    # First the child, which has the pipe of the other.
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def refuse(owner: str) -> None:
    raise UserError(owner)


def test_a_second_trainer_is_refused_with_pid_host_and_start_of_the_first(tmp_path, holder):
    process, _ = holder
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as caught, sole_trainer(workdir):
        raise AssertionError("two trainers in one workdir")
    owner = rf"PID {process.pid} on {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    assert re.fullmatch(
        rf"{re.escape(str(workdir))} is in use by {owner}; wait for it, or give another --workdir", str(caught.value)
    )
    # The refused one has taken nothing away.
    assert [path.name for path in workdir.iterdir()] == ["train.lock"]


def test_what_a_killed_owner_left_blocks_nobody_even_while_its_children_live(tmp_path, holder):
    process, child = holder
    process.kill()
    process.wait()
    os.kill(child, 0)
    assert (tmp_path / "run" / "train.lock").exists()
    with sole_trainer(tmp_path / "run"):
        assert f"PID {os.getpid()} " in (tmp_path / "run" / "train.lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_who_waits_is_told_for_whom_and_goes_on_when_the_owner_dies(tmp_path, holder):
    process, _ = holder
    told: list[str] = []

    def kill_owner(owner: str) -> None:
        told.append(owner)
        process.kill()

    with locked(tmp_path / "run" / "train.lock", when_held=kill_owner) as keeps_out:
        assert keeps_out
    (owner,) = told
    assert f"PID {process.pid} on " in owner


def test_never_two_at_once_though_each_removes_the_file(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNT, tmp_path / "lock", counter) for _ in range(4)]
    for process in processes:
        assert process.wait(timeout=60) == 0
        process.communicate()
    assert counter.read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_a_lock_file_that_vanishes_is_no_fault_and_one_of_somebody_else_stays(tmp_path):
    path = tmp_path / "lock"
    with locked(path, when_held=refuse):
        path.unlink()
    with locked(path, when_held=refuse):
        path.unlink()
        path.write_text("of another process")
    assert path.read_text() == "of another process"


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", when_held=refuse) as keeps_out:
        assert not keeps_out
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path} takes no locks (")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock", when_held=refuse):
        pass
    assert precious.read_text() == "precious"


def test_a_new_workdir_that_stays_empty_goes_again_and_no_other(tmp_path):
    with sole_trainer(tmp_path / "a" / "new"):
        pass
    (tmp_path / "empty").mkdir()
    with sole_trainer(tmp_path / "empty"):
        pass
    with sole_trainer(tmp_path / "full"):
        (tmp_path / "full" / "config.json").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "config.json", "empty", "full"]


def test_waiting_can_be_interrupted(tmp_path, holder):
    def wait(owner: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run" / "train.lock", when_held=wait):
            pass
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - began < 5
