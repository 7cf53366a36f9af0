"""The loss: what turns logits and the next tokens into nats."""

import jax
import jax.numpy as jnp


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns float32 losses_BT, the cross-entropy of each target in nats; `targets_BT` are int32 IDs below V."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # logsumexp and a gather instead of log_softmax: the normalised (B, T, V) array is never made.
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Mean of weight x cross-entropy, in nats, over the targets whose weight is not 0 (padding has weight 0).

    Dividing by the count, not by the sum of weights, keeps the mean over k micro-batches of equal size equal to that of
    one batch k times as large, also when some targets weigh more than others.
    """
    num_targets = jnp.maximum(jnp.sum(weights_BT != 0), 1)
    return jnp.sum(weights_BT * token_losses(logits_BTV, targets_BT)) / num_targets
