"""Which stories a config names, split by split, and what ties a cache or a tokenizer to them."""

import dataclasses
from pathlib import Path

from tinystories_jax.config import DataConfig, TokenizerConfig
from tinystories_jax.data.stories import StorySource, source_identity
from tinystories_jax.errors import UserError


def train_source(data: DataConfig) -> StorySource:
    """Returns the training split that `data` names; max_stories limits this split alone."""
    return StorySource(
        kind=data.source,
        split="train",
        files=data.train_files,
        hub_name=data.hub_name,
        hub_revision=data.hub_revision,
        max_stories=data.max_stories,
    )


def valid_source(data: DataConfig) -> StorySource:
    """Returns the validation split that `data` names, whole."""
    return dataclasses.replace(train_source(data), split="validation", files=data.valid_files, max_stories=0)


def tokenizer_source(data: DataConfig, tokenizer: TokenizerConfig) -> StorySource:
    """Returns what a tokenizer is trained on: the training split, or other text from the Hub or files."""
    if tokenizer.source == "stories":
        return train_source(data)
    return StorySource(
        kind=tokenizer.source,
        split="train",
        files=tokenizer.train_files,
        hub_name=tokenizer.hub_name,
        hub_subset=tokenizer.hub_subset,
        hub_revision=tokenizer.hub_revision,
    )


def identify_splits(data: DataConfig, *, remember: bool = True) -> list[dict[str, object]]:
    """Returns what the caches of the training and the validation split are tied to; raises one `UserError` for all that
    cannot be read."""
    identities: list[dict[str, object]] = []
    problems: list[str] = []
    for source in (train_source(data), valid_source(data)):
        try:
            # The identity of files is their content alone; a cache also belongs to one split.
            identity = source_identity(source, memo_path(data), remember=remember)
            identities.append({"split": source.split, **identity})
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return identities


def memo_path(data: DataConfig) -> Path:
    """Returns where the hashes of files are remembered."""
    return Path(data.cache_dir) / "source_hashes.json"


def name_of(source: StorySource) -> str:
    """Returns what a source is called in messages."""
    named = {"hub": f"{source.hub_name} ({source.split})", "files": source.files}
    return named.get(source.kind, f"the bundled sample ({source.split}; made up, not TinyStories)")
