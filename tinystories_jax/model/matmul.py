"""Matmuls in the form that is fast where they run: what is particular to a CPU in them stands here.

Shape suffixes besides those of transformer.py: N rows, or groups of R rows each; X, Y any two widths; P parts of D.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PACKED = "packed bfloat16"
TRANSPOSED = "transposed bfloat16"
_MOST_TERMS = 8
_MOST_CHUNKS = 8
_HIGH_BITS = np.uint32(0xFFFF0000)


class Transposed(NamedTuple):
    """A matrix (D, F) with the axis last that a matmul sums over: XLA's CPU backend arranges one in bf16 anew for each
    matmul, from this order in less time."""

    matrix_FD: jax.Array


Matrix = jax.Array | Transposed


def matmul(rows: jax.Array, matrix: Matrix) -> jax.Array:
    """Returns rows (..., D) times a matrix, as (..., F) in the rows' dtype, from a matmul in the matrix's.

    A matrix may be packed or transposed.
    """
    if isinstance(matrix, Transposed) or rows.dtype != matrix.dtype:
        # As when a CPU writes texts (model/generate.py).
        return matmul_into_float32(rows, matrix).astype(rows.dtype)
    width_in, width_out = matrix.shape
    if rows.size == width_in:
        # On a GPU too: of a plain matmul with a single row XLA makes products rounded to bf16, and a sum of those.
        return _matmul_row(rows, matrix).astype(rows.dtype)
    if jax.default_backend() != "cpu":
        return rows @ matrix
    return _matmul_rows(rows.reshape(-1, width_in), matrix).reshape(*rows.shape[:-1], width_out)


def matmul_into_float32(rows: jax.Array, matrix: Matrix) -> jax.Array:
    """Returns rows (..., D) times a matrix, as float32 (..., F): a matmul in the matrix's dtype, summed in float32.

    With a packed matrix it is a matmul in float32.
    """
    if isinstance(matrix, Transposed):
        # Rows in one axis: with several such a matmul takes longer than one with the matrix as it was.
        rows_ND = rows.reshape(-1, rows.shape[-1]).astype(matrix.matrix_FD.dtype)
        products_NF = jnp.einsum("ND,FD->NF", rows_ND, matrix.matrix_FD, preferred_element_type=jnp.float32)
        return products_NF.reshape(*rows.shape[:-1], -1)
    matrix_DF = matrix
    if is_packed(matrix_DF):
        if rows.size == rows.shape[-1]:
            return _matmul_row(rows, matrix_DF)
        # Not before the rows are there: all matrices of a prompt's program at once would be 91 MB of the recipe's.
        rows, matrix_DF = jax.lax.optimization_barrier((rows, matrix_DF))
        matrix_DF = jnp.stack(_unpack(matrix_DF), axis=1).reshape(-1, matrix_DF.shape[1])
    return jnp.einsum("...D,DF->...F", rows.astype(matrix_DF.dtype), matrix_DF, preferred_element_type=jnp.float32)


def batched_matmul(rows_NRD: jax.Array, matrices_NDF: jax.Array) -> jax.Array:
    """Returns the float32 results (N, R, F) of N groups of a few rows, each with its matrix, which may be packed."""
    if jax.default_backend() != "cpu" and not is_packed(matrices_NDF):
        return jnp.einsum("NRD,NDF->NRF", rows_NRD, matrices_NDF, preferred_element_type=jnp.float32)
    rows_NRD = rows_NRD.astype(jnp.float32)
    if not is_packed(matrices_NDF):
        return _sum_terms([(rows_NRD, matrices_NDF.astype(jnp.float32))])
    rows_of_halves = rows_NRD[..., 0::2], rows_NRD[..., 1::2]
    return _sum_terms(list(zip(rows_of_halves, _unpack(matrices_NDF), strict=True)))


def keep_matrix(matrix_DF: jax.Array, *, rounded_to: str, kept_as: str) -> Matrix:
    """Returns a float32 matrix rounded to a dtype, in the form in which matmuls with it read it: "float32",
    "bfloat16", `TRANSPOSED`, or `PACKED`, which is float32 after all where D is odd."""
    if kept_as == PACKED and matrix_DF.shape[0] % 2 == 0:
        return pack(matrix_DF, axis=0)
    if rounded_to == "bfloat16":
        # XLA may drop a conversion to bf16 and back (xla_allow_excess_precision).
        matrix_DF = jax.lax.reduce_precision(matrix_DF, exponent_bits=8, mantissa_bits=7)
    if kept_as == TRANSPOSED:
        return Transposed(matrix_DF.astype("bfloat16").T)
    return matrix_DF.astype("float32" if kept_as == PACKED else kept_as)


def pack(array: jax.Array, axis: int) -> jax.Array:
    """Returns an array as uint32 of half its length along `axis`, which is the one that a matmul sums over: of two
    neighbours in bf16 the first is in the lower 16 bits.

    XLA's CPU backend reads no array in bf16 for a matmul with a single row: it converts it into one in float32 before.
    What is shifted into place by a program of its own it reads as it is.
    """
    bits = _bits_of_bfloat16(array)
    low, high = (jax.lax.slice_in_dim(bits, first, None, stride=2, axis=axis) for first in (0, 1))
    return low | (high << 16)


def write_packed(packed: jax.Array, entries: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    """Returns a packed array with entries, of length 1 along `axis`, the packed one, at `place`; behind the end, the
    last are written again."""
    place = jnp.minimum(place, 2 * packed.shape[axis] - 1)
    bits, before = _bits_of_bfloat16(entries), jax.lax.dynamic_slice_in_dim(packed, place // 2, 1, axis)
    with_first, with_second = bits | (before & _HIGH_BITS), (bits << 16) | (before & ~_HIGH_BITS)
    words = jnp.where(place % 2 == 0, with_first, with_second)
    return jax.lax.dynamic_update_slice_in_dim(packed, words, place // 2, axis)


def is_packed(array: jax.Array) -> bool:
    """Returns whether this is what `pack` returns."""
    return array.dtype == jnp.uint32


def rounded_einsum(subscripts: str, left: Any, right: Any) -> jax.Array:
    """Returns `jnp.einsum` of two arrays in their dtype, from sums in float32.

    Processors with instructions for bf16 multiply it at twice the rate of float32, but XLA's CPU backend uses them only
    where the result is float32, and converts all operands before where it is bf16.
    """
    if jax.default_backend() != "cpu":
        return jnp.einsum(subscripts, left, right)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32).astype(left.dtype)


def sum_outer_products(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the outer products of left (..., N, X) and right (..., N, Y) summed over N, as float32 (..., X, Y).

    What is summed over one axis that both operands have in front XLA's CPU backend multiplies in float32, after
    converting them. Over two axes, chunks and what is in a chunk, it multiplies in bf16, at up to twice the rate; an
    odd N is one chunk, and converted. Named in that order, they leave the right operand as it is, where einsum's order
    has it copied.
    """
    if jax.default_backend() != "cpu" or left.dtype != jnp.bfloat16:
        return jnp.einsum("...NX,...NY->...XY", left, right, preferred_element_type=jnp.float32)
    chunks = math.gcd(left.shape[-2], _MOST_CHUNKS)
    left, right = (array.reshape(*array.shape[:-2], chunks, -1, array.shape[-1]) for array in (left, right))
    shared, summed = tuple(range(left.ndim - 3)), (left.ndim - 3, left.ndim - 2)
    dimensions = ((summed, summed), (shared, shared))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def split_columns(array: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """Returns an array (..., X), in which arrays of these widths stand side by side, as these arrays.

    With a gradient of its own. XLA's CPU backend would join the parts of one in bf16 in float32, and round that. On a
    GPU XLA would join them anew for each matmul that reads them, and apart from what makes them: a tenth of a step
    (docs/tuning.md).
    """
    return _split_columns(array, widths)


def _matmul_row(row: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """Returns a single row (..., D), as when one text is written, times a matrix, which may be packed, as float32
    (..., F)."""
    if is_packed(matrix_DF):
        # Else XLA would unpack once what a loop reads in each step, and the loop would read twice as much.
        row, matrix_DF = jax.lax.optimization_barrier((row, matrix_DF))
    return batched_matmul(row.reshape(1, 1, -1), matrix_DF[None]).reshape(*row.shape[:-1], -1)


def _unpack(packed: jax.Array) -> list[jax.Array]:
    """Returns both halves of what was packed, as float32: first, third, ... and second, fourth, ... entries."""
    bits = [packed << 16, packed & _HIGH_BITS]
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in bits]


def _bits_of_bfloat16(array: jax.Array) -> jax.Array:
    """Returns the entries rounded to bf16, as the lower 16 bits of uint32."""
    return jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)


