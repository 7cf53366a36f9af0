"""The pieces of a self-contained HTML page: no script, no network; every text that comes in is escaped here."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from tinystories_jax.data.folders import replace_file

_ARTICLE = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """Writes the page under a temporary name and renames it, so that a reader never sees half of one."""
    here = files("tinystories_jax.analysis")
    page = Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), css=(here / "page.css").read_text(encoding="utf-8"), body="\n".join(sections)
    )
    # A story may hold half of a character that JSON can write and UTF-8 cannot.
    replace_file(path, page.encode("utf-8", errors="replace"))
    return path


def section(title: str, *parts: str, note: str = "") -> str:
    """Returns a section; `parts` are HTML, `note` is text under the heading."""
    heading = f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "")
    return f"<section>{heading}{''.join(parts)}</section>"


def header(overline: str, title: str, state: str, *parts: str) -> str:
    """Returns the top of the page; `parts` are HTML."""
    lines = f"{paragraph(overline, 'overline')}<h1>{escape(title)}</h1>{paragraph(state, 'state')}"
    return f"<header>{lines}{''.join(parts)}</header>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def tiles(values: Mapping[str, str]) -> str:
    """Returns figures in large type over what they are."""
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
        + "</dl>"
    )


def figure(title: str, body: str, *, note: str = "", key: Sequence[tuple[str, str]] = ()) -> str:
    """Returns a figure with its caption on top; `key` holds classes, such as "series-1", and names."""
    about = f'<span class="note">{escape(note)}</span> ' if note else ""
    keys = " ".join(f'<span class="key {kind}">{escape(name)}</span>' for kind, name in key)
    return f"<figure><figcaption><b>{escape(title)}</b>{about}{keys}</figcaption>{body}</figure>"


def figures(*parts: str) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Returns a table in a box of its own that scrolls; cells are HTML, `numbers` the columns set flush right."""
    kinds = [' class="number"' if column in numbers else "" for column in range(max(len(head), 1))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def fields(values: Mapping[str, object]) -> str:
    """Returns names and values, one pair a line."""
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="value">{escape(str(value))}</td></tr>' for name, value in values.items()
    )
    return f'<div class="scroll"><table class="fields"><tbody>{rows}</tbody></table></div>'


def details(summary: str, *parts: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def story(text: str, prompt: str) -> str:
    """Returns a story with its articles in colour and its prompt muted."""
    begun = len(prompt) if text.startswith(prompt) else 0
    return f'<span class="prompt">{escape(text[:begun])}</span>{_mark_articles(text[begun:])}'


def _mark_articles(text: str) -> str:
    # Odd pieces of the split are the articles.
    pieces = _ARTICLE.split(text)
    return "".join(f"<mark>{escape(p)}</mark>" if odd % 2 else escape(p) for odd, p in enumerate(pieces))
