"""A resolved config of the smallest model that still has every part."""

import runpy
from pathlib import Path
from typing import Any

from tinystories_jax.config import Config, resolve, with_data

CONFIGS = Path(__file__).parents[1] / "configs"


def make_tiny_config() -> Config:
    values: Any = runpy.run_path(str(CONFIGS / "quickstart.py"))["get_config"]()
    values.data.sequence_length = 16
    values.model.update(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
    values.train.update(batch_size=4, grad_accum_steps=2, max_updates=20)
    values.optim.update(warmup_updates=4)
    return with_data(resolve(values), vocab_size=61, num_blocks=40)
