"""Tokenizers: the same bytes every time, nothing lost on the way, and nothing unusable accepted."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinystories_jax.data.stories import END_OF_STORY
from tinystories_jax.data.tokenizer import (
    END_OF_STORY_ID,
    StoryTokenizer,
    batch_stories,
    format_vocabulary,
    load_tokenizer,
    parse_tokenizer,
    save_tokenizer,
    train_bpe,
    vocabulary_report,
)
from tinystories_jax.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES, THINGS = ("Tom", "Lily", "Ben", "Mia", "Zoë"), ("park", "cat", "apple", "old tree", "umbrella")
STORIES = [
    f"Once upon a time there was {name}. The {thing} was not an owl.\nA {thing}, an egg and the moon: {name} saw them!"
    for name, thing in itertools.product(NAMES, THINGS)
]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return train_bpe(STORIES, vocab_size=320)


def test_training_gives_the_same_bytes_in_any_process(tmp_path, tokenizer):
    (tmp_path / "stories.json").write_text(json.dumps(STORIES))
    program = (
        "import json, sys; from tinystories_jax.data.tokenizer import train_bpe; "
        "print(train_bpe(json.load(open(sys.argv[1])), vocab_size=320).sha256)"
    )
    for hash_seed, threads in (("0", "1"), ("1", "2"), ("2", "5")):
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "stories.json")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == tokenizer.sha256


@pytest.mark.parametrize("text", [*STORIES[:3], " two  spaces ", "\n\ttabs\r\n", "naïve café … 🙂🏽 漢字", "\x00", ""])
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encode_batch_equals_encode(tokenizer):
    batch = tokenizer.encode_batch([*STORIES, ""])
    assert {ids.dtype for ids in batch} == {np.dtype(np.uint32)}
    assert [ids.tolist() for ids in batch] == [*(tokenizer.encode(story) for story in STORIES), []]


def test_end_of_story_is_id_0_and_never_added(tokenizer):
    assert tokenizer.encode(END_OF_STORY) == [END_OF_STORY_ID] == [0]
    assert END_OF_STORY_ID not in tokenizer.encode("A cat.")
    prompt = f"A cat.{END_OF_STORY}An owl."
    assert tokenizer.encode(prompt) == [*tokenizer.encode("A cat."), 0, *tokenizer.encode("An owl.")]
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_transformers_reads_the_file_with_the_same_ids(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(save_tokenizer(tokenizer, tmp_path)))
    for text in (*STORIES, f"It's é 🙂{END_OF_STORY}The end.\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert len(theirs) == tokenizer.vocab_size


def test_max_samples_is_the_first_stories(tokenizer):
    limited = train_bpe(iter(STORIES), vocab_size=320, max_samples=3)
    assert limited == train_bpe(STORIES[:3], vocab_size=320)
    assert limited != tokenizer


def test_a_small_corpus_does_not_fill_the_vocabulary():
    tokenizer = train_bpe(["The cat."], vocab_size=5_000)
    assert 257 < tokenizer.vocab_size < 300
    report = format_vocabulary(vocabulary_report(tokenizer, ["The cat."], asked=5_000))
    assert f"the corpus fills only {tokenizer.vocab_size} of the 5,000 tokens asked" in report


def test_no_story_to_train_on_is_refused():
    with pytest.raises(UserError, match="no story to train the tokenizer on"):
        train_bpe([], vocab_size=300)


def test_saved_and_loaded_bytes_are_the_same(tmp_path, tokenizer):
    path = save_tokenizer(tokenizer, tmp_path / "new")
    assert [item.name for item in path.parent.iterdir()] == ["tokenizer.json"]
    assert path.read_text(encoding="utf-8") == tokenizer.json
    assert load_tokenizer(path) == load_tokenizer(path.parent) == tokenizer
    assert load_tokenizer(path).sha256 == tokenizer.sha256


def test_saving_where_no_folder_can_be_is_refused(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        save_tokenizer(tokenizer, tmp_path / "file")


def _edited(tokenizer: StoryTokenizer, damage: str) -> str:
    values: dict[str, Any] = json.loads(tokenizer.json)
    vocab = values["model"]["vocab"]
    match damage:
        case "no end":
            values["added_tokens"], values["model"]["vocab"] = [], {k: v for k, v in vocab.items() if k != END_OF_STORY}
        case "end not 0":
            vocab[END_OF_STORY], vocab["!"] = 1, 0
            values["added_tokens"][0]["id"] = 1
        case "end not special":
            values["added_tokens"] = []
        case "truncation":
            values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        case "padding":
            values["padding"] = {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": END_OF_STORY,
            }
        case "post_processor":
            values["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": END_OF_STORY, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {END_OF_STORY: {"id": END_OF_STORY, "ids": [0], "tokens": [END_OF_STORY]}},
            }
        case "dropout":
            values["model"]["dropout"] = 0.1
        case "gap":
            vocab[max(vocab, key=vocab.get)] += 7
        case "lower case":
            values["normalizer"] = {"type": "Lowercase"}
        case "no decoder":
            values["decoder"] = None
    return json.dumps(values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no end", r"has no token <\|endoftext\|>"),
        ("end not 0", r"<\|endoftext\|> must be a special token with ID 0, but it has ID 1"),
        ("end not special", "must be a special token with ID 0"),
        ("truncation", "stores truncation"),
        ("padding", "stores padding"),
        ("post_processor", "post_processor adds tokens"),
        ("dropout", "BPE dropout 0.1"),
        ("gap", "without a gap, but ID 319 is missing"),
        ("lower case", "loses text"),
        ("no decoder", "loses text"),
    ],
)
def test_unusable_tokenizer_is_refused_by_name(tmp_path, tokenizer, damage, words):
    text = _edited(tokenizer, damage)
    with pytest.raises(UserError, match=words):
        parse_tokenizer(text, "checkpoint 7")
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1, 2]", "is not a tokenizer"),
        (b'{"version": "1.0"}', "is not a tokenizer"),
        (None, "does not exist"),
        ("huge", "at most 67,108,864"),
    ],
)
def test_unreadable_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "tokenizer.json"
    if content == "huge":
        with path.open("wb") as file:
            file.truncate(64 * 2**20 + 1)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_article_ids_are_articles_only(tokenizer):
    texts = {tokenizer.decode([token]) for token in tokenizer.article_ids}
    assert {" a", " an", " the", "A"} <= texts
    assert texts <= {" a", " an", " the", " A", " An", " The", "A", "An", "The"}


def test_vocabulary_report_counts_the_stream(tokenizer):
    stories = ["The cat saw a dog.", "é"]
    report = vocabulary_report(tokenizer, stories, asked=400)
    stream = [token for story in stories for token in (*tokenizer.encode(story), END_OF_STORY_ID)]
    assert report.num_tokens == len(stream)
    assert report.num_articles == sum(token in tokenizer.article_ids for token in stream)
    assert (report.num_stories, report.num_words, report.num_bytes) == (2, 6, 18 + 2)
    assert report.num_rows_unused == tokenizer.vocab_size - len(set(stream))
    assert report.num_rows_rare == tokenizer.vocab_size
    assert report.single_tokens["A"] == tokenizer.encode("A")[0]
    text = format_vocabulary(report)
    assert "320 tokens (400 asked)" in text
    assert all(len(line) < 100 for line in text.splitlines())
    assert len(text.splitlines()) < 24


def test_batches_are_bounded_by_count_and_by_size():
    assert [len(batch) for batch in batch_stories(["x"] * 5_000)] == [2048, 2048, 904]
    assert [len(batch) for batch in batch_stories(["x" * 2_000_000] * 5)] == [2, 2, 1]
    assert list(batch_stories([])) == []
