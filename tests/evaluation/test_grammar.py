"""Scores of written text on sentences whose faults are known."""

import ctypes.util
import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystories_jax.errors import UserError
from tinystories_jax.evaluation import checker
from tinystories_jax.evaluation.checker import CHECKER, find_faults
from tinystories_jax.evaluation.grammar import (
    GRAMMAR_SCALE,
    Interval,
    TextScores,
    read_reference,
    real_scores,
    score_stories,
    shipped_reference,
    write_reference,
)
from tinystories_jax.evaluation.sentences import normalise, split_sentences

ROOT = Path(__file__).parents[2]
CLEAN = "Once upon a time, there was a little girl named Lily. She went to the park with her mom. They were happy."
FAULTY = "Once upon time there was girl named Lily. She went to park with her mom. They was happy."


def faults_of(sentence: str) -> list[str]:
    return [sentence[start:end] for start, end in find_faults(normalise(sentence))]


def test_a_misspelled_word_is_no_fault_and_hides_none():
    assert faults_of("The littel girll ran home.") == []
    assert faults_of("Tom'sHe mom saw that he was jealous.") == ["sHe mom"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("He ran. She sat!", ["He ran.", "She sat!"]),
        ('"Stop!" she said. "Why?" he asked.', ['"Stop!" she said.', '"Why?" he asked.']),
        ("“Stop!”  she said. ‘Why?’ He asked.", ['"Stop!"  she said.', "'Why?'", "He asked."]),
        ("He ran\n\nShe sat.", ["He ran", "She sat."]),
        ("He ran over\nthe hill.", ["He ran over\nthe hill."]),
        ("He ran. ... !!! \n\n\n", ["He ran."]),
        ("He ran. She", ["He ran."]),
        ("He", []),
        ("", []),
        ("He ran. And" + " and" * 60, ["He ran.", "And" + " and" * 60]),
    ],
)
def test_a_text_is_cut_into_the_sentences_that_were_finished(text, sentences):
    assert split_sentences(normalise(text), finished=False) == sentences


def test_an_author_who_ended_a_story_meant_its_last_sentence():
    assert split_sentences("He ran. She", finished=True) == ["He ran.", "She"]


def test_the_pins_are_the_same_everywhere():
    pins = [f"{name}=={version}" for name, version in CHECKER.items()]
    for name in ("pyproject.toml", "requirements-dev.txt"):
        text = (ROOT / name).read_text()
        assert all(pin in text for pin in pins), name


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("They was happy.", "They was"),
        ("He have a ball.", "have"),
        ("It were too late.", "It were"),
        ("She ate a apple.", "a"),
        ("He went went home.", "went went"),
        ("Tom went to to the park.", "to to"),
        ("The cat cat cat sat.", "cat cat cat"),
        ("“Café”, they was told.", "they was"),
    ],
)
def test_a_fault_is_found_in_its_place(sentence, fault):
    assert any(fault in found or found in fault for found in faults_of(sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "If it were open, they would go in.",
        "Around it were tall trees.",
        "Tom and she were friends.",
        "Zorblax the snorfle loved colour.",
        "‘Mama’, she said , “I love you”!",
        "He ran. He ran. He ran.",
    ],
)
def test_what_is_right_or_a_matter_of_style_or_spelling_is_no_fault(sentence):
    assert faults_of(sentence) == []


@pytest.mark.parametrize("installed", [None, "0.0.1"])
def test_a_checker_that_is_missing_or_another_is_refused_with_the_command_that_mends_it(monkeypatch, installed):
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    checker.load_checker.cache_clear()
    with pytest.raises(UserError, match=r"pip install lingotweaker==\S+ lingotweaker-data-en==\S+"):
        score_stories([CLEAN])
    # Without grammar, the rest is scored.
    scores = score_stories([CLEAN, CLEAN], check_grammar=False)
    assert scores.articles == 1.0
    assert math.isnan(scores.grammar)
    assert math.isnan(scores.grammar_interval.low)


def test_scores_tell_right_from_wrong():
    clean, faulty = score_stories([CLEAN] * 3), score_stories([FAULTY] * 3)
    assert clean.grammar == 10
    assert clean.clean_sentences == 10
    assert clean.articles == 1
    assert faulty.grammar < 1
    assert faulty.clean_sentences == 0
    assert faulty.articles < 0.5
    assert clean.num_stories == 3
    assert clean.num_words == 3 * 22
    assert clean.words_per_story == 22


def test_the_grammar_score_is_what_the_page_says():
    scores = score_stories([FAULTY, CLEAN])
    excess = scores.faults_per_100_words - shipped_reference().real_faults_per_100_words
    assert excess > 0
    assert scores.grammar == pytest.approx(10 * math.exp(-excess / GRAMMAR_SCALE))


def test_a_fault_that_is_seen_twice_counts_once():
    # An article before "cat" and a repeated word at the same place; and a word three times over.
    def faults(text: str) -> float:
        scores = score_stories([text], finished=[True])
        return round(scores.faults_per_100_words * scores.num_words / 100)

    assert faults("There was a cat cat cat in the garden.") == 1
    assert faults("There was a cat in the garden.") == 0
    assert faults("There was cat in the garden.") == 1
    assert faults("There was cat cat in the garden.") == 1


