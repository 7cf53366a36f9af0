"""Schedule, decay, clipping and accumulation, each against its definition."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config, Schedule
from tinystories_jax.training.optim import decay_mask, learning_rate_schedule, make_optimizer

SCHEDULE = Schedule(num_blocks=100, blocks_per_update=4, total_updates=50, warmup_updates=10, epoch_ends=(25, 50))


@pytest.fixture(name="tiny_config")
def make_config() -> Config:
    return make_tiny_config()


@pytest.fixture
def config(tiny_config) -> Config:
    optim = dataclasses.replace(tiny_config.optim, learning_rate=0.01, min_learning_rate=0.001)
    return dataclasses.replace(tiny_config, schedule=SCHEDULE, optim=optim)


def rates(config, schedule):
    curve: Any = learning_rate_schedule(config.optim, schedule)
    return [float(curve(count)) for count in range(schedule.total_updates)]


def test_the_rate_rises_to_the_peak_and_ends_at_the_minimum(config):
    values = rates(config, SCHEDULE)
    np.testing.assert_allclose(values[:10], 0.01 * np.arange(1, 11) / 10, rtol=1e-5)
    expected = [0.001 + 0.009 * (1 + math.cos(math.pi * (u - 10) / 40)) / 2 for u in range(10, 51)]
    np.testing.assert_allclose(values[9:], expected, rtol=1e-4)
    assert values[-1] == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (3, 1), (5, 0)])
def test_short_runs_have_a_finite_rate_everywhere(config, total, warmup):
    schedule = dataclasses.replace(SCHEDULE, total_updates=total, warmup_updates=warmup)
    values = rates(config, schedule)
    assert values[max(warmup - 1, 0)] <= 0.01 * (1 + 1e-6)
    assert values[-1] == pytest.approx(0.001, rel=1e-5)


def test_matrices_decay_and_norm_scales_do_not(config):
    params: Any = {"norm": {"scale": jnp.ones(3)}, "proj": {"kernel": jnp.ones((3, 3))}}
    assert decay_mask(params) == {"norm": {"scale": False}, "proj": {"kernel": True}}
    single = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=1))
    optimizer: Any = make_optimizer(single)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    # First update: rate 0.001 (warm-up), decay 0.1, weight 1.
    np.testing.assert_allclose(updates["proj"]["kernel"], -0.001 * config.optim.weight_decay, rtol=1e-4)


def test_the_clip_sees_the_averaged_gradient(config):
    """Two gradients of norm 10 that cancel almost: clipped one by one they would leave another average."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=2))
    optimizer: Any = make_optimizer(config)
    params: Any = {"w": jnp.zeros((2, 2))}
    state = optimizer.init(params)
    for scale in (10.0, -9.0):
        _, state = optimizer.update({"w": jnp.full((2, 2), scale / 2)}, state, params)
    recorded = state.inner_opt_state[0].grad_norm
    assert float(recorded) == pytest.approx(0.5)
    assert int(state.gradient_step) == 1
    # Adam's first moment after one update is (1 - beta1) x the gradient it saw: unclipped, for 0.5 < max_grad_norm.
    moment = state.inner_opt_state[2][0].mu["w"]
    np.testing.assert_allclose(moment, (1 - config.optim.beta1) * 0.25, rtol=1e-5)


def test_a_large_gradient_is_clipped_and_its_norm_recorded_before(config):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=1))
    optimizer: Any = make_optimizer(config)
    params: Any = {"w": jnp.zeros((2, 2))}
    _, state = optimizer.update({"w": jnp.full((2, 2), 50.0)}, optimizer.init(params), params)
    assert float(state.inner_opt_state[0].grad_norm) == pytest.approx(100.0)
    moment = state.inner_opt_state[2][0].mu["w"]
    clipped = config.optim.max_grad_norm / 2
    np.testing.assert_allclose(moment, (1 - config.optim.beta1) * clipped, rtol=1e-5)
