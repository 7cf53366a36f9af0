"""The recipe's model on the recipe's data in 0.4 of the tokens: Muon for the layers' matrices, AdamW for the rest.

    python scripts/train.py --config configs/speedrun.py --workdir runs/speedrun

Hardware: as configs/top10k.py; 2 epochs of 470 M tokens are 1.4e17 FLOPs, Muon adds 2 %. Goal: the validation loss that
configs/top10k.py ends with. No run on a GPU yet: what was measured is a small model, configs/speedrun_cpu.py, from the
search for which these rates follow by width; docs/recipe.md has the search and the figures.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = runpy.run_path(str(Path(__file__).with_name("top10k.py")))["get_config"]()
    config.train.grad_accum_steps = 2  # 64 x 2 x 512 = 65,536 tokens an update: more updates out of fewer tokens
    config.train.num_epochs = 2  # of the recipe's 5
    # A step of Muon stretches each direction by up to rate x 0.2 x sqrt(width), a step of AdamW a row by as much as
    # width: so from 7e-3 and 2e-2 at width 128 (docs/recipe.md) the rates fall by the square root of 448 / 128, and by
    # 448 / 128.
    config.optim.muon_learning_rate = 3.7e-3
    config.optim.learning_rate = 5.7e-3  # of embedding and norms
    config.optim.min_learning_rate = 0.0  # what is learnt at the end, at small steps, is what few tokens can afford
    config.optim.warmup_updates = 200
    return config
