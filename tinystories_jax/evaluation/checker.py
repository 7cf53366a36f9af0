"""Faults of grammar in a sentence, by LingoTweaker: the rules of LanguageTool in a wheel, without a network.

The package is optional (the extra `eval`) and pinned exactly, rules included: another version sees other faults, and
its scores would not compare.
"""

import functools
import importlib.metadata
import re
from typing import Any

from tinystories_jax.errors import UserError

CHECKER = {"lingotweaker": "0.2.8", "lingotweaker-data-en": "0.1.6"}

# The others are matters of style, typography, punctuation and usage: none says that a sentence is wrong English.
_KEPT_CATEGORIES = frozenset(("GRAMMAR", "CONFUSED_WORDS", "COLLOCATIONS", "MISC", "TYPOS"))
_COMPOUNDS = "EN_COMPOUNDS"  # spelling, too: "lunch time"
# Nor is spelling. Left on, it looks for a right spelling of each wrong word: of what a model without training writes
# that takes fifteen times as long as all else.
_SPELLING_RULE = "MORFOLOGIK_RULE_EN_US"
# The checker's time grows with the square of the length of some texts (40,000 brackets: half a minute). The longest
# sentence of 7,455 real stories has 224 characters.
_MOST_CHARACTERS = 500
_PIECE = re.compile(rf"\S.{{0,{_MOST_CHARACTERS - 1}}}(?!\S)|\S.{{0,{_MOST_CHARACTERS - 1}}}", re.DOTALL)
# The checker reports a word twice over, but not most of those three times over.
_REPEATED = re.compile(r"\b(\w+)(?: \1\b){2,}", re.IGNORECASE)
# It lets pass every "it were", and a quarter of "he were", of real stories spoiled in this way.
_DISAGREES = re.compile(r"\b(?:(?:he|she|it) (?:were|are)|(?:they|we) (?:was|is))\b", re.IGNORECASE)
# "If it were open", "Tom and she were", "around it were trees" are right.
_UNREAL = re.compile(r"\b(?:if|wish\w*|though|unless|suppose)\b", re.IGNORECASE)
_BEFORE_OBJECT = frozenset((
    "and", "or", "than", "above", "across", "around", "at", "behind", "below", "beside", "by", "for", "from", "in",
    "inside", "near", "next", "of", "on", "over", "to", "under", "upon", "with", "within",
))  # fmt: skip


def checker_problem() -> str | None:
    """Returns why the checker cannot be used and how to mend it; None if it can."""
    install = "pip install " + " ".join(f"{name}=={version}" for name, version in CHECKER.items())
    for name, version in CHECKER.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed, and grammar is scored with it; run: {install}"
        if installed != version:
            return f"{name} {installed} is installed, but scores are defined with {version}; run: {install}"
    return None


@functools.cache
def load_checker() -> Any:
    """Returns the checker, loaded once (about 1.5 seconds); raises `UserError` where `checker_problem` names one."""
    if problem := checker_problem():
        raise UserError(problem)
    import lingotweaker_data_en
    import lt_py

    # The folder is named, since a variable of the environment could name other rules.
    engine: Any = lt_py.Engine  # pyright: ignore[reportAttributeAccessIssue]
    return engine("en-US", data_dir=lingotweaker_data_en.data_dir(), disabled_rules=[_SPELLING_RULE])


@functools.lru_cache(maxsize=50_000)
def find_faults(sentence: str) -> tuple[tuple[int, int], ...]:
    """Returns the [start, end) of each fault of grammar in a normalised sentence; they may overlap."""
    engine = load_checker()
    faults = []
    for piece in _PIECE.finditer(sentence):
        encoded = piece[0].encode()
        for match in engine.check(piece[0]):
            if match["category_id"] not in _KEPT_CATEGORIES or match["rule_id"].startswith(_COMPOUNDS):
                continue
            first, last = match["offset"], match["offset"] + match["length"]  # in bytes
            start = piece.start() + len(encoded[:first].decode(errors="ignore"))
            faults.append((start, start + len(encoded[first:last].decode(errors="ignore"))))
    repeated = (match.span() for match in _REPEATED.finditer(sentence))
    return (*faults, *repeated, *_find_disagreements(sentence))


def _find_disagreements(sentence: str) -> list[tuple[int, int]]:
    """Returns where a pronoun and a form of "be" disagree: "he were", "they was"."""
    if _UNREAL.search(sentence):
        return []
    faults = []
    for match in _DISAGREES.finditer(sentence):
        before = sentence[max(0, match.start() - _MOST_CHARACTERS) : match.start()].split()
        if not before or before[-1].lower() not in _BEFORE_OBJECT:
            faults.append(match.span())
    return faults
