"""A disk that is soon full: a small file system where mounting is allowed, else a limit on the size of files."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.faults.place import ROOT
from tests.test_cli import script_environment


class SmallDisk:
    """A folder for `num_bytes`; `grow` makes room. `kind` says what limits it."""

    def __init__(self, folder: Path, num_bytes: int):
        folder.mkdir()
        self.folder = folder
        self._limit: int | None = None
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True
        )
        self.kind = "tmpfs"
        if mounted.returncode:
            # Of one file, for want of a limit on all: so it is less.
            self.kind, self._limit = "RLIMIT_FSIZE", num_bytes // 2

    def grow(self) -> None:
        if self.kind == "tmpfs":
            subprocess.run(["mount", "-o", "remount,size=256m", str(self.folder)], check=True)
        self._limit = None

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with these arguments in the root of the checkout, under the limit if that is the only one."""

        # By a shell and not between fork and exec: where JAX has been imported, it warns of every fork.
        limited = [] if self._limit is None else ["sh", "-c", f'ulimit -f {self._limit // 512} && exec "$@"', "sh"]
        return subprocess.run(
            [*limited, sys.executable, *arguments],
            cwd=ROOT,
            env=script_environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def files(self) -> list[str]:
        """Returns what lies there but empty folders and the memory of hashes, kept once the stories are not new."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "source_hashes.json"]
        return sorted(str(path.relative_to(self.folder)) for path in files)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    disk = SmallDisk(folder, num_bytes)
    try:
        yield disk
    finally:
        if disk.kind == "tmpfs":
            subprocess.run(["umount", str(folder)], check=True)
