"""What results depend on besides code and config: the versions that are there, ours, Python's, the packages', the GPU's
driver; and variables of the environment."""

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tinystories_jax

_CUDA = tuple(
    f"{package}{major}{rest}"
    for major in (12, 13)
    for package, rest in (("jax-cuda", "-plugin"), ("jax-cuda", "-pjrt"), ("nvidia-cudnn-cu", ""))
)
_DRIVER = Path("/proc/driver/nvidia/version")


def find_versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of `packages`, and of what JAX needs for a GPU, by name; none of what is not installed."""
    found = {"tinystories_jax": tinystories_jax.__version__, "python": platform.python_version()}
    for package in (*packages, *_CUDA):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if driver := _driver_version():
        found["nvidia-driver"] = driver
    return found


def find_settings(prefixes: tuple[str, ...]) -> dict[str, str]:
    """Returns the environment's variables whose names begin with one of `prefixes`, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def _driver_version() -> str | None:
    try:
        found = re.search(r"Module.*?(\d+(?:\.\d+)+)", _DRIVER.read_text())
    except OSError:
        return None
    return found and found.group(1)
