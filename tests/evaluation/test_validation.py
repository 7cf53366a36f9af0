"""Scores over a split against sums made with NumPy."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config
from tinystories_jax.evaluation.validation import article_mask, validate
from tinystories_jax.model.transformer import forward, init_params

ARTICLES = (5, 17)


@pytest.fixture(name="tiny_config")
def make_config() -> Config:
    return make_tiny_config()


def cache_of(tokens: np.ndarray, num_bytes: int = 777) -> Any:
    return SimpleNamespace(tokens=tokens, manifest=SimpleNamespace(num_tokens=len(tokens), num_bytes=num_bytes))


@pytest.fixture
def params(tiny_config):
    return jax.tree.map(lambda leaf: leaf * 4, init_params(tiny_config.model, jax.random.key(0)))


def losses_by_hand(params, config, tokens):
    """Cross-entropy of every token in float64, in the blocks that validation reads, the first after an end token."""
    length = config.data.sequence_length
    stream = np.concatenate([[0], tokens])
    losses, hits = [], []
    for start in range(0, len(tokens), length):
        inputs, targets = stream[start : start + length], stream[start + 1 : start + length + 1]
        inputs = inputs[: len(targets)]
        logits = np.asarray(forward(params, jnp.asarray(inputs[None]), config.model)[0], np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        losses += list(log_sums - logits[np.arange(len(targets)), targets])
        hits += list(logits.argmax(-1) == targets)
    return np.array(losses), np.array(hits)


def test_every_token_counts_once_the_tail_included(params, tiny_config):
    tokens = np.random.RandomState(0).randint(0, 61, 16 * 4 * 2 + 16 + 7).astype(np.uint16)
    scores = validate(params, cache_of(tokens), tiny_config, article_mask(ARTICLES, 61))
    losses, hits = losses_by_hand(params, tiny_config, tokens)
    articles = np.isin(tokens, ARTICLES)
    assert scores.num_tokens == len(tokens)
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert scores.article_loss == pytest.approx(losses[articles].mean(), rel=1e-5)
    assert scores.article_recall == pytest.approx(hits[articles].mean())
    assert scores.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / 777, rel=1e-5)


def test_max_batches_reads_the_first_ones_only(params, tiny_config):
    config = dataclasses.replace(tiny_config, eval=dataclasses.replace(tiny_config.eval, max_batches=1))
    tokens = np.random.RandomState(0).randint(0, 61, 500).astype(np.uint16)
    scores = validate(params, cache_of(tokens), config, article_mask(ARTICLES, 61))
    losses, _ = losses_by_hand(params, config, tokens[:64])
    assert scores.num_tokens == 64
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-5)


def test_a_split_without_articles_has_no_article_scores(params, tiny_config):
    tokens = np.full(40, 3, np.uint16)
    scores = validate(params, cache_of(tokens), tiny_config, article_mask(ARTICLES, 61))
    assert math.isnan(scores.article_loss)
    assert math.isnan(scores.article_recall)
