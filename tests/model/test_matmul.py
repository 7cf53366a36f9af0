import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinystories_jax.model.matmul import (
    PACKED,
    TRANSPOSED,
    Transposed,
    batched_matmul,
    is_packed,
    keep_matrix,
    matmul,
    matmul_into_float32,
    pack,
    rounded_einsum,
    split_columns,
    sum_outer_products,
    write_packed,
)


def make_operands(width_in, width_out, num_rows, dtype="float32"):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, num_rows, width_in), np.float32)
    matrix = rng.standard_normal((width_in, width_out), np.float32)
    return jnp.array(rows).astype(dtype), jnp.array(matrix).astype(dtype)


@pytest.mark.parametrize(("width_in", "width_out"), [(8, 5), (448, 1344), (6, 4)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_product_and_its_gradients_are_the_plain_ones(width_in, width_out, num_rows):
    rows, matrix = make_operands(width_in, width_out, num_rows)
    product, gradients = jax.vjp(matmul, rows, matrix)
    plain, plain_gradients = jax.vjp(jnp.matmul, rows, matrix)
    grads = jnp.cos(plain)
    pairs = zip((product, *gradients(grads)), (plain, *plain_gradients(grads)), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_in_bfloat16_products_and_their_gradients_are_rounded_once(num_rows):
    """Each is the nearest bf16 of the sum in float32, so at most half of a last place away."""
    rows, matrix = make_operands(448, 96, num_rows, "bfloat16")
    product, gradients = jax.vjp(matmul, rows, matrix)
    exact_rows, exact_matrix = rows.astype(jnp.float32), matrix.astype(jnp.float32)
    exact, exact_gradients = jax.vjp(jnp.matmul, exact_rows, exact_matrix)
    grads = jnp.ones_like(product) * 0.75
    pairs = zip((product, *gradients(grads)), (exact, *exact_gradients(grads.astype(jnp.float32))), strict=True)
    for rounded, plain in pairs:
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), plain, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_in_float32_times_a_matrix_in_bfloat16_are_summed_and_given_in_float32(num_rows):
    rows, matrix = make_operands(448, 96, num_rows)
    product = matmul(rows, matrix.astype(jnp.bfloat16))
    rounded_rows, rounded_matrix = (array.astype(jnp.bfloat16).astype(jnp.float32) for array in (rows, matrix))
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, rounded_rows @ rounded_matrix, rtol=1e-5, atol=1e-4)


def round_to_bfloat16(array):
    return np.asarray(array.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("apply", [matmul, matmul_into_float32])
@pytest.mark.parametrize(("width_in", "width_out"), [(8, 5), (448, 1344), (6, 4), (2, 3)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_product_with_a_packed_matrix_is_that_with_its_entries_in_bfloat16(width_in, width_out, num_rows, apply):
    rows, matrix = make_operands(width_in, width_out, num_rows)
    product = jax.jit(apply)(rows, keep_matrix(matrix, rounded_to="bfloat16", kept_as=PACKED))
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, rows @ round_to_bfloat16(matrix), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("apply", [matmul, matmul_into_float32])
@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (2, 3, 8), (448,)])
def test_a_product_with_a_transposed_matrix_is_that_of_entries_in_bfloat16(shape, apply):
    rng = np.random.default_rng(0)
    rows, matrix = (jnp.array(rng.standard_normal(each), jnp.float32) for each in (shape, (shape[-1], 5)))
    kept = keep_matrix(matrix, rounded_to="bfloat16", kept_as=TRANSPOSED)
    product = jax.jit(apply)(rows, kept)
    assert product.dtype == jnp.float32
    assert product.shape == (*shape[:-1], 5)
    np.testing.assert_allclose(product, round_to_bfloat16(rows) @ round_to_bfloat16(matrix), rtol=1e-5, atol=1e-4)
    operands = f"(tensor<{math.prod(shape[:-1])}x{shape[-1]}xbf16>, tensor<5x{shape[-1]}xbf16>)"
    assert operands in jax.jit(apply).lower(rows, kept).as_text()


@pytest.mark.parametrize("kept_as", ["float32", "bfloat16", TRANSPOSED, PACKED])
@pytest.mark.parametrize("width_in", [6, 7])
def test_a_matrix_is_rounded_to_the_same_however_it_is_kept(width_in, kept_as):
    _, matrix = make_operands(width_in, 5, 1)
    kept = jax.jit(keep_matrix, static_argnames=("rounded_to", "kept_as"))
    kept = kept(matrix, rounded_to="bfloat16", kept_as=kept_as)
    assert isinstance(kept, Transposed) == (kept_as == TRANSPOSED)
    packed = not isinstance(kept, Transposed) and is_packed(kept)
    assert packed == (kept_as == PACKED and width_in == 6)  # no halves of an odd number of rows
    np.testing.assert_array_equal(matmul_into_float32(jnp.eye(width_in), kept), round_to_bfloat16(matrix))


@pytest.mark.parametrize("rounded_to", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width_in", "width_out"), [(64, 96), (6, 10), (40, 2)])
def test_rows_are_multiplied_each_with_its_own_matrix(width_in, width_out, packed, rounded_to):
    rng = np.random.default_rng(0)
    rows_NRD = jnp.array(rng.standard_normal((5, 2, width_in)), jnp.float32)
    matrices_NDF = jnp.array(rng.standard_normal((5, width_in, width_out)), rounded_to)
    products = jax.jit(batched_matmul)(rows_NRD, pack(matrices_NDF, axis=1) if packed else matrices_NDF)
    matrices = round_to_bfloat16(matrices_NDF) if packed else matrices_NDF.astype(jnp.float32)
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, np.asarray(rows_NRD) @ np.asarray(matrices), rtol=1e-5, atol=1e-4)


def test_an_entry_is_written_where_two_are_packed_and_its_neighbour_stays():
    rng = np.random.default_rng(0)
    array, entries = (rng.standard_normal((3, length, 5), np.float32) for length in (6, 1))
    for place, written in [(0, 0), (3, 3), (5, 5), (8, 5)]:
        expected = array.copy()
        expected[:, written : written + 1] = entries
        packed = jax.jit(write_packed, static_argnames="axis")(pack(jnp.array(array), 1), entries, place, axis=1)
        np.testing.assert_array_equal(packed, pack(jnp.array(expected), 1))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU gets products as they are")
def test_a_cpu_multiplies_for_a_matrix_gradient_without_transposing_the_rows():
    rows, matrix = make_operands(8, 5, 3)
    gradients = jax.jit(lambda rows, matrix: jax.vjp(matmul, rows, matrix)[1](jnp.ones((1, 3, 5))))
    assert "transpose" not in gradients.lower(rows, matrix).as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU gets products in bf16 as they are")
def test_a_cpu_gets_products_of_bfloat16_with_results_in_float32():
    rows, matrix = make_operands(8, 5, 2, "bfloat16")
    lowered = jax.jit(lambda rows, matrix: rounded_einsum("BTD,DF->BTF", rows, matrix)).lower(rows, matrix).as_text()
    assert "(tensor<1x2x8xbf16>, tensor<8x5xbf16>) -> tensor<1x2x5xf32>" in lowered


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64,), (3, 12), (2, 1), (7,)])
def test_sums_of_outer_products_are_the_plain_ones(shape, dtype):
    """Also where the rows do not divide into 8 pieces."""
    rng = np.random.default_rng(0)
    left, right = (jnp.array(rng.standard_normal((*shape, width)), dtype) for width in (5, 6))
    sums = sum_outer_products(left, right)
    assert sums.dtype == jnp.float32
    plain = np.swapaxes(left.astype(jnp.float32), -1, -2) @ np.asarray(right.astype(jnp.float32))
    np.testing.assert_allclose(sums, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU multiplies bf16 as it is")
def test_a_cpu_sums_outer_products_of_bfloat16_without_converting_them():
    left, right = jnp.ones((512, 64), jnp.bfloat16), jnp.ones((512, 128), jnp.bfloat16)

    def conversions(function):
        return str(jax.jit(function).lower(left, right).compile().as_text()).count("convert(")

    assert conversions(sum_outer_products) == 0
    # That says something: the plain form converts both.
    plain = functools.partial(jnp.einsum, "NX,NY->XY", preferred_element_type=jnp.float32)
    assert conversions(plain) == 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU multiplies bf16 as it is")
def test_a_cpu_sums_outer_products_of_bfloat16_without_a_copy_of_the_right_operand():
    left, right = jnp.ones((512, 64), jnp.bfloat16), jnp.ones((512, 128), jnp.bfloat16)

    def copied(function):
        text = str(jax.jit(function).lower(left, right).compile().as_text())
        return sorted(re.findall(r"= bf16\[([\d,]+)\]\S* copy\(", text))

    assert copied(sum_outer_products) == ["64,8,64"]

    def in_the_order_of_einsum(left, right):
        pieces = left.reshape(8, 64, 64), right.reshape(8, 64, 128)
        return jnp.einsum("PNX,PNY->XY", *pieces, preferred_element_type=jnp.float32)

    assert len(copied(in_the_order_of_einsum)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_are_split_and_their_gradients_joined(dtype):
    array = jnp.array(np.random.default_rng(0).standard_normal((2, 3, 9)), dtype)

    def split(array):
        return jnp.split(array, [4, 6], axis=-1)

    parts, gradients = jax.vjp(functools.partial(split_columns, widths=(4, 2, 3)), array)
    plain, plain_gradients = jax.vjp(split, array)
    grads = [jnp.cos(part) for part in plain]
    for ours, expected in zip((*parts, *gradients(grads)), (*plain, *plain_gradients(grads)), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU moves bf16 as it is")
def test_a_cpu_joins_gradients_in_bfloat16_as_they_are():
    array = jnp.ones((4, 8), jnp.bfloat16)

    def arrays_in_float32(join):
        parts = array[:, :4], array[:, 4:]
        return str(jax.jit(join).lower(*parts).compile().as_text()).count("f32[4,8]")

    def ours(left, right):
        return jax.vjp(lambda array: split_columns(array, (4, 4)), array)[1]([left, right])

    def in_float32(left, right):
        return jnp.concatenate([left.astype(jnp.float32), right.astype(jnp.float32)], axis=-1)

    assert arrays_in_float32(ours) == 0 < arrays_in_float32(in_float32)


def lower_for_a_gpu(monkeypatch, function, *arrays):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("num_rows", "result"), [(1, "1x1x96xf32"), (3, "1x3x96xbf16")])
def test_a_gpu_multiplies_a_single_row_into_float32(num_rows, result, monkeypatch):
    rows, matrix = make_operands(448, 96, num_rows, "bfloat16")
    lowered = lower_for_a_gpu(monkeypatch, matmul, rows, matrix)
    assert re.findall(r"dot_general .* -> tensor<(\w+)>", lowered) == [result]


def test_a_gpu_joins_gradients_before_any_product_reads_them(monkeypatch):
    array = jnp.ones((4, 8), jnp.bfloat16)

    def gradients(left, right):
        return jax.vjp(lambda array: split_columns(array, (4, 4)), array)[1]([left, right])

    lowered = lower_for_a_gpu(monkeypatch, gradients, array[:, :4], array[:, 4:])
    assert re.findall(r"concatenate|optimization_barrier", lowered) == ["concatenate", "optimization_barrier"]
