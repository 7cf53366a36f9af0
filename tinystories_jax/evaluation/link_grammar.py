"""Sentences that a full parser of English finds no parse for: a second opinion, never part of a score.

The parser is the C library link-grammar (Sleator and Temperley 1991), where the system has it; no package from PyPI
brings it, and its version is the system's. It is slow: about twenty stories a second.
"""

import ctypes
import ctypes.util
import functools
from collections.abc import Sequence
from typing import NamedTuple

from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.sentences import WORD

_MOST_WORDS = 30  # the time grows with the third power; a limit on the time would make results depend on the machine
_MOST_CHARACTERS = 300
# Words that begin sentences and are no names: the parser knows them in lower case.
_OPENERS = frozenset((
    "a", "after", "all", "an", "and", "another", "as", "at", "because", "before", "both", "but", "do", "don't",
    "every", "everyone", "finally", "from", "have", "he", "her", "his", "how", "i'm", "if", "in", "inside", "instead",
    "is", "it", "its", "just", "let", "let's", "my", "next", "no", "not", "now", "on", "once", "one", "other", "our",
    "she", "so", "some", "soon", "sometimes", "suddenly", "that", "the", "their", "then", "there", "they", "this",
    "to", "today", "together", "two", "was", "we", "what", "when", "where", "while", "who", "why", "will", "with",
    "yes", "you", "your",
))  # fmt: skip
_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "lg_error_set_handler": (_POINTER, [_POINTER, _POINTER]),
    "parse_options_create": (_POINTER, []),
    "parse_options_set_verbosity": (None, [_POINTER, ctypes.c_int]),
    "parse_options_set_max_parse_time": (None, [_POINTER, ctypes.c_int]),
    "parse_options_set_spell_guess": (None, [_POINTER, ctypes.c_int]),
    "parse_options_set_linkage_limit": (None, [_POINTER, ctypes.c_int]),
    "parse_options_set_max_null_count": (None, [_POINTER, ctypes.c_int]),
    "dictionary_create_lang": (_POINTER, [ctypes.c_char_p]),
    "sentence_create": (_POINTER, [ctypes.c_char_p, _POINTER]),
    "sentence_parse": (ctypes.c_int, [_POINTER, _POINTER]),
    "sentence_delete": (None, [_POINTER]),
}


class ParseCounts(NamedTuple):
    """Numbers of sentences: without a parse, tried, and too long to be tried."""

    unparsed: int
    tried: int
    skipped: int


def has_parser() -> bool:
    """Returns whether this machine has the library and its English dictionary."""
    try:
        _load_parser()
    except (UserError, OSError):
        return False
    return True


def count_unparsed(sentences: Sequence[str]) -> ParseCounts:
    """Returns how many normalised sentences the parser finds no parse for.

    Raises `UserError` where the library or its English dictionary is missing.
    """
    short = [s for s in sentences if len(WORD.findall(s)) <= _MOST_WORDS and len(s) <= _MOST_CHARACTERS]
    unparsed = sum(not _has_parse(_prepare(sentence)) for sentence in short)
    return ParseCounts(unparsed, len(short), len(sentences) - len(short))


def _prepare(sentence: str) -> str:
    """Returns the sentence without quotation marks and NULs, its first word in lower case if that is no name."""
    bare = " ".join(sentence.replace('"', " ").replace("\0", " ").split())
    first, _, rest = bare.partition(" ")
    return f"{first.lower()} {rest}" if first.lower().strip(",.!?") in _OPENERS else bare


def _has_parse(sentence: str) -> bool:
    library, dictionary, options = _load_parser()
    handle = library.sentence_create(sentence.encode(errors="replace"), dictionary)
    if not handle:
        return False
    num_parses = library.sentence_parse(handle, options)
    library.sentence_delete(handle)
    return num_parses > 0


@functools.cache
def _load_parser() -> tuple[ctypes.CDLL, int, int]:
    """Returns the library, its English dictionary, and options that make results the same each time."""
    name = ctypes.util.find_library("link-grammar")
    problem = "install it, as Debian's packages link-grammar and link-grammar-dictionaries-en do"
    if name is None:
        raise UserError(f"the library link-grammar is not on this machine; {problem}, or leave its figure out")
    library = ctypes.CDLL(name)
    for function, (result, arguments) in _SIGNATURES.items():
        if not hasattr(library, function):
            raise UserError(f"the library {name} is too old and lacks {function}; {problem}, or leave its figure out")
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    library.lg_error_set_handler(None, None)  # it would tell of its locale on standard error
    options = library.parse_options_create()
    library.parse_options_set_verbosity(options, 0)
    library.parse_options_set_max_parse_time(options, -1)
    library.parse_options_set_spell_guess(options, 0)
    library.parse_options_set_max_null_count(options, 0)
    library.parse_options_set_linkage_limit(options, 100)
    dictionary = library.dictionary_create_lang(b"en")
    if not dictionary:
        raise UserError(f"link-grammar finds no English dictionary; {problem}, or leave its figure out")
    return library, dictionary, options
