"""Which versions are found: those that are there, the driver's among them."""

from pathlib import Path

import pytest

from tinystories_jax import versions
from tinystories_jax.versions import find_versions

DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Fri Sep  5\nGCC version: 12.2.0\n": "580.159.04",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release\nGCC version: 13.3.0\n": "575.57.08",
}


def test_what_is_not_installed_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "_DRIVER", tmp_path / "none")
    found = find_versions(["numpy", "no-such-package"])
    assert {"tinystories_jax", "python", "numpy"} <= set(found)
    assert not {"no-such-package", "nvidia-driver"} & set(found)


@pytest.mark.parametrize("text", DRIVERS)
def test_the_driver_of_a_gpu_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(versions, "_DRIVER", tmp_path / "version")
    assert find_versions([])["nvidia-driver"] == DRIVERS[text]
