"""What all tests share. JAX is never imported here: the tests of data/ show that data/ does without it."""

import os
import signal
from pathlib import Path

import pytest

# Read by JAX when it is imported: an array that silently gains an axis is a fault.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

if os.environ.get("JAX_PLATFORMS") != "cpu":
    # On a GPU: float32 as the tests mean it, not TF32; sums always in one order; memory for the processes they start.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Where the tests run in the background of a shell script SIGINT is ignored, and would be by every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def caches_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what scripts leave in a user's cache folder, such as compiled programs, out of the real one."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def tinystories_data() -> Path:
    """Returns the folder with train.txt and valid.txt, real stories; fails where there is none, rather than skip."""
    named = os.environ.get("TINYSTORIES_DATA")
    if not named:
        pytest.fail("TINYSTORIES_DATA is not set; it must name a folder with train.txt and valid.txt of TinyStories")
    folder = Path(named)
    missing = [name for name in ("train.txt", "valid.txt") if not (folder / name).is_file()]
    if missing:
        pytest.fail(f"TINYSTORIES_DATA={named} has no {' and no '.join(missing)}")
    return folder
