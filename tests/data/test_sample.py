"""The bundled sample promises stories that are distinct, the same everywhere, and written in correct English."""

import functools
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinystories_jax.data import sample

# Spoken with a vowel although written with a consonant, and the other way round.
_VOWEL_SOUNDS = {"hour", "honest", "honor", "heir"}
_CONSONANT_SOUNDS = {"one", "once", "unicorn", "uniform", "useful", "used", "union", "united", "ukulele", "ewe", "euro"}

# The text between an opening quotation mark and the closing one.
_QUOTE = re.compile(r'"([^"]*)"')


@functools.cache
def _stories(split: str) -> tuple[str, ...]:
    return tuple(sample.iter_sample(split))


@functools.cache
def _all_stories() -> tuple[str, ...]:
    return _stories("train") + _stories("validation")


@functools.cache
def _all_sentences() -> frozenset[str]:
    """The distinct sentences, cut after .!? and a closing quotation mark: fewer to check, as stories share most."""
    paragraphs = {paragraph for story in _all_stories() for paragraph in story.split("\n")}
    return frozenset(sentence for text in paragraphs for sentence in re.split(r'(?<=[.!?"]) (?=["A-Z])', text))


def test_counts_and_distinctness():
    for split, at_least in (("train", 20_000), ("validation", 500)):
        stories = _stories(split)
        assert len(stories) == sample.NUM_STORIES[split] >= at_least
        assert len(set(stories)) == len(stories)


def test_validation_stories_are_not_in_the_training_split():
    assert not set(_stories("train")) & set(_stories("validation"))


def test_vocabulary_and_length_suit_a_small_language_model():
    words = {word for sentence in _all_sentences() for word in re.findall(r"[a-z']+", sentence.lower())}
    assert len(words) >= 1_300
    lengths = sorted(len(story.split()) for story in _all_stories())
    assert lengths[0] >= 60
    assert lengths[-1] <= 240
    assert all(2 <= story.count("\n") + 1 <= 5 for story in _all_stories())


def test_every_kind_of_plot_is_told_in_both_splits():
    for split in sample.NUM_STORIES:
        for word in ("kite", "picnic", "dark", "race", "truth", "snow", "seed", "doctor", "treasure", "present"):
            assert any(re.search(rf"\b{word}\b", story) for story in _stories(split)), (split, word)


def test_stories_do_not_depend_on_the_process():
    """A prefix of both splits, written in processes with other hash seeds, equals the one written here."""
    program = (
        "import hashlib, itertools; from tinystories_jax.data import sample;"
        "text = [s for split in sample.NUM_STORIES for s in itertools.islice(sample.iter_sample(split), 300)];"
        "print(hashlib.sha256('|'.join(text).encode()).hexdigest(), sample.sample_identity())"
    )
    text = [story for split in sample.NUM_STORIES for story in _stories(split)[:300]]
    expected = f"{hashlib.sha256('|'.join(text).encode()).hexdigest()} {sample.sample_identity()}"
    root = Path(sample.__file__).parents[2]
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        assert output.strip() == expected


def test_iterating_twice_gives_the_same_stories():
    assert tuple(sample.iter_sample("validation")) == _stories("validation")


def test_identity_covers_the_grammar_and_the_code():
    folder = Path(sample.__file__).parent
    content = (folder / "sample.py").read_bytes() + (folder / "sample_words.json").read_bytes()
    assert sample.sample_identity() == hashlib.sha256(content).hexdigest()


def test_unknown_split_is_refused_at_once():
    with pytest.raises(ValueError, match=r"split='test'.*train, validation"):
        sample.iter_sample("test")


def test_articles_agree_with_the_sound_of_the_next_word():
    seen = {"a": 0, "an": 0}
    for sentence in _all_sentences():
        for article, word in re.findall(r"\b(an?) \"?(\w+)", sentence, flags=re.IGNORECASE):
            article, word = article.lower(), word.lower()
            vowel = word in _VOWEL_SOUNDS or (word[0] in "aeiou" and word not in _CONSONANT_SOUNDS)
            assert article == ("an" if vowel else "a"), sentence
            seen[article] += 1
    assert seen["a"] > 1_000
    assert seen["an"] > 100


