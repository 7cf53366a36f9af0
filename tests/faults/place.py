"""A folder with stories and a small token cache, for faults to be done to."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinystories_jax.config import Config, resolve
from tinystories_jax.data.prepare import PreparedData, prepare_data
from tinystories_jax.data.stories import END_OF_STORY

ROOT = Path(__file__).resolve().parents[2]


def write_stories(path: Path, indices: range) -> Path:
    """Writes one story for each index."""
    path.write_text(
        "".join(
            f"Once upon a time cat {index} saw {index * 3} red balls and an owl.\n{END_OF_STORY}\n" for index in indices
        )
    )
    return path


def make_config(folder: Path, **overrides: Any) -> Config:
    """Returns the config of a tiny model on `folder`/train.txt and valid.txt, with its cache in `folder`/cache."""
    values: Any = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    changed = {
        "data.source": "files",
        "data.train_files": str(folder / "train.txt"),
        "data.valid_files": str(folder / "valid.txt"),
        "data.cache_dir": str(folder / "cache"),
        "data.sequence_length": 16,
        "tokenizer.vocab_size": 300,
    }
    values.update_from_flattened_dict({**changed, **overrides})
    return resolve(values)


def prepare(config: Config, *, rebuild: bool = False, log: Callable[[str], None] = lambda line: None) -> PreparedData:
    return prepare_data(config, rebuild=rebuild, show_progress=False, log=log)
