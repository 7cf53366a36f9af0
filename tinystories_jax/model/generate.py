"""Writes stories: one prefill per length bucket, then one jitted decode loop with a KV cache that grows with the texts.

Everything a token needs (logits, filters, the draw) stays on the device; the host sees tokens when the loop returns.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.background import in_background
from tinystories_jax.config import ModelConfig
from tinystories_jax.errors import UserError
from tinystories_jax.model.matmul import PACKED, TRANSPOSED
from tinystories_jax.model.transformer import (
    DecodeWeights,
    KVCache,
    Params,
    decode_step,
    decode_weights,
    grow_kv_cache,
    prefill,
)
from tinystories_jax.processor import multiplies_bfloat16

_SMALLEST_BUCKET = 32
_SMALLEST_ROOM = 64
_NUM_GROUPS = 2
_SMALLEST_GROUP = 8
_FEWEST_IN_LOW_PRECISION = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters act in this order, as in Hugging Face's generate.

    repetition_penalty: logits of tokens already in the text are divided (positive) or multiplied (negative) by it
        (Keskar et al. 2019, arXiv:1909.05858), but for the end token, which stands before every text; 1 is off.
        temperature: divides the logits; 0 is greedy. top_k: the k likeliest tokens only; 0 is off. top_p: the smallest
        set of likeliest tokens with at least this probability (Holtzman et al. 2020, arXiv:1904.09751); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        problems = []
        if not 0 <= self.temperature <= 100:
            problems.append(f"temperature={self.temperature} must lie between 0 (greedy) and 100")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if not 0.1 <= self.repetition_penalty <= 10:
            problems.append(f"repetition_penalty={self.repetition_penalty} must lie between 0.1 and 10; 1 is off")
        if problems:
            raise UserError(problems)


class DecodeState(NamedTuple):
    """Texts under way. `lengths_B` counts the tokens of each row of `tokens_BT`; the last is not yet in the cache.
    A row draws by its own key and `num_new` alone."""

    row_keys_B: jax.Array
    tokens_BT: jax.Array
    lengths_B: jax.Array
    finished_B: jax.Array
    num_new: jax.Array
    cache: KVCache


class DecodeForm(NamedTuple):
    """In which precision texts are written, and how what is read for them is kept: `config`, with the dtype of
    activations; `rounded_to` and `kept_as`, of matrices (`matmul.keep_matrix`); whether keys and values are packed
    (`matmul.pack`)."""

    config: ModelConfig
    rounded_to: str
    kept_as: str
    packs_cache: bool


class _Draw(NamedTuple):
    """Sampling as traced scalars: changing a value compiles nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


class _Filters(NamedTuple):
    """Which parts of sampling are compiled in."""

    greedy: bool
    truncate: bool
    penalize: bool


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling,
    *,
    key: jax.Array,
    end_token: int,
    context_length: int,
    max_new_tokens: int,
    first_row: int = 0,
    num_rows: int = 0,
) -> list[list[int]]:
    """Returns prompt + new tokens of each row; a row ends after `end_token`, `max_new_tokens` or at `context_length`.

    The draw for token n of row i, counted from `first_row`, depends on (key, i, n) alone; `num_rows` is as in
    `generate_chunks`. Raises `UserError` for prompts that leave no room.
    """
    *_, texts = generate_chunks(
        params,
        prompts,
        config,
        sampling,
        key=key,
        end_token=end_token,
        context_length=context_length,
        max_new_tokens=max_new_tokens,
        chunk_size=max_new_tokens,
        first_row=first_row,
        num_rows=num_rows,
    )
    return texts


