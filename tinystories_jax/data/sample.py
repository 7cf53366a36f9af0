"""The bundled sample: made-up children's stories from a small story grammar. It is NOT TinyStories.

It is the first stop on the way from story to model for whoever has no network and no corpus at hand: `stories.py`
offers it as the source `sample`; the tokenizer and the token cache then treat it like any other source. The stories
were written for this project in the manner of TinyStories: a model trained on them shows that the machinery works, not
how good the recipe is.

The grammar is data (`sample_words.json`). A template holds slots, `{color}`, and choices, `[red|blue]`, which may be
nested:

* a slot is a character of the story, a fact of its plot (picked once, so that a lost boat stays a boat), or else a
  phrase (picked anew at each use); a capital letter in the slot's name makes a capital letter in the story;
* `{he}`, `{him}`, `{his}`, `{himself}`, `{kind}` agree with the hero, `{friend.he}` and so on with another character;
* "a" becomes "an" where the next word is spoken with a vowel.
"""

import functools
import hashlib
import importlib.resources
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

NUM_STORIES = {"train": 24_000, "validation": 1_000}

_FOLDER = importlib.resources.files("tinystories_jax.data")
_WORDS_FILE = "sample_words.json"
_SLOT = re.compile(r"\{([\w.]+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=(\w+))")


def iter_sample(split: str) -> Iterator[str]:
    """Yields the NUM_STORIES[split] stories of "train" or "validation": all distinct, the same on every machine.

    Raises ValueError, before the first story, for another split.
    """
    if split not in NUM_STORIES:
        raise ValueError(f"split={split!r} is not in the bundled sample; use one of {', '.join(NUM_STORIES)}")
    num_validation = NUM_STORIES["validation"]
    if split == "validation":
        return itertools.islice(_distinct_stories(), num_validation)
    return itertools.islice(_distinct_stories(), num_validation, num_validation + NUM_STORIES["train"])


def sample_identity() -> str:
    """Returns the SHA-256 (hex) of this file and its words: a changed grammar is a changed data set."""
    digest = hashlib.sha256()
    for name in ("sample.py", _WORDS_FILE):
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()


def _distinct_stories() -> Iterator[str]:
    """Yields an endless row of stories without repeats, of which both splits are slices and therefore disjoint."""
    seen: set[bytes] = set()
    for index in itertools.count():
        story = _write_story(index)
        digest = hashlib.blake2b(story.encode("ascii"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield story


def _write_story(index: int) -> str:
    """Returns the story of this index: a pure function of the index and the grammar."""
    grammar = _load_grammar()
    writer = _Writer(grammar, random.Random(index))
    plot = writer.pick(grammar["plots"])
    for role, group in plot["cast"].items():
        writer.add_character(role, group)
    for name, template in {**plot.get("facts", {}), **writer.pick(plot["cases"])}.items():
        writer.facts[name] = writer.expand(template)
    paragraphs = []
    for sentences in plot["paragraphs"]:
        # A sentence that may be left out expands to nothing.
        paragraphs.append(" ".join(filter(None, map(writer.expand, sentences))))
    return _mend_articles("\n".join(paragraphs))


class _Writer:
    """Expands the templates of one story; `facts` is what has been settled about it so far."""

    def __init__(self, grammar: dict[str, Any], rng: random.Random):
        self.facts: dict[str, str] = {}
        self._grammar = grammar
        self._rng = rng

    def pick(self, options: Sequence[Any]) -> Any:
        # random() is the one method whose sequence Python keeps the same between versions.
        return options[int(self._rng.random() * len(options))]

    def add_character(self, role: str, group: str) -> None:
        """Settles the name of a new character, and the pronouns that go with it."""
        taken = set(self.facts.values())
        by_sex = self._grammar["people"][group]
        sex, name = self.pick([(sex, name) for sex in by_sex for name in by_sex[sex] if name not in taken])
        self.facts[role] = name
        for word, form in self._grammar["pronouns"][sex].items():
            self.facts[word if role == "hero" else f"{role}.{word}"] = form

    def expand(self, template: str) -> str:
        """Returns the template with every choice made and every slot filled."""
        while "[" in template:
            template = _CHOICE.sub(lambda choice: self.pick(choice[1].split("|")), template)
        return _SLOT.sub(self._fill, template)

    def _fill(self, slot: re.Match[str]) -> str:
        name = slot[1][0].lower() + slot[1][1:]
        text = self.facts[name] if name in self.facts else self.expand(self.pick(self._grammar["phrases"][name]))
        return text if slot[1][0].islower() else text[0].upper() + text[1:]


def _mend_articles(text: str) -> str:
    """Returns the text with "a" changed to "an" where the next word is spoken with a vowel ("an hour", "a unicorn")."""
    exceptions = _load_grammar()["articles"]

    def article(match: re.Match[str]) -> str:
        word = match[2].lower()
        vowel = word in exceptions["an"] or (word[0] in "aeiou" and word not in exceptions["a"])
        return match[1] + ("n " if vowel else " ")

    return _ARTICLE.sub(article, text)


@functools.cache
def _load_grammar() -> dict[str, Any]:
    return json.loads((_FOLDER / _WORDS_FILE).read_text(encoding="utf-8"))
