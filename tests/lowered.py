"""Lowered programs as text, in which a function that is called several times stands once."""

import re
from typing import Any


def text_as_called(lowered: Any) -> str:
    """Returns the text of a `jax.stages.Lowered` with the body of each function as often as it is called."""
    functions = dict(re.findall(r"func\.func \w+ @(\S+?)(\(.*?)\n  }\n", lowered.as_text(), re.DOTALL))

    def expand(name: str) -> str:
        callees = re.findall(r"= (?:func\.)?call @(\S+?)\(", functions[name])
        return functions[name] + "".join(map(expand, callees))

    return expand("main")
