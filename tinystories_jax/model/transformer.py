"""The decoder: Llama's own maths, with Flax NNX confined to this file.

Callers see plain functions over a pytree of float32 arrays (`params`, nested dicts named as in Hugging Face's
LlamaForCausalLM): `init_params`, `forward` for training; `decode_weights`, `prefill` and `decode_step` for generating.

Shape suffixes, here and wherever arrays carry them: B batch, T query positions, S key positions (cache length),
D model width, H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary, X the output widths
of several matrices side by side, N rows and key/value heads as one axis, R query heads that share a key/value head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinystories_jax.config import ModelConfig
from tinystories_jax.model.attention import causal_attention, uses_flash_attention
from tinystories_jax.model.matmul import (
    Matrix,
    batched_matmul,
    is_packed,
    keep_matrix,
    matmul,
    matmul_into_float32,
    pack,
    split_columns,
    write_packed,
)

Params = dict[str, Any]
Array = jax.Array | np.ndarray

_INIT_STD = 0.02
_INIT_OWN_SHARE = 0.03
_NORM_EPSILON = 1e-5


class LayerCache(NamedTuple):
    """Keys and values of one layer, packed along axis 1 (model/matmul.py), which their matmuls sum over, or not.
    Slots stand last in keys and inner in values: the layouts that the two matmuls of a decode step read in order. Rows
    and heads are one axis N = B x G, since XLA copies a cache with an axis of length 1 before it writes into it, and
    one row is what is written most."""

    keys_NKS: jax.Array
    values_NSK: jax.Array


class KVCache(NamedTuple):
    """What a decode step has to know of the tokens before. A token's slot is not its position: the next token of every
    row goes into the same slot, so that it is written in place, whatever the lengths of the prompts. `seen_BS` is True
    for the slots that hold a token of the row; `next_slot` is a scalar."""

    layers: list[LayerCache]
    seen_BS: jax.Array
    next_slot: jax.Array


class LayerKernels(NamedTuple):
    """The matrices of one layer as its matmuls take them. Those that multiply the same vectors (queries, keys and
    values; gate and up) stand side by side, for one large matmul in place of several."""

    attention_in_DX: Matrix
    attention_out_DD: Matrix
    feed_forward_in_DX: Matrix
    feed_forward_out_FD: Matrix


class DecodeWeights(NamedTuple):
    """What generation reads besides the cache: all matrices in the form their matmuls read, made once for all tokens,
    since making them takes as long as a token or two. Of `params` only vectors are read, and rows of the embedding."""

    params: Params
    layers: list[LayerKernels]
    output_DV: Matrix


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Returns fresh float32 parameters: matrices normal(0, 0.02), but for two kinds.

    Those that write into the residual stream are smaller by 1 / sqrt(2 num_layers) (GPT-2, Radford et al. 2019, section
    2.3). Embeddings are as large as they can be while the loss still starts near ln V (see `_embedding_std`).
    """
    model = Transformer(config, rngs=_rngs(key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def forward(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, *, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Returns float32 logits_BTV for int32 tokens_BT; position t sees positions <= t only.

    Dropout acts when `dropout_key` is given and config.dropout > 0.
    """
    hidden_BTD, output_DV = hidden_and_output(params, tokens_BT, config, dropout_key=dropout_key)
    return logits(hidden_BTD, output_DV)


def hidden_and_output(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, *, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns hidden_BTD and output_DV, in the activations' dtype, whose matmul gives the logits of `forward`."""
    model = _bind(params, config)
    hidden_BTD, _ = model.hidden(tokens_BT, dropout_key=dropout_key)
    return hidden_BTD, model.output_matrix(config.dtype)


def logits(hidden: jax.Array, output_DV: Matrix) -> jax.Array:
    """Returns float32 logits (..., V), whatever the activations are."""
    return matmul_into_float32(hidden, output_DV)


@functools.partial(jax.jit, static_argnames=("config", "rounded_to", "kept_as"))
def decode_weights(params: Params, config: ModelConfig, *, rounded_to: str, kept_as: str) -> DecodeWeights:
    """Returns what `prefill` and `decode_step` take, with matrices as `matmul.keep_matrix` keeps them."""
    model = _bind(params, config)
    keep = functools.partial(keep_matrix, rounded_to=rounded_to, kept_as=kept_as)
    layers = [jax.tree.map(keep, layer.kernels("float32")) for layer in model.layers]
    return DecodeWeights(params, layers, keep(model.output_matrix("float32")))


def prefill(
    weights: DecodeWeights,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    config: ModelConfig,
    *,
    cache_length: int,
    packs_cache: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Returns float32 logits_BV after each prompt's last token, and the cache that holds the prompts.

    `tokens_BT` is padded on the right; `lengths_B` counts the real tokens, at least 1. The padding has slots of its
    own, which are never seen; `cache_length` is T and room for what is to be written. The cache is packed
    (model/matmul.py) or in the activations' dtype.
    """
    model = _bind(weights.params, config)
    hidden_BTD, keys_and_values = model.hidden(tokens_BT, weights.layers)
    layers = []
    for keys_BTGK, values_BTGK in keys_and_values:
        keys_BGKT, values_BGTK = jnp.transpose(keys_BTGK, (0, 2, 3, 1)), jnp.swapaxes(values_BTGK, 1, 2)
        layers.append(LayerCache(_join_heads(keys_BGKT), _join_heads(values_BGTK)))
    prompt_length = tokens_BT.shape[1]
    seen_BS = jnp.arange(prompt_length)[None] < lengths_B[:, None]
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    cache = grow_kv_cache(KVCache(layers, seen_BS, jnp.int32(prompt_length)), cache_length)
    if packs_cache:
        cache = cache._replace(layers=[LayerCache(*(pack(array, axis=1) for array in layer)) for layer in cache.layers])
    return logits(last_BD, weights.output_DV), cache


def decode_step(
    weights: DecodeWeights, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    """Returns float32 logits_BV for what follows `tokens_B`, which stand at `positions_B`, and the cache with them.

    The cache must have room: beyond its last slot, that one is written again.
    """
    model = _bind(weights.params, config)
    hidden_BTD, cache = model.hidden_cached(tokens_B[:, None], positions_B, cache, weights.layers)
    return logits(hidden_BTD[:, 0], weights.output_DV), cache


def grow_kv_cache(cache: KVCache, cache_length: int) -> KVCache:
    """Returns the cache with empty slots behind the others, `cache_length` in all, or one more where that is odd."""
    num_slots = cache_length + cache_length % 2  # packed values hold two to a word

    def grow(array: jax.Array, axis: int, length: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, length - array.shape[axis])
        return jnp.pad(array, widths)

    layers = [
        LayerCache(
            keys_NKS=grow(layer.keys_NKS, 2, num_slots),
            values_NSK=grow(layer.values_NSK, 1, num_slots // 2 if is_packed(layer.values_NSK) else num_slots),
        )
        for layer in cache.layers
    ]
    return cache._replace(layers=layers, seen_BS=grow(cache.seen_BS, 1, num_slots))


def num_params(config: ModelConfig) -> int:
    """Returns the count of parameters, from the shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(_abstract_model(config)[1])))


@functools.lru_cache(maxsize=8)
def _abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """Returns the graph definition and the state's shapes: what `_bind` needs to give arrays their modules back."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=_rngs(jax.random.key(0))))
    return nnx.split(model)


class _Keys:
    """Gives modules a key for each of their arrays, the same ones as `nnx.Rngs`, of which they ask nothing else.

    Flax counts in an array and asks for its sharding at each key. A traced array has none, and JAX goes through all
    that has been traced to say why: quadratic time, minutes for hundreds of layers.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def _rngs(key: jax.Array) -> nnx.Rngs:
    return cast(nnx.Rngs, _Keys(key))


def _bind(params: Params, config: ModelConfig) -> "Transformer":
    graph_definition, shapes = _abstract_model(config)
    state = jax.tree.map(lambda leaf: leaf, shapes)  # a copy: replacing works in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph_definition, state)


class Transformer(nnx.Module):
    """Embedding, pre-norm decoder layers, final norm, output matrix (the embedding itself when tied)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=_normal(_embedding_std(config)),
            rngs=rngs,
        )
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _rms_norm(config, rngs)
        if not config.tie_embeddings:
            self.lm_head = _linear(config.d_model, config.vocab_size, rngs)

    def hidden(
        self,
        tokens_BT: jax.Array,
        kernels: list[LayerKernels] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Returns normalised hidden_BTD, and each layer's keys_BTGK (rotated) and values_BTGK; from the layers' own
        kernels where none are given."""
        hidden_BTD = self._embed(tokens_BT)
        rotation = _rotation(tokens_BT.shape[1], self.config)
        keys_and_values = []
        given = kernels or [None] * len(self.layers)
        run = _trace_once(_run_layer, rotation=rotation)
        if self.config.remat:
            run = jax.checkpoint(run)
        for index, (layer, layer_kernels) in enumerate(zip(self.layers, given, strict=True)):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            hidden_BTD, layer_keys_and_values = run(layer, layer_kernels, hidden_BTD, key)
            keys_and_values.append(layer_keys_and_values)
        return self.norm(hidden_BTD), keys_and_values

    def hidden_cached(
        self, tokens_BT: jax.Array, positions_B: jax.Array, cache: KVCache, kernels: list[LayerKernels]
    ) -> tuple[jax.Array, KVCache]:
        """Returns normalised hidden_BTD of one new token a row (T = 1) and the cache with its keys and values."""
        hidden_BTD = self._embed(tokens_BT)
        slot = cache.next_slot
        # No position is beyond the slots.
        cosines, sines = _rotation(cache.seen_BS.shape[1], self.config)
        rotation = jnp.asarray(cosines[0])[positions_B, None], jnp.asarray(sines[0])[positions_B, None]
        seen_BS = jax.lax.dynamic_update_slice_in_dim(cache.seen_BS, jnp.ones_like(tokens_BT, bool), slot, axis=1)
        seen_NS = jnp.repeat(seen_BS, self.config.num_kv_heads, axis=0)
        new_layers = []
        run = _trace_once(DecoderLayer.cached)
        for layer, layer_kernels, layer_cache in zip(self.layers, kernels, cache.layers, strict=True):
            hidden_BTD, layer_cache = run(layer, hidden_BTD, rotation, slot, seen_NS, layer_cache, layer_kernels)
            new_layers.append(layer_cache)
        return self.norm(hidden_BTD), KVCache(new_layers, seen_BS, slot + 1)

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        # Rows first, then the cast: the other way round their gradients add up in bf16, where the thousandth "the" of a
        # batch is too small to count.
        return self.embed_tokens.embedding[...][tokens_BT].astype(self.config.dtype)

    def output_matrix(self, dtype: str) -> jax.Array:
        """Returns output_DV: the embedding itself when tied."""
        matrix_DV = self.embed_tokens.embedding[...].T if self.config.tie_embeddings else self.lm_head.kernel[...]
        return matrix_DV.astype(dtype)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.input_layernorm = _rms_norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _rms_norm(config, rngs)
        self.mlp = FeedForward(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        rotation: tuple[Array, Array],
        kernels: LayerKernels,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        attended_BTD, keys_and_values = self.self_attn(self.input_layernorm(hidden_BTD), rotation, kernels)
        hidden_BTD = hidden_BTD + self._drop(attended_BTD, dropout_key, 0)
        fed_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD), kernels)
        return hidden_BTD + self._drop(fed_BTD, dropout_key, 1), keys_and_values

    def cached(
        self,
        hidden_BTD: jax.Array,
        rotation: tuple[Array, Array],
        slot: jax.Array,
        seen_NS: jax.Array,
        cache: LayerCache,
        kernels: LayerKernels,
    ) -> tuple[jax.Array, LayerCache]:
        attended_BTD, cache = self.self_attn.cached(
            self.input_layernorm(hidden_BTD), rotation, slot, seen_NS, cache, kernels
        )
        hidden_BTD = hidden_BTD + attended_BTD
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD), kernels), cache

    def kernels(self, dtype: str) -> LayerKernels:
        """Returns the layer's own matrices."""

        def join(*layers: nnx.Linear) -> jax.Array:
            return jnp.concatenate([layer.kernel[...].astype(dtype) for layer in layers], axis=1)

        attention, mlp = self.self_attn, self.mlp
        return LayerKernels(
            attention_in_DX=join(attention.q_proj, attention.k_proj, attention.v_proj),
            attention_out_DD=join(attention.o_proj),
            feed_forward_in_DX=join(mlp.gate_proj, mlp.up_proj),
            feed_forward_out_FD=join(mlp.down_proj),
        )

    def _drop(self, hidden_BTD: jax.Array, key: jax.Array | None, branch: int) -> jax.Array:
        if key is None:
            return hidden_BTD
        return self.dropout(hidden_BTD, deterministic=False, rngs=jax.random.fold_in(key, branch))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; several query heads may share one key/value head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config.d_model, query_width, rngs)
        self.k_proj = _linear(config.d_model, kv_width, rngs)
        self.v_proj = _linear(config.d_model, kv_width, rngs)
        self.o_proj = _linear(query_width, config.d_model, rngs, std=_residual_std(config))

    def __call__(
        self, hidden_BTD: jax.Array, rotation: tuple[Array, Array], kernels: LayerKernels
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        queries_BTHK, keys_BTGK, values_BTGK = self._project(hidden_BTD, rotation, kernels)
        if uses_flash_attention(self.config, hidden_BTD.shape[1], jax.devices()[0]):
            attended_BTHK = jax.nn.dot_product_attention(
                queries_BTHK, keys_BTGK, values_BTGK, is_causal=True, implementation="cudnn"
            )
        else:
            attended_BTHK = causal_attention(queries_BTHK, keys_BTGK, values_BTGK)
        return self._output(attended_BTHK, kernels), (keys_BTGK, values_BTGK)

    def cached(
        self,
        hidden_BTD: jax.Array,
        rotation: tuple[Array, Array],
        slot: jax.Array,
        seen_NS: jax.Array,
        cache: LayerCache,
        kernels: LayerKernels,
    ) -> tuple[jax.Array, LayerCache]:
        queries_BTHK, keys_BTGK, values_BTGK = self._project(hidden_BTD, rotation, kernels)
        cache = _write(cache, _join_heads(keys_BTGK[:, 0]), _join_heads(values_BTGK[:, 0]), slot)
        # R query heads share a key/value head; they stand next to each other, as in Llama.
        queries_NRK = queries_BTHK.reshape(cache.keys_NKS.shape[0], -1, self.config.head_dim)
        scores_NRS = batched_matmul(queries_NRK, cache.keys_NKS)
        scores_NRS = jnp.where(seen_NS[:, None], scores_NRS * self.config.head_dim**-0.5, -jnp.inf)
        # Softmax in float32: bf16 has 8 significant bits, and the tail is what sampling draws from.
        weights_NRS = jax.nn.softmax(scores_NRS, axis=-1).astype(hidden_BTD.dtype)
        attended_NRK = batched_matmul(weights_NRS, cache.values_NSK).astype(hidden_BTD.dtype)
        return self._output(attended_NRK.reshape(queries_BTHK.shape), kernels), cache

    def _project(
        self, hidden_BTD: jax.Array, rotation: tuple[Array, Array], kernels: LayerKernels
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = (*hidden_BTD.shape[:2], -1, self.config.head_dim)
        query_width = self.config.num_heads * self.config.head_dim
        kv_width = self.config.num_kv_heads * self.config.head_dim
        projected_BTX = matmul(hidden_BTD, kernels.attention_in_DX)
        queries, keys, values = split_columns(projected_BTX, (query_width, kv_width, kv_width))
        return _rotate(queries.reshape(heads), rotation), _rotate(keys.reshape(heads), rotation), values.reshape(heads)

    def _output(self, attended_BTHK: jax.Array, kernels: LayerKernels) -> jax.Array:
        return matmul(attended_BTHK.reshape(*attended_BTHK.shape[:2], -1), kernels.attention_out_DD)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(config.d_model, config.d_ff, rngs)
        self.up_proj = _linear(config.d_model, config.d_ff, rngs)
        self.down_proj = _linear(config.d_ff, config.d_model, rngs, std=_residual_std(config))

    def __call__(self, hidden_BTD: jax.Array, kernels: LayerKernels) -> jax.Array:
        # The backward pass computes what is between the matmuls again, which takes less time than to read it.
        gated_BTF = jax.checkpoint(_gate)(matmul(hidden_BTD, kernels.feed_forward_in_DX))
        return matmul(gated_BTF, kernels.feed_forward_out_FD)


def _gate(gate_and_up_BTX: jax.Array) -> jax.Array:
    width = gate_and_up_BTX.shape[-1] // 2
    gate_BTF, up_BTF = split_columns(gate_and_up_BTX, (width, width))
    # In float32 and rounded once: a CPU would convert to bf16 and back after each operation.
    gated_BTF = jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)
    return gated_BTF.astype(gate_and_up_BTX.dtype)


def _trace_once(run_layer: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
    """Returns the function of a layer, jitted: all layers of a program that call it are traced as one.

    A new function each time, so that JAX keeps no trace from one program to the next: what a test replaces in between
    would not be seen.
    """
    return jax.jit(functools.partial(run_layer, **constants))


def _run_layer(
    layer: DecoderLayer,
    kernels: LayerKernels | None,
    hidden_BTD: jax.Array,
    dropout_key: jax.Array | None,
    *,
    rotation: tuple[Array, Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Made in here, so that remat makes them again and keeps no copy.
    kernels = layer.kernels(layer.config.dtype) if kernels is None else kernels
    return layer(hidden_BTD, rotation, kernels, dropout_key)


def _embedding_std(config: ModelConfig) -> float:
    # The residual stream starts as the embedding of the token just read, so with tied embeddings that very token starts
    # with a logit of about std x d_model while all others are near 0. This std lets it outweigh 3 % of the vocabulary:
    # larger embeddings learn faster, and still larger ones would start by predicting every word twice.
    return math.log(max(_INIT_OWN_SHARE * config.vocab_size, 1.5)) / config.d_model


def _residual_std(config: ModelConfig) -> float:
    return _INIT_STD / (2 * config.num_layers) ** 0.5


def _rms_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=_NORM_EPSILON, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _linear(width_in: int, width_out: int, rngs: nnx.Rngs, std: float = _INIT_STD) -> nnx.Linear:
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=_normal(std), rngs=rngs)


def _normal(std: float) -> nnx.Initializer:
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: _draw_normal(key, shape, dtype, std)


# A program for each shape, which all matrices of it share: XLA takes two to three times as long to compile one that
# draws every matrix.
@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * std


def _rotation(num_positions: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 cosines and sines (1, T, 1, K/2) of the rotary angles (Su et al. 2021, arXiv:2104.09864) of
    positions 0, 1, ...

    In NumPy, and so constants in the compiled program: XLA would compute those of every head and layer anew.
    """
    exponents = np.arange(config.head_dim // 2) / (config.head_dim // 2)
    frequencies = (config.rope_theta**-exponents).astype(np.float32)
    angles = np.arange(num_positions, dtype=np.float32)[None, :, None, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _rotate(heads_BTHK: jax.Array, rotation: tuple[Array, Array]) -> jax.Array:
    """Rotates pairs (k, k + K/2): the half-split form that Hugging Face's Llama uses, so that export is a rename."""
    cosines, sines = rotation
    first, second = jnp.split(heads_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return rotated.astype(heads_BTHK.dtype)


def _join_heads(heads: jax.Array) -> jax.Array:
    """Returns (B, G, ...) as (B x G, ...)."""
    return heads.reshape(-1, *heads.shape[2:])


def _write(cache: LayerCache, keys_NK: jax.Array, values_NK: jax.Array, slot: jax.Array) -> LayerCache:
    """Returns the cache with one token a row in `slot`; in place in a loop, or when the cache is donated."""
    keys_NK1, values_N1K = keys_NK[:, :, None], values_NK[:, None]
    write = write_values = jax.lax.dynamic_update_slice_in_dim
    if is_packed(cache.keys_NKS):
        # Of a token's keys two share a word; of the values each shares it with that of the neighbouring slot.
        keys_NK1, write_values = pack(keys_NK1, axis=1), write_packed
    return LayerCache(
        keys_NKS=write(cache.keys_NKS, keys_NK1, slot, axis=2),
        values_NSK=write_values(cache.values_NSK, values_N1K, slot, axis=1),
    )