def test_what_a_limit_cut_off_is_no_fault():
    cut = CLEAN + " They was"
    assert score_stories([cut], finished=[False]).clean_sentences == 10
    assert score_stories([cut], finished=[True]).clean_sentences < 10


def test_the_share_of_finished_stories():
    assert score_stories([CLEAN] * 4, finished=[True, False, True, True]).finished == 0.75
    assert score_stories([CLEAN]).finished is None
    with pytest.raises(ValueError, match="shorter"):
        score_stories([CLEAN] * 2, finished=[True])


def test_repetition_and_distinct_words():
    scores = score_stories(["One two three four. One two three four.", "One two."], check_grammar=False)
    # 4-grams: 1234 2341 3412 4123 1234; the second story has none.
    assert scores.repetition == pytest.approx(1 / 5)
    assert scores.distinct_1 == pytest.approx(4 / 10)
    # Pairs: 12 23 34 41 12 23 34, and 12; none from one story into the next.
    assert scores.distinct_2 == pytest.approx(4 / 8)
    same_in_both = score_stories(["One two three four."] * 2, check_grammar=False)
    assert same_in_both.repetition == 0


def test_distinct_words_do_not_sink_with_more_stories():
    stories = [f"word{n % 1000}. " * 100 for n in range(400)]
    few, many = (score_stories(stories[:num], check_grammar=False) for num in (200, 400))
    assert few.distinct_1 == many.distinct_1


def test_an_interval_holds_the_figure_and_narrows_with_more_stories():
    few, many = score_stories([CLEAN, FAULTY] * 10), score_stories([CLEAN, FAULTY] * 40)
    for name in ("grammar", "clean_sentences", "articles"):
        wide, narrow = getattr(few, f"{name}_interval"), getattr(many, f"{name}_interval")
        assert wide.low <= narrow.low < getattr(many, name) < narrow.high <= wide.high, name
    assert math.isnan(score_stories([CLEAN, FAULTY] * 9 + [CLEAN]).grammar_interval.low)


@pytest.mark.parametrize("texts", [[], [""], ["", "cat"], ["!!! ..."]])
def test_where_nothing_was_finished_figures_are_undefined(texts):
    scores = score_stories(texts)
    for name in ("grammar", "clean_sentences", "articles", "faults_per_100_words", "articles_unlikely"):
        assert math.isnan(getattr(scores, name)), name
    assert math.isnan(scores.articles_interval.high)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 50_000,
        "(" * 50_000,
        "a," * 25_000,
        '"' * 50_000,
        "they was " * 2_000,
        "." * 50_000 + "x",
        "no!" + " " * 50_000 + "x",
    ],
)
def test_no_text_is_too_long(text):
    began = time.monotonic()
    score_stories([text, CLEAN], finished=[True, True])
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "text", ["\ud800 a cat \udfff", "\0\x1b", "я кот 我是猫。 مرحبا", "🙂" * 100, "a\r\n\tb", "\u202e\ufeff"]
)
def test_no_text_is_too_strange(text):
    scores = score_stories([text, CLEAN], finished=[True, True])
    assert scores.num_stories == 2
    assert 0 <= scores.grammar <= 10


def test_every_process_finds_the_same_scores():
    script = (
        "import sys, json, dataclasses; from tinystories_jax.evaluation.grammar import score_stories;"
        "print(json.dumps(dataclasses.asdict(score_stories(sys.argv[1:]))))"
    )
    lines = {
        subprocess.run(
            [sys.executable, "-c", script, CLEAN, FAULTY, CLEAN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert lines == {json.dumps(dataclasses.asdict(score_stories([CLEAN, FAULTY, CLEAN]))) + "\n"}


def test_scoring_does_not_import_jax():
    script = "import sys, tinystories_jax.evaluation.grammar; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_sentences_without_a_parse_are_one_more_figure(capfd):
    texts = [CLEAN, "Went the to they. " + "They ran and " * 20 + "sat."]
    if ctypes.util.find_library("link-grammar") is None:
        with pytest.raises(UserError, match="link-grammar"):
            score_stories(texts, parse_sentences=True)
        return
    scores = score_stories(texts, parse_sentences=True)
    assert scores.unparsed_sentences == pytest.approx(1 / 4)
    assert scores.unparsed_skipped == 1
    assert score_stories(texts) == dataclasses.replace(scores, unparsed_sentences=None, unparsed_skipped=None)
    assert capfd.readouterr().err == ""


def test_a_reference_is_read_as_it_was_written_always_in_the_same_bytes(tmp_path):
    reference, real = shipped_reference(), real_scores()
    paths = [tmp_path / "one.json.gz", tmp_path / "two.json.gz"]
    for path in paths:
        write_reference(reference, real, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read, read_real = read_reference(paths[0])
    assert read_real == real
    assert isinstance(read_real, TextScores)
    assert isinstance(read_real.grammar_interval, Interval)
    assert dataclasses.asdict(read) == dataclasses.asdict(reference)


def test_a_reference_with_an_undefined_score_is_not_written(tmp_path):
    with pytest.raises(UserError, match="undefined"):
        write_reference(shipped_reference(), score_stories([]), tmp_path / "one.json.gz")
    assert not (tmp_path / "one.json.gz").exists()


def test_the_shipped_reference_is_small():
    path = ROOT / "tinystories_jax" / "evaluation" / "reference.json.gz"
    assert path.stat().st_size < 1_000_000
