"""Products of matrices, in the form that is fast where they run: all that is particular to a CPU stands here."""

from typing import Any

import jax
import jax.numpy as jnp

_NUM_PARTS = 4


def multiply(rows: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Returns rows (..., D) times a matrix, as (..., F) in the rows' dtype, from a product in the matrix's."""
    width_in, width_out = matrix_DF.shape
    if rows.dtype != matrix_DF.dtype:
        converted = rows.astype(matrix_DF.dtype)
        return jnp.einsum("...D,DF->...F", converted, matrix_DF, preferred_element_type=jnp.float32).astype(rows.dtype)
    if jax.default_backend() != "cpu":
        return rows @ matrix_DF
    if rows.size == width_in and width_in % _NUM_PARTS == 0:
        return _multiply_in_parts(rows.reshape(width_in), matrix_DF).reshape(*rows.shape[:-1], width_out)
    return _multiply_rows(rows.reshape(-1, width_in), matrix_DF).reshape(*rows.shape[:-1], width_out)


def rounded_einsum(subscripts: str, left: Any, right: Any) -> jax.Array:
    """Returns `jnp.einsum` of two arrays in their dtype, from sums in float32.

    Processors with instructions for bf16 multiply it at twice the rate of float32, but XLA's CPU backend uses them only
    where the result is float32, and converts all operands before where it is bf16.
    """
    if jax.default_backend() != "cpu":
        return jnp.einsum(subscripts, left, right)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32).astype(left.dtype)


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
    return rounded_einsum("NF,DF->ND", grads_NF, matrix_DF), rounded_einsum("ND,NF->DF", rows_ND, grads_NF)


_multiply_rows.defvjp(_keep_operands, _multiply_gradients)