def generate_chunks(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling,
    *,
    key: jax.Array,
    end_token: int,
    context_length: int,
    max_new_tokens: int,
    chunk_size: int,
    first_row: int = 0,
    num_rows: int = 0,
) -> Iterator[list[list[int]]]:
    """Yields what `generate` returns, grown by up to `chunk_size` tokens a row each time; the last one is whole.

    The rows draw as rows `first_row`, `first_row` + 1, ... of a larger batch would, with matrices as for one of
    `num_rows` rows (0: as many as there are prompts).
    """
    form = decode_form(config, num_rows or len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    _check_prompts(lengths, context_length, max_new_tokens)
    # The compiled programs depend on batch size and bucket only, never on the prompts' lengths.
    prompt_bucket = _bucket(int(lengths.max()), context_length)
    tokens_BT = np.zeros((len(prompts), prompt_bucket), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(len(prompts)))
    draw, filters = _trace_sampling(sampling, config.vocab_size)
    common = {"draw": draw, "config": form.config, "filters": filters, "end_token": end_token}
    # Every step takes a slot of the cache behind the prompts, and reads all slots. So there are few at the start, and
    # twice as many when they are full, until the last token has one.
    max_new_tokens = min(max_new_tokens, context_length)
    room, most_room = _SMALLEST_ROOM, -(-max_new_tokens // _SMALLEST_ROOM) * _SMALLEST_ROOM
    arrays = {"context_length": context_length, "cache_length": prompt_bucket + room, "packs_cache": form.packs_cache}
    weights = decode_weights(params, config=form.config, rounded_to=form.rounded_to, kept_as=form.kept_as)
    states = [
        _start(weights, tokens_BT[rows], lengths[rows], row_keys_B[rows], **arrays, **common)
        for rows in np.split(np.arange(len(prompts)), _num_groups(len(prompts)))
    ]
    decode_until = functools.partial(_decode_until, weights, **common)
    shown = {*range(chunk_size, max_new_tokens, chunk_size), max_new_tokens}
    full = {_SMALLEST_ROOM << doubled for doubled in range(max_new_tokens.bit_length())}
    for until in sorted(shown | {tokens for tokens in full if tokens < max_new_tokens}):
        if room < until:
            room = min(2 * room, most_room)
            states = [_grow(state, cache_length=prompt_bucket + room) for state in states]
        states = _run_groups(decode_until, states, until)
        if until not in shown:
            continue
        seen = jax.device_get([(state.tokens_BT, state.lengths_B, state.finished_B) for state in states])
        tokens, ends, finished = (np.concatenate(groups) for groups in zip(*seen, strict=True))
        yield [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]
        if finished.all():
            return


def decode_form(config: ModelConfig, num_rows: int) -> DecodeForm:
    """Returns the form in which `num_rows` texts are written.

    A GPU writes in the config's dtype. XLA's CPU backend has no arithmetic in bf16 but matmuls of many rows, and
    converts to float32 and back: there activations are float32, and of a config in bf16 matrices, keys and values are
    what is rounded. Matrices in bf16 it reads packed for a single row, and transposed for many where the processor has
    instructions for bf16: half as many bytes (docs/tuning.md). For a few rows it has them in float32, so that a
    story is the same alone and beside a few others, but for the rounding of float32; many round the activations too.
    """
    if jax.default_backend() != "cpu" or config.dtype == "float32":
        return DecodeForm(config, rounded_to=config.dtype, kept_as=config.dtype, packs_cache=False)
    many = num_rows >= _FEWEST_IN_LOW_PRECISION and multiplies_bfloat16()
    kept_as = PACKED if num_rows == 1 else TRANSPOSED if many else "float32"
    return DecodeForm(replace(config, dtype="float32"), config.dtype, kept_as, packs_cache=True)


def _num_groups(batch_size: int) -> int:
    """Returns into how many equal groups the rows are cut, each with a program of its own.

    XLA's CPU backend runs the operations of a step one after the other, and small ones in a single thread: two programs
    at once keep two threads busy (docs/tuning.md). A GPU is busy with one.
    """
    fits = batch_size % _NUM_GROUPS == 0 and batch_size >= _NUM_GROUPS * _SMALLEST_GROUP
    return _NUM_GROUPS if fits and jax.default_backend() == "cpu" else 1


def _run_groups(
    decode_until: Callable[[DecodeState, np.int32], DecodeState], states: list[DecodeState], until: int
) -> list[DecodeState]:
    """Returns what `decode_until(state, until)` does of each group, all at once."""
    if len(states) == 1:
        return [decode_until(states[0], np.int32(until))]
    # No new token, but the program is compiled now: the threads would each compile it.
    states = [decode_until(states[0], np.int32(0)), *states[1:]]
    # JAX runs one after the other what a single thread asks for.
    groups = [in_background("decode", decode_until, state, np.int32(until)) for state in states]
    return [group.result() for group in groups]


def _trace_sampling(sampling: Sampling, vocab_size: int) -> tuple[_Draw, _Filters]:
    """Returns the values that a compiled program takes, and what is compiled into it."""
    draw = _Draw(
        jnp.float32(max(sampling.temperature, 1e-6)),
        jnp.int32(sampling.top_k or vocab_size),
        jnp.float32(sampling.top_p),
        jnp.float32(sampling.repetition_penalty),
    )
    filters = _Filters(
        greedy=sampling.temperature == 0,
        truncate=0 < sampling.top_k < vocab_size or sampling.top_p < 1,
        penalize=sampling.repetition_penalty != 1,
    )
    return draw, filters


@functools.partial(
    jax.jit, static_argnames=("config", "filters", "end_token", "context_length", "cache_length", "packs_cache")
)
def _start(
    weights: DecodeWeights,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    row_keys_B: jax.Array,
    draw: _Draw,
    *,
    config: ModelConfig,
    filters: _Filters,
    end_token: int,
    context_length: int,
    cache_length: int,
    packs_cache: bool,
) -> DecodeState:
    logits_BV, cache = prefill(
        weights, tokens_BT, lengths_B, config, cache_length=cache_length, packs_cache=packs_cache
    )
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, context_length - tokens_BT.shape[1])))
    finished_B = jnp.zeros(lengths_B.shape, bool)
    state = DecodeState(row_keys_B, tokens_BT, lengths_B, finished_B, jnp.int32(0), cache)
    return _append(state, logits_BV, draw, filters, end_token)


