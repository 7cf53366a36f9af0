"""From batches of stories to their token IDs, each distinct word encoded once.

On the way: train_bpe -> `StoryEncoder.encode` -> tokens.bin, inside write_cache. A byte-level BPE never merges across
the border before a space, so a text's IDs are those of its words in a row, and stories have few distinct words: looking
them up takes a tenth of the time that encoding them takes.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from tinystories_jax.data.stories import END_OF_STORY
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer

# What stands between two borders at which the pre-tokenizer splits whatever comes before and after; the first is a
# word with its punctuation, the others are its own rules for whitespace (`\s+(?!\S)|\s+`).
_find_words = re.compile(r" ?\S+|\s+(?!\S)|\s+").findall
# Texts with these are left to the tokenizer: it has other borders at its special token, and takes the separators, which
# are whitespace to Python, for punctuation.
_ODD = (END_OF_STORY, "\x1c", "\x1d", "\x1e", "\x1f")
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_MAX_WORDS = 2**17
_MAX_WORD_CHARACTERS = 64


class StoryEncoder:
    """Encodes as its tokenizer does, bit for bit, in bounded memory; for one thread at a time."""

    def __init__(self, tokenizer: StoryTokenizer, dtype: np.dtype):
        self._tokenizer, self._dtype = tokenizer, dtype
        self._end = np.array([END_OF_STORY_ID], dtype)
        self._words = _Words(tokenizer, dtype) if encodes_by_words(tokenizer) else None

    def encode(self, stories: Sequence[str]) -> np.ndarray:
        """Returns the token IDs of the stories in a row, each followed by END_OF_STORY_ID."""
        if self._words is None:
            return self._encode_whole(stories)
        lookup, end, parts = self._words.__getitem__, self._end.tobytes(), []
        for story in stories:
            if any(odd in story for odd in _ODD):
                parts.append(self._encode_whole([story]).tobytes())
            else:
                parts.extend(map(lookup, _find_words(story)))
                parts.append(end)
        tokens = np.frombuffer(b"".join(parts), self._dtype)
        # One story of each batch the ordinary way: a tokenizer that splits elsewhere must not go unnoticed.
        expected = self._encode_whole(stories[:1])
        assert np.array_equal(tokens[: len(expected)], expected), "encodes_by_words has checked the tokenizer"
        return tokens

    def _encode_whole(self, stories: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(stories)
        return np.concatenate([part for ids in encoded for part in (ids, self._end)]).astype(self._dtype)


def encodes_by_words(tokenizer: StoryTokenizer) -> bool:
    """Says whether a text's IDs are those of its words in a row: so it is for what `train_bpe` makes, and for GPT-2's
    tokenizer, but not where a normalizer, another pre-tokenizer or further special tokens look at a text as a whole."""
    values = json.loads(tokenizer.json)
    pre_tokenizer = values.get("pre_tokenizer") or {}
    processor = values.get("post_processor") or {"type": "ByteLevel"}  # that one shifts offsets alone
    return (
        values.get("normalizer") is None
        and {name: pre_tokenizer.get(name) for name in _PRE_TOKENIZER} == _PRE_TOKENIZER
        and processor["type"] == "ByteLevel"
        and [token["content"] for token in values["added_tokens"]] == [END_OF_STORY]
    )


class _Words(dict[str, bytes]):
    """The token IDs of words, as bytes, filled as they are looked up; forgotten when there are too many."""

    def __init__(self, tokenizer: StoryTokenizer, dtype: np.dtype):
        self._tokenizer, self._dtype = tokenizer, dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._tokenizer.encode(word), self._dtype).tobytes()
        if len(word) <= _MAX_WORD_CHARACTERS:
            if len(self) == _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
