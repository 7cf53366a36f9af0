"""Real stories on two CPU cores: 1,377,408 parameters, 400 updates, a few minutes.

    python scripts/train.py --config configs/cpu_real.py --workdir runs/real --config.data.source=files \
        --config.data.train_files=train.txt --config.data.valid_files=valid.txt

Expected on about 7,000 stories: see docs/recipe.md.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = runpy.run_path(str(Path(__file__).with_name("top10k.py")))["get_config"]()
    config.data.sequence_length = 256  # tokens; most stories still fit
    config.tokenizer.vocab_size = 4_096  # tokens; 7,000 stories do not fill 10,000
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4  # heads of 32
    config.model.d_ff = 384  # 3 x d_model
    config.model.dtype = "float32"  # few CPUs have a fast bfloat16
    config.train.batch_size = 32
    config.train.grad_accum_steps = 1
    config.train.max_updates = 400  # 3.3 M tokens, about 2 epochs of 7,000 stories
    config.optim.learning_rate = 4e-3  # small models take large steps
    config.optim.min_learning_rate = 4e-4
    config.optim.warmup_updates = 40
    config.eval.every = 100
    config.checkpoint.every = 100
    return config
