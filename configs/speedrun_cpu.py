"""configs/cpu_real.py for speed: the validation loss that it ends with, in a third of the tokens.

    python scripts/train.py --config configs/speedrun_cpu.py --workdir runs/speedrun --config.data.source=files \
        --config.data.train_files=train.txt --config.data.valid_files=valid.txt

Muon for the layers' matrices, AdamW for the rest, and smaller updates. Expected on about 7,000 stories: see
docs/recipe.md.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = runpy.run_path(str(Path(__file__).with_name("cpu_real.py")))["get_config"]()
    config.train.batch_size = 8  # 2,048 tokens an update, a quarter of those of cpu_real
    config.train.max_updates = 512  # 1.05 M tokens: those of 128 updates of cpu_real
    config.optim.muon_learning_rate = 7e-3
    config.optim.muon_momentum = 0.85  # found by search: a short run, and 0.95 remembers long
    config.optim.learning_rate = 4e-2  # of embedding and norms
    config.optim.beta2 = 0.99  # small updates are noisy: a memory of as many tokens as that of cpu_real
    config.optim.min_learning_rate = 0.0
    config.optim.warmup_updates = 20
    config.eval.every = 128
    config.checkpoint.every = 128
    return config
