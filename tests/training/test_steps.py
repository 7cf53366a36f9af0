"""train_step: shift, accumulation, article weight, dropout, determinism, overfitting, compilations."""

import dataclasses
import functools
import math
import platform
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lowered import text_as_called
from tests.tiny import make_tiny_config
from tinystories_jax.config import Config
from tinystories_jax.model import transformer
from tinystories_jax.model.transformer import forward
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.steps import (
    TrainState,
    fresh_params,
    init_state,
    make_train_step,
    step_compiler_options,
)

NO_ARTICLES_V = jnp.zeros(61, bool)


@pytest.fixture(name="tiny_config")
def make_config() -> Config:
    return make_tiny_config()


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def lengthen(config, total_updates):
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, total_updates=total_updates))


@functools.cache
def initial_state(config: Config) -> TrainState:
    """Returns one that is only to be copied: a step takes the buffers of the state that it is given."""
    return init_state(config, make_optimizer(config))


@functools.cache
def step_of(config: Config, *, for_many_updates: bool = False) -> Any:
    """Returns the step of a config, which all tests share, since most of their time would go into compiling it."""
    return make_train_step(config, make_optimizer(config), for_many_updates=for_many_updates)


def start(config, **flags: bool) -> tuple[Any, Any]:
    step_compiler_options(config.model.dtype)  # pytest forgets which warnings are not to be seen
    return jax.tree.map(jnp.copy, initial_state(config)), step_of(config, **flags)


def run(config, blocks, article_mask_V=NO_ARTICLES_V) -> tuple[Any, list[Any]]:
    state, step = start(config)
    metrics = []
    for block in blocks:
        state, step_metrics = step(state, block, article_mask_V)
        metrics.append(step_metrics)
    return state, metrics


def random_blocks(count, batch_size=4, seed=0):
    return np.random.RandomState(seed).randint(1, 61, (count, batch_size, 17)).astype(np.int32)


def assert_trees_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_matrices_of_a_shape_are_drawn_by_one_program_whoever_asks(tiny_config):
    program: Any = transformer._draw_normal
    program.clear_cache()
    params = fresh_params(tiny_config)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert program._cache_size() == len(shapes) == 5
    state = init_state(tiny_config, make_optimizer(tiny_config))
    assert_trees_equal(params, state.params)
    assert program._cache_size() == len(shapes)


def test_the_loss_at_initialisation_is_about_ln_v(tiny_config):
    _, (metrics,) = run(tiny_config, random_blocks(1))
    assert float(metrics.loss) == pytest.approx(math.log(61), rel=0.02)


def test_position_t_learns_to_predict_token_t_plus_1(tiny_config):
    """On a cycle every offset is learnable; which one was learned shows where the labels stood."""
    config = lengthen(change(tiny_config, "train", grad_accum_steps=1), 100)
    cycle = np.arange(10_000) % 60 + 1
    blocks = [
        np.stack([cycle[start : start + 17] for start in starts]).astype(np.int32)
        for starts in np.random.RandomState(0).randint(0, 9_000, (20, 4))
    ]
    state, metrics = run(config, blocks * 5)
    assert float(metrics[-1].loss) < 1.5
    predicted_BT = forward(state.params, jnp.asarray(blocks[0][:, :-1]), config.model).argmax(-1)
    offsets = (np.asarray(predicted_BT) - blocks[0][:, :-1]) % 60
    assert np.bincount(offsets.ravel(), minlength=60).argmax() == 1


