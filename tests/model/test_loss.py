"""The loss against its definition, and the loss in chunks against the plain one."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinystories_jax.model import loss as loss_module
from tinystories_jax.model.loss import losses_and_hits, next_token_loss, num_chunks, token_losses
from tinystories_jax.model.transformer import logits

LOGITS_BTV = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 3
TARGETS_BT = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)


@pytest.fixture(autouse=True)
def chunks_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the few tokens of a test into as many chunks as training does the many of a micro-batch."""
    monkeypatch.setattr(loss_module, "_FEWEST_TOKENS", 1)


def test_token_losses_are_minus_log_of_the_softmax_at_the_target():
    logits = np.asarray(LOGITS_BTV, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, np.asarray(TARGETS_BT)[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(token_losses(LOGITS_BTV, TARGETS_BT), expected, rtol=1e-5)


def test_equal_logits_cost_ln_v():
    assert math.isclose(
        float(token_losses(jnp.zeros((1, 1, 11)), jnp.zeros((1, 1), int))[0, 0]), math.log(11), rel_tol=1e-6
    )


def test_large_logits_neither_overflow_nor_lose_the_target():
    logits_BTV = jnp.array([[[1e4, 0.0, -1e4]]])
    np.testing.assert_allclose(token_losses(logits_BTV, jnp.array([[0]])), 0, atol=1e-6)
    np.testing.assert_allclose(token_losses(logits_BTV, jnp.array([[2]])), 2e4)


def make_inputs(batch: int, length: int, width: int, vocab_size: int, dtype: str = "float32"):
    keys = jax.random.split(jax.random.key(2), 3)
    hidden_BTD = jax.random.normal(keys[0], (batch, length, width), dtype)
    output_DV = jax.random.normal(keys[1], (width, vocab_size), dtype)
    return hidden_BTD, output_DV, jax.random.randint(keys[2], (batch, length), 0, vocab_size)


def plain_loss(hidden_BTD, output_DV, targets_BT, weights_BT):
    """The definition: all logits at once, differentiated by JAX."""
    losses_BT = token_losses(logits(hidden_BTD, output_DV), targets_BT)
    return (weights_BT * losses_BT).sum() / (weights_BT != 0).sum(), losses_BT


@pytest.mark.parametrize(
    ("batch_size", "length", "chunks"),
    [(64, 512, 8), (8, 512, 8), (2, 512, 2), (1, 512, 1), (1, 2048, 4), (1, 1, 1), (2048, 3, 3), (1000, 9, 5)],
)
def test_a_chunk_has_five_hundred_tokens_or_an_eighth_of_the_text(monkeypatch, batch_size, length, chunks):
    monkeypatch.undo()  # chunks of the size that training has
    assert num_chunks(batch_size, length) == chunks


# Lengths that the chunks divide, that they do not, and that are shorter than their number.
@pytest.mark.parametrize("length", [16, 19, 5, 1])
def test_the_loss_in_chunks_is_the_plain_loss_with_its_gradients(length):
    hidden_BTD, output_DV, targets_BT = make_inputs(3, length, 8, 41)
    weights_BT = jnp.where(targets_BT < 7, 10.0, 1.0).at[2, length // 2 :].set(0)
    values = []
    for function in (next_token_loss, plain_loss):

        def doubled(hidden_BTD, output_DV, function=function):
            loss, losses_BT = function(hidden_BTD, output_DV, targets_BT, weights_BT)
            return 2 * loss, losses_BT

        values.append(jax.jit(jax.value_and_grad(doubled, argnums=(0, 1), has_aux=True))(hidden_BTD, output_DV))
    jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6), *values)


def test_large_logits_overflow_neither_in_the_loss_nor_in_its_gradients():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 16, 8, 41)
    hidden_BTD *= 1e3
    assert logits(hidden_BTD, output_DV).max() > 1e3
    weights_BT = jnp.ones(targets_BT.shape)
    values = [
        jax.value_and_grad(lambda *operands, f=function: f(*operands, targets_BT, weights_BT)[0], argnums=(0, 1))(
            hidden_BTD, output_DV
        )
        for function in (next_token_loss, plain_loss)
    ]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values))
    jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4), *values)


