import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinystories_jax.model import attention
from tinystories_jax.model.attention import causal_attention


def make_inputs(length, num_rows=2):
    """Queries, keys, values and gradients of what is attended: 4 query heads of width 8, 2 of keys and values."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((num_rows, length, num_heads, 8) for num_heads in (4, 2, 2, 4))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain_attention(queries, keys, values):
    return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="xla")


def gradients(attention, inputs, grads):
    return jax.jit(lambda: jax.vjp(attention, *inputs)[1](grads))()


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 1), (16, 4), (700, 4), (1300, 5), (4096, 16), (5000, 16)])
def test_a_long_text_has_more_blocks_up_to_a_limit(length, num_blocks):
    blocks = attention._blocks(length)
    assert len(blocks) == num_blocks
    assert [position for start, end in blocks for position in range(start, end)] == list(range(length))


# Up to four blocks of the true length, and five of a shorter one as a text of 1,300 tokens has.
@pytest.mark.parametrize(("length", "block_length"), [*((n, 256) for n in (1, 3, 16, 21, 700)), (22, 4)])
def test_attention_in_blocks_is_attention(length, block_length, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_LENGTH", block_length)
    *inputs, grads = make_inputs(length)
    np.testing.assert_allclose(causal_attention(*inputs), plain_attention(*inputs), atol=2e-6)
    for ours, plain in zip(
        gradients(causal_attention, inputs, grads), gradients(plain_attention, inputs, grads), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=5e-6)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 6])
def test_in_bfloat16_attention_and_its_gradients_stay_near_float32(num_rows):
    """A CPU attends in two groups of rows where they divide."""
    *inputs, grads = make_inputs(64, num_rows)
    rounded = [array.astype(jnp.bfloat16) for array in (*inputs, grads)]
    exact = [array.astype(jnp.float32) for array in rounded]
    ours = [causal_attention(*rounded[:3]), *gradients(causal_attention, rounded[:3], rounded[3])]
    plain = [plain_attention(*exact[:3]), *gradients(plain_attention, exact[:3], exact[3])]
    for rounded_array, exact_array in zip(ours, plain, strict=True):
        assert rounded_array.dtype == jnp.bfloat16
        error = np.linalg.norm(rounded_array.astype(jnp.float32) - exact_array)
        assert error < 0.01 * np.linalg.norm(exact_array)  # bf16 rounds to 1 part in 256
