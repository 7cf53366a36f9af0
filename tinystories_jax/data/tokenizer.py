"""From stories to a vocabulary: trains, loads, stores and describes byte-level BPE tokenizers.

On the way: iter_stories -> `train_bpe` -> write_cache, and at the far end generate -> `StoryTokenizer.decode`.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tinystories_jax.data.folders import parse_json, read_small_file, replace_file
from tinystories_jax.data.stories import END_OF_STORY
from tinystories_jax.errors import UserError, explain_refusal

END_OF_STORY_ID = 0
TOKENIZER_FILE = "tokenizer.json"
_MAX_FILE_BYTES = 64 * 2**20
_ROUND_TRIP = "Once upon a time,  Zoë said: \"It's 10 o'clock!\"\n\nThe café was 50% full… 🙂\tThe end."

# A token of its own is an article in all but one in a thousand cases when a space stands before it or when it opens
# a line in capitals. Bare "a", "an" and "the" are left out: after a space they would carry it, so they are pieces of
# words (Ev|an) and of "peek-a-boo".
_ARTICLES = {
    "a": (" a", " A", "A"),
    "an": (" an", " An", "An"),
    "the": (" the", " The", "The"),
}
_REPORTED = (" a", " the", " an", "A", "The", "An")
_RARE = 100  # below so many uses, a row of the embedding has hardly moved from where it began


@dataclass(frozen=True)
class StoryTokenizer:
    """A tokenizer with the very text of the tokenizer.json it came from; equal when that text is equal.

    Made by `train_bpe`, `load_tokenizer` and `parse_tokenizer`, which check it.
    """

    json: str = field(repr=False)
    backend: Tokenizer = field(compare=False, repr=False)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 bytes of `json`, in hex: what token caches and checkpoints are tied to."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def article_forms(self) -> dict[str, tuple[int, ...]]:
        """IDs of the tokens that are "a", "an" and "the" each, ascending; a form of several tokens has none."""
        found = {article: map(self.token_id, forms) for article, forms in _ARTICLES.items()}
        return {article: tuple(sorted({i for i in ids if i is not None})) for article, ids in found.items()}

    @cached_property
    def article_ids(self) -> tuple[int, ...]:
        """IDs of the tokens that are a / an / the, ascending."""
        return tuple(sorted(token for ids in self.article_forms.values() for token in ids))

    def token_id(self, text: str) -> int | None:
        """Returns the ID of `text` if it is encoded as one token, else None."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def encode(self, text: str) -> list[int]:
        """Returns the token IDs of `text`; an end-of-story marker written in it becomes ID 0, and none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the uint32 token IDs of each text, in parallel and mostly without the interpreter lock."""
        # The fast variant leaves out the offsets, which nobody here reads.
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        # By way of array: half the time of np.array on a list.
        return [np.asarray(array("I", encoding.ids)) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the exact text of `ids`, end-of-story markers included; half a character becomes U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=False)


def train_bpe(
    stories: Iterable[str], *, vocab_size: int, max_samples: int = 0, show_progress: bool = False
) -> StoryTokenizer:
    """Returns a byte-level BPE of at most `vocab_size` tokens, trained on the first `max_samples` stories (0: all).

    The same stories give the same bytes of JSON, whatever the process, the hash seed or the number of threads.
    Raises `UserError` when there is no story.
    """
    samples = iter(itertools.islice(stories, max_samples or None))
    first = next(samples, None)
    if first is None:
        raise UserError("no story to train the tokenizer on; see the source of stories (tokenizer.source, data.source)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_STORY],  # the first special token takes ID 0
        # All 256 bytes have a token, so any text can be encoded and nothing is ever "unknown".
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(itertools.chain([first], samples), trainer)
    return parse_tokenizer(backend.to_str(), "the tokenizer just trained")


def load_tokenizer(path: str | Path) -> StoryTokenizer:
    """Returns the tokenizer in `path`, a tokenizer.json or a folder with one; raises `UserError` when unusable."""
    file = Path(path)
    if file.is_dir():
        file = file / TOKENIZER_FILE
    try:
        text = read_small_file(file, _MAX_FILE_BYTES).decode()
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; give a tokenizer.json or a folder with one") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); give a tokenizer.json") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{error}; give a tokenizer.json") from error
    return parse_tokenizer(text, str(file))


def parse_tokenizer(json_text: str, where: str) -> StoryTokenizer:
    """Returns the tokenizer that `json_text` describes; raises `UserError`, which names `where`, when unusable."""
    try:
        parse_json(json_text, where)
    except ValueError as error:
        raise UserError(f"{error}; give a tokenizer.json") from error
    try:
        tokenizer = StoryTokenizer(json_text, Tokenizer.from_str(json_text))
        problem = _find_problem(tokenizer)
    except BaseException as error:
        # The library raises nothing more precise than Exception, and not even that where its Rust code panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not a tokenizer that the tokenizers library can use: {reason:.300}") from error
    if problem:
        raise UserError(f"{where}: {problem:.500}")
    return tokenizer


