"""The loss: what turns hidden states, the output matrix and the next tokens into nats.

Training never holds the logits of a whole micro-batch, unless that is small: at the main recipe they would be 1.3 GB of
float32, written and read several times. `next_token_loss` makes them a chunk of the text at a time, and takes from each
chunk its part of the gradient before the next. So does evaluation, which would else need more memory than training.

Shape suffixes beside those of transformer.py: N chunks of a text, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from tinystories_jax.model.matmul import rounded_einsum
from tinystories_jax.model.transformer import logits

_MOST_CHUNKS = 8
_FEWEST_TOKENS = 512  # of a chunk: each adds to the gradient of the whole output matrix


def split_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns inputs_BT and targets_BT, two views of a block (B, T + 1): the only place where labels are shifted."""
    return block[:, :-1], block[:, 1:]


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns float32 losses_BT, the cross-entropy of each target in nats; `targets_BT` are int32 IDs below V."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # logsumexp and a gather instead of log_softmax: the normalised (B, T, V) array is never made.
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT


def losses_and_hits(hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns losses_BT in nats, and whether each target is the likeliest token, hits_BT, by chunks of the text."""

    def look_at(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_BCD, targets_BC = chunk
        logits_BCV = logits(hidden_BCD, output_DV)
        return None, (token_losses(logits_BCV, targets_BC), jnp.argmax(logits_BCV, axis=-1) == targets_BC)

    _, (losses_NBC, hits_NBC) = jax.lax.scan(look_at, None, _split(hidden_BTD, targets_BT))
    length = targets_BT.shape[1]
    return _join(losses_NBC, length), _join(hits_NBC, length)


def next_token_loss(
    hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of weight x cross-entropy over the targets whose weight is not 0, and plain losses_BT, in nats.

    The logits are hidden_BTD @ output_DV. Padding has weight 0. Dividing by the count, not by the sum of weights, keeps
    the mean over k micro-batches of equal size equal to that of one batch k times as large, also when some targets
    weigh more than others. Only the mean has a gradient, by the first two arguments; losses_BT are to be looked at.
    """
    shares_BT = weights_BT / jnp.maximum(jnp.sum(weights_BT != 0), 1)
    weighted_sum, losses_BT = _chunked_loss(hidden_BTD, output_DV, targets_BT, shares_BT)
    return weighted_sum, jax.lax.stop_gradient(losses_BT)


@jax.custom_vjp
def _chunked_loss(
    hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array, shares_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    losses_BT, _ = losses_and_hits(hidden_BTD, output_DV, targets_BT)
    return jnp.sum(shares_BT * losses_BT), losses_BT


def _loss_and_gradients(
    hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array, shares_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns what `_chunked_loss` does, and its gradients by hidden states and output matrix.

    The gradient of cross-entropy by its logits is softmax - one-hot: known with the logits, so that the backward pass
    needs neither them nor a second matmul to make them again.
    """

    def add_chunk(
        sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        loss, output_grad_DV = sums
        hidden_BCD, targets_BC, shares_BC = chunk
        logits_BCV = logits(hidden_BCD, output_DV)
        # In place of logsumexp: what is summed is what the gradient needs, and a CPU takes long for an exponential.
        largest_BC = logits_BCV.max(axis=-1)
        exponentials_BCV = jnp.exp(logits_BCV - largest_BC[..., None])
        exponential_sums_BC = exponentials_BCV.sum(axis=-1)
        log_sums_BC = largest_BC + jnp.log(exponential_sums_BC)
        losses_BC = log_sums_BC - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        is_target_BCV = targets_BC[..., None] == jnp.arange(output_DV.shape[1])[None, None]
        target_shares_BCV = jnp.where(is_target_BCV, shares_BC[..., None], 0)
        grads_BCV = exponentials_BCV * (shares_BC / exponential_sums_BC)[..., None] - target_shares_BCV
        grads_BCV = grads_BCV.astype(hidden_BTD.dtype)
        output_grad_DV += jnp.einsum("BCD,BCV->DV", hidden_BCD, grads_BCV, preferred_element_type=jnp.float32)
        hidden_grad_BCD = rounded_einsum("BCV,DV->BCD", grads_BCV, output_DV)
        return (loss + jnp.sum(shares_BC * losses_BC), output_grad_DV), (losses_BC, hidden_grad_BCD)

    # Summed in float32 also where the activations are bf16, in which small gradients would be lost.
    zeros = jnp.float32(0), jnp.zeros(output_DV.shape, jnp.float32)
    sums, per_chunk = jax.lax.scan(add_chunk, zeros, _split(hidden_BTD, targets_BT, shares_BT))
    (loss, output_grad_DV), (losses_NBC, hidden_grad_NBCD) = sums, per_chunk
    length = targets_BT.shape[1]
    gradients = _join(hidden_grad_NBCD, length), output_grad_DV.astype(output_DV.dtype)
    return (loss, _join(losses_NBC, length)), gradients


def _scale_gradients(
    gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    factor, _ = cotangents
    hidden_grad_BTD, output_grad_DV = (gradient * factor.astype(gradient.dtype) for gradient in gradients)
    return hidden_grad_BTD, output_grad_DV, None, None


_chunked_loss.defvjp(_loss_and_gradients, _scale_gradients)


def num_chunks(batch_size: int, length: int) -> int:
    """Returns into how many chunks texts of `length` tokens are cut."""
    return -(-length // _chunk_size(batch_size, length))


def _chunk_size(batch_size: int, length: int) -> int:
    wanted = min(batch_size * length // _FEWEST_TOKENS, _MOST_CHUNKS, length)
    return -(-length // max(wanted, 1))


def _split(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays (B, T, ...) as equal chunks of the text (N, B, C, ...), zeros behind its end."""
    batch_size, length = arrays[0].shape[:2]
    count, size = num_chunks(batch_size, length), _chunk_size(batch_size, length)

    def split(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * size - length), *[(0, 0)] * (array.ndim - 2)]
        chunks = jnp.pad(array, padding).reshape(array.shape[0], count, size, *array.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    return tuple(split(array) for array in arrays)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """Returns chunks (N, B, C, ...) as one array (B, T, ...), without what was put behind the end."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