def _sum_terms(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Returns the sum of the products of all pairs (N, R, D) and (N, D, F), as (N, R, F).

    XLA's CPU backend gives such a matmul to a single thread, and memory could serve several. A sum of a few terms,
    eighths of D, it computes in vectors and in all threads, in one loop over the matrix that unpacks it as well. What
    is left to add up is a matmul with ones: any other sum XLA would join with the loop, which then goes down the
    columns and waits for memory.
    """
    width_in = pairs[0][0].shape[2]
    num_terms = math.gcd(width_in, _MOST_TERMS)
    parts = (num_terms, width_in // num_terms)
    products = []
    for term in range(num_terms):
        for rows_NRD, matrices_NDF in pairs:
            rows_NRP1 = rows_NRD.reshape(*rows_NRD.shape[:2], *parts, 1)[:, :, term]
            matrices_N1PF = matrices_NDF.reshape(matrices_NDF.shape[0], 1, *parts, -1)[:, :, term]
            products.append(rows_NRP1 * matrices_N1PF)
    sums_NRPF = functools.reduce(jnp.add, products)
    return jnp.einsum("NP,NRPF->NRF", jnp.ones_like(sums_NRPF[:, 0, :, 0]), sums_NRPF)


def _split(array: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    return jnp.split(array, list(itertools.accumulate(widths))[:-1], axis=-1)


def _split_and_save(array: jax.Array, widths: tuple[int, ...]) -> tuple[list[jax.Array], None]:
    return _split(array, widths), None


def _join_gradients(_widths: tuple[int, ...], _saved: None, grads: list[jax.Array]) -> tuple[jax.Array]:
    dtype = grads[0].dtype
    if jax.default_backend() != "cpu":
        return (jax.lax.optimization_barrier(jnp.concatenate(grads, axis=-1)),)
    if dtype != jnp.bfloat16:
        return (jnp.concatenate(grads, axis=-1),)
    bits = [jax.lax.bitcast_convert_type(grad, jnp.uint16) for grad in grads]
    return (jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=-1), dtype),)


_split_columns = jax.custom_vjp(_split, nondiff_argnums=(1,))
_split_columns.defvjp(_split_and_save, _join_gradients)


@jax.custom_vjp
def _matmul_rows(rows_ND: jax.Array, matrix_DF: jax.Array) -> jax.Array:
    """With gradients of its own. JAX would differentiate the matmul as it is before rounding: gradients in float32,
    and so their matmuls. And it would make the matrix's gradient transposed, for which XLA's CPU backend first
    transposes the gradients of all rows."""
    return rounded_einsum("ND,DF->NF", rows_ND, matrix_DF)


def _keep_operands(rows_ND: jax.Array, matrix_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul_rows(rows_ND, matrix_DF), (rows_ND, matrix_DF)


def _matmul_gradients(operands: tuple[jax.Array, jax.Array], grads_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows_ND, matrix_DF = operands
    matrix_grads_DF = sum_outer_products(rows_ND, grads_NF).astype(matrix_DF.dtype)
    return rounded_einsum("NF,DF->ND", grads_NF, matrix_DF), matrix_grads_DF


_matmul_rows.defvjp(_keep_operands, _matmul_gradients)
