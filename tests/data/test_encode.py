"""Encoding by words gives the tokenizer's own IDs, whatever the text, and is not tried where it would not."""

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from tinystories_jax.data import encode
from tinystories_jax.data.encode import StoryEncoder, encodes_by_words
from tinystories_jax.data.sample import iter_sample
from tinystories_jax.data.stories import END_OF_STORY, SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import StoryTokenizer, parse_tokenizer, train_bpe

UINT16 = np.dtype("<u2")
WHITESPACE = [char for char in map(chr, range(sys.maxunicode + 1)) if char.isspace()]
# And what some tables take for whitespace and others do not.
PIECES = [
    *WHITESPACE,
    *("\u180e", "\u200b", "\u2060", "\ufeff", "\0", "\x7f"),
    *(" ", "  ", "   ", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n\n", "\t"),
    *("a", "The", "cat", "é", "e\u0301", "狗", "🙂", "\u200d", "Ⅷ", "½", "7", "1234"),
    *("'", "''", "'s", "'ll", "'LL", "don't", "“", "”", "…", ".", "?!", "--", "_", "$", "<|endof", "text|>"),
    END_OF_STORY,
]


def made_up_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(count)]


def one_by_one(tokenizer: StoryTokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in (*tokenizer.encode(text), 0)]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    # Trained on the odd texts as well, so that runs of whitespace have tokens, and splitting them shows.
    return train_bpe([*made_up_texts(3_000), *itertools.islice(iter_sample("train"), 200)], vocab_size=1_000)


def test_made_up_texts_get_the_ids_of_the_tokenizer(tokenizer):
    assert encodes_by_words(tokenizer)
    runs = {token for token in tokenizer.backend.get_vocab() if set(token) <= set("ĠĊ") and len(token) > 2}
    assert runs, "no run of whitespace has a token, so that this test shows little"
    texts = [*made_up_texts(6_000), *("".join(pair) for pair in itertools.product(PIECES, repeat=2))]
    encoder = StoryEncoder(tokenizer, UINT16)
    for batch in (texts[:5_000], texts[5_000:], texts):
        assert encoder.encode(batch).tolist() == one_by_one(tokenizer, batch)


def test_real_stories_get_the_ids_of_the_tokenizer(tinystories_data: Path):
    source = StorySource("files", "train", files=str(tinystories_data / "valid.txt"))
    stories = list(iter_stories(source, StoryReport(), SeenStories()))
    tokenizer = train_bpe(stories, vocab_size=2_000)
    encoder = StoryEncoder(tokenizer, np.dtype("<u4"))
    tokens = encoder.encode(stories)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == one_by_one(tokenizer, stories)


def test_words_are_forgotten_when_there_are_many(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_MAX_WORDS", 3)
    monkeypatch.setattr(encode, "_MAX_WORD_CHARACTERS", 4)
    encoder = StoryEncoder(tokenizer, UINT16)
    texts = list(itertools.islice(iter_sample("validation"), 5))
    assert encoder.encode(texts).tolist() == one_by_one(tokenizer, texts)
    assert encoder._words is not None
    assert 0 < len(encoder._words) <= 3
    assert all(len(word) <= 4 for word in encoder._words)


def changed(tokenizer: StoryTokenizer, **parts: object) -> StoryTokenizer:
    backend = Tokenizer.from_str(tokenizer.json)
    for name, part in parts.items():
        setattr(backend, name, part)
    return parse_tokenizer(backend.to_str(), "the changed tokenizer")


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])},
        {"post_processor": processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])},
    ],
)
def test_other_tokenizers_see_whole_texts(tokenizer, parts):
    other = changed(tokenizer, **parts)
    assert not encodes_by_words(other)
    texts = made_up_texts(300)
    assert StoryEncoder(other, UINT16).encode(texts).tolist() == one_by_one(other, texts)


def test_a_tokenizer_with_more_special_tokens_sees_whole_texts(tokenizer):
    backend = Tokenizer.from_str(tokenizer.json)
    backend.add_tokens(["cat a"])
    other = parse_tokenizer(backend.to_str(), "the changed tokenizer")
    assert not encodes_by_words(other)
    texts = ["The cat a cat", "a cat an owl"]
    assert StoryEncoder(other, UINT16).encode(texts).tolist() == one_by_one(other, texts)


def test_shifted_offsets_change_no_ids(tokenizer):
    assert encodes_by_words(changed(tokenizer, post_processor=processors.ByteLevel(trim_offsets=False)))


def test_a_tokenizer_that_splits_elsewhere_is_noticed(tokenizer):
    # As if another version of the library read the same file in another way.
    values = json.loads(tokenizer.json) | {"normalizer": {"type": "Prepend", "prepend": "x"}}
    liar = StoryTokenizer(tokenizer.json, Tokenizer.from_str(json.dumps(values)))
    with pytest.raises(AssertionError, match="encodes_by_words has checked"):
        StoryEncoder(liar, UINT16).encode(["The cat saw a dog."])
