"""The decoder against its definition: causality, cached decoding, dtypes, counts, and Hugging Face's Llama."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from tests.lowered import text_as_called
from tests.tiny import make_empty_cache
from tinystories_jax.config import ModelConfig
from tinystories_jax.model import transformer
from tinystories_jax.model.transformer import (
    Params,
    decode_step,
    decode_weights,
    forward,
    init_params,
    num_params,
    prefill,
    uses_flash_attention,
)

CONFIG = ModelConfig(
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    rope_theta=10_000.0,
    tie_embeddings=True,
    dropout=0.0,
    dtype="float32",
    remat=False,
    head_dim=8,
    vocab_size=97,
)


IN_FLOAT32 = {"rounded_to": "float32", "kept_as": "float32"}


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module", name="tokens_BT")
def make_tokens():
    return jax.random.randint(jax.random.key(1), (3, 20), 0, CONFIG.vocab_size)


def llama_in_numpy(params, tokens_BT, config):
    """Llama's forward pass in float64, written from its definition and independent of the code under test."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch, length = tokens_BT.shape
    half = config.head_dim // 2

    def norm(x, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer["scale"]

    def rotate(x_BTHK):
        angles = np.arange(length)[:, None] / config.rope_theta ** (np.arange(half) / half)
        turn = np.exp(1j * angles)[None, :, None]
        turned = (x_BTHK[..., :half] + 1j * x_BTHK[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = params["embed_tokens"]["embedding"][np.asarray(tokens_BT)]
    for layer in params["layers"].values():
        attention, mlp = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"])
        q, k, v = (
            (h @ attention[f"{name}_proj"]["kernel"]).reshape(batch, length, -1, config.head_dim) for name in "qkv"
        )
        k, v = (np.repeat(a, config.num_heads // config.num_kv_heads, axis=2) for a in (rotate(k), v))
        scores = np.einsum("BTHK,BSHK->BHTS", rotate(q), k) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("BHTS,BSHK->BTHK", weights, v).reshape(batch, length, -1)
        x = x + mixed @ attention["o_proj"]["kernel"]
        h = norm(x, layer["post_attention_layernorm"])
        gate = h @ mlp["gate_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
    output_VD = params["embed_tokens"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"].T
    return norm(x, params["norm"]) @ output_VD.T


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_forward_pass_is_llamas(tie_embeddings, tokens_BT):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    # Scaled up and off one: at initialisation attention is nearly flat and norm scales are all 1.
    params = jax.tree.map(lambda leaf: leaf * 5 + 0.1, init_params(config, jax.random.key(7)))
    np.testing.assert_allclose(
        forward(params, tokens_BT, config), llama_in_numpy(params, tokens_BT, config), rtol=1e-3, atol=1e-3
    )


def test_a_future_token_leaves_past_logits_bit_identical(params, tokens_BT):
    changed_BT = tokens_BT.at[:, 11].set((tokens_BT[:, 11] + 1) % CONFIG.vocab_size)
    logits_BTV, changed_BTV = forward(params, tokens_BT, CONFIG), forward(params, changed_BT, CONFIG)
    np.testing.assert_array_equal(logits_BTV[:, :11], changed_BTV[:, :11])
    assert not np.allclose(logits_BTV[:, 11:], changed_BTV[:, 11:])


def test_the_past_reaches_every_later_logit(params, tokens_BT):
    changed_BT = tokens_BT.at[:, 0].set((tokens_BT[:, 0] + 1) % CONFIG.vocab_size)
    difference_BTV = forward(params, tokens_BT, CONFIG) - forward(params, changed_BT, CONFIG)
    assert (jnp.abs(difference_BTV).max(axis=-1) > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(dtype, tokens_BT):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = init_params(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert forward(params, tokens_BT, config).dtype == jnp.float32
    weights = decode_weights(params, config, rounded_to=dtype, kept_as=dtype)
    _, cache = prefill(weights, tokens_BT[:1], jnp.array([4]), config, cache_length=tokens_BT.shape[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(dtype)}


def test_bfloat16_stays_near_float32(params, tokens_BT):
    logits_BTV = forward(params, tokens_BT, CONFIG)
    rounded_BTV = forward(params, tokens_BT, dataclasses.replace(CONFIG, dtype="bfloat16"))
    # bf16 keeps 8 significant bits; these logits are of order 0.1.
    assert 0 < float(jnp.abs(logits_BTV - rounded_BTV).max()) < 0.02


def test_swiglu_and_its_gradient_in_bfloat16_are_rounded_once():
    rng = np.random.default_rng(0)
    rounded = [jnp.array(rng.standard_normal((64, width)), jnp.bfloat16) for width in (96, 48)]
    exact = [array.astype(jnp.float32) for array in rounded]

    def gate(gate_and_up, grads):
        gated, gradient = jax.vjp(transformer._gate, gate_and_up)
        return gated, *gradient(grads)

    for once, plain in zip(gate(*rounded), gate(*exact), strict=True):
        assert once.dtype == jnp.bfloat16
        np.testing.assert_allclose(once.astype(jnp.float32), plain, rtol=2**-8, atol=1e-6)


def test_bfloat16_gradients_of_a_frequent_token_do_not_lose_their_tail(params):
    """4,096 equal contributions to one row: a sum in bf16 stops growing after a few hundred."""
    tokens_BT = jnp.full((64, 64), 5)

    def row_gradient(dtype):
        config = dataclasses.replace(CONFIG, dtype=dtype, tie_embeddings=False)
        untied = init_params(config, jax.random.key(0))
        grads = jax.grad(lambda p: forward(p, tokens_BT, config)[..., 7].sum())(untied)
        return np.asarray(grads["embed_tokens"]["embedding"][5])

    exact, rounded = row_gradient("float32"), row_gradient("bfloat16")
    assert np.linalg.norm(exact - rounded) < 0.05 * np.linalg.norm(exact)


class Device(NamedTuple):
    platform: str = "gpu"
    client: Any = SimpleNamespace(platform_version="cuda 12090")
    compute_capability: str = "9.0"


@pytest.mark.parametrize(
    ("device", "changes", "length", "expected"),
    [
        (Device(), {}, 16, True),
        (Device(), {}, 13, False),
        (Device(compute_capability="7.5"), {}, 16, False),
        (Device(platform="cpu"), {}, 16, False),
        (Device(client=SimpleNamespace(platform_version="rocm 60000"), compute_capability="gfx90a"), {}, 16, False),
        (Device(), {"dtype": "float32"}, 16, False),
        (Device(), {"head_dim": 20}, 16, False),
        (Device(), {"head_dim": 136}, 16, False),
    ],
)
def test_flash_attention_is_asked_for_only_where_it_runs(device, changes, length, expected):
    config = dataclasses.replace(CONFIG, **({"dtype": "bfloat16"} | changes))
    assert uses_flash_attention(config, length, device) is expected


@pytest.mark.parametrize(("length", "calls_per_layer"), [(16, 1), (13, 0)])
def test_each_layer_calls_flash_attention_forward_and_backward(length, calls_per_layer, monkeypatch):
    """Lowered for a CUDA device, which takes none; whether it runs there is asserted by the benchmark."""
    monkeypatch.setattr(
        transformer, "uses_flash_attention", lambda config, length, _: uses_flash_attention(config, length, Device())
    )
    # The one thing that JAX asks of the machine while it lowers.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tokens_BT = jnp.zeros((2, length), jnp.int32)

    def lowered(function: Callable[[Params], Any]) -> str:
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        return text_as_called(jax.jit(function).trace(params).lower(lowering_platforms=("cuda",)))

    def loss(params: Params) -> jax.Array:
        return forward(params, tokens_BT, config).mean()

    for function, times in ((loss, 1), (jax.grad(loss), 2)):
        calls = len(re.findall(r"custom_call @__cudnn\$fmha\w*", lowered(function)))
        assert calls == times * calls_per_layer * config.num_layers


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_cached_decoding_equals_the_full_forward_for_unequal_prompts(tie_embeddings, num_kv_heads, tokens_BT):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings, num_kv_heads=num_kv_heads)
    params = init_params(config, jax.random.key(2))
    weights = decode_weights(params, config, **IN_FLOAT32)
    full_BTV = forward(params, tokens_BT, config)
    rows, lengths_B = jnp.arange(3), jnp.array([1, 12, 7])
    logits_BV, cache = prefill(weights, tokens_BT[:, :12], lengths_B, config, cache_length=20)
    np.testing.assert_allclose(logits_BV, full_BTV[rows, lengths_B - 1], atol=2e-6)
    for positions_B in (lengths_B + step for step in range(8)):
        logits_BV, cache = decode_step(weights, tokens_BT[rows, positions_B], positions_B, cache, config)
        np.testing.assert_allclose(logits_BV, full_BTV[rows, positions_B], atol=2e-6)


def test_decoding_from_an_empty_cache_equals_the_full_forward(params, tokens_BT):
    cache, weights = make_empty_cache(CONFIG, 3, 20), decode_weights(params, CONFIG, **IN_FLOAT32)
    full_BTV = forward(params, tokens_BT, CONFIG)
    for position in range(4):
        positions_B = jnp.full(3, position)
        logits_BV, cache = decode_step(weights, tokens_BT[:, position], positions_B, cache, CONFIG)
        np.testing.assert_allclose(logits_BV, full_BTV[:, position], atol=2e-6)


def test_remat_changes_neither_loss_nor_gradient(params, tokens_BT):
    def gradient(remat):
        config = dataclasses.replace(CONFIG, remat=remat, dropout=0.2)
        return jax.grad(lambda p: forward(p, tokens_BT, config, dropout_key=jax.random.key(3)).var())(params)

    for plain, recomputed in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(plain, recomputed, atol=1e-7)


@pytest.mark.parametrize("remat", [False, True])
def test_one_layer_is_traced_for_all_and_anew_in_each_program(remat, tokens_BT, monkeypatch):
    run_layer, traced = transformer._run_layer, []

    def counting(*arguments, **named):
        traced.append(arguments)
        return run_layer(*arguments, **named)

    monkeypatch.setattr(transformer, "_run_layer", counting)
    config = dataclasses.replace(CONFIG, num_layers=5, dropout=0.5, remat=remat)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def loss(params: Params) -> jax.Array:
        return forward(params, tokens_BT, config, dropout_key=jax.random.key(1)).mean()

    for programs in (1, 2):
        jax.eval_shape(jax.grad(loss), params)
        assert len(traced) == programs


def test_one_layer_is_traced_for_all_of_a_step_of_writing_too(monkeypatch):
    cached, traced = transformer.DecoderLayer.cached, []

    def counting(*arguments):
        traced.append(arguments)
        return cached(*arguments)

    monkeypatch.setattr(transformer.DecoderLayer, "cached", counting)
    config = dataclasses.replace(CONFIG, num_layers=5)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    weights = jax.eval_shape(lambda params: decode_weights(params, config, **IN_FLOAT32), params)
    for programs in (1, 2):
        step = functools.partial(decode_step, config=config)
        jax.eval_shape(step, weights, jnp.array([3]), jnp.array([0]), make_empty_cache(config, 1, 20))
        assert len(traced) == programs


def test_dropout_acts_only_with_a_key_and_depends_on_it(params, tokens_BT):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    plain_BTV = forward(params, tokens_BT, config)
    np.testing.assert_array_equal(plain_BTV, forward(params, tokens_BT, CONFIG))
    one_BTV = forward(params, tokens_BT, config, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(one_BTV, forward(params, tokens_BT, config, dropout_key=jax.random.key(1)))
    assert not np.allclose(one_BTV, plain_BTV)
    assert not np.allclose(one_BTV, forward(params, tokens_BT, config, dropout_key=jax.random.key(2)))


def test_initial_parameters_depend_on_the_key_alone():
    one, same, other = (init_params(CONFIG, jax.random.key(seed)) for seed in (5, 5, 6))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
    assert not np.array_equal(one["embed_tokens"]["embedding"], other["embed_tokens"]["embedding"])


def test_every_matrix_has_the_key_that_flax_would_give_it(params):
    rngs = nnx.Rngs(jax.random.key(0))
    model = transformer.Transformer(CONFIG, rngs=rngs)
    made = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert all(map(np.array_equal, jax.tree.leaves(made), jax.tree.leaves(params)))


def test_the_shapes_of_hundreds_of_layers_are_counted_without_delay():
    counted = [num_params(dataclasses.replace(CONFIG, num_layers=layers)) for layers in (1, 2)]
    began = time.perf_counter()
    deep = num_params(dataclasses.replace(CONFIG, num_layers=300))
    assert deep == counted[0] + 299 * (counted[1] - counted[0])
    assert time.perf_counter() - began < 20  # it took a minute when JAX was asked for the counter of the keys


def test_num_params_counts_what_is_made(params):
    assert num_params(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(params))
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    assert num_params(untied) == num_params(CONFIG) + CONFIG.vocab_size * CONFIG.d_model


def test_a_second_forward_of_the_same_shape_compiles_nothing(params, tokens_BT):
    # Of a function of its own: what JAX compiled of `forward` itself it counts over all tests of a process.
    step: Any = jax.jit(lambda params, tokens_BT, config: forward(params, tokens_BT, config), static_argnames="config")
    step(params, tokens_BT, CONFIG)
    step(params, tokens_BT + 0, dataclasses.replace(CONFIG))
    assert step._cache_size() == 1
