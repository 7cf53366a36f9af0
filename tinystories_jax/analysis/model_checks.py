"""Checks of model, loss and optimizer by measurement, on the functions that training itself calls.

Where a property does not depend on size, they run on a small copy of the config: the same code, dtype, head width and
sharing of key/value heads, but two layers, few heads and a short context. The table says where.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.analysis.check import Check, judge
from tinystories_jax.config import Config, ModelConfig, OptimConfig, Schedule
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer
from tinystories_jax.evaluation.validation import eval_step
from tinystories_jax.model import generate, transformer
from tinystories_jax.training import optim, steps

_LONGEST_CONTEXT = 64  # of the small copy
_VOCAB_SIZE = 160  # of the small copy: more than its context, so that each position can have a token of its own
_ROWS = 8
_CYCLE = 61  # tokens; prime, so that no offset is confounded with another
_SHIFT_UPDATES = 80
_OVERFIT_ROWS = 2
_TOKENS = 1024
_OVERFIT_UPDATES = 200
_NEW_TOKENS = 8
_INITIAL_LOSS_BOUND = 0.02  # relative
_SHIFT_SHARE_BOUND = 0.9
_OVERFIT_BOUND = 0.1  # nats per token
_ACCUMULATION_BOUND = 1e-3  # relative
_SCHEDULE_BOUND = 1e-3  # relative
_PARITY_BOUND = 1e-3  # of the largest logit
_PRECISION_BOUND = 0.02  # nats per token; bf16 keeps 8 bits of each activation, and the loss averages over tokens


def shrink(
    config: Config, *, vocab_size: int, num_updates: int, grad_accum_steps: int = 1, rows: int = _ROWS
) -> Config:
    """Returns the small copy: a constant learning rate that suits its size, no dropout, `rows` rows a micro-batch."""
    model = config.model
    num_kv_heads = min(model.num_kv_heads, 2)
    num_heads = num_kv_heads * min(model.num_heads // model.num_kv_heads, 2)
    d_model = num_heads * model.head_dim
    small = dataclasses.replace(
        model,
        num_layers=min(model.num_layers, 2),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_model=d_model,
        d_ff=2 * d_model,
        dropout=0.0,
        vocab_size=vocab_size,
    )
    return dataclasses.replace(
        config,
        model=small,
        data=dataclasses.replace(config.data, sequence_length=min(config.data.sequence_length, _LONGEST_CONTEXT)),
        train=dataclasses.replace(config.train, batch_size=rows, grad_accum_steps=grad_accum_steps),
        optim=dataclasses.replace(config.optim, learning_rate=4e-3, min_learning_rate=4e-3),
        schedule=Schedule(
            num_blocks=num_updates * grad_accum_steps * rows,
            blocks_per_update=grad_accum_steps * rows,
            total_updates=num_updates,
            warmup_updates=0,
            epoch_ends=(num_updates,),
        ),
    )


def _describe(small: Config) -> str:
    model = small.model
    return (
        f"small copy: {model.num_layers} layers of width {model.d_model}, context {small.data.sequence_length}, "
        f"{model.vocab_size:,} tokens"
    )


def _start(config: Config) -> tuple[steps.TrainState, steps.TrainStep]:
    """Returns the initial state and the jitted step of a small copy, made as training makes them."""
    assert config.schedule is not None
    optimizer = optim.make_optimizer(config)
    train_step = steps.make_train_step(config, optimizer, optim.learning_rate_schedule(config.optim, config.schedule))
    return steps.init_state(config, optimizer), train_step


def _run(config: Config, blocks: np.ndarray, article_mask_V: jax.Array) -> tuple[steps.TrainState, Any]:
    """Returns the state after training on `blocks`, one a micro-step, and the metrics of each, stacked."""
    state, train_step = _start(config)
    metrics = []
    for block in blocks:
        state, step_metrics = train_step(state, block, article_mask_V)
        metrics.append(step_metrics)
    return state, jax.tree.map(lambda *values: np.array(values), *jax.device_get(metrics))


def _forward(config: Config) -> Any:
    return jax.jit(functools.partial(transformer.forward, config=config.model))


def check_target_shift(config: Config, block: np.ndarray | None, tokenizer: StoryTokenizer | None) -> Check:
    """Trains on a cycle of tokens, on which every offset can be learnt, and measures which one is: it must be +1.

    `block` is a real micro-batch, shown as text at the offset found.
    """
    small = shrink(config, vocab_size=_VOCAB_SIZE, num_updates=_SHIFT_UPDATES)
    random = np.random.RandomState(0)
    cycle = 1 + random.permutation(_VOCAB_SIZE - 1)[:_CYCLE]
    length = small.data.sequence_length
    starts = random.randint(0, _CYCLE, (_SHIFT_UPDATES, _ROWS, 1))
    blocks = cycle[(starts + np.arange(length + 1)) % _CYCLE].astype(np.int32)
    state, _ = _run(small, blocks, jnp.zeros(_VOCAB_SIZE, bool))
    inputs_BT = blocks[0, :, :-1]
    logits_BTV = _forward(small)(state.params, inputs_BT)
    place_V = np.full(_VOCAB_SIZE, -1)
    place_V[cycle] = np.arange(_CYCLE)
    predicted_BT = place_V[np.asarray(logits_BTV).argmax(-1)]
    offsets_BT = (predicted_BT - place_V[inputs_BT]) % _CYCLE
    counts = np.bincount(offsets_BT[predicted_BT >= 0], minlength=_CYCLE)
    offset, share = int(counts.argmax()), float(counts.max() / inputs_BT.size)
    return judge(
        "target shift",
        offset == 1 and share >= _SHIFT_SHARE_BOUND,
        f"+{offset} at {share:.0%} of the positions",
        f"+1 at {_SHIFT_SHARE_BOUND:.0%} or more",
        on_fail=f"position t is trained to predict token t + {offset} instead of t + 1: the labels are shifted in more "
        "than one place, or in none. Such a model drops articles and other small words, without any error. Shift in "
        "train_step alone.",
        remark=_describe(small),
        figures={"offset": offset, "share": share},
        details=_show_pairs(block, tokenizer, offset),
    )


def _show_pairs(block: np.ndarray | None, tokenizer: StoryTokenizer | None, offset: int) -> tuple[str, ...]:
    if block is None or tokenizer is None:
        return ()
    row = block[0]
    places = [min(len(row) - 1 - offset, round(share * len(row))) for share in (0.25, 0.5, 0.75)]
    return tuple(
        f"{tokenizer.decode(row[max(0, place - 11) : place + 1])!r} -> {tokenizer.decode([row[place + offset]])!r}"
        for place in places
        if place >= 0
    )


def check_causality(config: Config) -> Check:
    """Measures how the logits at t change with tokens after t: by gradient, and by changing a token; exactly 0."""
    small = shrink(config, vocab_size=_VOCAB_SIZE, num_updates=1)
    params = transformer.init_params(small.model, jax.random.key(1))
    length = small.data.sequence_length
    # A token of its own at each position: its embedding's gradient is that of the input there.
    tokens_BT = 1 + np.random.RandomState(1).permutation(_VOCAB_SIZE - 1)[None, :length].astype(np.int32)
    forward = _forward(small)

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

    places = sorted({round(share * (length - 2)) for share in (0, 0.13, 0.25, 0.5, 0.77, 1)})
    gradient, difference = 0.0, 0.0
    before_TV = np.asarray(forward(params, tokens_BT))[0]
    for place in places:
        gradient = max(gradient, float(np.asarray(sensitivity(params, jnp.int32(place)))[place + 1 :].max()))
        changed_BT = tokens_BT.copy()
        changed_BT[0, place + 1 :] = np.roll(changed_BT[0, place + 1 :], 1) if length - place > 2 else END_OF_STORY_ID
        after_TV = np.asarray(forward(params, changed_BT))[0]
        difference = max(difference, float(np.abs(after_TV[: place + 1] - before_TV[: place + 1]).max()))
    return judge(
        "causality",
        gradient == 0 and difference == 0,
        f"gradient {gradient:.2g}, change of logits {difference:.2g}",
        "both exactly 0",
        on_fail="a position sees tokens that come after it: training will look excellent, and the model will write "
        "nonsense, for when writing there is nothing after. Mend the mask of the attention in model/transformer.py.",
        remark=_describe(small),
        figures={"largest_gradient": gradient, "largest_change": difference, "positions": places},
    )


def check_initial_loss(config: Config, block: np.ndarray | None) -> Check:
    """Measures the loss of fresh parameters at full size: near ln V, since nothing is known yet."""
    loss = _loss(_fresh_params(config), _rows_of(config, block), config)
    expected = _expected_initial_loss(config.model)
    distance = abs(loss / expected - 1)
    return judge(
        "loss at initialisation",
        distance <= _INITIAL_LOSS_BOUND,
        f"{loss:.4f} nats, {distance:.2%} off",
        f"within {_INITIAL_LOSS_BOUND:.0%} of {expected:.4f}; ln V is {math.log(config.model.vocab_size):.4f}",
        on_fail="fresh parameters should find all tokens about equally likely: a larger loss means that they start "
        "with strong wrong beliefs (too large an initialisation), a smaller one that targets leak. See init_params.",
        remark="" if block is not None else "on random tokens, for there is no token cache yet",
        figures={"loss": loss, "expected": expected},
    )


def _expected_initial_loss(model: ModelConfig) -> float:
    """Returns ln V, plus what the recipe's embeddings add where they are the output matrix too.

    They are drawn from normal(0, ln(0.03 V) / d_model), so the logits have the variance (ln(0.03 V))^2 / d_model, and
    the mean of exp(logit) is exp(half of that).
    """
    variance = math.log(max(0.03 * model.vocab_size, 1.5)) ** 2 / model.d_model if model.tie_embeddings else 0.0
    return math.log(model.vocab_size) + variance / 2


def _fresh_params(config: Config) -> transformer.Params:
    return _init(jax.random.key(config.seed), config=config.model)


@functools.partial(jax.jit, static_argnames="config")
def _init(key: jax.Array, *, config: ModelConfig) -> transformer.Params:
    return transformer.init_params(config, key)


def num_rows_measured(config: Config) -> int:
    """Returns how many rows a loss is measured on: enough tokens for their average not to depend on which they are."""
    return -(-_TOKENS // config.data.sequence_length)


def _rows_of(config: Config, block: np.ndarray | None) -> np.ndarray:
    """Returns the first rows of real tokens, random ones where there are none."""
    rows = num_rows_measured(config)
    if block is not None:
        return block[:rows]
    shape = (rows, config.data.sequence_length + 1)
    return np.random.RandomState(2).randint(1, config.model.vocab_size, shape).astype(np.int32)


def _loss(params: transformer.Params, block: np.ndarray, config: Config) -> float:
    no_articles_AV = jnp.zeros((1, config.model.vocab_size), bool)
    weights_BT = np.ones((block.shape[0], block.shape[1] - 1), np.float32)
    sums = eval_step(params, block, weights_BT, no_articles_AV, config=config.model)
    return float(sums.loss / sums.num_tokens)


def check_overfit(config: Config, block: np.ndarray | None) -> Check:
    """Trains on one micro-batch until it is known by heart: gradients and optimizer do their work."""
    small = shrink(config, vocab_size=config.model.vocab_size, num_updates=_OVERFIT_UPDATES, rows=_OVERFIT_ROWS)
    rows = _rows_of(config, block)[:_OVERFIT_ROWS, : small.data.sequence_length + 1]
    state, train_step = _start(small)
    no_articles_V = jnp.zeros(small.model.vocab_size, bool)
    loss, updates = math.inf, 0
    while updates < _OVERFIT_UPDATES and not loss < _OVERFIT_BOUND:
        for _ in range(10):
            state, metrics = train_step(state, rows, no_articles_V)
        updates, loss = updates + 10, float(metrics.loss)
    return judge(
        "overfit",
        loss < _OVERFIT_BOUND,
        f"{loss:.4f} nats after {updates} updates",
        f"below {_OVERFIT_BOUND} within {_OVERFIT_UPDATES} updates",
        on_fail="a model that cannot learn two rows by heart learns nothing else: gradients do not reach all "
        "parameters, the optimizer does not apply them, or it holds them back; compare "
        f"optim.max_grad_norm={config.optim.max_grad_norm}, optim.beta1={config.optim.beta1} and "
        f"optim.weight_decay={config.optim.weight_decay} with those of configs/top10k.py.",
        remark=_describe(small),
        figures={"loss": loss, "updates": updates},
    )


def check_accumulation(config: Config) -> Check:
    """Compares two updates by k micro-batches with two by one batch k times as large, in float32."""
    k = config.train.grad_accum_steps if 2 <= config.train.grad_accum_steps <= 8 else 4
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    pieces = shrink(exact, vocab_size=_VOCAB_SIZE, num_updates=2, grad_accum_steps=k, rows=2)
    whole = shrink(exact, vocab_size=_VOCAB_SIZE, num_updates=2, rows=2 * k)
    length = pieces.data.sequence_length
    blocks = np.random.RandomState(3).randint(1, _VOCAB_SIZE, (2 * k, 2, length + 1)).astype(np.int32)
    some_articles_V = jnp.zeros(_VOCAB_SIZE, bool).at[1:20].set(True)
    with jax.default_matmul_precision("highest"):
        in_pieces, metrics = _run(pieces, blocks, some_articles_V)
        at_once, whole_metrics = _run(whole, blocks.reshape(2, 2 * k, length + 1), some_articles_V)
    start, _ = _start(whole)
    change = jax.tree.map(jnp.subtract, at_once.params, start.params)
    error = jax.tree.map(jnp.subtract, at_once.params, in_pieces.params)
    of_params = float(_norm(error) / _norm(change))
    # AdamW forgets the scale of a gradient, so a sum in place of a mean shows in the gradient's norm alone.
    of_gradient = float(np.abs(metrics.grad_norm[k - 1 :: k] / whole_metrics.grad_norm - 1).max())
    return judge(
        "accumulation",
        of_params <= _ACCUMULATION_BOUND and of_gradient <= _ACCUMULATION_BOUND,
        f"change of parameters {of_params:.1e}, gradient {of_gradient:.1e}",
        f"relative difference at most {_ACCUMULATION_BOUND:g}",
        on_fail=f"{k} micro-batches do not add up to one batch {k} times as large, so --config.train.grad_accum_steps "
        "changes what is learnt: the gradients must be averaged, each target weighted alike (MultiSteps in "
        "training/optim.py, next_token_loss).",
        remark=f"{k} micro-batches against one batch, in float32, {_describe(pieces)}",
        figures={"micro_batches": k, "parameters": of_params, "gradient_norm": of_gradient},
    )


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def check_schedule(config: Config) -> Check:
    """Measures the learning rate that the run's own optimizer applies at its first update, the peak, half-way down,
    the last but one and the last, by how far it moves a parameter under a unit gradient."""
    schedule = config.schedule
    assert schedule is not None
    total, warmup = schedule.total_updates, schedule.warmup_updates
    numbers = sorted({1, max(warmup, 1), (warmup + total) // 2, max(total - 1, 1), total})
    optimizer = optim.make_optimizer(config)
    apply = jax.jit(functools.partial(_applied_rate, optimizer, config.train.grad_accum_steps))
    applied = {number: float(apply(number)) for number in numbers}
    curve = optim.learning_rate_schedule(config.optim, schedule)
    logged = {number: float(jnp.asarray(curve(jnp.int32(number - 1)))) for number in numbers}
    expected = {number: _expected_rate(config.optim, schedule, number) for number in numbers}
    peak = config.optim.learning_rate
    worst = max(numbers, key=lambda n: max(abs(rate[n] - expected[n]) for rate in (applied, logged)))
    error = max(abs(rate[worst] - expected[worst]) for rate in (applied, logged)) / (peak or 1.0)
    asked = config.train.max_updates or config.train.num_epochs * schedule.num_blocks / schedule.blocks_per_update
    right_length = 0 <= total - asked < 1
    meaning = (
        f"update {worst:,} of {total:,} runs at {applied[worst]:.3e} (logged as {logged[worst]:.3e}) instead of "
        f"{expected[worst]:.3e}"
        if right_length
        else f"the run has {total:,} updates, but the config asks for {asked:,.1f}"
    )
    at_peak = max(warmup, 1)
    return judge(
        "schedule",
        error <= _SCHEDULE_BOUND and right_length,
        f"{applied[at_peak]:.2e} at {at_peak:,}, {applied[total]:.2e} at {total:,}",
        f"{expected[at_peak]:.2e} at {at_peak:,}, {expected[total]:.2e} at {total:,}, the last",
        on_fail=f"{meaning}: the schedule does not fit the run. See learning_rate_schedule and make_optimizer.",
        figures={"applied": applied, "logged": logged, "expected": expected, "total_updates": total},
        details=[
            f"update {number:,}: applied {applied[number]:.3e}, logged {logged[number]:.3e}, by definition "
            f"{expected[number]:.3e}"
            for number in numbers
        ],
    )


def _expected_rate(optim_config: OptimConfig, schedule: Schedule, number: int) -> float:
    """Returns the definition: linear from 0 to the peak at update `warmup_updates`, then half a cosine to the last."""
    peak, lowest = optim_config.learning_rate, optim_config.min_learning_rate
    warmup, total = schedule.warmup_updates, schedule.total_updates
    if number <= warmup:
        return peak * number / warmup
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (number - warmup) / (total - warmup))) / 2


def _applied_rate(optimizer: Any, grad_accum_steps: int, number: jax.Array) -> jax.Array:
    """Returns the rate at which update `number` moves parameters: AdamW's first step is rate x sign of the gradient."""
    params = {"kernel": jnp.zeros((2, 2))}  # zeros: nothing to decay
    state = optimizer.init(params)
    # What counts updates is set to those before; Adam's own count, which mends the bias of its averages, stays 0.
    before = jnp.asarray(number - 1, jnp.int32)
    inner = jax.tree.map(
        lambda part: part._replace(count=before) if _counts_updates(part) else part,
        state.inner_opt_state,
        is_leaf=_counts_updates,
    )
    state = state._replace(gradient_step=before, inner_opt_state=inner)

    def micro_step(_: int, carried: Any) -> Any:
        return optimizer.update({"kernel": jnp.ones((2, 2))}, carried[1], params)

    updates, _ = jax.lax.fori_loop(0, grad_accum_steps, micro_step, (params, state))
    return -updates["kernel"][0, 0]


