"""A config of the smallest model that still has every part."""

import runpy
from pathlib import Path
from typing import Any

from tinystories_jax.config import Config, resolve, with_data

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