@functools.partial(jax.jit, static_argnames=("config", "filters", "end_token"), donate_argnames="state")
def _decode_until(
    weights: DecodeWeights,
    state: DecodeState,
    until: jax.Array,
    draw: _Draw,
    *,
    config: ModelConfig,
    filters: _Filters,
    end_token: int,
) -> DecodeState:
    """Returns the state after at most `until` new tokens a row, or fewer when every row is finished."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.num_new < until) & ~jnp.all(state.finished_B)

    def step(state: DecodeState) -> DecodeState:
        positions_B = state.lengths_B - 1
        last_B = jnp.take_along_axis(state.tokens_BT, positions_B[:, None], axis=1)[:, 0]
        logits_BV, cache = decode_step(weights, last_B, positions_B, state.cache, config)
        return _append(state._replace(cache=cache), logits_BV, draw, filters, end_token)

    return jax.lax.while_loop(unfinished, step, state)


@functools.partial(jax.jit, static_argnames="cache_length")
def _grow(state: DecodeState, *, cache_length: int) -> DecodeState:
    return state._replace(cache=grow_kv_cache(state.cache, cache_length))


def _append(state: DecodeState, logits_BV: jax.Array, draw: _Draw, filters: _Filters, end_token: int) -> DecodeState:
    """Returns the state with one drawn token more in every row that is not finished."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.row_keys_B, state.num_new)
    next_B = _sample(logits_BV, state, keys_B, draw, filters, end_token)
    context_length = state.tokens_BT.shape[1]
    rows = jnp.arange(next_B.shape[0])
    # A finished row writes outside the array, which JAX drops.
    places_B = jnp.where(state.finished_B, context_length, state.lengths_B)
    lengths_B = state.lengths_B + ~state.finished_B
    return state._replace(
        tokens_BT=state.tokens_BT.at[rows, places_B].set(next_B, mode="drop"),
        lengths_B=lengths_B,
        finished_B=state.finished_B | (next_B == end_token) | (lengths_B >= context_length),
        num_new=state.num_new + 1,
    )


