"""A config of the smallest model that still has every part, and an empty KV cache."""

import runpy
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tinystories_jax.config import Config, ModelConfig, resolve, with_data
from tinystories_jax.model.matmul import pack
from tinystories_jax.model.transformer import KVCache, LayerCache

CONFIGS = Path(__file__).parents[1] / "configs"


def read_tiny_values() -> Any:
    """Returns the ConfigDict, to be changed before it is resolved."""
    values: Any = runpy.run_path(str(CONFIGS / "quickstart.py"))["get_config"]()
    values.data.sequence_length = 16
    values.model.update(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
    values.train.update(batch_size=4, grad_accum_steps=2, max_updates=20)
    values.optim.update(warmup_updates=4)
    return values


def make_tiny_config() -> Config:
    """Returns it resolved, for a vocabulary of 61 tokens and 40 blocks: 5 updates are an epoch."""
    return with_data(resolve(read_tiny_values()), vocab_size=61, num_blocks=40)


def make_empty_cache(config: ModelConfig, batch_size: int, cache_length: int, *, packed: bool = False) -> KVCache:
    keys_NKS = jnp.zeros((batch_size * config.num_kv_heads, config.head_dim, cache_length), config.dtype)
    arrays = keys_NKS, jnp.swapaxes(keys_NKS, 1, 2)
    layer = LayerCache(*(pack(array, axis=1) if packed else array for array in arrays))
    layers = [layer] * config.num_layers
    return KVCache(layers, jnp.zeros((batch_size, cache_length), bool), jnp.int32(0))
