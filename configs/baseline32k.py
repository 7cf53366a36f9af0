"""The old approach, for comparison only: 32,000 tokens made for other text, articles weighted 10x in the loss.

    python scripts/train.py --config configs/baseline32k.py --workdir runs/baseline32k

Everything else is configs/top10k.py, but a larger vocabulary is a larger embedding, too.
32,606,784 parameters; hardware as there, 1.4 times the time. Compare bits per byte, never the loss per token, for the
vocabularies differ.
Local text or a ready tokenizer can stand in for WikiText:
    --config.tokenizer.source=files --config.tokenizer.train_files=PATH   or   --config.tokenizer.path=TOKENIZER_JSON
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = runpy.run_path(str(Path(__file__).with_name("top10k.py")))["get_config"]()
    config.tokenizer.max_samples = 0  # all of WikiText: its rows are lines, not stories
    config.tokenizer.vocab_size = 32_000  # tokens; the size of Llama's vocabulary
    config.tokenizer.source = "hub"  # other text than the stories: that is the point
    config.tokenizer.hub_name = "Salesforce/wikitext"
    config.tokenizer.hub_subset = "wikitext-103-raw-v1"
    config.tokenizer.hub_revision = "b08601e04326c79dfdd32d625aee71d232d685c3"  # commit
    config.train.article_loss_weight = 10.0  # the old approach's remedy for missing articles
    return config
