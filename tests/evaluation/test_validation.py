"""Scores over a split against sums made with NumPy."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config
from tinystories_jax.data.tokenizer import train_bpe
from tinystories_jax.evaluation.validation import cache_of_files, eval_step, validate
from tinystories_jax.model.transformer import forward, init_params

ARTICLES = {"a": (5, 17), "an": (), "the": (40,)}


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
    compiled = jax.jit(forward, static_argnums=2)
    losses, hits = [], []
    for start in range(0, len(tokens), length):
        inputs, targets = stream[start : start + length], stream[start + 1 : start + length + 1]
        # Padded to one shape: what follows a token does not change its logits.
        padded = jnp.zeros((1, length), jnp.int32).at[0, : len(inputs)].set(inputs)
        logits = np.asarray(compiled(params, padded, config.model)[0, : len(targets)], np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        losses += list(log_sums - logits[np.arange(len(targets)), targets])
        hits += list(logits.argmax(-1) == targets)
    return np.array(losses), np.array(hits)


def test_every_token_counts_once_the_tail_included(params, tiny_config):
    tokens = np.random.RandomState(0).randint(0, 61, 16 * 4 * 2 + 16 + 7).astype(np.uint16)
    scores = validate(params, cache_of(tokens), tiny_config, ARTICLES)
    losses, _ = losses_by_hand(params, tiny_config, tokens)
    assert scores.num_tokens == len(tokens)
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert scores.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / 777, rel=1e-5)


def test_articles_are_scored_together_and_apart_at_the_targets_that_are_one(params, tiny_config):
    tokens = np.random.RandomState(0).randint(0, 61, 16 * 4 * 2 + 16 + 7).astype(np.uint16)
    # Every other token stands twice, which an untrained model guesses: some first guesses are right.
    tokens[1::2] = tokens[::2][: len(tokens[1::2])]
    scores = validate(params, cache_of(tokens), tiny_config, ARTICLES)
    losses, hits = losses_by_hand(params, tiny_config, tokens)
    ids = {**ARTICLES, "all": (5, 17, 40)}
    for article, found in {**scores.articles, "all": scores.all_articles}.items():
        where = np.isin(tokens, ids[article])
        assert found.num_targets == where.sum()
        if article == "an":
            assert math.isnan(found.loss)
            continue
        assert found.loss == pytest.approx(losses[where].mean(), rel=1e-5)
        assert found.probability == pytest.approx(np.exp(-losses[where]).mean(), rel=1e-5)
        assert found.recall == pytest.approx(hits[where].mean())
    assert scores.all_articles.recall > 0


def test_one_program_is_compiled_for_a_whole_split(params, tiny_config):
    tokens = np.random.RandomState(1).randint(0, 61, 16 * 4 * 3 + 9).astype(np.uint16)
    compiled: Any = eval_step
    compiled.clear_cache()
    validate(params, cache_of(tokens), tiny_config, ARTICLES)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_any_file_of_stories_is_a_split_for_as_long_as_it_is_needed(tmp_path, suffix):
    stories = ["Once upon a time.", "The café had an owl. 🙂"]
    path = tmp_path / f"stories.{suffix}"
    if suffix == "txt":
        path.write_text("\n<|endoftext|>\n".join(stories))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": story}) for story in stories))
    else:
        pq.write_table(pa.table({"text": stories}), path)
    tokenizer = train_bpe(stories, vocab_size=300)
    with cache_of_files(str(path), tokenizer) as cache:
        folder = cache.folder
        assert cache.manifest.num_bytes == sum(len(story.encode()) for story in stories)
        assert tokenizer.decode(cache.tokens) == "<|endoftext|>".join([*stories, ""])
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_max_batches_reads_the_first_ones_only(params, tiny_config):
    config = dataclasses.replace(tiny_config, eval=dataclasses.replace(tiny_config.eval, max_batches=1))
    tokens = np.random.RandomState(0).randint(0, 61, 500).astype(np.uint16)
    scores = validate(params, cache_of(tokens), config, ARTICLES)
    losses, _ = losses_by_hand(params, config, tokens[:64])
    assert scores.num_tokens == 64
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-5)


def test_a_split_without_articles_has_no_article_scores(params, tiny_config):
    tokens = np.full(40, 3, np.uint16)
    scores = validate(params, cache_of(tokens), tiny_config, ARTICLES)
    for articles in (scores.all_articles, *scores.articles.values()):
        assert articles.num_targets == 0
        assert math.isnan(articles.loss)
        assert math.isnan(articles.probability)
        assert math.isnan(articles.recall)
