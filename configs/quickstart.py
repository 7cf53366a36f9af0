"""The first ten minutes: the bundled made-up stories (not TinyStories), a small model, two CPU cores, no network.

    make quickstart

It shows that every part works and what a run looks like. Its figures say nothing about TinyStories.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = runpy.run_path(str(Path(__file__).with_name("cpu_real.py")))["get_config"]()
    config.data.source = "sample"
    config.tokenizer.vocab_size = 2_048  # tokens; the made-up stories have few words
    config.train.batch_size = 16  # small updates, and many: what learns fastest in a few minutes
    config.train.max_updates = 600
    config.optim.warmup_updates = 60
    config.eval.every = 200
    config.eval.max_batches = 16  # validation batches
    config.checkpoint.every = 200
    return config