def _counts_updates(part: Any) -> bool:
    return hasattr(part, "_fields") and part._fields == ("count",)


def check_decode_parity(config: Config) -> Check:
    """Compares the logits of prefill + cached decoding with those of the full forward, for prompts of unequal length,
    and what `generate` writes greedily with the forward's own first choices."""
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    small = shrink(exact, vocab_size=_VOCAB_SIZE, num_updates=1)
    model, context = small.model, small.data.sequence_length
    # Matrices larger than at the start, so that what stands in the cache decides on the logits.
    params = jax.tree.map(
        lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, transformer.init_params(model, jax.random.key(4))
    )
    new_tokens = min(_NEW_TOKENS, context - 1)
    lengths_B = np.array(sorted({1, (context - new_tokens) // 3 + 1, context - new_tokens}), np.int32)
    tokens_BT = np.random.RandomState(4).randint(1, _VOCAB_SIZE, (len(lengths_B), context)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        forward = _forward(small)
        full_BTV = np.asarray(forward(params, tokens_BT))
        differences = _decode_differences(params, tokens_BT, lengths_B, full_BTV, new_tokens, small)
        disagreeing = _greedy_disagreements(params, tokens_BT, lengths_B, new_tokens, small, forward)
    largest = float(max(differences) / np.abs(full_BTV).max())
    return judge(
        "decode parity",
        largest <= _PARITY_BOUND and disagreeing == 0,
        f"logits {largest:.1e}, {disagreeing} greedy tokens differ",
        f"at most {_PARITY_BOUND:g} of the largest logit, 0",
        on_fail="writing computes other logits than training did, so samples are worse than the model: look at what "
        "prefill and decode_step write into the KV cache, at which position, and at the angles they rotate by.",
        remark=f"prompts of {', '.join(map(str, lengths_B))} tokens, in float32, {_describe(small)}",
        figures={
            "largest_difference": largest,
            "greedy_tokens_that_differ": disagreeing,
            "prompt_lengths": lengths_B.tolist(),
        },
    )


def _decode_differences(
    params: transformer.Params,
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    full_BTV: np.ndarray,
    new_tokens: int,
    small: Config,
) -> list[float]:
    """Returns the largest difference of logits after the prompts, and after each of `new_tokens` - 1 tokens more."""
    context, rows = small.data.sequence_length, np.arange(len(lengths_B))
    prefill = jax.jit(functools.partial(transformer.prefill, config=small.model, cache_length=context))
    decode_step = jax.jit(functools.partial(transformer.decode_step, config=small.model))
    prompts_BT = np.where(np.arange(context)[None] < lengths_B[:, None], tokens_BT, END_OF_STORY_ID)
    logits_BV, caches = prefill(params, prompts_BT, jnp.asarray(lengths_B))
    differences = [float(np.abs(logits_BV - full_BTV[rows, lengths_B - 1]).max())]
    for step in range(new_tokens - 1):
        positions_B = lengths_B + step
        logits_BV, caches = decode_step(params, tokens_BT[rows, positions_B], jnp.asarray(positions_B), caches)
        differences.append(float(np.abs(logits_BV - full_BTV[rows, positions_B]).max()))
    return differences


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
    params, rows = _fresh_params(config), _rows_of(config, block)
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    rounds = config.model.dtype != "float32"
    difference = abs(_loss(params, rows, config) - _loss(params, rows, exact)) if rounds else 0.0
    return judge(
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
    assert config.schedule is not None
    optimizer = optim.make_optimizer(config)
    before = jax.eval_shape(lambda: steps.init_state(config, optimizer))
    train_step = steps.make_train_step(config, optimizer, optim.learning_rate_schedule(config.optim, config.schedule))
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
