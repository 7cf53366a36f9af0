"""Loss of a model over a split: token-weighted, every token a target once, the articles apart."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.config import Config, ModelConfig
from tinystories_jax.data.cache import TokenCache, eval_batches
from tinystories_jax.model.loss import token_losses
from tinystories_jax.model.transformer import Params, forward


@dataclass(frozen=True)
class ValidationScores:
    """loss: nats per token. bits_per_byte: comparable between vocabularies. article_loss and article_recall: nats, and
    the share of right first guesses, at the targets that are an article; nan where there is none."""

    loss: float
    bits_per_byte: float
    article_loss: float
    article_recall: float
    num_tokens: int


class EvalSums(NamedTuple):
    """Sums over the weighted targets of one batch; float32 scalars."""

    loss: jax.Array
    num_tokens: jax.Array
    article_loss: jax.Array
    article_hits: jax.Array
    num_articles: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def eval_step(
    params: Params, block: jax.Array, weights_BT: jax.Array, article_mask_V: jax.Array, *, config: ModelConfig
) -> EvalSums:
    """Returns the sums over one block, int32 (batch, T + 1); `weights_BT` is 0 on padding and 1 elsewhere."""
    inputs_BT, targets_BT = block[:, :-1], block[:, 1:]
    logits_BTV = forward(params, inputs_BT, config)
    losses_BT = token_losses(logits_BTV, targets_BT) * weights_BT
    articles_BT = article_mask_V[targets_BT] * weights_BT
    hits_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return EvalSums(
        loss=losses_BT.sum(),
        num_tokens=weights_BT.sum(),
        article_loss=(losses_BT * articles_BT).sum(),
        article_hits=(hits_BT * articles_BT).sum(),
        num_articles=articles_BT.sum(),
    )


def validate(params: Params, cache: TokenCache, config: Config, article_mask_V: jax.Array) -> ValidationScores:
    """Returns the scores over `cache`, or over its first `eval.max_batches` batches when that is not 0.

    bits per byte = loss x tokens / (ln 2 x UTF-8 bytes), tokens and bytes of the whole split.
    """
    sums: list[EvalSums] = []
    batches = eval_batches(
        cache.tokens, batch_size=config.train.batch_size, sequence_length=config.data.sequence_length
    )
    for index, (block, weights_BT) in enumerate(batches):
        if config.eval.max_batches and index >= config.eval.max_batches:
            break
        sums.append(eval_step(params, block, weights_BT, article_mask_V, config=config.model))
    # One transfer for all batches; summed in float64, so that no batch is lost in a large float32 sum.
    total = EvalSums(*np.sum(np.array(jax.device_get(sums), np.float64), axis=0))
    loss = total.loss / total.num_tokens
    manifest = cache.manifest
    return ValidationScores(
        loss=float(loss),
        bits_per_byte=float(loss * manifest.num_tokens / (math.log(2) * manifest.num_bytes)),
        article_loss=float(total.article_loss / total.num_articles) if total.num_articles else math.nan,
        article_recall=float(total.article_hits / total.num_articles) if total.num_articles else math.nan,
        num_tokens=int(total.num_tokens),
    )


def article_mask(article_ids: tuple[int, ...], vocab_size: int) -> jax.Array:
    """Returns bool mask_V, True for the IDs of a / an / the."""
    return jnp.zeros(vocab_size, bool).at[jnp.array(article_ids, jnp.int32)].set(True)