@pytest.mark.parametrize("length", [16, 19, 1])
def test_losses_and_hits_in_chunks_are_those_of_the_logits(length):
    hidden_BTD, output_DV, targets_BT = make_inputs(3, length, 8, 41)
    logits_BTV = logits(hidden_BTD, output_DV)
    targets_BT = jnp.where(jnp.arange(length)[None] % 2 == 0, logits_BTV.argmax(axis=-1), targets_BT)
    losses_BT, hits_BT = losses_and_hits(hidden_BTD, output_DV, targets_BT)
    np.testing.assert_allclose(losses_BT, token_losses(logits_BTV, targets_BT), rtol=1e-5)
    np.testing.assert_array_equal(hits_BT, logits_BTV.argmax(axis=-1) == targets_BT)
    assert hits_BT[:, ::2].all()


def test_without_a_gradient_the_loss_is_the_same():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 9, 8, 41)
    weights_BT = jnp.ones(targets_BT.shape)
    alone = jax.jit(next_token_loss)(hidden_BTD, output_DV, targets_BT, weights_BT)
    both, _ = jax.vjp(lambda hidden: next_token_loss(hidden, output_DV, targets_BT, weights_BT), hidden_BTD)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), alone, both)


def test_the_losses_to_look_at_have_no_gradient():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 9, 8, 41)
    ones_BT = jnp.ones(targets_BT.shape)
    grad_BTD = jax.grad(lambda hidden: next_token_loss(hidden, output_DV, targets_BT, ones_BT)[1].sum())(hidden_BTD)
    assert not np.asarray(grad_BTD).any()


def test_in_bfloat16_the_gradients_are_near_those_in_float32():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 16, 32, 300, "bfloat16")
    ones_BT = jnp.ones(targets_BT.shape)
    grads = jax.grad(lambda h, o: next_token_loss(h, o, targets_BT, ones_BT)[0], (0, 1))(hidden_BTD, output_DV)
    inputs = hidden_BTD.astype(jnp.float32), output_DV.astype(jnp.float32)
    exact = jax.grad(lambda h, o: plain_loss(h, o, targets_BT, ones_BT)[0], (0, 1))(*inputs)
    for grad, plain in zip(grads, exact, strict=True):
        assert grad.dtype == jnp.bfloat16
        error = np.linalg.norm(grad.astype(jnp.float32) - plain) / np.linalg.norm(plain)
        assert error < 0.01


def test_the_logits_of_a_whole_micro_batch_are_never_held(monkeypatch):
    monkeypatch.undo()  # chunks of the size that training has
    # Much more than the 34 MB of work space that a GPU's products ask for; nothing is run.
    hidden_BTD, output_DV, targets_BT = make_inputs(16, 512, 16, 20_000)
    ones_BT = jnp.ones(targets_BT.shape)
    whole_bytes = 4 * targets_BT.size * output_DV.shape[1]

    def compiled(function):
        step = jax.value_and_grad(lambda *arrays: function(*arrays, targets_BT, ones_BT)[0], (0, 1))
        program: Any = jax.jit(step).lower(hidden_BTD, output_DV).compile()
        return program.memory_analysis().temp_size_in_bytes, program.as_text()

    (our_bytes, our_text), (plain_bytes, _) = compiled(next_token_loss), compiled(plain_loss)
    # The plain form shows that the measure would see them.
    assert plain_bytes > whole_bytes
    assert our_bytes < 0.6 * whole_bytes
    largest = max(
        math.prod(int(size) for size in sizes.split(",")) for sizes in re.findall(r"f32\[(\d+(?:,\d+)+)\]", our_text)
    )
    assert largest <= max(whole_bytes // 4 // loss_module._MOST_CHUNKS, output_DV.size)


def test_padding_has_no_say():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 5, 8, 11)
    weights_BT = jnp.ones((2, 5)).at[1, 3:].set(0)
    changed_BT = targets_BT.at[1, 3:].set((targets_BT[1, 3:] + 1) % 11)
    loss, losses_BT = next_token_loss(hidden_BTD, output_DV, targets_BT, weights_BT)
    assert loss == next_token_loss(hidden_BTD, output_DV, changed_BT, weights_BT)[0]
    np.testing.assert_allclose(loss, (losses_BT.sum() - losses_BT[1, 3:].sum()) / 8, rtol=1e-6)


def test_weighted_micro_batches_average_to_the_large_batch():
    hidden_BTD, output_DV, targets_BT = make_inputs(2, 5, 8, 11)
    weights_BT = jnp.where(targets_BT[0, 0] == targets_BT, 10.0, 1.0)
    halves = [
        next_token_loss(hidden_BTD[i : i + 1], output_DV, targets_BT[i : i + 1], weights_BT[i : i + 1])[0]
        for i in range(2)
    ]
    whole, _ = next_token_loss(hidden_BTD, output_DV, targets_BT, weights_BT)
    np.testing.assert_allclose(whole, sum(halves) / 2, rtol=1e-6)
