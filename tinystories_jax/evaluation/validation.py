"""Loss of a model over a split: token-weighted, every token a target once, the articles apart."""

import contextlib
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.config import Config, ModelConfig
from tinystories_jax.data.cache import TokenCache, cache_fingerprint, eval_batches, open_cache, write_cache
from tinystories_jax.data.stories import StorySource, source_identity
from tinystories_jax.data.tokenizer import StoryTokenizer
from tinystories_jax.model.loss import losses_and_hits, split_block
from tinystories_jax.model.transformer import Params, hidden_and_output


@dataclass(frozen=True)
class ArticleScores:
    """At the targets that are a token of an article: the mean loss in nats, the mean probability of the right token,
    and the share of right first guesses; nan where there is none."""

    loss: float
    probability: float
    recall: float
    num_targets: int


@dataclass(frozen=True)
class ValidationScores:
    """loss: nats per token. bits_per_byte: comparable between vocabularies. all_articles: a, an and the together;
    articles: each apart, its forms (capitals, a space before it) together."""

    loss: float
    bits_per_byte: float
    num_tokens: int
    all_articles: ArticleScores
    articles: dict[str, ArticleScores]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # beyond what a float holds


class EvalSums(NamedTuple):
    """Sums over the weighted targets of one batch, float32: scalars, and one per article (A)."""

    loss: jax.Array
    num_tokens: jax.Array
    loss_A: jax.Array
    probability_A: jax.Array
    hits_A: jax.Array
    num_targets_A: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def eval_step(
    params: Params, block: jax.Array, weights_BT: jax.Array, articles_AV: jax.Array, *, config: ModelConfig
) -> EvalSums:
    """Returns the sums over one block, int32 (batch, T + 1).

    `weights_BT` is 0 on padding and 1 elsewhere; row A of `articles_AV` is True for the tokens of article A.
    """
    inputs_BT, targets_BT = split_block(block)
    hidden_BTD, output_DV = hidden_and_output(params, inputs_BT, config)
    losses_BT, hits_BT = losses_and_hits(hidden_BTD, output_DV, targets_BT)
    articles_ABT = articles_AV[:, targets_BT] * weights_BT[None]

    def sum_per_article(values_BT: jax.Array) -> jax.Array:
        return (articles_ABT * values_BT[None]).sum(axis=(1, 2))

    return EvalSums(
        loss=(losses_BT * weights_BT).sum(),
        num_tokens=weights_BT.sum(),
        loss_A=sum_per_article(losses_BT),
        probability_A=sum_per_article(jnp.exp(-losses_BT)),
        hits_A=sum_per_article(hits_BT),
        num_targets_A=articles_ABT.sum(axis=(1, 2)),
    )


def validate(
    params: Params, cache: TokenCache, config: Config, article_forms: Mapping[str, Sequence[int]]
) -> ValidationScores:
    """Returns the scores over `cache`, or over its first `eval.max_batches` batches when that is not 0.

    `article_forms` are the IDs of each article (`StoryTokenizer.article_forms`). bits per byte = loss x tokens /
    (ln 2 x UTF-8 bytes), tokens and bytes of the whole split.
    """
    articles_AV = jnp.stack([article_mask(ids, config.model.vocab_size) for ids in article_forms.values()])
    total = sum_over_tokens(params, cache.tokens, config, articles_AV)
    per_article = np.stack([total.loss_A, total.probability_A, total.hits_A, total.num_targets_A], axis=1)
    loss = total.loss / total.num_tokens
    manifest = cache.manifest
    return ValidationScores(
        loss=float(loss),
        bits_per_byte=float(loss * manifest.num_tokens / (math.log(2) * manifest.num_bytes)),
        num_tokens=int(total.num_tokens),
        all_articles=_article_scores(per_article.sum(axis=0)),
        articles={article: _article_scores(row) for article, row in zip(article_forms, per_article, strict=True)},
    )


def sum_over_tokens(params: Params, tokens: np.ndarray, config: Config, articles_AV: jax.Array) -> EvalSums:
    """Returns the sums over `tokens`, integers in one dimension, or over their first `eval.max_batches` batches when
    that is not 0; in NumPy's float64. Row A of `articles_AV` is as in `eval_step`.
    """
    sums: list[EvalSums] = []
    batches = eval_batches(tokens, batch_size=config.train.batch_size, sequence_length=config.data.sequence_length)
    for index, (block, weights_BT) in enumerate(batches):
        if config.eval.max_batches and index >= config.eval.max_batches:
            break
        sums.append(eval_step(params, block, weights_BT, articles_AV, config=config.model))
    # One transfer for all batches; summed in float64, so that no batch is lost in a large float32 sum.
    return jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(sums))


@contextlib.contextmanager
def cache_of_files(files: str, tokenizer: StoryTokenizer) -> Iterator[TokenCache]:
    """Yields a cache of the stories in comma-separated paths or globs, which vanishes with the block.

    They are read as training reads them: mended, stripped, none twice. Raises `UserError` for what cannot be read.
    """
    source = StorySource("files", "validation", files=files)
    identity = source_identity(source, None)
    with tempfile.TemporaryDirectory(prefix="tinystories-") as parent:
        folder = Path(parent) / "cache"
        write_cache(source, tokenizer, folder, identity=identity, show_progress=True)
        fingerprint = cache_fingerprint(tokenizer.sha256, identity)
        yield open_cache(
            folder, fingerprint=fingerprint, vocab_size=tokenizer.vocab_size, rebuild_command="the same command"
        )


def article_mask(article_ids: Sequence[int], vocab_size: int) -> jax.Array:
    """Returns bool mask_V, True for the IDs of a / an / the."""
    mask_V = np.zeros(vocab_size, bool)  # in NumPy: JAX would compile a program for each of ten operations
    mask_V[list(article_ids)] = True
    return jax.device_put(mask_V)


def _article_scores(sums: np.ndarray) -> ArticleScores:
    """Returns the means; `sums` are those of loss, probability, hits and targets."""
    *parts, num_targets = (float(value) for value in sums)
    loss, probability, recall = (part / num_targets if num_targets else math.nan for part in parts)
    return ArticleScores(loss, probability, recall, int(num_targets))
