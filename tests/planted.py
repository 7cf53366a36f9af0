"""Faults planted into the package for a test or an experiment, each by replacing one function; never options of it.

`python -m tests.planted labels_shifted_twice FLAGS_OF_TRAIN --nodoctor` trains with one.
"""

import dataclasses
import functools
import runpy
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinystories_jax.data import cache
from tinystories_jax.evaluation import validation
from tinystories_jax.model import generate, loss, matmul, transformer
from tinystories_jax.training import optim, steps

Patch = Callable[[Any, str, Any], None]  # as setattr and pytest's monkeypatch.setattr


def labels_shifted_twice(patch: Patch) -> None:
    """The loss shifts labels that are shifted already: position t learns token t + 2."""
    next_token_loss = steps.next_token_loss

    def shifted_again(
        hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(hidden_BTD[:, :-1], output_DV, targets_BT[:, 1:], weights_BT[:, 1:])

    patch(steps, "next_token_loss", shifted_again)


def no_causal_mask(patch: Patch) -> None:
    def attend_to_all(queries_BTHK: jax.Array, keys_BTGK: jax.Array, values_BTGK: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(queries_BTHK, keys_BTGK, values_BTGK, is_causal=False)

    patch(transformer, "causal_attention", attend_to_all)


def one_block_leaks(patch: Patch) -> None:
    """The third of four blocks of queries sees itself whole."""
    causal_attention = transformer.causal_attention

    def leaking(queries_BTHK: jax.Array, keys_BTGK: jax.Array, values_BTGK: jax.Array) -> jax.Array:
        attended = causal_attention(queries_BTHK, keys_BTGK, values_BTGK)
        start, end = queries_BTHK.shape[1] // 2, queries_BTHK.shape[1] * 3 // 4
        whole = jax.nn.dot_product_attention(
            queries_BTHK[:, start:end], keys_BTGK[:, :end], values_BTGK[:, :end], is_causal=False
        )
        return attended.at[:, start:end].set(whole)

    patch(transformer, "causal_attention", leaking)


def logits_not_finite(patch: Patch) -> None:
    logits = transformer.logits
    for module in (transformer, loss):
        patch(module, "logits", lambda hidden, output_DV: logits(hidden, output_DV) * jnp.nan)


def gradients_summed(patch: Patch) -> None:
    patch(optim.optax, "MultiSteps", functools.partial(optax.MultiSteps, use_grad_mean=False))


def schedule_of_half_the_length(patch: Patch) -> None:
    curve = optim.learning_rate_schedule

    def halved(optim_config, schedule):
        return curve(optim_config, dataclasses.replace(schedule, total_updates=schedule.total_updates // 2))

    patch(optim, "learning_rate_schedule", halved)


def muon_schedule_of_half_the_length(patch: Patch) -> None:
    muon = optax.contrib.muon

    def hurried(learning_rate, **values):
        return muon(lambda count: learning_rate(2 * count + 1), **values)

    patch(optim.optax.contrib, "muon", hurried)


def kv_cache_off_by_one(patch: Patch) -> None:
    write = transformer._write
    patch(
        transformer,
        "_write",
        lambda kv_cache, keys, values, slot: write(kv_cache, keys, values, slot + 1),
    )


def cache_forgets_when_it_grows(patch: Patch) -> None:
    grow = generate.grow_kv_cache

    def forgetful(cache: transformer.KVCache, cache_length: int) -> transformer.KVCache:
        grown = grow(cache, cache_length)
        return grown._replace(layers=jax.tree.map(jnp.zeros_like, grown.layers))

    patch(generate, "grow_kv_cache", forgetful)


def packed_halves_swapped(patch: Patch) -> None:
    unpack = matmul._unpack
    patch(matmul, "_unpack", lambda packed: unpack(packed)[::-1])


def bfloat16_optimizer_state(patch: Patch) -> None:
    patch(optim.optax, "adamw", functools.partial(optax.adamw, mu_dtype=jnp.bfloat16))


def large_embeddings(patch: Patch) -> None:
    """Embeddings so large that fresh parameters predict each token to repeat itself."""
    std = transformer._embedding_std
    patch(transformer, "_embedding_std", lambda config: 4 * std(config))


def parameters_not_updated(patch: Patch) -> None:
    patch(steps.optax, "apply_updates", lambda params, updates: params)


def attention_not_updated(patch: Patch) -> None:
    """The optimizer's updates are applied to all parameters but those of the attention."""

    apply_updates = optax.apply_updates

    def apply_others(params: Any, updates: Any) -> Any:
        updated: Any = apply_updates(params, updates)
        layers = {
            index: {**layer, "self_attn": params["layers"][index]["self_attn"]}
            for index, layer in updated["layers"].items()
        }
        return {**updated, "layers": layers}

    patch(steps.optax, "apply_updates", apply_others)


def attention_without_gradient(patch: Patch) -> None:
    """Queries, keys and values learn nothing, and are moved by the decay of weights alone."""
    causal_attention = transformer.causal_attention
    patch(transformer, "causal_attention", lambda *arrays: jax.lax.stop_gradient(causal_attention(*arrays)))


def validation_shifted(patch: Patch) -> None:
    """Validation asks for token t + 2."""
    losses_and_hits = validation.losses_and_hits

    def shifted(hidden_BTD: jax.Array, output_DV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses_and_hits(hidden_BTD, output_DV, jnp.roll(targets_BT, -1, axis=1))

    patch(validation, "losses_and_hits", shifted)


def validation_drops_its_last_batch(patch: Patch) -> None:
    eval_batches = validation.eval_batches
    patch(validation, "eval_batches", lambda tokens, **sizes: list(eval_batches(tokens, **sizes))[:-1])


def padding_counts_in_validation(patch: Patch) -> None:
    eval_batches = validation.eval_batches

    def all_weighed(tokens: np.ndarray, **sizes: int) -> Any:
        return ((block, np.ones_like(weights)) for block, weights in eval_batches(tokens, **sizes))

    patch(validation, "eval_batches", all_weighed)


def norms_only_decay(patch: Patch) -> None:
    """Scales of norms get no gradient, and weight decay all the same."""
    apply_updates = optax.apply_updates

    def decay(params: Any, updates: Any) -> Any:
        updated = apply_updates(params, updates)
        return jax.tree.map(lambda was, new: new if was.ndim > 1 else 0.999 * was, params, updated)

    patch(steps.optax, "apply_updates", decay)


def no_end_tokens(patch: Patch) -> None:
    """Stories run on in the cache; manifest and checksum agree with that."""
    encode_ahead = cache._encode_ahead

    def without_ends(stories, tokenizer, dtype):
        for tokens, num_stories, num_bytes in encode_ahead(stories, tokenizer, dtype):
            yield np.ascontiguousarray(tokens[tokens != cache.END_OF_STORY_ID]), num_stories, num_bytes

    patch(cache, "_encode_ahead", without_ends)


def a_block_left_out(patch: Patch) -> None:
    """The last block of an epoch is never dealt out, and the first one twice."""
    permutation = cache._permutation

    def incomplete(seed: int, epoch: int, length: int) -> np.ndarray:
        order = permutation(seed, epoch, length).copy()
        order[-1] = order[0]
        return order

    patch(cache, "_permutation", incomplete)


if __name__ == "__main__":
    globals()[sys.argv.pop(1)](setattr)
    sys.argv[0] = "scripts/train.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
