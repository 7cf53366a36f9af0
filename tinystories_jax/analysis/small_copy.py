"""The small copy of a config on which the doctor measures what does not depend on size, and full-size helpers.

The copy has the same code, dtype, head width, sharing of key/value heads, context where asked, and optimizer; but two
layers, few heads, no dropout, and a constant learning rate that suits its size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.config import Config, Schedule
from tinystories_jax.evaluation.validation import eval_step
from tinystories_jax.model import transformer
from tinystories_jax.training import optim, steps

SHORT_CONTEXT = 64
LONGEST_CONTEXT = 2_048
_LEAST_WIDTH = 64  # narrower models learn too slowly to be judged by
_LEARNING_RATE = 4e-3
_MUON_LEARNING_RATE = 1e-2
_TOKENS = 1024  # on which a loss is measured


def shrink(
    config: Config,
    *,
    vocab_size: int,
    num_updates: int = 1,
    grad_accum_steps: int = 1,
    rows: int = 1,
    context: int = SHORT_CONTEXT,
) -> Config:
    """Returns the small copy, with micro-batches of `rows` rows and at most `context` tokens of context."""
    model = config.model
    sharing = min(model.num_heads // model.num_kv_heads, 2)
    num_kv_heads = max(min(model.num_kv_heads, 2), -(-_LEAST_WIDTH // (sharing * model.head_dim)))
    num_heads = num_kv_heads * sharing
    d_model = num_heads * model.head_dim
    rates = {"learning_rate": _LEARNING_RATE, "min_learning_rate": _LEARNING_RATE}
    if config.optim.muon_learning_rate:
        rates["muon_learning_rate"] = _MUON_LEARNING_RATE
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
        data=dataclasses.replace(config.data, sequence_length=min(config.data.sequence_length, context)),
        train=dataclasses.replace(config.train, batch_size=rows, grad_accum_steps=grad_accum_steps),
        optim=dataclasses.replace(config.optim, **rates),
        schedule=Schedule(
            num_blocks=num_updates * grad_accum_steps * rows,
            blocks_per_update=grad_accum_steps * rows,
            total_updates=num_updates,
            warmup_updates=0,
            epoch_ends=(num_updates,),
        ),
    )


def describe(small: Config) -> str:
    """Returns what the table says of the small copy."""
    model = small.model
    return (
        f"small copy: {model.num_layers} layers of width {model.d_model}, context {small.data.sequence_length}, "
        f"{model.vocab_size:,} tokens"
    )


def start(config: Config) -> tuple[steps.TrainState, steps.TrainStep]:
    """Returns the initial state and the jitted step of a small copy, made as training makes them."""
    optimizer = optim.make_optimizer(config)
    return steps.init_state(config, optimizer), steps.make_train_step(config, optimizer)


def jit_forward(config: Config) -> Any:
    """Returns the jitted `forward(params, tokens_BT)`."""
    return jax.jit(functools.partial(transformer.forward, config=config.model))


# A program of its own: what runs outside of jit is one for every operation and shape.
@jax.jit
def sharpen(params: transformer.Params) -> transformer.Params:
    """Returns fresh parameters with matrices as large as training makes them, so that what a layer does shows in the
    logits."""
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)


def num_rows_measured(config: Config) -> int:
    """Returns how many rows a loss is measured on: enough tokens for their average not to depend on which they are."""
    return -(-_TOKENS // config.data.sequence_length)


def rows_of(config: Config, block: np.ndarray | None) -> np.ndarray:
    """Returns the first rows of real tokens, random ones where there are none."""
    rows = num_rows_measured(config)
    if block is not None:
        return block[:rows]
    shape = (rows, config.data.sequence_length + 1)
    return np.random.RandomState(2).randint(1, config.model.vocab_size, shape).astype(np.int32)


def loss_of(params: transformer.Params, block: np.ndarray, config: Config) -> float:
    """Returns the mean loss over `block`, in nats per token, by the step that evaluates."""
    no_articles_AV = jnp.zeros((1, config.model.vocab_size), bool)
    weights_BT = np.ones((block.shape[0], block.shape[1] - 1), np.float32)
    sums = eval_step(params, block, weights_BT, no_articles_AV, config=config.model)
    return float(sums.loss / sums.num_tokens)
