"""What speed is measured on: a config in its full shapes, and tokens made up for it. No data is needed, nor JAX."""

import dataclasses

import numpy as np

from tinystories_jax.config import Config, with_data

PROMPT_LENGTH = 8  # tokens, about what a story begins with
_NUM_BLOCKS = 4096


def with_made_up_data(config: Config) -> Config:
    """Returns `config` as if its stories had filled the vocabulary asked for, and 4,096 blocks."""
    return with_data(config, vocab_size=config.tokenizer.vocab_size, num_blocks=_NUM_BLOCKS)


def with_rows(config: Config, rows: int) -> Config:
    """Returns `config` with micro-batches of `rows` rows."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))


def made_up_tokens(config: Config) -> np.ndarray:
    """Returns the IDs of the blocks of `with_made_up_data`, uint16 or uint32 as a token cache has them.

    Their frequencies fall off as those of words do, so that rows of the embedding are hit as by text.
    """
    vocab_size = config.model.vocab_size
    tokens = np.random.default_rng(0).zipf(1.2, _NUM_BLOCKS * config.data.sequence_length + 1) % vocab_size
    return tokens.astype(np.uint16 if vocab_size <= 65_535 else np.uint32)


def num_new_tokens(config: Config) -> int:
    """Returns how many tokens each timed text gets: sample.max_new_tokens, or what the context has room for."""
    return min(config.sample.max_new_tokens, config.data.sequence_length - PROMPT_LENGTH)
