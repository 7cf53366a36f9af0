"""Trains a byte-level BPE tokenizer on stories and describes the vocabulary that came out.

    python scripts/train_tokenizer.py --vocab_size=10000 --output_dir=tokenizer/tinystories_10k --max_samples=100000

Training uses it with --config.tokenizer.path=tokenizer/tinystories_10k; without, train.py trains its own.
"""

import sys
from collections.abc import Iterator

from absl import flags

from tinystories_jax import cli
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import format_vocabulary, save_tokenizer, train_bpe, vocabulary_report
from tinystories_jax.errors import UserError

_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 10_000, "Tokens to reach.", lower_bound=257, upper_bound=1_000_000)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for tokenizer.json.", required=True)
_MAX_SAMPLES = flags.DEFINE_integer("max_samples", 100_000, "Stories to train on; 0 is all.", lower_bound=0)
_SOURCE = flags.DEFINE_enum(
    "source", "hub", ["hub", "files", "sample"], "Where from; the sample is bundled and made up."
)
_TRAIN_FILES = flags.DEFINE_string("train_files", "", "For files: comma-separated paths or globs.")
_HUB_NAME = flags.DEFINE_string("hub_name", "roneneldan/TinyStories", "For hub: OWNER/NAME.")
_HUB_SUBSET = flags.DEFINE_string("hub_subset", "", "For hub: the data set's configuration, if it has several.")
_HUB_REVISION = flags.DEFINE_string("hub_revision", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", "For hub: commit.")


def main() -> None:
    if _SOURCE.value == "files" and not _TRAIN_FILES.value:
        raise UserError("--train_files is empty but --source=files; give paths or globs, comma-separated")
    if _SOURCE.value != "files" and _TRAIN_FILES.value:
        raise UserError(
            f"--train_files={_TRAIN_FILES.value} is not read with --source={_SOURCE.value}; add --source=files"
        )
    source = StorySource(
        kind=_SOURCE.value,
        split="train",
        files=_TRAIN_FILES.value,
        hub_name=_HUB_NAME.value,
        hub_subset=_HUB_SUBSET.value,
        hub_revision=_HUB_REVISION.value,
        max_stories=_MAX_SAMPLES.value,
    )
    described: list[str] = []
    stories = remember_first(iter_stories(source, StoryReport(), SeenStories()), described, limit=100_000)
    tokenizer = train_bpe(stories, vocab_size=_VOCAB_SIZE.value, show_progress=sys.stderr.isatty())
    path = save_tokenizer(tokenizer, _OUTPUT_DIR.value)
    print(format_vocabulary(vocabulary_report(tokenizer, described, asked=_VOCAB_SIZE.value)))
    print(f"wrote {path} (SHA-256 {tokenizer.sha256})")


def remember_first(stories: Iterator[str], kept: list[str], *, limit: int) -> Iterator[str]:
    """Yields the stories, and keeps the first `limit` of them: one reading serves training and description."""
    for story in stories:
        if len(kept) < limit:
            kept.append(story)
        yield story


if __name__ == "__main__":
    cli.run(main)
