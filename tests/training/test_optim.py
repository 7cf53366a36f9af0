"""Schedule, decay, clipping and accumulation, each against its definition."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config, Schedule
from tinystories_jax.model.transformer import init_params
from tinystories_jax.training.optim import (
    MUON_UPDATE_RMS,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    optimizer_of,
)

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


@pytest.mark.parametrize("muon_learning_rate", [0.0, 0.02])
def test_single_micro_steps_are_updates_of_multi_steps(config, muon_learning_rate):
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, muon_learning_rate=muon_learning_rate),
        train=dataclasses.replace(config.train, grad_accum_steps=1),
    )
    optimizer = make_optimizer(config)
    reference = optax.MultiSteps(optimizer.inner_opt, every_k_schedule=1)
    params: Any = init_params(config.model, jax.random.key(0))
    state: Any = optimizer.init(params)
    expected_state = reference.init(params)
    update, expected_update = jax.jit(optimizer.update), jax.jit(reference.update)
    for key in jax.random.split(jax.random.key(1), 3):
        grads = init_params(config.model, key)
        updates, state = update(grads, state, params)
        expected, expected_state = expected_update(grads, expected_state, params)
        # All but the place for sums of gradients, which there is none of.
        assert state.acc_grads == ()
        without_sums = expected_state._replace(acc_grads=())
        assert jax.tree.structure(state) == jax.tree.structure(without_sums)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), updates, expected)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state, without_sums)
        params = optax.apply_updates(params, updates)
    assert int(state.gradient_step) == 3
    assert type(optimizer) is not optax.MultiSteps  # else this compares it with itself


def test_a_large_gradient_is_clipped_and_its_norm_recorded_before(config):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=1))
    optimizer: Any = make_optimizer(config)
    params: Any = {"w": jnp.zeros((2, 2))}
    _, state = optimizer.update({"w": jnp.full((2, 2), 50.0)}, optimizer.init(params), params)
    assert float(state.inner_opt_state[0].grad_norm) == pytest.approx(100.0)
    moment = state.inner_opt_state[2][0].mu["w"]
    clipped = config.optim.max_grad_norm / 2
    np.testing.assert_allclose(moment, (1 - config.optim.beta1) * clipped, rtol=1e-5)


def single_with(config: Config, **optim: float) -> Config:
    """Returns `config` with fields of section optim replaced and an update for each micro-step."""
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, **optim),
        train=dataclasses.replace(config.train, grad_accum_steps=1),
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(config, tie_embeddings):
    model = dataclasses.replace(config.model, tie_embeddings=tie_embeddings)
    params = init_params(model, jax.random.key(0))
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="."): name
        for path, name in jax.tree_util.tree_leaves_with_path(optimizer_of(params))
    }
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    muon = {f"layers.{layer}.{matrix}.kernel" for layer in range(2) for matrix in matrices}
    norms = {f"layers.{layer}.{name}_layernorm.scale" for layer in range(2) for name in ("input", "post_attention")}
    adamw = {"embed_tokens.embedding", "norm.scale", *norms} | ({"lm_head.kernel"} if not tie_embeddings else set())
    assert chosen == dict.fromkeys(muon, "muon") | dict.fromkeys(adamw, "adamw")


def test_an_update_of_muon_stretches_all_directions_about_alike_at_its_own_rate(config):
    config = single_with(config, muon_learning_rate=0.03, weight_decay=0.0)
    params: Any = {"layers": {0: {"kernel": jnp.zeros((32, 48))}}}
    grads: Any = {"layers": {0: {"kernel": jax.random.normal(jax.random.key(0), (32, 48))}}}
    optimizer: Any = make_optimizer(config)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kernel = updates["layers"][0]["kernel"]
    assert np.sum(kernel * grads["layers"][0]["kernel"]) < 0
    # First update: a tenth of the peak.
    singular_values = np.linalg.svd(kernel, compute_uv=False) / (0.003 * MUON_UPDATE_RMS * 48**0.5)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3
    rms = np.sqrt(np.mean(np.square(kernel)))
    assert rms == pytest.approx(0.003 * MUON_UPDATE_RMS, rel=0.2)


def test_muon_moves_stacked_matrices_as_it_moves_each(config):
    config = single_with(config, muon_learning_rate=0.03, weight_decay=0.1, max_grad_norm=1e9)
    shapes = {0: {"q": (8, 8), "up": (8, 24), "down": (24, 8)}, 1: {"q": (8, 8), "up": (8, 24), "k": (8, 4)}}
    numbers = iter(range(100))

    def draw() -> Any:
        return {
            "layers": {
                layer: {name: jax.random.normal(jax.random.key(next(numbers)), shape) for name, shape in of.items()}
                for layer, of in shapes.items()
            }
        }

    schedule = learning_rate_schedule(config.optim, SCHEDULE)
    each: Any = optax.contrib.muon(
        lambda count: 3 * schedule(count),
        beta=config.optim.muon_momentum,
        weight_decay=0.1,
        consistent_rms=MUON_UPDATE_RMS,
    )
    params, optimizer = draw(), make_optimizer(config)
    state, each_state = optimizer.init(params), each.init(params)
    update, update_each = jax.jit(optimizer.update), jax.jit(each.update)
    for _ in range(3):
        grads = draw()
        updates, state = update(grads, state, params)
        expected, each_state = update_each(grads, each_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), updates, expected)


def test_both_rates_reach_peak_and_minimum_together(config):
    """Weight decay alone moves parameters that have no gradient, by rate x decay."""
    config = single_with(config, muon_learning_rate=0.05, weight_decay=0.5)
    ones = jnp.ones((2, 2))
    params: Any = {"embed_tokens": {"embedding": ones}, "layers": {0: {"kernel": ones}}, "norm": {"scale": ones[0]}}
    optimizer: Any = make_optimizer(config)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = []
    for _ in range(SCHEDULE.total_updates):
        updates, state = update(zeros, state, params)
        moved.append((updates["embed_tokens"]["embedding"][0, 0], updates["layers"][0]["kernel"][0, 0]))
        np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    rates_of = -np.array(moved) / 0.5
    np.testing.assert_allclose(rates_of[:, 0], rates(config, SCHEDULE), rtol=1e-5)
    np.testing.assert_allclose(rates_of[:, 1], 5 * rates_of[:, 0], rtol=1e-5)
    np.testing.assert_allclose(rates_of[[9, -1]], [[0.01, 0.05], [0.001, 0.005]], rtol=1e-5)


def test_without_muon_the_optimizer_is_clip_and_adamw_alone(config):
    """Its state has the very structure that checkpoints of AdamW's runs hold."""
    config = single_with(config, muon_learning_rate=0.0, muon_momentum=0.5)
    optim = config.optim
    schedule = learning_rate_schedule(optim, SCHEDULE)
    adamw = optax.adamw(schedule, b1=optim.beta1, b2=optim.beta2, weight_decay=optim.weight_decay, mask=decay_mask)
    plain: Any = optax.chain(optax.clip_by_global_norm(optim.max_grad_norm), adamw)
    params: Any = {"layers": {0: {"kernel": jnp.ones((2, 2))}}, "norm": {"scale": jnp.ones(2)}}
    grads = jax.tree.map(lambda leaf: 3 * leaf, params)
    optimizer: Any = make_optimizer(config)
    state, plain_state = optimizer.init(params), plain.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        plain_updates, plain_state = plain.update(grads, plain_state, params)
        assert jax.tree.structure(state.inner_opt_state[1:]) == jax.tree.structure(plain_state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, plain_updates)
