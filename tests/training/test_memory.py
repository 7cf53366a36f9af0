"""The micro-batch that fits, by XLA's own analysis and a planted limit of the device."""

import dataclasses

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
    limit = memory.step_memory(config, 2).total_bytes
    assert memory.step_memory(config, 4).total_bytes > limit
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: limit)
    assert memory.fitting_micro_batch(config) == (2, 8)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 1)
    assert memory.fitting_micro_batch(config) is None


@pytest.mark.parametrize(
    ("batch_size", "micro_steps", "expected"),
    [(8, 1, [(4, 2), (2, 4), (1, 8)]), (12, 1, [(6, 2), (3, 4), (1, 12)]), (7, 3, [(3, 7), (1, 21)]), (1, 4, [])],
)
def test_smaller_micro_batches_make_the_same_update(batch_size, micro_steps, expected):
    assert list(memory.smaller_micro_batches(make_config(batch_size, micro_steps))) == expected
