"""What speed is measured on: a config in its full shapes, and synthetic tokens. No data is needed, nor JAX."""

import dataclasses

import numpy as np

from tinystories_jax.config import Config, with_data
from tinystories_jax.data.cache import dtype_for
from tinystories_jax.errors import UserError

PROMPT_LENGTH = 8  # tokens, about what a story begins with
_NUM_BLOCKS = 4096


def with_synthetic_data(config: Config) -> Config:
    """Returns `config` as if its stories had filled the vocabulary asked for, and 4,096 blocks."""
    return with_data(config, vocab_size=config.tokenizer.vocab_size, num_blocks=_NUM_BLOCKS)


def with_rows(config: Config, rows: int) -> Config:
    """Returns `config` with micro-batches of `rows` rows."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))


def synthetic_tokens(config: Config) -> np.ndarray:
    """Returns the IDs of the blocks of `with_synthetic_data`, uint16 or uint32 as a token cache has them.

    Their frequencies fall off as those of words do, so that rows of the embedding are hit as by text.
    """
    vocab_size = config.model.vocab_size
    tokens = np.random.default_rng(0).zipf(1.2, _NUM_BLOCKS * config.data.sequence_length + 1) % vocab_size
    return tokens.astype(dtype_for(vocab_size))


def require_room_to_write(config: Config) -> None:
    """Raises `UserError` where the context has no room for a text whose tokens can be timed by position."""
    shortest = PROMPT_LENGTH + 2
    if config.data.sequence_length < shortest:
        raise UserError(
            f"data.sequence_length={config.data.sequence_length}: writing is timed after a prompt of {PROMPT_LENGTH} "
            f"tokens; give --config.data.sequence_length={shortest} or more"
        )


def num_new_tokens(config: Config) -> int:
    """Returns how many tokens each timed text gets: sample.max_new_tokens, or what the context has room for."""
    return min(config.sample.max_new_tokens, config.data.sequence_length - PROMPT_LENGTH)