def _sample(
    logits_BV: jax.Array, state: DecodeState, keys_B: jax.Array, draw: _Draw, filters: _Filters, end_token: int
) -> jax.Array:
    if filters.penalize:
        logits_BV = _penalize(logits_BV, state, draw.repetition_penalty, end_token)
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / draw.temperature
    if not filters.truncate:
        return _draw_index(keys_B, jax.nn.softmax(logits_BV, axis=-1))
    # Drawing among the sorted tokens needs no scatter back, and ties cannot let a k + 1st token in.
    vocab_size = logits_BV.shape[1]
    sorted_BV, order_BV = jax.lax.top_k(logits_BV, vocab_size)
    sorted_BV = jnp.where(jnp.arange(vocab_size)[None] < draw.top_k, sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    mass_before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    ranks_B = _draw_index(keys_B, jnp.where(mass_before_BV < draw.top_p, probabilities_BV, 0))
    return jnp.take_along_axis(order_BV, ranks_B[:, None], axis=1)[:, 0]


def _draw_index(keys_B: jax.Array, weights_BV: jax.Array) -> jax.Array:
    """Returns an int32 index per row, drawn in proportion to the weights; one of weight 0 is never drawn.

    By one random number a row and the running sum of the weights, where Gumbel noise takes a random number for every
    token: on a CPU a tenth to a fifth of a step of 32 rows. First one of N blocks of M tokens each is chosen, then one
    of its tokens.
    """
    batch_size, vocab_size = weights_BV.shape
    block = math.isqrt(vocab_size - 1) + 1
    blocks_BNM = jnp.pad(weights_BV, ((0, 0), (0, -vocab_size % block))).reshape(batch_size, -1, block)
    sums_BN = blocks_BNM.sum(axis=-1)
    targets_B = jax.vmap(jax.random.uniform)(keys_B) * sums_BN.sum(axis=-1)
    chosen_B, before_B = _choose(sums_BN, targets_B)
    block_BM = jnp.take_along_axis(blocks_BNM, chosen_B[:, None, None], axis=1)[:, 0]
    within_B, _ = _choose(block_BM, targets_B - before_B)
    return chosen_B * block + within_B


def _choose(weights_BN: jax.Array, targets_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the running sum of `weights_BN` first exceeds `targets_B`, as int32, and the sum before."""
    not_after_NN = jnp.tri(weights_BN.shape[1], dtype=bool)
    sums_BN = jnp.where(not_after_NN[None], weights_BN[:, None], 0).sum(axis=-1)
    exceeds_BN = (sums_BN > targets_B[:, None]) & (weights_BN > 0)
    # Rounding can leave the last sum below the target.
    index_B = jnp.where(exceeds_BN.any(axis=-1), exceeds_BN.argmax(axis=-1), weights_BN.argmax(axis=-1))
    before_BN = sums_BN - weights_BN
    return index_B.astype(jnp.int32), jnp.take_along_axis(before_BN, index_B[:, None], axis=1)[:, 0]


def _penalize(logits_BV: jax.Array, state: DecodeState, penalty: jax.Array, end_token: int) -> jax.Array:
    batch_size, context_length = state.tokens_BT.shape
    written_BT = jnp.arange(context_length)[None] < state.lengths_B[:, None]
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(batch_size)[:, None], state.tokens_BT].max(written_BT)
    # The end token that stands before every text is no part of it: penalized, it would keep stories from ending.
    seen_BV = seen_BV.at[:, end_token].set(False)
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def _bucket(length: int, context_length: int) -> int:
    """Returns the smallest of 32, 64, 128, ... and the context that holds `length` tokens."""
    bucket = _SMALLEST_BUCKET
    while bucket < min(length, context_length):
        bucket *= 2
    return min(bucket, context_length)


def _check_prompts(lengths: np.ndarray, context_length: int, max_new_tokens: int) -> None:
    problems = [] if max_new_tokens > 0 else [f"max_new_tokens={max_new_tokens} must be 1 or more"]
    if not len(lengths):
        problems.append("no prompt was given")
    for row, length in enumerate(lengths):
        if not 0 < length < context_length:
            problems.append(
                f"prompt {row + 1} has {length} tokens; it must have at least 1 and fewer than the model's context "
                f"of {context_length}, so that there is room to write"
            )
    if problems:
        raise UserError(problems)