def _find_problem(tokenizer: StoryTokenizer) -> str | None:
    backend = tokenizer.backend
    end_id = backend.token_to_id(END_OF_STORY)
    if end_id is None:
        return f"it has no token {END_OF_STORY}, which ends every story; train one with scripts/train_tokenizer.py"
    if end_id != END_OF_STORY_ID or tokenizer.encode(END_OF_STORY) != [END_OF_STORY_ID]:
        return f"{END_OF_STORY} must be a special token with ID {END_OF_STORY_ID}, but it has ID {end_id}"
    for name, stored in (("truncation", backend.truncation), ("padding", backend.padding)):
        if stored is not None:
            return f"it stores {name} {stored}, which would falsify stories; set {name} to null in the file"
    if backend.num_special_tokens_to_add(False):
        return "its post_processor adds tokens to every text, which the stories do not have; set post_processor to null"
    if getattr(backend.model, "dropout", None):
        return f"it stores BPE dropout {backend.model.dropout}, so texts have no fixed IDs; set dropout to null"
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        missing = next((row for row, token in enumerate(ids) if row != token), len(ids))
        return f"its {len(ids):,} IDs must be 0 to {len(ids) - 1:,} without a gap, but ID {missing:,} is missing"
    decoded = tokenizer.decode(tokenizer.encode(_ROUND_TRIP))
    if decoded != _ROUND_TRIP:
        return f"it loses text: {_ROUND_TRIP!r} comes back as {decoded!r}; a byte-level BPE would not"
    return None


def save_tokenizer(tokenizer: StoryTokenizer, folder: str | Path) -> Path:
    """Writes `folder`/tokenizer.json, the very bytes of `tokenizer.json`, at once or not at all; returns its path."""
    path = Path(folder) / TOKENIZER_FILE
    try:
        replace_file(path, tokenizer.json.encode())
    except OSError as error:
        reason, way_out = explain_refusal(error)
        raise UserError(f"cannot write {path}: {reason}; {way_out}, or choose another folder") from error
    return path


def batch_stories(stories: Iterable[str]) -> Iterator[list[str]]:
    """Yields the stories in lists of up to 2,048, shorter when 4 M characters are reached, to bound the memory."""
    batch: list[str] = []
    num_characters = 0
    for story in stories:
        batch.append(story)
        num_characters += len(story)
        if len(batch) == 2048 or num_characters >= 4_000_000:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class VocabularyReport:
    """What a vocabulary does to some stories; tokens include the end-of-story token of each."""

    asked: int
    vocab_size: int
    num_stories: int
    num_words: int
    num_bytes: int
    num_tokens: int
    num_articles: int
    num_rows_unused: int
    num_rows_rare: int
    single_tokens: dict[str, int | None]  # text -> its ID, None when it takes several tokens


def vocabulary_report(tokenizer: StoryTokenizer, stories: Iterable[str], *, asked: int) -> VocabularyReport:
    """Returns the report over all of `stories`, in one pass; `asked` is the vocabulary size that was wanted."""
    uses = np.zeros(tokenizer.vocab_size, np.int64)
    num_stories = num_words = num_bytes = 0
    for batch in batch_stories(stories):
        ids = np.concatenate(tokenizer.encode_batch(batch))
        uses += np.bincount(ids, minlength=len(uses))
        num_stories += len(batch)
        num_words += sum(len(story.split()) for story in batch)
        num_bytes += sum(len(story.encode()) for story in batch)
    if not num_stories:
        raise UserError("no story to describe the vocabulary with")
    uses[END_OF_STORY_ID] += num_stories
    return VocabularyReport(
        asked=asked,
        vocab_size=tokenizer.vocab_size,
        num_stories=num_stories,
        num_words=num_words,
        num_bytes=num_bytes,
        num_tokens=int(uses.sum()),
        num_articles=int(uses[list(tokenizer.article_ids)].sum()),
        num_rows_unused=int((uses == 0).sum()),
        num_rows_rare=int((uses < _RARE).sum()),
        single_tokens={text: tokenizer.token_id(text) for text in _REPORTED},
    )


def format_vocabulary(report: VocabularyReport) -> str:
    """Returns the report as plain text of one screen."""
    lines = [f"vocabulary            {report.vocab_size:,} tokens ({report.asked:,} asked)"]
    if report.vocab_size < report.asked:
        lines.append(f"  the corpus fills only {report.vocab_size:,} of the {report.asked:,} tokens asked")
    lines += [
        f"measured on           {report.num_stories:,} stories, {report.num_words:,} words, {report.num_bytes:,} bytes",
        f"tokens                {report.num_tokens:,} (each story's end token counted, here and below)",
        f"tokens per word       {report.num_tokens / max(report.num_words, 1):.3f}",
        f"bytes per token       {report.num_bytes / report.num_tokens:.3f}",
        f"share of articles     {report.num_articles / report.num_tokens:.2%} of the tokens are a / an / the",
        f"rows never used       {report.num_rows_unused:,} of {report.vocab_size:,}",
        f"rows used under {_RARE} x {report.num_rows_rare:,} (the unused included)",
        "articles as one token " + _format_single_tokens(report.single_tokens),
    ]
    return "\n".join(lines)


def _format_single_tokens(single_tokens: dict[str, int | None]) -> str:
    parts = (f'"{text}" {"no" if token is None else "yes"}' for text, token in single_tokens.items())
    return ", ".join(parts)