@pytest.mark.parametrize("muon_learning_rate", [0.0, 0.01])
def test_micro_batches_update_like_one_large_batch(tiny_config, muon_learning_rate):
    tiny_config = change(tiny_config, "optim", muon_learning_rate=muon_learning_rate)
    large = change(tiny_config, "train", grad_accum_steps=1)
    small = change(tiny_config, "train", grad_accum_steps=4)
    blocks = random_blocks(2, batch_size=8)
    pieces = blocks.reshape(8, 2, 17)
    state_large, metrics = run(large, blocks)
    state_small, pieces_metrics = run(small, pieces)
    assert int(state_small.opt_state.gradient_step) == int(state_large.opt_state.gradient_step) == 2
    for a, b in zip(jax.tree.leaves(state_large.params), jax.tree.leaves(state_small.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(metrics[0].loss, np.mean([m.loss for m in pieces_metrics[:4]]), rtol=1e-6)
    np.testing.assert_allclose(metrics[1].grad_norm, pieces_metrics[7].grad_norm, rtol=1e-4)


def test_parameters_change_only_when_the_update_is_complete(tiny_config):
    state, step = start(tiny_config)
    before = jax.device_get(state.params)
    blocks = random_blocks(2)
    state, _ = step(state, blocks[0], NO_ARTICLES_V)
    assert_trees_equal(before, state.params)
    assert (int(state.micro_step), int(state.opt_state.gradient_step)) == (1, 0)
    state, _ = step(state, blocks[1], NO_ARTICLES_V)
    assert not np.array_equal(before["norm"]["scale"], state.params["norm"]["scale"])
    assert (int(state.micro_step), int(state.opt_state.gradient_step)) == (2, 1)


def test_the_learning_rate_follows_the_count_of_updates(tiny_config):
    _, metrics = run(tiny_config, random_blocks(8))
    peak = tiny_config.optim.learning_rate
    np.testing.assert_allclose([m.learning_rate for m in metrics[1::2]], peak * np.arange(1, 5) / 4, rtol=1e-5)


@pytest.mark.parametrize("muon_learning_rate", [0.0, 0.01])
def test_one_batch_overfits(tiny_config, muon_learning_rate):
    tiny_config = change(tiny_config, "optim", muon_learning_rate=muon_learning_rate)
    config = change(change(tiny_config, "train", grad_accum_steps=1), "optim", warmup_updates=0)
    config = lengthen(config, 300)
    _, metrics = run(config, list(random_blocks(1)) * 300)
    assert float(metrics[-1].loss) < 0.05


def test_the_article_weight_moves_parameters_but_not_the_reported_loss(tiny_config):
    blocks = random_blocks(2)
    article_mask_V = NO_ARTICLES_V.at[:20].set(True)
    weighted = change(tiny_config, "train", article_loss_weight=10.0)
    state, metrics = run(tiny_config, blocks, article_mask_V)
    weighted_state, weighted_metrics = run(weighted, blocks, article_mask_V)
    assert float(metrics[0].loss) == float(weighted_metrics[0].loss)
    assert not np.allclose(state.params["norm"]["scale"], weighted_state.params["norm"]["scale"], atol=1e-7)
    none_state, _ = run(weighted, blocks)
    assert_trees_equal(state.params, none_state.params)


def test_dropout_is_a_function_of_seed_and_micro_step(tiny_config):
    config = change(tiny_config, "model", dropout=0.3)
    blocks = random_blocks(2)
    state, metrics = run(config, blocks)
    again, step = start(config)[0], make_train_step(config, make_optimizer(config))  # traced anew
    for block in blocks:
        again, _ = step(again, block, NO_ARTICLES_V)
    assert_trees_equal(state, again)
    _, plain = run(tiny_config, blocks)
    assert float(metrics[0].loss) != float(plain[0].loss)
    # Same parameters and block at another micro-step (the update is not complete yet): another mask.
    _, repeated = run(config, [blocks[0], blocks[0]])
    assert float(repeated[0].loss) != float(repeated[1].loss)


def test_state_is_float32_and_bfloat16_runs_near_it(tiny_config):
    rounded = change(tiny_config, "model", dtype="bfloat16")
    blocks = random_blocks(2)
    state, metrics = run(rounded, blocks)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    _, exact = run(tiny_config, blocks)
    assert float(metrics[0].loss) == pytest.approx(float(exact[0].loss), abs=0.01)


def test_nothing_compiles_twice(tiny_config):
    state, step = init_state(tiny_config, make_optimizer(tiny_config)), step_of(tiny_config)
    for block in random_blocks(5):
        state, _ = step(state, block, NO_ARTICLES_V)
    assert step._cache_size() == 1


def test_the_old_state_is_donated(tiny_config):
    state, step = start(tiny_config)
    step(state, random_blocks(1)[0], NO_ARTICLES_V)
    assert state.params["norm"]["scale"].is_deleted()


# Lengths that blocks and pieces do not divide, one row, one token, heads that share keys, activations made anew; and
# one that is long enough for the sums of another library.
ODD_SHAPES: list[tuple[int, int, dict[str, Any]]] = [
    (3, 255, {}),
    (4, 16, {}),
    (1, 13, {"num_kv_heads": 1, "d_ff": 7}),
    (1, 1, {"tie_embeddings": False}),
    (3, 5, {"remat": True, "dropout": 0.1}),
    (2, 9, {"num_layers": 1, "vocab_size": 3}),
]


@pytest.mark.parametrize(("rows", "length", "model"), ODD_SHAPES)
def test_a_step_for_many_updates_is_the_same_step(rows, length, model):
    config = change(make_tiny_config(), "model", **model)
    no_articles_V = jnp.zeros(config.model.vocab_size, bool)
    block = np.random.RandomState(0).randint(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    (plain, plain_step), (state, step) = start(config), start(config, for_many_updates=True)
    plain, plain_metrics = plain_step(plain, block, no_articles_V)
    state, metrics = step(state, block, no_articles_V)
    np.testing.assert_allclose(metrics, plain_metrics, rtol=1e-5)
    # Moments are the gradients, but for their scale.
    for moment, plain_moment in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(plain.opt_state), strict=True):
        np.testing.assert_allclose(moment, plain_moment, rtol=1e-4, atol=1e-6 * max(np.abs(plain_moment).max(), 1e-3))


@pytest.mark.parametrize(("rows", "length", "model"), ODD_SHAPES[2:5])
def test_odd_shapes_train_in_bfloat16_as_in_float32(rows, length, model):
    losses, grad_norms = [], []
    for dtype in ("float32", "bfloat16"):
        config = change(make_tiny_config(), "model", **model, dtype=dtype)
        block = np.random.RandomState(0).randint(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
        state, step = start(config)
        _, metrics = step(state, block, jnp.zeros(config.model.vocab_size, bool))
        losses.append(metrics.loss)
        grad_norms.append(metrics.grad_norm)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)
    np.testing.assert_allclose(grad_norms[1], grad_norms[0], rtol=0.05)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU has libraries of its own")
def test_on_x86_every_product_of_many_updates_goes_to_onednn_and_sums_stay_with_ynnpack(tiny_config):
    optimizer = make_optimizer(tiny_config)
    block = jax.ShapeDtypeStruct((4, 257), np.int32)  # YNNPACK is not called for less
    state = jax.eval_shape(lambda: init_state(tiny_config, optimizer))

    def compiled_text(for_many_updates: bool) -> str:
        step: Any = make_train_step(tiny_config, optimizer, for_many_updates=for_many_updates)
        return step.lower(state, block, NO_ARTICLES_V).compile().as_text()

    text, plain_text = compiled_text(for_many_updates=True), compiled_text(for_many_updates=False)
    products = len(re.findall(r" dot\(", text))
    assert products > 0
    assert text.count("__onednn_fusion") == (products if platform.machine() == "x86_64" else 0)
    assert "__onednn_fusion" not in plain_text
    if platform.machine() == "x86_64":
        # A maximum and a sum for the softmax of each of four blocks of attention.
        assert text.count("__ynn_fusion") >= tiny_config.model.num_layers * 4 * 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU gets products in bf16 as they are")
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"tie_embeddings": False}])
def test_in_bfloat16_no_product_of_a_cpu_is_left_to_conversion(tiny_config, changes):
    """Forward and backward: operands in bf16 and results in float32, which is what its instructions for bf16 do."""
    config = change(tiny_config, "model", dtype="bfloat16", **changes)
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    step: Any = make_train_step(config, optimizer, for_many_updates=True)
    lowered = step.lower(state, jax.ShapeDtypeStruct((4, 17), np.int32), NO_ARTICLES_V)
    types = re.findall(
        r"dot_general .*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text_as_called(lowered)
    )
    # Four products a layer, and two in each of four blocks of attention; their gradients are two for each.
    assert len(types) >= config.model.num_layers * 3 * (4 + 2 * 4)
    assert set(types) == {("bf16", "bf16", "f32")}
    assert "__onednn_fusion" not in lowered.compile().as_text()
