"""Checks of what the logits depend on, by measurement: the past alone, the same in writing, and in which precision."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.analysis.check import Check, pass_or_fail
from tinystories_jax.analysis.small_copy import (
    LONGEST_CONTEXT,
    describe,
    jit_forward,
    loss_of,
    rows_of,
    sharpen,
    shrink,
)
from tinystories_jax.config import Config
from tinystories_jax.data.tokenizer import END_OF_STORY_ID
from tinystories_jax.model import generate, transformer
from tinystories_jax.training import optim, steps

_VOCAB_SIZE = 160
_CUTS = 24  # places at which what comes after is changed
_GRADIENTS = 8  # places whose logits are differentiated
_NEW_TOKENS = 8  # whose logits are compared one by one
_GREEDY_TOKENS = 72  # more than the first cache of `generate` has room for
_EMBEDDING_SCALE = 0.05
_PARITY_BOUND = 1e-3  # of the largest logit
_ROUNDED_BOUND = 0.05  # the same, with matrices and cache in bf16, and of many texts or on a GPU the activations
_MANY_TEXTS = 32  # enough for what only many are written with (model/generate.py)
_PRECISION_BOUND = 0.02  # nats per token; bf16 keeps 8 bits of each activation, and the loss averages over tokens


def check_causality(config: Config) -> Check:
    """Measures how the logits at t change with tokens after t: by gradient, and by changing a token; exactly 0."""
    length = min(config.data.sequence_length, LONGEST_CONTEXT)
    small = shrink(config, vocab_size=length + 2, context=length)
    params = transformer.init_params(small.model, jax.random.key(1))
    # A token of its own at each position: its embedding's gradient is that of the input there.
    random = np.random.RandomState(1)
    tokens_BT = 1 + random.permutation(length + 1)[None, :length].astype(np.int32)
    forward = jit_forward(small)

    @jax.jit
    def sensitivity(params: transformer.Params, position: jax.Array) -> jax.Array:
        def objective(params: transformer.Params) -> jax.Array:
            logits_V = transformer.forward(params, jnp.asarray(tokens_BT), small.model)[0, position]
            # With tied embeddings the logit of a token reads its own row, so only those of END_OF_STORY and of what
            # stands up to t are looked at.
            seen_T = jnp.arange(length) <= position
            return logits_V[END_OF_STORY_ID] ** 2 + jnp.sum(jnp.where(seen_T, logits_V[tokens_BT[0]] ** 2, 0.0))

        gradient_VD = jax.grad(objective)(params)["embed_tokens"]["embedding"]
        return jnp.abs(gradient_VD[tokens_BT[0]]).max(axis=1)

    # Spread over the context, and not on round numbers, where blocks of queries might begin.
    cuts = np.linspace(0, length - 2, _CUTS) + random.uniform(-0.4, 0.4, _CUTS) * length / _CUTS
    places = np.unique(np.append(cuts.round().clip(0, length - 2).astype(int), [0, length - 2])).tolist()
    changes = []
    before_TV = np.asarray(forward(params, tokens_BT))[0]
    for place in places:
        changed_BT = tokens_BT.copy()
        changed_BT[0, place + 1 :] = np.roll(changed_BT[0, place + 1 :], 1) if length - place > 2 else END_OF_STORY_ID
        after_TV = np.asarray(forward(params, changed_BT))[0]
        changes.append(np.abs(after_TV[: place + 1] - before_TV[: place + 1]).max())
    gradients = [
        np.asarray(sensitivity(params, jnp.int32(place)))[place + 1 :].max()
        for place in places[:: -(-len(places) // _GRADIENTS)]
    ]
    # np.max, because that of Python passes over what is not a number.
    gradient, difference = float(np.max(gradients)), float(np.max(changes))
    return pass_or_fail(
        "causality",
        gradient == 0 and difference == 0,
        f"gradient {gradient:.2g}, change of logits {difference:.2g}",
        "both exactly 0",
        on_fail="a position sees tokens that come after it: training will look excellent, and the model will write "
        "nonsense, for when writing there is nothing after. Mend the mask of the attention in model/transformer.py.",
        remark=f"{len(places)} places, {describe(small)}",
        figures={"largest_gradient": gradient, "largest_change": difference, "positions": places},
    )


def check_decode_parity(config: Config) -> Check:
    """Compares the logits of prefill + cached decoding with those of the full forward, for prompts of unequal length,
    and what `generate` writes greedily with the forward's own first choices, in float32, over a cache that grows.

    Then the logits once more as `generate` writes one text, a few and many in the config's own dtype.
    """
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    small = shrink(exact, vocab_size=_VOCAB_SIZE, context=LONGEST_CONTEXT)
    model, context = small.model, small.data.sequence_length
    params = sharpen(transformer.init_params(model, jax.random.key(4)))
    # So that the texts before a token, not the token itself, tell what is written next.
    params["embed_tokens"] = {"embedding": params["embed_tokens"]["embedding"] * _EMBEDDING_SCALE}
    new_tokens = min(_NEW_TOKENS, context - 1)
    greedy_tokens = min(_GREEDY_TOKENS, max(new_tokens, context * 2 // 3))
    lengths_B, greedy_lengths_B = _prompt_lengths(context, new_tokens), _prompt_lengths(context, greedy_tokens)
    tokens_BT = np.random.RandomState(4).randint(1, _VOCAB_SIZE, (len(lengths_B), context)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        forward = jit_forward(small)
        full_BTV = np.asarray(forward(params, tokens_BT))
        texts = (tokens_BT, lengths_B, full_BTV)
        largest = _decode_difference(params, texts, new_tokens, generate.decode_form(model, len(lengths_B)))
        prompts_BT = tokens_BT[: len(greedy_lengths_B)]
        disagreeing = _greedy_disagreements(params, prompts_BT, greedy_lengths_B, greedy_tokens, small, forward)
        rounded = {}
        if config.model.dtype != "float32":
            own = dataclasses.replace(model, dtype=config.model.dtype)
            for num_texts in (1, len(lengths_B), _MANY_TEXTS):
                last = (tokens_BT[-num_texts:], lengths_B[-num_texts:], full_BTV[-num_texts:])
                form = generate.decode_form(own, num_texts)
                rounded[f"written as one of {num_texts}"] = _decode_difference(params, last, new_tokens, form)
    off, bound, dtypes = f"{largest:.1e}", f"{_PARITY_BOUND:g}", "float32"
    if rounded:
        off += f", {config.model.dtype} {np.max(list(rounded.values())):.1e}"
        bound += f" and {_ROUNDED_BOUND:g}"
        dtypes += f" and {config.model.dtype}"
    return pass_or_fail(
        "decode parity",
        largest <= _PARITY_BOUND and disagreeing == 0 and all(value <= _ROUNDED_BOUND for value in rounded.values()),
        f"logits {off}; {disagreeing} tokens differ",
        f"{bound} of the largest logit; 0",
        on_fail="writing computes other logits than training did, so samples are worse than the model: look at what "
        "prefill and decode_step write into the KV cache, into which slot, and at the angles they rotate by; where "
        "only bfloat16 is far off, at how matrices and cache are kept (model/matmul.py).",
        remark=f"prompts of {', '.join(map(str, lengths_B))} tokens, in {dtypes}, {describe(small)}",
        figures={
            "largest_difference": largest,
            "greedy_tokens_that_differ": disagreeing,
            "largest_difference_rounded": rounded,
            "prompt_lengths": lengths_B.tolist(),
        },
    )


def _prompt_lengths(context: int, new_tokens: int) -> np.ndarray:
    """Returns up to three lengths, the longest with just enough room for `new_tokens`."""
    return np.array(sorted({1, (context - new_tokens) // 3 + 1, context - new_tokens}), np.int32)


def _decode_difference(
    params: transformer.Params,
    texts: tuple[np.ndarray, np.ndarray, np.ndarray],
    new_tokens: int,
    form: generate.DecodeForm,
) -> float:
    """Returns the largest difference of logits after the prompts, and after each of `new_tokens` - 1 tokens more, as a
    share of the largest logit; `texts` are tokens_BT, the prompts' lengths_B, and full_BTV, the forward's logits.

    The cache has room for half of the tokens at first, and grows when it is full."""
    tokens_BT, lengths_B, full_BTV = texts
    context, rows = tokens_BT.shape[1], np.arange(len(lengths_B))
    weights = transformer.decode_weights(params, form.config, rounded_to=form.rounded_to, kept_as=form.kept_as)
    first_room = (new_tokens + 1) // 2
    cache_form = {"cache_length": context + first_room, "packs_cache": form.packs_cache}
    prefill = jax.jit(functools.partial(transformer.prefill, config=form.config, **cache_form))
    decode_step = jax.jit(functools.partial(transformer.decode_step, config=form.config))
    prompts_BT = np.where(np.arange(context)[None] < lengths_B[:, None], tokens_BT, END_OF_STORY_ID)
    logits_BV, cache = prefill(weights, prompts_BT, jnp.asarray(lengths_B))
    differences = [np.abs(logits_BV - full_BTV[rows, lengths_B - 1]).max()]
    grow = jax.jit(functools.partial(transformer.grow_kv_cache, cache_length=context + new_tokens))
    for step in range(new_tokens - 1):
        if step == first_room:
            cache = grow(cache)
        positions_B = lengths_B + step
        logits_BV, cache = decode_step(weights, tokens_BT[rows, positions_B], jnp.asarray(positions_B), cache)
        differences.append(np.abs(logits_BV - full_BTV[rows, positions_B]).max())
    return float(np.max(differences) / np.abs(full_BTV).max())


def _greedy_disagreements(
    params: transformer.Params,
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    new_tokens: int,
    small: Config,
    forward: Callable[..., jax.Array],
) -> int:
    """Returns how many tokens that `generate` wrote the full forward finds clearly less likely than another."""
    texts = generate.generate(
        params,
        [row[:length].tolist() for row, length in zip(tokens_BT, lengths_B, strict=True)],
        small.model,
        generate.Sampling(temperature=0),
        key=jax.random.key(0),
        end_token=END_OF_STORY_ID,
        context_length=small.data.sequence_length,
        max_new_tokens=new_tokens,
    )
    padded_BT = np.zeros_like(tokens_BT)
    for row, text in enumerate(texts):
        padded_BT[row, : len(text)] = text
    logits_BTV = np.asarray(forward(params, padded_BT))
    margin = _PARITY_BOUND * np.abs(logits_BTV).max()
    return sum(
        int(logits_BTV[row, place - 1].max() - logits_BTV[row, place - 1, text[place]] > margin)
        for row, (text, length) in enumerate(zip(texts, lengths_B, strict=True))
        for place in range(length, len(text))
    )


def check_precision(config: Config, block: np.ndarray | None) -> Check:
    """Checks that parameters, optimizer state and logits are float32, before and after a step, and measures how far
    the loss in the config's dtype is from that in float32, on the same parameters and tokens."""
    wrong = _not_float32(config)
    params, rows = sharpen(steps.fresh_params(config)), rows_of(config, block)
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    rounds = config.model.dtype != "float32"
    difference = abs(loss_of(params, rows, config) - loss_of(params, rows, exact)) if rounds else 0.0
    return pass_or_fail(
        "precision",
        not wrong and difference <= _PRECISION_BOUND,
        f"{len(wrong)} arrays not float32" + f"; {config.model.dtype} loss {difference:.1e} off" * rounds,
        "0" + f"; at most {_PRECISION_BOUND} nats" * rounds,
        on_fail=f"not float32: {', '.join(wrong[:4])}. Updates are a thousandth of a parameter, which bfloat16 cannot "
        "add: training slows down and stalls. Keep parameters, optimizer state and logits in float32."
        if wrong
        else f"activations in {config.model.dtype} change the loss; try --config.model.dtype=float32",
        figures={"not_float32": wrong, "loss_difference": difference},
    )


def _not_float32(config: Config) -> list[str]:
    """Returns the names of floating arrays of another dtype in the state before and after a step, and the logits."""
    optimizer = optim.make_optimizer(config)
    before = jax.eval_shape(lambda: steps.init_state(config, optimizer))
    train_step = steps.make_train_step(config, optimizer)
    block = jax.ShapeDtypeStruct((1, config.data.sequence_length + 1), jnp.int32)
    after, _ = jax.eval_shape(train_step, before, block, jax.ShapeDtypeStruct((config.model.vocab_size,), bool))
    tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
    logits = jax.eval_shape(functools.partial(transformer.forward, config=config.model), before.params, tokens)
    named = jax.tree_util.tree_leaves_with_path({"before": before, "after": after, "logits": logits})
    return [
        f"{jax.tree_util.keystr(path)} ({leaf.dtype})"
        for path, leaf in named
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32
    ]
