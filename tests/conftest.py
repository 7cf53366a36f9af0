"""What all tests share. JAX is never imported here: the tests of data/ show that data/ does without it."""

import os
from pathlib import Path

import pytest

# Read by JAX when it is imported: an array that silently gains an axis is a fault.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


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
