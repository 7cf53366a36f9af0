"""The loss against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.model.loss import next_token_loss, token_losses

LOGITS_BTV = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 3
TARGETS_BT = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)


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


def test_padding_has_no_say():
    weights_BT = jnp.ones((2, 5)).at[1, 3:].set(0)
    changed_BT = TARGETS_BT.at[1, 3:].set((TARGETS_BT[1, 3:] + 1) % 11)
    loss = next_token_loss(LOGITS_BTV, TARGETS_BT, weights_BT)
    assert loss == next_token_loss(LOGITS_BTV, changed_BT, weights_BT)
    losses_BT = token_losses(LOGITS_BTV, TARGETS_BT)
    np.testing.assert_allclose(loss, (losses_BT.sum() - losses_BT[1, 3:].sum()) / 8, rtol=1e-6)


def test_weighted_micro_batches_average_to_the_large_batch():
    weights_BT = jnp.where(TARGETS_BT[0, 0] == TARGETS_BT, 10.0, 1.0)
    halves = [next_token_loss(LOGITS_BTV[i : i + 1], TARGETS_BT[i : i + 1], weights_BT[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(next_token_loss(LOGITS_BTV, TARGETS_BT, weights_BT), sum(halves) / 2, rtol=1e-6)