def test_no_two_determiners_and_no_article_before_a_mass_noun():
    determiner = r"(?:an?|the|his|her|its|their|your|my|this|that)"
    mass = r"(?:water|milk|flour|sugar|honey|bread|sand|snow|rain|music|money|mud|soup|juice|corn|hay|food)"
    # "her" and "that" are not always determiners: "gave her the shot".
    for sentence in _all_sentences():
        assert not re.search(rf"\b(?:an?|the|its|your|my) {determiner}\b", sentence, re.IGNORECASE), sentence
        assert not re.search(rf"\ban? {mass}(?=[.,!?\"])", sentence, re.IGNORECASE), sentence


def test_no_doubled_words():
    # The comma in "tap, tap" and the end of a sentence keep two equal words apart.
    for sentence in _all_sentences():
        assert not re.search(r"\b(\w+) \1\b", sentence, re.IGNORECASE), sentence


def test_stories_are_plain_ascii_without_stray_spaces():
    for story in _all_stories():
        assert story.isascii()
        assert story == story.strip()
        assert not re.search(r"  | \n|\n |\n\n|[\t\r]| [.,!?;]", story), story


def test_no_unfilled_placeholders():
    for sentence in _all_sentences():
        assert not re.search(r"[^A-Za-z0-9 .,!?'\"-]", sentence), sentence
        assert not re.search(r"PLACEHOLDER|TODO|\bNone\b", sentence), sentence


def test_quotation_marks_are_balanced_and_punctuated():
    for story in _all_stories():
        for paragraph in story.split("\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            for quote in _QUOTE.findall(paragraph):
                # What is said ends with its own mark inside: "Yes," said Tim.
                assert re.fullmatch(r"\S.*[.,!?]", quote), paragraph
                assert quote[0].isupper() or quote.startswith("but "), paragraph


def test_speech_with_a_comma_goes_on_and_speech_with_a_full_stop_ends():
    speaker = r"(?:[a-z]|[A-Z]\w* (?:said|thought))"
    for story in _all_stories():
        assert not re.search(r'\." [a-z]', story), story
        assert not re.search(rf'," (?!{speaker})', story), story


def test_sentences_begin_with_a_capital_and_end_with_a_mark():
    for story in _all_stories():
        for paragraph in story.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph), paragraph
            assert re.search(r'[.!?]"?$', paragraph), paragraph
            # After a full stop outside speech the next word has a capital ("Mrs. Brown" has one anyway).
            narration = _QUOTE.sub('""', paragraph)
            assert not re.search(r"[.] [a-z]", narration.replace("... ", "")), paragraph


def test_pronouns_agree_with_the_hero():
    """The second sentence of many stories is about the hero: "a girl named Mia. She", never "a girl named Mia. He"."""
    checked = 0
    for story in _all_stories():
        child = re.search(r"\b(girl|boy) (?:named|called) \w+\. (He|She)\b", story)
        if child:
            assert (child[1] == "girl") == (child[2] == "She"), story
            checked += 1
    assert checked > 1_000


def test_pronouns_agree_with_the_grown_up():
    pronoun = {"mom": "she", "grandma": "she", "dad": "he", "grandpa": "he"}
    checked = 0
    for sentence in _all_sentences():
        laughed = re.search(r"\b[Hh](?:is|er) (mom|grandma|dad|grandpa) laughed until (\w+) cried", sentence)
        if laughed:
            assert laughed[2] == pronoun[laughed[1]], sentence
            checked += 1
    assert checked > 4


def test_verbs_agree_with_pronouns():
    wrong = r"\b(?:he|she|it) (?:were|have|are|do|want)\b|\b(?:they|we) (?:was|has|is|does)\b|\bI (?:is|has|are)\b"
    for sentence in _all_sentences():
        # "Did he want" and "let it do" would be right, but no story says so.
        assert not re.search(wrong, sentence, re.IGNORECASE), sentence
