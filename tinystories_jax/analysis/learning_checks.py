"""Checks of loss, gradients and optimizer by measurement, on the functions that training itself calls."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.analysis.check import Check, pass_or_fail
from tinystories_jax.analysis.small_copy import (
    describe,
    jit_forward,
    loss_of,
    rows_of,
    shrink,
    start,
)
from tinystories_jax.config import Config, ModelConfig
from tinystories_jax.data.tokenizer import StoryTokenizer
from tinystories_jax.evaluation.validation import sum_over_tokens
from tinystories_jax.training import steps

_VOCAB_SIZE = 160
_ROWS = 8
_CYCLE = 61  # tokens; prime, so that no offset is confounded with another
_SHIFT_UPDATES = 80
_OVERFIT_UPDATES = 200
_OVERFIT_ROWS = 2
_REPEATED_EVERY = 4  # tokens; what follows the repeated one is known by what stands before it alone
_MOST_MICRO_BATCHES = 64
_SHIFT_SHARE_BOUND = 0.9
_EVALUATED_TOKENS = 1_000  # no whole number of batches, so that the last is padded
_EVALUATION_BOUND = 0.25  # nats per token; one more or one less of a shift costs more than the ln 61 of a guess
_INITIAL_LOSS_BOUND = 0.02  # relative
_OVERFIT_BOUND = 0.1  # nats per token
_UNTRAINED_BOUND = 1e-5  # of the array's norm; float32 keeps 6e-8 of each value, an update moves it by 1e-3 or more
_ACCUMULATION_BOUND = 1e-3  # relative


def check_target_shift(config: Config, block: np.ndarray | None, tokenizer: StoryTokenizer | None) -> Check:
    """Trains on a cycle of tokens, on which every offset can be learnt, and measures which one is: it must be +1.
    Validation, on that cycle, must measure the loss that training reached.

    `block` is a real micro-batch, shown as text at the offset found.
    """
    small = shrink(config, vocab_size=_VOCAB_SIZE, num_updates=_SHIFT_UPDATES, rows=_ROWS)
    random = np.random.RandomState(0)
    cycle = 1 + random.permutation(_VOCAB_SIZE - 1)[:_CYCLE]
    length = small.data.sequence_length
    starts = random.randint(0, _CYCLE, (_SHIFT_UPDATES, _ROWS, 1))
    blocks = cycle[(starts + np.arange(length + 1)) % _CYCLE].astype(np.int32)
    state, metrics = _run(small, blocks, jnp.zeros(_VOCAB_SIZE, bool))
    trained = float(metrics.loss[-1])
    validated, num_validated = _validate(state.params, np.resize(cycle, _EVALUATED_TOKENS), small)
    offset, share = _learnt_offset(jit_forward(small)(state.params, blocks[0, :, :-1]), blocks[0, :, :-1], cycle)
    return pass_or_fail(
        "target shift",
        offset == 1
        and share >= _SHIFT_SHARE_BOUND
        and abs(validated - trained) <= _EVALUATION_BOUND
        and num_validated == _EVALUATED_TOKENS,
        f"{offset:+} at {share:.0%} of the positions; loss {trained:.3f}, by validation {validated:.3f}",
        f"+1 at {_SHIFT_SHARE_BOUND:.0%} or more; {_EVALUATION_BOUND} nats apart",
        on_fail=_explain_shift(offset, share, trained, validated, num_validated),
        remark=describe(small),
        figures={
            "offset": offset,
            "share": share,
            "training_loss": trained,
            "validation_loss": validated,
            "validated_tokens": num_validated,
        },
        details=_show_pairs(block, tokenizer, offset),
    )


def _learnt_offset(logits_BTV: jax.Array, inputs_BT: np.ndarray, cycle: np.ndarray) -> tuple[int, float]:
    """Returns how far along `cycle` the predictions most often stand from the inputs, and at what share of them."""
    place_V = np.full(_VOCAB_SIZE, -1)
    place_V[cycle] = np.arange(_CYCLE)
    predicted_BT = place_V[np.asarray(logits_BTV).argmax(-1)]
    offsets_BT = (predicted_BT - place_V[inputs_BT]) % _CYCLE
    counts = np.bincount(offsets_BT[predicted_BT >= 0], minlength=_CYCLE)
    offset = int(counts.argmax())
    return offset - _CYCLE * (offset > _CYCLE // 2), float(counts.max() / inputs_BT.size)


def _explain_shift(offset: int, share: float, trained: float, validated: float, num_validated: float) -> str:
    if share < _SHIFT_SHARE_BOUND:
        return (
            f"no offset was learnt (at best {offset:+} at {share:.0%} of the positions): the loss does not teach what "
            "comes next, or this optimizer does not get there"
        )
    if offset != 1:
        return (
            f"position t is trained to predict token t {'-' if offset < 0 else '+'} {abs(offset)} instead of t + 1: "
            "the labels are shifted in more than one place, or in none. Such a model drops articles and other small "
            "words, without any error. Shift in train_step alone."
        )
    if num_validated != _EVALUATED_TOKENS:
        return (
            f"validation counts {num_validated:,.0f} of {_EVALUATED_TOKENS:,} tokens: each must be a target once, and "
            "padding none. See eval_batches and eval_step."
        )
    return (
        f"validation measures {validated:.2f} nats on what training learnt to {trained:.2f}: it asks for other tokens "
        "than training teaches. See eval_batches and eval_step."
    )


def _validate(params: Any, tokens: np.ndarray, config: Config) -> tuple[float, float]:
    """Returns the mean loss, and how many tokens it was measured on."""
    no_articles_AV = jnp.zeros((1, config.model.vocab_size), bool)
    whole = dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_batches=0))
    sums = sum_over_tokens(params, tokens, whole, no_articles_AV)
    return float(sums.loss / sums.num_tokens), float(sums.num_tokens)


def _show_pairs(block: np.ndarray | None, tokenizer: StoryTokenizer | None, offset: int) -> tuple[str, ...]:
    if block is None or tokenizer is None:
        return ()
    row = block[0]
    places = [min(len(row) - 1 - max(offset, 0), round(share * len(row))) for share in (0.25, 0.5, 0.75)]
    return tuple(
        f"{tokenizer.decode(row[max(0, place - 11) : place + 1])!r} -> {tokenizer.decode([row[place + offset]])!r}"
        for place in places
        if place >= 0 and place + offset >= 0
    )


def check_initial_loss(config: Config, block: np.ndarray | None, why_random: str = "") -> Check:
    """Measures the loss of fresh parameters at full size: near ln V, since nothing is known yet."""
    loss = loss_of(steps.fresh_params(config), rows_of(config, block), config)
    expected = _expected_initial_loss(config.model)
    distance = abs(loss / expected - 1)
    return pass_or_fail(
        "loss at initialisation",
        distance <= _INITIAL_LOSS_BOUND,
        f"{loss:.4f} nats, {distance:.2%} off",
        f"within {_INITIAL_LOSS_BOUND:.0%} of {expected:.4f}; ln V is {math.log(config.model.vocab_size):.4f}",
        on_fail="fresh parameters should find all tokens about equally likely: a larger loss means that they start "
        "with strong wrong beliefs (too large an initialisation), a smaller one that targets leak. See init_params.",
        remark="" if block is not None else f"on random tokens: {why_random}",
        figures={"loss": loss, "expected": expected},
    )


def _expected_initial_loss(model: ModelConfig) -> float:
    """Returns ln V plus half the variance of the logits, since that is what the mean of exp(logit) adds.

    By the recipe the output matrix is drawn from normal(0, ln(0.03 V) / d_model) where it is the embedding, else from
    normal(0, 0.02); the hidden state it meets has d_model values of variance 1.
    """
    if model.tie_embeddings:
        variance = math.log(max(0.03 * model.vocab_size, 1.5)) ** 2 / model.d_model
    else:
        variance = 0.02**2 * model.d_model
    return math.log(model.vocab_size) + variance / 2


def check_overfit(config: Config) -> Check:
    """Trains on two rows until they are known by heart: gradients and optimizer do their work, on every parameter.

    No token of the rows stands twice, but for one that comes again and again in both: what follows it is told by
    attention alone. So the rows can be known by heart, however short the context, which not all rows of stories can.
    """
    small = shrink(config, vocab_size=config.model.vocab_size, num_updates=_OVERFIT_UPDATES, rows=_OVERFIT_ROWS)
    size = (_OVERFIT_ROWS, small.data.sequence_length + 1)
    rows = 1 + np.random.RandomState(5).permutation(small.model.vocab_size - 1)[: math.prod(size)].reshape(size)
    rows[:, 1::_REPEATED_EVERY] = rows[0, 1]
    rows = rows.astype(np.int32)
    state, train_step = start(small)
    before = jax.device_get(state.params)
    no_articles_V = jnp.zeros(small.model.vocab_size, bool)
    loss, updates = math.inf, 0
    while updates < _OVERFIT_UPDATES and not loss < _OVERFIT_BOUND:
        for _ in range(10):
            state, metrics = train_step(state, rows, no_articles_V)
        updates, loss = updates + 10, float(metrics.loss)
    untrained = _untrained(before, jax.device_get(state.params))
    return pass_or_fail(
        "overfit",
        loss < _OVERFIT_BOUND and not untrained,
        f"{loss:.4f} nats after {updates} updates; {len(untrained)} arrays not trained",
        f"below {_OVERFIT_BOUND} within {_OVERFIT_UPDATES} updates; 0",
        on_fail=f"no gradient reaches {', '.join(untrained[:4])}, or the optimizer does not apply it: such arrays keep "
        "the values they were drawn with, but for the decay of weights. See train_step and make_optimizer."
        if untrained
        else "a model that cannot learn two rows by heart learns nothing else: gradients do not reach all "
        "parameters, the optimizer does not apply them, or it holds them back; compare "
        f"optim.max_grad_norm={config.optim.max_grad_norm}, optim.beta1={config.optim.beta1}, "
        f"optim.beta2={config.optim.beta2}, optim.weight_decay={config.optim.weight_decay} and "
        f"optim.muon_momentum={config.optim.muon_momentum} with those of configs/top10k.py.",
        remark=f"{_OVERFIT_ROWS} rows, {describe(small)}",
        figures={"loss": loss, "updates": updates, "untrained": untrained},
    )


def _untrained(before: Any, after: Any) -> list[str]:
    """Returns the names of the arrays that training left as they were, or only made smaller or larger as a whole, as
    the decay of weights does."""
    found = []
    for (path, was), is_now in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        change = is_now.astype(np.float64) - was
        change -= was * (np.vdot(change, was) / np.vdot(was, was))  # what is along the array itself
        if np.linalg.norm(change) <= _UNTRAINED_BOUND * np.linalg.norm(was):
            found.append(jax.tree_util.keystr(path, simple=True, separator="."))
    return found


def check_accumulation(config: Config) -> Check:
    """Compares two updates by k micro-batches with two by one batch k times as large, in float32."""
    asked = config.train.grad_accum_steps
    k = min(asked, _MOST_MICRO_BATCHES) if asked > 1 else 4
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    pieces = shrink(exact, vocab_size=_VOCAB_SIZE, num_updates=2, grad_accum_steps=k, rows=2)
    whole = shrink(exact, vocab_size=_VOCAB_SIZE, num_updates=2, rows=2 * k)
    length = pieces.data.sequence_length
    blocks = np.random.RandomState(3).randint(1, _VOCAB_SIZE, (2 * k, 2, length + 1)).astype(np.int32)
    some_articles_V = jnp.zeros(_VOCAB_SIZE, bool).at[1:20].set(True)
    with jax.default_matmul_precision("highest"):
        in_pieces, metrics = _run(pieces, blocks, some_articles_V)
        at_once, whole_metrics = _run(whole, blocks.reshape(2, 2 * k, length + 1), some_articles_V)
    before, _ = start(whole)
    # In NumPy: every subtraction of another shape would be a program to compile.
    was, is_now, other = (jax.device_get(state.params) for state in (before, at_once, in_pieces))
    change = jax.tree.map(np.subtract, is_now, was)
    error = jax.tree.map(np.subtract, is_now, other)
    moved = _norm(change)
    of_params = _norm(error) / moved if moved else math.nan
    # The optimizers forget the scale of a gradient, so a sum in place of a mean shows in the gradient's norm alone.
    of_gradient = float(np.abs(metrics.grad_norm[k - 1 :: k] / whole_metrics.grad_norm - 1).max())
    return pass_or_fail(
        "accumulation",
        of_params <= _ACCUMULATION_BOUND and of_gradient <= _ACCUMULATION_BOUND,
        f"change of parameters {of_params:.1e}, gradient {of_gradient:.1e}",
        f"relative difference at most {_ACCUMULATION_BOUND:g}",
        on_fail=f"{k} micro-batches do not add up to one batch {k} times as large, so --config.train.grad_accum_steps "
        "changes what is learnt: the gradients must be averaged, each target weighted alike (MultiSteps in "
        "training/optim.py, next_token_loss).",
        remark=f"{k} micro-batches against one batch, in float32, {describe(pieces)}",
        figures={"micro_batches": k, "parameters": of_params, "gradient_norm": of_gradient},
    )


def _run(config: Config, blocks: np.ndarray, article_mask_V: jax.Array) -> tuple[steps.TrainState, Any]:
    """Returns the state after training on `blocks`, one a micro-step, and the metrics of each, stacked."""
    state, train_step = start(config)
    metrics = []
    for block in blocks:
        state, step_metrics = train_step(state, block, article_mask_V)
        metrics.append(step_metrics)
    return state, jax.tree.map(lambda *values: np.array(values), *jax.device_get(metrics))


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.sum(leaf.astype(np.float64) ** 2)) for leaf in jax.tree.leaves(tree)))
