"""The micro-batch that fits, by XLA's own analysis and a planted limit of the device; the limits of control groups."""

import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config
from tinystories_jax.training import memory


def make_config(batch_size: int, grad_accum_steps: int) -> Config:
    config = make_tiny_config()
    train = dataclasses.replace(config.train, batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    return dataclasses.replace(config, train=train)


def test_the_largest_of_the_halved_micro_batches_that_fits_is_named(monkeypatch):
    config = make_config(8, 2)
    # The same micro-batch is compiled once, whoever asks.
    monkeypatch.setattr(memory, "step_memory", functools.cache(memory.step_memory))
    limit = memory.step_memory(config, 2).total_bytes
    assert memory.step_memory(config, 4).total_bytes > limit
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: limit)
    assert memory.fitting_micro_batch(config) == (2, 8)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 1)
    assert memory.fitting_micro_batch(config) is None
    assert memory.advise_what_fits(config).endswith("sequence_length, or --config.model.remat=True")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
    assert memory.advise_what_fits(config).endswith("or a shorter --config.data.sequence_length")


@pytest.mark.parametrize(
    ("batch_size", "micro_steps", "expected"),
    [
        (8, 1, [(4, 2), (2, 4), (1, 8)]),
        (12, 1, [(6, 2), (3, 4), (1, 12)]),
        (7, 3, [(3, 7), (1, 21)]),
        (1, 4, []),
        (65_539, 2, []),
    ],
)
def test_smaller_micro_batches_make_the_same_update(batch_size, micro_steps, expected):
    assert list(memory.smaller_micro_batches(make_config(batch_size, micro_steps))) == expected


def plant_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


VERSION_2, VERSION_1 = "0::/user/job\n", "9:name=systemd:/\n4:cpu,memory:/user/job\n0::/\n"
TREE_2, TREE_1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU says how much memory it has")
@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        (VERSION_2, {f"{TREE_2}/user/job/memory.max": "3000\n", f"{TREE_2}/user/memory.max": "5000\n"}, 3000),
        (VERSION_2, {f"{TREE_2}/user/job/memory.max": "max\n", f"{TREE_2}/user/memory.max": "5000\n"}, 5000),
        (VERSION_2, {f"{TREE_2}/memory.max": "4000\n"}, 4000),
        (VERSION_1, {f"{TREE_1}/user/job/memory.limit_in_bytes": "2000\n", f"{TREE_2}/memory.max": "max"}, 2000),
        (VERSION_1, {f"{TREE_1}/memory.limit_in_bytes": "6000\n"}, 6000),
        (VERSION_1, {f"{TREE_1}/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        (VERSION_1, {f"{TREE_1}/memory.limit_in_bytes": "-1\n"}, None),
        (VERSION_2, {f"{TREE_2}/user/job/memory.max": "max\n"}, None),
        (VERSION_2, {f"{TREE_2}/other/memory.max": "1000\n"}, None),
        (f"\nno group\n{VERSION_2}", {f"{TREE_2}/user/job/memory.max": "3000\n"}, 3000),
        ("0::/a\u2028b\n", {f"{TREE_2}/a\u2028b/memory.max": "3000\n"}, 3000),
    ],
)
def test_the_memory_is_the_smallest_limit_of_the_control_groups(monkeypatch, tmp_path, groups, limits, expected):
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    whole = memory.device_memory_bytes()
    plant_files(tmp_path, {"proc/self/cgroup": groups, **limits})
    assert memory.device_memory_bytes() == (expected or whole)
