"""Causal attention over whole texts: where cuDNN's runs, and our own in plain matmuls for everywhere else."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tinystories_jax.config import ModelConfig
from tinystories_jax.model.matmul import rounded_einsum, sum_outer_products

_BLOCK_LENGTH = 256
_FEWEST_BLOCKS = 4
_MOST_BLOCKS = 16
_NUM_GROUPS = 2

_Saved = tuple[jax.Array, jax.Array, jax.Array, list[jax.Array], jax.Array]


def uses_flash_attention(config: ModelConfig, length: int, device: Any) -> bool:
    """Returns whether cuDNN's flash attention is used on `device` for texts of `length` tokens and this model.

    JAX takes it on CUDA from Ampere on, and raises elsewhere: for bfloat16, a head width that is a multiple of 8 up to
    128 (from Hopper on up to 256, which has not been tried here), and, where there is a gradient, an even length.
    """
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    fits = config.dtype == "bfloat16" and config.head_dim % 8 == 0 and config.head_dim <= 128 and length % 2 == 0
    return fits and float(device.compute_capability) >= 8.0


def causal_attention(queries_BTHK: jax.Array, keys_BTGK: jax.Array, values_BTGK: jax.Array) -> jax.Array:
    """Returns attended_BTHK, by blocks of queries that see only the keys before their end.

    Four blocks compute 5/8 of the square that jax.nn.dot_product_attention computes, sixteen little more than half.
    """
    num_heads, head_dim = queries_BTHK.shape[2:]
    # Query heads that share a key/value head stand next to each other, as in Llama.
    keys_BHSK, values_BHSK = (
        jnp.swapaxes(jnp.repeat(shared, num_heads // shared.shape[2], axis=2), 1, 2)
        for shared in (keys_BTGK, values_BTGK)
    )
    queries_BHTK = jnp.swapaxes(queries_BTHK, 1, 2) * head_dim**-0.5
    num_groups = _num_groups(queries_BHTK)
    groups = zip(*(jnp.split(array, num_groups) for array in (queries_BHTK, keys_BHSK, values_BHSK)), strict=True)
    return jnp.swapaxes(jnp.concatenate([_attend(*group) for group in groups]), 1, 2)


@jax.custom_vjp
def _attend(queries_BHTK: jax.Array, keys_BHSK: jax.Array, values_BHSK: jax.Array) -> jax.Array:
    attended_BHTK, _ = _attend_and_save(queries_BHTK, keys_BHSK, values_BHSK)
    return attended_BHTK


def _attend_and_save(queries_BHTK: jax.Array, keys_BHSK: jax.Array, values_BHSK: jax.Array) -> tuple[jax.Array, _Saved]:
    weights, attended = [], []
    for start, end in _blocks(queries_BHTK.shape[2]):
        scores_BHTS = jnp.einsum(
            "BHTK,BHSK->BHTS", queries_BHTK[:, :, start:end], keys_BHSK[:, :, :end], preferred_element_type=jnp.float32
        )
        seen_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
        weights_BHTS = jax.nn.softmax(jnp.where(seen_TS[None, None], scores_BHTS, -jnp.inf), axis=-1)
        weights.append(weights_BHTS.astype(values_BHSK.dtype))
        attended.append(rounded_einsum("BHTS,BHSK->BHTK", weights[-1], values_BHSK[:, :, :end]))
    attended_BHTK = jnp.concatenate(attended, axis=2)
    return attended_BHTK, (queries_BHTK, keys_BHSK, values_BHSK, weights, attended_BHTK)


def _attend_gradients(saved: _Saved, grads_BHTK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients by queries, keys and values.

    JAX's own would add up arrays of the whole length for each block, with keys across: on a CPU that takes longer than
    the matmuls. The sum of weights x their gradients, which softmax subtracts, is that of attended x its gradients
    (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    """
    queries_BHTK, keys_BHSK, values_BHSK, weights, attended_BHTK = saved
    sums_BHT = jnp.einsum("BHTK,BHTK->BHT", grads_BHTK, attended_BHTK, preferred_element_type=jnp.float32)
    query_grads = []
    batch_size, num_heads, length, head_dim = keys_BHSK.shape
    key_grads_BHKS = value_grads_BHKS = jnp.zeros((batch_size, num_heads, head_dim, length), jnp.float32)
    for (start, end), weights_BHTS in zip(_blocks(queries_BHTK.shape[2]), weights, strict=True):
        block_grads_BHTK = grads_BHTK[:, :, start:end]
        weight_grads_BHTS = jnp.einsum(
            "BHTK,BHSK->BHTS", block_grads_BHTK, values_BHSK[:, :, :end], preferred_element_type=jnp.float32
        )
        score_grads_BHTS = weights_BHTS * (weight_grads_BHTS - sums_BHT[:, :, start:end, None])
        score_grads_BHTS = score_grads_BHTS.astype(weights_BHTS.dtype)
        query_grads.append(rounded_einsum("BHTS,BHSK->BHTK", score_grads_BHTS, keys_BHSK[:, :, :end]))
        key_grads_BHKS = _add_product(key_grads_BHKS, queries_BHTK[:, :, start:end], score_grads_BHTS)
        value_grads_BHKS = _add_product(value_grads_BHKS, block_grads_BHTK, weights_BHTS)
    key_grads_BHSK, value_grads_BHSK = (
        jnp.swapaxes(grads_BHKS, 2, 3).astype(keys_BHSK.dtype) for grads_BHKS in (key_grads_BHKS, value_grads_BHKS)
    )
    return jnp.concatenate(query_grads, axis=2), key_grads_BHSK, value_grads_BHSK


def _add_product(total_BHKS: jax.Array, of_BHTK: jax.Array, by_BHTS: jax.Array) -> jax.Array:
    """Returns the total with what a block of queries adds to the keys, or values, that it has seen.

    Keys stand last in the result: XLA's CPU backend transposes the first operand of such a matmul, and `of_BHTK` is
    the smaller of the two.
    """
    product_BHKS = sum_outer_products(of_BHTK, by_BHTS)
    return total_BHKS.at[..., : product_BHKS.shape[3]].add(product_BHKS)


_attend.defvjp(_attend_and_save, _attend_gradients)


def _num_groups(queries_BHTK: jax.Array) -> int:
    """Returns into how many equal groups of rows attention is cut.

    XLA's CPU backend gives matmuls in bf16 as small as those of a head to a single thread each, but runs at the same
    time what does not depend on each other.
    """
    if jax.default_backend() != "cpu" or queries_BHTK.dtype != jnp.bfloat16:
        return 1
    return math.gcd(queries_BHTK.shape[0], _NUM_GROUPS)


def _blocks(length: int) -> list[tuple[int, int]]:
    # A block computes the square on its diagonal whole, so a long context needs more blocks for the same waste; but
    # each is compiled on its own.
    num_blocks = min(max(_FEWEST_BLOCKS, length // _BLOCK_LENGTH), _MOST_BLOCKS)
    block = -(-length // num_blocks)
    return [(start, min(start + block, length)) for start in range(0, length, block)]
