"""Products of matrices, in the form that is fast where they run: all that is particular to a CPU stands here."""

import math
from typing import Any

import jax
import jax.numpy as jnp

_NUM_PARTS = 4
_MOST_PIECES = 8


def multiply(rows: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Returns rows (..., D) times a matrix, as (..., F) in the rows' dtype, from a product in the matrix's."""
    width_in, width_out = matrix_DF.shape
    if rows.dtype != matrix_DF.dtype:
        # As when a CPU writes many texts (model/generate.py).
        return multiply_into_float32(rows, matrix_DF).astype(rows.dtype)
    if jax.default_backend() != "cpu":
        return rows @ matrix_DF
    if rows.size == width_in and width_in % _NUM_PARTS == 0:
        return _multiply_in_parts(rows.reshape(width_in), matrix_DF).reshape(*rows.shape[:-1], width_out)
    return _multiply_rows(rows.reshape(-1, width_in), matrix_DF).reshape(*rows.shape[:-1], width_out)


def multiply_into_float32(rows: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Returns rows (..., D) times a matrix, as float32 (..., F): a product in the matrix's dtype, summed in float32."""
    return jnp.einsum("...D,DF->...F", rows.astype(matrix_DF.dtype), matrix_DF, preferred_element_type=jnp.float32)


def rounded_einsum(subscripts: str, left: Any, right: Any) -> jax.Array:
    """Returns `jnp.einsum` of two arrays in their dtype, from sums in float32.

    Processors with instructions for bf16 multiply it at twice the rate of float32, but XLA's CPU backend uses them only
    where the result is float32, and converts all operands before where it is bf16.
    """
    if jax.default_backend() != "cpu":
        return jnp.einsum(subscripts, left, right)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32).astype(left.dtype)


def sum_outer_products(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the products of left (..., N, X) and right (..., N, Y) summed over N, as float32 (..., X, Y).

    What is summed over one axis that both operands have in front XLA's CPU backend multiplies in float32, after
    converting them. Over two axes, pieces and what is in a piece, it multiplies in bf16, at up to twice the rate; an
    odd N is one piece, and converted.
    """
    if jax.default_backend() != "cpu" or left.dtype != jnp.bfloat16:
        return jnp.einsum("...NX,...NY->...XY", left, right, preferred_element_type=jnp.float32)
    pieces = math.gcd(left.shape[-2], _MOST_PIECES)
    left, right = (array.reshape(*array.shape[:-2], pieces, -1, array.shape[-1]) for array in (left, right))
    return jnp.einsum("...PNX,...PNY->...XY", left, right, preferred_element_type=jnp.float32)


def _multiply_in_parts(row_D: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """A single row, as when one text is written. XLA's CPU backend goes through such a matrix in one thread, at half of
    the rate at which memory could give it; several products at once it spreads over the threads."""
    width_in, width_out = matrix_DF.shape
    parts = (_NUM_PARTS, width_in // _NUM_PARTS)
    products_PF = jnp.einsum(
        "PD,PDF->PF", row_D.reshape(parts), matrix_DF.reshape(*parts, width_out), preferred_element_type=jnp.float32
    )
    return products_PF.sum(axis=0).astype(row_D.dtype)


@jax.custom_vjp
def _multiply_rows(rows_ND: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """With gradients of its own. JAX would differentiate the product as it is before rounding: gradients in float32,
    and so their products. And it would make the matrix's gradient transposed, for which XLA's CPU backend first
    transposes the gradients of all rows."""
    return rounded_einsum("ND,DF->NF", rows_ND, matrix_DF)


def _keep_operands(rows_ND: jax.Array, matrix_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply_rows(rows_ND, matrix_DF), (rows_ND, matrix_DF)


def _multiply_gradients(operands: tuple[jax.Array, jax.Array], grads_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows_ND, matrix_DF = operands
    matrix_grads_DF = sum_outer_products(rows_ND, grads_NF).astype(matrix_DF.dtype)
    return rounded_einsum("NF,DF->ND", grads_NF, matrix_DF), matrix_grads_DF


_multiply_rows.defvjp(_keep_operands, _multiply_gradients)
